"""Objects of a store below one address, through fsspec: gs:// with gcsfs, s3:// with s3fs, or any installed package.

An object is written whole or not at all and can be replaced by another PUT, but not renamed or appended to. fsspec's
packages retry transient errors themselves; any other failure is raised here as a one-line OSError.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdsearch_jax.storage.files import one_line

_EXTRAS = {"gs": "gcs", "gcs": "gcs"}  # our optional dependencies; other packages are named as fsspec names them


class StoreError(OSError):
    """An object store cannot be reached, read or written."""


class Bucket:
    """The objects whose names begin with an address.

    Raises:
      StoreError: the scheme is unknown, or the package it needs is not installed.
    """

    def __init__(self, address: str):
        import fsspec  # not at the top: most runs are local

        self.address = address
        scheme = address.partition("://")[0]
        try:
            # A cached listing would hide what other processes have written.
            self._store, self._root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except ImportError as error:
            needed = re.search(r"[Ii]nstall ([\w-]+)", str(error))
            package = needed[1] if needed else error.name or "an fsspec package"
            install = f"'kdsearch-jax[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else package
            raise StoreError(
                f"{address}: {scheme}:// needs {package}, which is not installed; pip install {install}"
            ) from None
        except ValueError as error:
            if "rotocol" not in str(error):
                raise StoreError(f"{address}: {one_line(error)}") from error
            raise StoreError(
                f"{address}: unknown scheme {scheme}://; give gs://…, s3://… or a local path, or install the fsspec "
                "package for it"
            ) from None
        except Exception as error:  # no credentials, no such account: each package raises its own type
            raise StoreError(f"{address} cannot be opened: {one_line(error)}") from error

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small object, or None if it does not exist; StoreError above `limit` bytes."""
        with self._errors("read", name), contextlib.suppress(FileNotFoundError):
            content: Any = self._store.cat_file(self._path(name), start=0, end=limit + 1)
            if len(content) > limit:
                raise StoreError(f"{self._name(name)} is larger than the limit of {limit} bytes")
            return content
        return None

    def write(self, name: str, content: bytes) -> None:
        """Creates or replaces an object with this content."""
        with self._errors("written", name):
            self._store.pipe_file(self._path(name), content)

    def upload(self, name: str, path: Path) -> None:
        """Creates or replaces an object with the content of a local file."""
        with self._errors("written", name):
            self._store.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> bool:
        """Writes an object to a local file; returns False if it does not exist."""
        with self._errors("read", name), contextlib.suppress(FileNotFoundError):
            self._store.get_file(self._path(name), str(path))
            return True
        path.unlink(missing_ok=True)
        return False

    def copy(self, source: str, target: str) -> None:
        """Copies an object, if it exists, over another one inside the store."""
        with self._errors("written", target), contextlib.suppress(FileNotFoundError):
            self._store.cp_file(self._path(source), self._path(target))

    def delete(self, name: str) -> None:
        """Deletes an object, if it exists."""
        with self._errors("deleted", name), contextlib.suppress(FileNotFoundError):
            self._store.rm_file(self._path(name))

    def find(self, below: str = "") -> dict[str, int]:
        """{name: bytes} of all objects below a name, or of the single object with that name."""
        with self._errors("listed", below), contextlib.suppress(FileNotFoundError):
            found: Any = self._store.find(self._path(below), detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {name[start:]: info["size"] or 0 for name, info in found.items() if not name.endswith("/")}
        return {}

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _name(self, name: str) -> str:
        return f"{self.address}/{name}" if name else self.address

    @contextlib.contextmanager
    def _errors(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:  # of the HTTP client, the credentials, the store
            raise StoreError(f"{self._name(name)} could not be {action}: {one_line(error)}") from error
