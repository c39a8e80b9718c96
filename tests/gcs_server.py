"""A server that speaks as much of Google Cloud Storage's JSON API as gcsfs uses, for tests without a cloud.

Objects are in memory. What `refuses` says yes to, by method and object, gets status 403, which gcsfs does not repeat.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Cloud:
    """The buckets, and the server; a context manager."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.refuses: Callable[[str, str], bool] = lambda method, name: False
        self.requests: list[str] = []
        self.page = 1000
        handler = type("Handler", (_Handler,), {"cloud": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.handle_error = lambda *_: None  # who has seen enough of an answer hangs up
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Cloud:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    cloud: Cloud
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in url.path.split("/")]
        if "b" not in parts:
            return self.answer(404, {"error": {"message": "unknown"}})
        bucket, *rest = parts[parts.index("b") + 1 :]
        name = rest[1] if len(rest) > 1 else query.get("name", "")
        method = "DOWNLOAD" if query.get("alt") == "media" else self.command
        if not name and query.get("uploadType") == "multipart":
            name = json.loads(body.split(b"\n\n", 2)[1].partition(b"\n--==0==")[0])["name"]
        if "rewriteTo" in rest:
            method, name = "COPY", rest[-1]
        self.cloud.requests.append(f"{method} {name}")
        if self.cloud.refuses(method, name):
            return self.answer(403, {"error": {"message": "no permission", "code": 403}})
        getattr(self, f"do_{method.lower()}")(bucket, name, rest, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        content = self.cloud.objects[bucket, name]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        told = {"kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(content)), "md5Hash": digest}
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        return {**told, **times, "generation": "1", "contentType": "application/octet-stream"}

    def missing(self, bucket: str, name: str) -> bool:
        if (bucket, name) in self.cloud.objects:
            return False
        self.answer(404, {"error": {"message": f"No such object: {bucket}/{name}", "code": 404}})
        return True

    def do_get(self, bucket: str, name: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        if name:
            return None if self.missing(bucket, name) else self.answer(200, self.described(bucket, name))
        if not rest:
            return self.answer(200, {"name": bucket, "kind": "storage#bucket", "locationType": "region"})
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = sorted(n for b, n in self.cloud.objects if b == bucket and n.startswith(prefix))
        folders = {
            prefix + n[len(prefix) :].split("/")[0] + "/" for n in names if delimiter and "/" in n[len(prefix) :]
        }
        names = [n for n in names if not (delimiter and "/" in n[len(prefix) :])]
        start = int(query.get("pageToken", 0))
        end = start + min(self.cloud.page, int(query.get("maxResults", self.cloud.page)))
        found: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [self.described(bucket, n) for n in names[start:end]],
        }
        found |= {"prefixes": sorted(folders)} if folders else {}
        self.answer(200, found | ({"nextPageToken": str(end)} if end < len(names) else {}))

    def do_download(self, bucket: str, name: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        if self.missing(bucket, name):
            return
        content = self.cloud.objects[bucket, name]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(200, content)
        first, last = int(span[1]), int(span[2] or len(content))
        if first >= len(content):
            return self.answer(416)
        part = content[first : last + 1]
        told = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return self.answer(206, part, Content_Range=told)

    def do_post(self, bucket: str, name: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        if query.get("uploadType") == "multipart":
            content = body.split(b"\n\n", 2)[2]
            self.cloud.objects[bucket, name] = content[: content.rindex(b"\n--==0==--")]
            return self.answer(200, self.described(bucket, name))
        if query.get("upload_id"):
            return self.do_put(bucket, name, rest, query, body)
        key = str(len(self.cloud.uploads))
        self.cloud.uploads[key] = (bucket, name, bytearray())
        where = f"{self.cloud.address}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
        return self.answer(200, {}, Location=where)

    def do_put(self, bucket: str, name: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        bucket, name, content = self.cloud.uploads[query["upload_id"]]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(content) - 1}")
        whole = int(self.headers["Content-Range"].rpartition("/")[2])
        if len(content) < whole:
            return self.answer(308, Range=f"bytes=0-{len(content) - 1}")
        self.cloud.objects[bucket, name] = bytes(content)
        return self.answer(200, self.described(bucket, name))

    def do_copy(self, bucket: str, name: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        source, target = (bucket, rest[1]), (rest[rest.index("rewriteTo") + 2], rest[-1])
        if not self.missing(*source):
            self.cloud.objects[target] = self.cloud.objects[source]
            self.answer(200, {"done": True, "resource": self.described(*target)})

    def do_delete(self, bucket: str, name: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        if query.get("upload_id"):
            self.answer(204)
        elif not self.missing(bucket, name):
            del self.cloud.objects[bucket, name]
            self.answer(204)
