"""A directory of a store and its local copy: snapshots of the one become the other, whole.

In the store every file is an object of its own name, so that people can fetch and open it; beside them lies
`.kdsearch/manifest.json`, which lists name, size and SHA-256 of what belongs to the directory. Publishing is a log of
what is to be done, written first:

    1  new files are PUT under their names, which the manifest does not list yet; changed ones under .kdsearch/staged/
    2  the manifest is PUT: one object, so it is the old or the new (the commit)
    3  staged objects are copied over those of the same name; staged ones, and those not listed any more, are deleted

Killed or failing before 2, the directory is what it was; after 2, what was to be. Who reads takes an object whose
digest is the manifest's, in place or staged; one that is neither is left out, with a warning, and then whatever needs
it says what is missing. Names that 1 is about to use are written down before, so that leftovers can be removed, and
nothing else.

What is published is what the local directory held at one moment: files are listed until two listings in a row agree and
all that they name is uploaded. So whatever survives a local kill at any moment survives a kill here. Logs that grow all
the time, and reports, are exempt (`loose`): nobody's work depends on them, the newest stands, and no digest is kept.

One process writes. A change by another since is taken over where it is of other files; of the same, this one stops:
the run was started a second time. Stores have no "replace only if unchanged", so two commits within milliseconds of one
another are not told apart.
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
    MANIFEST,
    OURS,
    STAGED,
    WRITING,
    Entry,
    Manifest,
    checked,
    is_below,
    is_brought,
    is_loose,
    is_own,
)

_AT_ONCE = 16  # transfers
_PATIENCE = 20  # times that a reader begins anew because a writer was faster

Signature = tuple[int, int, int]  # inode, bytes, time of the last change

log = logging.getLogger(__name__)


class Mirror:
    """A directory of a store, and its copy at `place`."""

    def __init__(self, address: str, place: Path):
        self.address, self.place = address, place
        self._bucket = Bucket(address)
        self._lock = threading.RLock()
        self.apart: set[Path] = set()  # below `place`, and not part of it
        self._writer, self._numbers = uuid.uuid4().hex[:12], itertools.count()
        self._seen: Manifest | None = None  # as it was read or written last
        self._here: dict[str, tuple[Signature, Entry]] = {}  # local files that are those of the store
        self._brought: set[str] = set()
        self._announced: set[str] = set()  # objects that may be there without being listed
        self._staged: set[str] = set()
        self._settled: set[str] = set()  # staged objects that are in their places, whatever a manifest says
        self._writes = False

    # Reading

    def pull(self, below: str = "", *, everything: bool = False) -> None:
        """Brings what lies below a name, and drops what is not listed there any more; local changes stay.

        everything: folders too that are left out else, of checkpoints and TensorBoard.
        """
        with self._lock:
            missing: list[str] = []
            for _ in range(_PATIENCE):
                seen = self._look()
                within = {
                    n: e for n, e in seen.files.items() if is_below(n, below) and (everything or is_brought(n, below))
                }
                wanted = {n: e for n, e in within.items() if n not in self._here or not e.like(self._here[n][1])}
                self._check_room(wanted)
                missing = [name for name, there in _each(self._bring, wanted.items()) if not there]
                if not missing or self._read() == seen:
                    break
            for name in missing:
                if seen.files[name].sha256:
                    log.warning("%s/%s is missing or not what it should be; it is left out", self.address, name)
            for name in [name for name in self._here if is_below(name, below) and name not in seen.files]:
                self._drop(name)
            if not everything:
                self._brought.add(below)

    def pull_again(self) -> None:
        """Brings what changed of all that was brought before."""
        for below in sorted(self._brought):
            self.pull(below)

    def _look(self) -> Manifest:
        theirs = self._read()
        self._check_others(theirs)
        self._seen = theirs
        return theirs

    def _read(self) -> Manifest:
        """The manifest; without one, all objects that there are, but what somebody is publishing for the first time."""
        if (content := self._bucket.read(MANIFEST, MAX_JSON)) is not None:
            return Manifest.of(content, f"{self.address}/{MANIFEST}")
        found = self._bucket.find()
        unlisted = self._unlisted(n for n in found if n.startswith(f"{WRITING}/"))
        if (content := self._bucket.read(MANIFEST, MAX_JSON)) is not None:  # the first came meanwhile
            return Manifest.of(content, f"{self.address}/{MANIFEST}")
        others = [name for name in found if name and name not in unlisted and not name.startswith(f"{OURS}/")]
        return Manifest({checked(name): Entry(found[name]) for name in others})

    def _unlisted(self, records: Iterable[str]) -> set[str]:
        """What writers have written down to be there perhaps without being listed."""
        names: set[str] = set()
        for record in records:
            content = self._bucket.read(record, MAX_JSON) or b"[]"
            with contextlib.suppress(ValueError, TypeError):
                names |= {checked(name) for name in json.loads(content)}
        return names

    def _bring(self, item: tuple[str, Entry]) -> tuple[str, bool]:
        """(name, whether the file is here now)."""
        name, entry = item
        path = self.place / name
        if path.exists() and (name not in self._here or _signature(path) != self._here[name][0]):
            return name, True  # changed here
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            for source in (name, entry.staged):
                if source and self._bucket.download(source, part):
                    size, digest = _digest(part)
                    if entry.sha256 in (None, digest):
                        part.replace(path)
                        self._here[name] = _signature(path), Entry(size if entry.sha256 else entry.bytes, entry.sha256)
                        return name, True
        finally:
            part.unlink(missing_ok=True)
        return name, False

    def _drop(self, name: str) -> None:
        path, (signature, _) = self.place / name, self._here.pop(name)
        with contextlib.suppress(OSError):
            if _signature(path) == signature:
                path.unlink()
            for folder in path.relative_to(self.place).parents[:-1]:
                (self.place / folder).rmdir()  # fails where something else is in it

    def _check_room(self, wanted: Mapping[str, Entry]) -> None:
        if not wanted:
            return
        self.place.mkdir(parents=True, exist_ok=True)
        needed, free = sum(entry.bytes for entry in wanted.values()), shutil.disk_usage(self.place).free
        if needed > free:
            raise StoreError(
                f"{self.address}: {needed >> 20} MiB are to be copied to {self.place}, where {free >> 20} MiB are "
                "free; set TMPDIR to a larger disk"
            )

    # Writing

    def own(self) -> None:
        """Completes what a writer that was killed had committed, and removes what it had not; for the run itself."""
        with self._lock:
            seen, self._writes = self._look(), True
            staged = set(self._bucket.find(STAGED))
            waiting = {n: e.staged for n, e in seen.files.items() if e.staged in staged and e.staged}
            records = list(self._bucket.find(WRITING))
            leftover = staged | set(records) | (self._unlisted(records) - seen.files.keys())
            self._settle(waiting, leftover)
            self._settled |= {e.staged for e in seen.files.values() if e.staged} - staged

    def push(self) -> None:
        """Publishes the local directory as it is at one moment.

        Raises:
          StoreError: it could not be written, or another run has; what was there before is intact.
        """
        with self._lock:
            if self._differs(self._listing()):
                self._writes = True
                try:
                    self._push()
                except FileNotFoundError as error:  # the bucket itself
                    raise StoreError(f"{self.address} could not be written: {error}") from error

    def _push(self) -> None:
        base = self._look().files
        sent: dict[str, tuple[Signature, Entry]] = {}
        before: dict[str, Signature] = {}
        gone: set[str] = set()
        while True:
            now = self._listing()
            firm = {name: signature for name, signature in now.items() if not is_loose(name)}
            known = {name: signature for name, (signature, _) in {**self._here, **sent}.items()}
            todo = [name for name, signature in firm.items() if known.get(name) != signature]
            if not todo and firm == before:
                break
            gone = self._gone(now)
            self._announce({name for name in todo if name not in base} | gone)
            sent |= {n: (firm[n], entry) for n, entry in _each(self._send, ((n, base.get(n)) for n in todo)) if entry}
            before = firm
        grown = [name for name in now if is_loose(name) and self._differs({name: now[name]}, every=False)]
        sent |= {n: (now[n], entry) for n, entry in _each(self._send, ((n, None) for n in grown)) if entry}
        files = {n: _unstaged(e) if e.staged in self._settled else e for n, e in base.items() if n not in gone}
        files |= {name: entry for name, (_, entry) in sent.items() if name in now}
        if files != dict(base):
            self._check_others(self._read())
            version = Manifest(files, self._writer, (self._seen or Manifest()).sequence + 1)
            self._bucket.write(MANIFEST, version.to_json())
            self._seen = version
        for name in gone:
            del self._here[name]
        self._here |= {name: (signature, _unstaged(entry)) for name, (signature, entry) in sent.items() if name in now}
        waiting = {
            n: e.staged for n, (_, e) in sent.items() if e.staged and e.staged not in self._settled and n in files
        }
        self._settle(waiting, gone | (self._announced - files.keys()))

    def _send(self, item: tuple[str, Entry | None]) -> tuple[str, Entry | None]:
        """Uploads a file; (name, None) where it was gone already."""
        name, old = item
        path = self.place / name
        try:
            if is_loose(name):
                self._bucket.upload(name, path)
                return name, Entry(path.stat().st_size)
            size, digest = _digest(path)
            if old is not None and old.sha256 == digest:
                return name, old
            staged = None
            if old is not None:
                staged = f"{STAGED}/{self._writer}-{next(self._numbers)}"
                self._staged.add(staged)
            self._bucket.upload(staged or name, path)
            return name, Entry(size, digest, staged)
        except (FileNotFoundError, StoreError):
            if path.exists():
                raise
            return name, None

    def _announce(self, names: set[str]) -> None:
        """Writes down what may be there without being listed."""
        if not names <= self._announced:
            self._announced |= names
            self._bucket.write(f"{WRITING}/{self._writer}", json.dumps(sorted(self._announced)).encode())

    def _settle(self, staged: Mapping[str, str], leftover: Iterable[str]) -> None:
        """Puts changed files into their places, and removes objects; what fails is done by the next `own`."""
        try:
            _each(lambda item: self._bucket.copy(item[1], item[0]), staged.items())
            _each(self._bucket.delete, {*staged.values(), *leftover, *self._staged})
        except OSError as error:
            log.warning("%s: written, but not tidied up: %s", self.address, error)
            return
        self._announced, self._staged = set(), set()
        self._settled |= set(staged.values())

    def _check_others(self, theirs: Manifest) -> None:
        """Raises StoreError where another process has changed a file that is this one's as well."""
        seen = self._seen
        if seen is None or not self._writes or theirs.writer in (seen.writer, self._writer):
            return
        names = seen.files.keys() | theirs.files.keys()
        changed = {n for n in names if not Entry.like(seen.files.get(n, Entry(-1)), theirs.files.get(n))}
        if clash := sorted(n for n in changed & {*self._here, *self._listing()} if not is_loose(n)):
            raise StoreError(
                f"{self.address}: another run has changed {clash[0]} meanwhile, and goes on there; this one stops, and "
                "nothing of it is written over"
            )

    def _differs(self, listing: Mapping[str, Signature], every: bool = True) -> bool:
        known = {name: signature for name, (signature, _) in self._here.items()}
        return any(known.get(n) != s for n, s in listing.items()) or (every and bool(self._gone(listing)))

    def _gone(self, listing: Mapping[str, Signature]) -> set[str]:
        """Files that were here and are not any more."""
        return {name for name in self._here.keys() - listing.keys() if all(map(is_own, name.split("/")))}

    def _listing(self) -> dict[str, Signature]:
        """The local files that belong to the directory: no temporary ones, no links."""
        if self._here and not self.place.is_dir():
            raise StoreError(f"{self.place}, the copy of {self.address}, was deleted; start again with --resume")
        found = {}
        for folder, folders, names in os.walk(self.place):
            folders[:] = [name for name in folders if is_own(name) and Path(folder, name) not in self.apart]
            for name in filter(is_own, names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if not path.is_symlink():
                        found[path.relative_to(self.place).as_posix()] = _signature(path)
        return found


def _each(function: Any, items: Iterable[Any]) -> list[Any]:
    """The function's values, several at once; raises the first error when all have ended."""
    given = list(items)
    if len(given) < 2:
        return [function(item) for item in given]
    with ThreadPoolExecutor(min(_AT_ONCE, len(given))) as pool:
        return list(pool.map(function, given))


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _signature(path: Path) -> Signature:
    told = path.stat()
    return told.st_ino, told.st_size, told.st_mtime_ns


def _unstaged(entry: Entry) -> Entry:
    return Entry(entry.bytes, entry.sha256)
