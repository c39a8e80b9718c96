"""A stand-in for an object store: `bucket://NAME/KEY`, for fsspec, in any process that has STORE in its environment.

As a store does, it puts objects whole, replaces and copies them, and lists them by prefix; it has no folders, and
neither renames nor appends. Objects lie in the folder STORE, one file each. A file STORE/.fails with a pattern makes
every PUT and copy of a key that it matches fail; STORE/.log has a line for every request.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fsspec import AbstractFileSystem


class ObjectStore(AbstractFileSystem):
    protocol = "bucket"
    cachable = False

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.folder = Path(os.environ["STORE"])

    def _file(self, key: str, request: str) -> Path:
        key = self._strip_protocol(key)
        with (self.folder / ".log").open("a") as log:
            log.write(f"{request} {key}\n")
        fails = self.folder / ".fails"
        if request in ("PUT", "COPY") and fails.exists() and re.search(fails.read_text(), key):
            raise ConnectionError(f"503: the store is unwell ({request} {key})")
        return self.folder / quote(key, safe="")

    def _put(self, key: str, content: bytes, request: str = "PUT") -> None:
        target = self._file(key, request)
        part = self.folder / f".{os.urandom(8).hex()}"
        part.write_bytes(content)
        part.replace(target)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        return self._file(path, "GET").read_bytes()[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._put(path, value)

    def put_file(self, lpath: str, rpath: str, *rest: Any, **options: Any) -> None:
        self._put(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath: str, lpath: str, *rest: Any, **options: Any) -> None:
        shutil.copyfile(self._file(rpath, "GET"), lpath)

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        self._put(path2, self._file(path1, "GET").read_bytes(), "COPY")

    def rm_file(self, path: str) -> None:
        self._file(path, "DELETE").unlink()

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **o: Any) -> Any:
        prefix = self._strip_protocol(path)
        self._file(prefix, "LIST")
        keys = sorted(unquote(name) for name in os.listdir(self.folder) if not name.startswith("."))
        found = [key for key in keys if key == prefix or key.startswith(f"{prefix}/")]
        sizes = {key: {"name": key, "size": (self.folder / quote(key, safe="")).stat().st_size} for key in found}
        return sizes if detail else list(sizes)


def install(folder: Path) -> dict[str, str]:
    """Makes an empty store and a package that tells fsspec of it, both in `folder`; the environment that it takes."""
    (folder / "store").mkdir()
    package = folder / "packages" / "object_store-1.dist-info"
    package.mkdir(parents=True)
    shutil.copy(__file__, package.parent / "object_store.py")
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: object-store\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[fsspec.specs]\nbucket = object_store.ObjectStore\n")
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"STORE": str(folder / "store"), "PYTHONPATH": os.pathsep.join(paths)}
