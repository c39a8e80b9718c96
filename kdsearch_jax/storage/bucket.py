"""The objects of a store under one address, by fsspec: gs:// by gcsfs, s3:// by s3fs, whatever else is installed.

An object is written whole or not at all, replaced by another PUT, and neither renamed nor appended to. Packages of
fsspec retry what may pass by themselves; what they give up is an OSError here, in one line.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_EXTRAS = {"gs": "gcs", "gcs": "gcs"}  # of our own package; others are named as fsspec names them


class StoreError(OSError):
    """A store cannot be reached, read or written."""


class Bucket:
    """The objects whose names begin with an address.

    Raises:
      StoreError: there is no such kind of store, or what it needs is not installed.
    """

    def __init__(self, address: str):
        import fsspec  # not at the top: most runs are local

        self.address = address
        scheme = address.partition("://")[0]
        try:
            # Listings that are kept would hide what other processes have written.
            self._store, self._root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except ImportError as error:
            needed = re.search(r"[Ii]nstall ([\w-]+)", str(error))
            package = needed[1] if needed else error.name or "a package of fsspec"
            way = f"pip install 'kdsearch-jax[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else f"pip install {package}"
            raise StoreError(f"{address}: {scheme}:// needs {package}, which is missing; {way}") from None
        except ValueError as error:
            if "rotocol" not in str(error):
                raise StoreError(f"{address}: {_line(error)}") from error
            known = "give gs://…, s3://… or a local path, or install fsspec's package for it"
            raise StoreError(f"{address}: no kind of store is named {scheme}://; {known}") from None
        except Exception as error:  # no credentials, no such account: each package has its own
            raise StoreError(f"{address} cannot be opened: {_line(error)}") from error

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small object, None where there is none; raises StoreError above `limit` bytes."""
        with self._said("read", name), contextlib.suppress(FileNotFoundError):
            content: Any = self._store.cat_file(self._path(name), start=0, end=limit + 1)
            if len(content) > limit:
                raise StoreError(f"{self._name(name)} has more than {limit} bytes, which none of its kind has")
            return content
        return None

    def write(self, name: str, content: bytes) -> None:
        """The object with this content."""
        with self._said("written", name):
            self._store.pipe_file(self._path(name), content)

    def upload(self, name: str, path: Path) -> None:
        """The object with the content of a local file."""
        with self._said("written", name):
            self._store.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> bool:
        """Writes the object to a local file; False where there is none."""
        with self._said("read", name), contextlib.suppress(FileNotFoundError):
            self._store.get_file(self._path(name), str(path))
            return True
        path.unlink(missing_ok=True)
        return False

    def copy(self, source: str, target: str) -> None:
        """Copies one object, if it is there, over another, within the store."""
        with self._said("written", target), contextlib.suppress(FileNotFoundError):
            self._store.cp_file(self._path(source), self._path(target))

    def delete(self, name: str) -> None:
        """Removes an object, if it is there."""
        with self._said("removed", name), contextlib.suppress(FileNotFoundError):
            self._store.rm_file(self._path(name))

    def find(self, below: str = "") -> dict[str, int]:
        """{name: bytes} of all objects below a name, or of the object that has it."""
        with self._said("listed", below), contextlib.suppress(FileNotFoundError):
            found: Any = self._store.find(self._path(below), detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {name[start:]: info["size"] or 0 for name, info in found.items() if not name.endswith("/")}
        return {}

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _name(self, name: str) -> str:
        return f"{self.address}/{name}" if name else self.address

    @contextlib.contextmanager
    def _said(self, done: str, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:  # those of HTTP clients, credentials, the store
            raise StoreError(f"{self._name(name)} could not be {done}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:200]} … {text[-90:]}"
