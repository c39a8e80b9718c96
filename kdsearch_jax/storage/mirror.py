"""Synchronises a directory of an object store with its local copy, one complete snapshot at a time.

In the store each file is an object of its own name, so that people can download and open it; `.kdsearch/manifest.json`
lists the name, size and SHA-256 of every file that belongs to the directory. Publishing works like a write-ahead log:

    1  new files are PUT under their names, which the manifest does not list yet; changed ones under .kdsearch/staged/
    2  the manifest is PUT: a single object, so readers see the old or the new one (the commit)
    3  staged objects are copied over the objects they replace, then deleted with those that are no longer listed

A kill or failure before 2 leaves the old directory; after 2, the new one. Readers accept an object, in place or staged,
only if its digest matches the manifest; a file without such an object is left out with a warning, and whatever needs it
says what is missing. The names that step 1 is about to create are recorded first, so that leftovers, and nothing else,
can be deleted.

A snapshot is what the local directory contained at one moment: files are listed until two consecutive listings agree
and every file in them has been uploaded. Anything that survives a local kill therefore survives one here. Logs and
reports that grow all the time are exempt (`is_growing`): nothing depends on them, and they have no digest.

One process writes. If another process has changed other files, its change is merged; if it has changed the same files,
this one stops, since the run was started twice. Object stores have no portable "replace only if unchanged", so two
commits within milliseconds of each other cannot be told apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kdsearch_jax.storage.bucket import Bucket, StoreError
from kdsearch_jax.storage.files import MAX_JSON
from kdsearch_jax.storage.manifest import (
    CONTROL,
    MANIFEST,
    STAGED,
    WRITING,
    FileRecord,
    Manifest,
    check_name,
    is_below,
    is_downloaded_by_default,
    is_growing,
    is_permanent,
)

_PARALLEL_TRANSFERS = 16
_MAX_READS = 20  # attempts to read a snapshot while a writer keeps replacing it

FileState = tuple[int, int, int]  # inode, bytes, modification time in ns

log = logging.getLogger(__name__)


class Mirror:
    """A directory of an object store and its local copy.

    Args:
      address: of the directory in the store.
      directory: of the local copy.

    Attributes:
      excluded: directories inside `directory` that are not part of it.
    """

    def __init__(self, address: str, directory: Path):
        self.address, self.directory = address, directory
        self._bucket = Bucket(address)
        self._lock = threading.RLock()
        self.excluded: set[Path] = set()
        self._writer, self._numbers = uuid.uuid4().hex[:12], itertools.count()
        self._manifest: Manifest | None = None  # as last read or written
        self._synced: dict[str, tuple[FileState, FileRecord]] = {}  # local files whose content the store has
        self._pulled: set[str] = set()
        self._announced: set[str] = set()  # objects that may exist without being listed
        self._staged: set[str] = set()
        self._settled: set[str] = set()  # staged objects that are in place, whatever a manifest says
        self._is_writer = False

    # Reading

    def pull(self, below: str = "", *, include_checkpoints: bool = False) -> None:
        """Downloads files and deletes those that are no longer listed; local changes are kept.

        Args:
          below: the folder or file to download; "" for everything.
          include_checkpoints: also download checkpoints and TensorBoard events.
        """
        with self._lock:
            missing: list[str] = []
            for _ in range(_MAX_READS):
                manifest = self._read_manifest()
                wanted = {
                    name: record
                    for name, record in manifest.files.items()
                    if is_below(name, below) and (include_checkpoints or is_downloaded_by_default(name, below))
                    if name not in self._synced or not record.same_content(self._synced[name][1])
                }
                self._check_free_space(wanted)
                missing = [name for name, present in _parallel(self._download, wanted.items()) if not present]
                if not missing or self._fetch_manifest() == manifest:
                    break
            for name in missing:
                if manifest.files[name].sha256:
                    log.warning("%s/%s is missing or does not match its digest; skipped", self.address, name)
            for name in [name for name in self._synced if is_below(name, below) and name not in manifest.files]:
                self._delete_local(name)
            if not include_checkpoints:
                self._pulled.add(below)

    def pull_again(self) -> None:
        """Updates everything that was pulled before."""
        for below in sorted(self._pulled):
            self.pull(below)

    def _read_manifest(self) -> Manifest:
        manifest = self._fetch_manifest()
        self._check_other_writers(manifest)
        self._manifest = manifest
        return manifest

    def _fetch_manifest(self) -> Manifest:
        """The manifest; without one, all objects except those that a writer is about to publish for the first time."""
        if (content := self._bucket.read(MANIFEST, MAX_JSON)) is not None:
            return Manifest.from_json(content, f"{self.address}/{MANIFEST}")
        objects = self._bucket.find()
        unlisted = self._announced_by(name for name in objects if name.startswith(f"{WRITING}/"))
        if (content := self._bucket.read(MANIFEST, MAX_JSON)) is not None:  # the first one was written meanwhile
            return Manifest.from_json(content, f"{self.address}/{MANIFEST}")
        names = [name for name in objects if name and name not in unlisted and not name.startswith(f"{CONTROL}/")]
        return Manifest({check_name(name): FileRecord(objects[name]) for name in names})

    def _announced_by(self, announcements: Iterable[str]) -> set[str]:
        """Names of objects that writers have announced, so they may exist without being listed."""
        names: set[str] = set()
        for announcement in announcements:
            content = self._bucket.read(announcement, MAX_JSON) or b"[]"
            with contextlib.suppress(ValueError, TypeError):
                names |= {check_name(name) for name in json.loads(content)}
        return names

    def _download(self, item: tuple[str, FileRecord]) -> tuple[str, bool]:
        """Returns (name, whether the file is present locally now)."""
        name, record = item
        path = self.directory / name
        if path.exists() and (name not in self._synced or _state(path) != self._synced[name][0]):
            return name, True  # changed locally
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            # In place once more: a staged object is moved there and deleted, perhaps between the first two reads.
            for source in (name, record.staged, name) if record.staged else (name,):
                if self._bucket.download(source, part):
                    size, digest = _digest(part)
                    if record.sha256 in (None, digest):
                        part.replace(path)
                        size = size if record.sha256 else record.bytes
                        self._synced[name] = _state(path), FileRecord(size, record.sha256)
                        return name, True
        finally:
            part.unlink(missing_ok=True)
        return name, False

    def _delete_local(self, name: str) -> None:
        path, (state, _) = self.directory / name, self._synced.pop(name)
        with contextlib.suppress(OSError):
            if _state(path) == state:
                path.unlink()
            for folder in path.relative_to(self.directory).parents[:-1]:
                (self.directory / folder).rmdir()  # fails unless it is empty

    def _check_free_space(self, wanted: Mapping[str, FileRecord]) -> None:
        if not wanted:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        needed, free = sum(record.bytes for record in wanted.values()), shutil.disk_usage(self.directory).free
        if needed > free:
            raise StoreError(
                f"{self.address}: its copy needs {needed >> 20} MiB in {self.directory}, where {free >> 20} MiB are "
                "free; set TMPDIR to a larger disk"
            )

    # Writing

    def claim(self) -> None:
        """Makes this process the writer: completes what a killed writer had committed and deletes what it had not."""
        with self._lock:
            manifest, self._is_writer = self._read_manifest(), True
            staged = set(self._bucket.find(STAGED))
            pending = {n: r.staged for n, r in manifest.files.items() if r.staged in staged and r.staged}
            announcements = set(self._bucket.find(WRITING))
            leftover = staged | announcements | (self._announced_by(announcements) - manifest.files.keys())
            self._settle(pending, leftover)
            self._settled |= {record.staged for record in manifest.files.values() if record.staged} - staged

    def push(self) -> None:
        """Publishes a snapshot of the local directory, if it has changed.

        Raises:
          StoreError: the upload failed, or another run has written; what was published before is intact.
        """
        with self._lock:
            if self._has_changed(self._list_local()):
                self._is_writer = True
                try:
                    self._push()
                except FileNotFoundError as error:  # the bucket itself
                    raise StoreError(f"{self.address} could not be written: {error}") from error

    def _push(self) -> None:
        published = self._read_manifest().files
        listing, deleted, sent = self._upload_snapshot(published)
        growing = [n for n in listing if is_growing(n) and self._has_changed({n: listing[n]}, check_deleted=False)]
        sent |= {n: (listing[n], r) for n, r in _parallel(self._upload, ((n, None) for n in growing)) if r}
        sent = {name: pair for name, pair in sent.items() if name in listing}
        files = {
            name: _without_staged(record) if record.staged in self._settled else record
            for name, record in published.items()
            if name not in deleted
        } | {name: record for name, (_, record) in sent.items()}
        if files != dict(published):
            self._check_other_writers(self._fetch_manifest())
            manifest = Manifest(files, self._writer, (self._manifest or Manifest()).sequence + 1)
            self._bucket.write(MANIFEST, manifest.to_json())
            self._manifest = manifest
        for name in deleted:
            del self._synced[name]
        self._synced |= {name: (state, _without_staged(record)) for name, (state, record) in sent.items()}
        pending = {n: r.staged for n, (_, r) in sent.items() if r.staged and r.staged not in self._settled}
        self._settle(pending, deleted | (self._announced - files.keys()))

    def _upload_snapshot(
        self, published: Mapping[str, FileRecord]
    ) -> tuple[dict[str, FileState], set[str], dict[str, tuple[FileState, FileRecord]]]:
        """Uploads until two listings agree.

        Returns:
          The listing, the files that were deleted locally, and {name: (local state, record)} of what was uploaded.
        """
        sent: dict[str, tuple[FileState, FileRecord]] = {}
        before: dict[str, FileState] = {}
        deleted: set[str] = set()
        while True:
            listing = self._list_local()
            fixed = {name: state for name, state in listing.items() if not is_growing(name)}
            known = {name: state for name, (state, _) in {**self._synced, **sent}.items()}
            changed = [name for name, state in fixed.items() if known.get(name) != state]
            if not changed and fixed == before:
                return listing, deleted, sent
            deleted = self._deleted(listing)
            self._announce({name for name in changed if name not in published} | deleted)
            uploads = _parallel(self._upload, ((name, published.get(name)) for name in changed))
            sent |= {name: (fixed[name], record) for name, record in uploads if record}
            before = fixed

    def _upload(self, item: tuple[str, FileRecord | None]) -> tuple[str, FileRecord | None]:
        """Uploads a file, staged if it was published before; returns (name, None) if it no longer exists."""
        name, published = item
        path = self.directory / name
        try:
            if is_growing(name):
                self._bucket.upload(name, path)
                return name, FileRecord(path.stat().st_size)
            size, digest = _digest(path)
            if published is not None and published.sha256 == digest:
                return name, published
            staged = None
            if published is not None:
                staged = f"{STAGED}/{self._writer}-{next(self._numbers)}"
                self._staged.add(staged)
            self._bucket.upload(staged or name, path)
            return name, FileRecord(size, digest, staged)
        except (FileNotFoundError, StoreError):
            if path.exists():
                raise
            return name, None

    def _announce(self, names: set[str]) -> None:
        """Records which objects may soon exist without being listed."""
        if not names <= self._announced:
            self._announced |= names
            self._bucket.write(f"{WRITING}/{self._writer}", json.dumps(sorted(self._announced)).encode())

    def _settle(self, staged: Mapping[str, str], leftover: Iterable[str]) -> None:
        """Copies staged objects into place and deletes leftovers; after a failure the next `claim` does it."""
        try:
            _parallel(lambda item: self._bucket.copy(item[1], item[0]), staged.items())
            _parallel(self._bucket.delete, {*staged.values(), *leftover, *self._staged})
        except OSError as error:
            log.warning("%s: published, but temporary objects could not be cleaned up: %s", self.address, error)
            return
        self._announced, self._staged = set(), set()
        self._settled |= set(staged.values())

    def _check_other_writers(self, manifest: Manifest) -> None:
        """Raises StoreError if another process has changed a file that this one has as well."""
        last = self._manifest
        if last is None or not self._is_writer or manifest.writer in (last.writer, self._writer):
            return
        names = last.files.keys() | manifest.files.keys()
        absent = FileRecord(-1)
        changed = {n for n in names if not last.files.get(n, absent).same_content(manifest.files.get(n))}
        if clash := sorted(n for n in changed & {*self._synced, *self._list_local()} if not is_growing(n)):
            raise StoreError(
                f"{self.address}: another run has changed {clash[0]} and continues there; this one stops without "
                "overwriting anything"
            )

    def _has_changed(self, listing: Mapping[str, FileState], check_deleted: bool = True) -> bool:
        known = {name: state for name, (state, _) in self._synced.items()}
        changed = any(known.get(name) != state for name, state in listing.items())
        return changed or (check_deleted and bool(self._deleted(listing)))

    def _deleted(self, listing: Mapping[str, FileState]) -> set[str]:
        return {name for name in self._synced.keys() - listing.keys() if all(map(is_permanent, name.split("/")))}

    def _list_local(self) -> dict[str, FileState]:
        """The local files that belong to the directory, without temporary files and links."""
        if self._synced and not self.directory.is_dir():
            raise StoreError(
                f"{self.directory}, the local copy of {self.address}, was deleted; start again with --resume"
            )
        listing = {}
        for folder, folders, names in os.walk(self.directory):
            folders[:] = [name for name in folders if is_permanent(name) and Path(folder, name) not in self.excluded]
            for name in filter(is_permanent, names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if not path.is_symlink():
                        listing[path.relative_to(self.directory).as_posix()] = _state(path)
        return listing


def _parallel(function: Any, items: Iterable[Any]) -> list[Any]:
    """Maps a function over items in threads; raises the first error once all have finished."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_PARALLEL_TRANSFERS, len(items))) as pool:
        return list(pool.map(function, items))


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _state(path: Path) -> FileState:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _without_staged(record: FileRecord) -> FileRecord:
    return FileRecord(record.bytes, record.sha256)
