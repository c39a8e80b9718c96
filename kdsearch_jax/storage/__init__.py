"""Paths of an object store, such as gs://bucket/run, for code that knows local files only.

Every path that a user gives may be of a store. `local` brings what lies there to a scratch directory of this process
and returns the path of the copy, with which everything works as ever: Orbax, safetensors, NumPy, TFDS, locks, renames.
What is written into a copy goes to the store when `publish` is called: after every checkpoint, every stage, at the end.
For local paths all of this does nothing.

Why copies, and not reading and writing over there (Orbax and etils could): a store neither renames nor appends nor
locks, so nothing would be written whole that is several files; each library reaches it in another way, or not at all;
and a training step would wait for it. A run's own files are a few checkpoints, no larger than the machine's disk.
Why fsspec, which etils would use as well: it lists, copies within the store, and does not remember listings.

A run of several processes needs no shared disk: the first publishes, the others `follow`, around the same barriers that
let them wait for one another in any case. How a snapshot is published so that no moment of a kill matters: `mirror`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from kdsearch_jax.storage import scratch
from kdsearch_jax.storage.bucket import Bucket, StoreError
from kdsearch_jax.storage.files import MAX_JSON
from kdsearch_jax.storage.manifest import MANIFEST
from kdsearch_jax.storage.mirror import Mirror
from kdsearch_jax.storage.scratch import shown

__all__ = ["StoreError", "address", "close", "follow", "local", "named", "own", "publish", "shown"]

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_mirrors: dict[str, Mirror] = {}
_lock = threading.RLock()


def address(path: str | os.PathLike[str]) -> str | None:
    """`scheme://bucket/name` where a path is of a store, None where it is local.

    A `Path` made of it has lost one slash, and means the same.

    Raises:
      ValueError: it has a scheme, and no bucket, or steps upwards.
    """
    found = _ADDRESS.fullmatch(os.fspath(path))
    if found is None or found[1].lower() == "file":
        return None
    parts = [part for part in found[2].split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "::" in found[2]:
        raise ValueError(f"{os.fspath(path)!r} is no place of a store; give one like gs://BUCKET/NAME")
    return f"{found[1].lower()}://{'/'.join(parts)}"


def local(path: str | os.PathLike[str], argument: str = "", *, whole: bool = False) -> Path:
    """The path itself, or that of a copy of what lies in a store, brought here now; where there is nothing, it is new.

    Args:
      path: as the user gave it; argument: by which name, for errors.
      whole: with all of the run that it is part of. Checkpoints come when `follow` asks for them.

    Raises:
      StoreError: the store cannot be read.
      ValueError: no such address is possible, or what is there is damaged.
    """
    try:
        there = address(path)
        return _copy(there, whole) if there else Path(re.sub(r"^file:/+", "/", os.fspath(path))).expanduser()
    except (StoreError, ValueError) as error:
        raise type(error)(f"{argument}: {error}" if argument else str(error)) from error


def _copy(there: str, whole: bool) -> Path:
    with _lock:
        found = _mirror(there)
        place = scratch.place(there)
        if found is not None:
            below = place.relative_to(found.place).as_posix()
            found.pull("" if whole or below == "." else below)
            if not place.exists() and place != found.place and Bucket(there).find():
                found.apart.add(place)  # somebody's own files inside of one of our directories
                if (own := _unlisted(there)) is not None:
                    own.pull()
    return place


def _mirror(there: str) -> Mirror | None:
    """The mirror of the directory that an address belongs to; None where it is one object, which is brought."""
    parts = there.split("/")
    above = ["/".join(parts[:end]) for end in range(len(parts), 2, -1)]
    for candidate in above:
        if candidate in _mirrors:
            return _mirrors[candidate]
    for candidate in above:
        try:
            if Bucket(candidate).read(MANIFEST, MAX_JSON) is not None:
                return _register(candidate)
        except StoreError:
            if candidate == there:
                raise
            # Who may not look at what is above has nothing there.
    return _unlisted(there)


def _unlisted(there: str) -> Mirror | None:
    """The mirror of a directory without a manifest; None where it is one object, which is brought."""
    objects = Bucket(there)
    if "" not in objects.find():
        return _register(there)
    place = scratch.place(there)
    place.parent.mkdir(parents=True, exist_ok=True)
    objects.download("", place)
    return None


def _register(there: str) -> Mirror:
    return _mirrors.setdefault(there, Mirror(there, scratch.place(there)))


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Within this context, what errors say has addresses in place of the paths of copies."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.args = tuple(shown(part) if isinstance(part, str) else part for part in error.args)
        raise


def follow(directory: Path | None = None) -> None:
    """Brings what the first process has published meanwhile; of a directory its checkpoints too, in every process."""
    if directory is not None:
        for found in [m for m in _mirrors.values() if directory.absolute().is_relative_to(m.place)]:
            below = directory.absolute().relative_to(found.place).as_posix()
            found.pull("" if below == "." else below, everything=True)
    elif not _is_first():
        for found in list(_mirrors.values()):
            found.pull_again()


def own(directory: Path) -> None:
    """Completes or removes what a run that was killed has left in the store; this process's is the directory's now."""
    for found in _mirrors.values():
        if directory.absolute().is_relative_to(found.place) and _is_first():
            found.own()


def publish() -> None:
    """Writes what has changed in copies to where it belongs; in the first process.

    Raises:
      StoreError: it could not be written, or another run writes there; what was there before is intact.
    """
    if _mirrors and _is_first():
        for found in list(_mirrors.values()):
            found.push()


def close() -> None:
    """Removes the copies."""
    _mirrors.clear()
    scratch.remove()


def _is_first() -> bool:
    """Whether no other process is first; asks nothing of devices."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0
