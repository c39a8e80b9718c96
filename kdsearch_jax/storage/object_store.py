"""Local copies of object-store directories such as gs://bucket/run.

Every path that a user passes may be the address of an object store. `local_copy` downloads what is stored there into a
scratch directory and returns the local path, so that Orbax, safetensors, NumPy, TFDS, file locks and renames work as on
any disk. `publish` uploads what has changed: after every checkpoint, after every stage, and at the end. For local paths
these functions do nothing.

Why copies, when Orbax, etils and fsspec can write to a bucket directly: an object store cannot rename, append or lock,
so a directory of several files would never be replaced atomically; each library reaches the store in its own way, or
not at all; and a training step would wait for the network. A run's files are a few checkpoints, which fit on the disk.
Why fsspec rather than etils on top of it: fsspec lists and copies inside the store, and its listing cache can be
turned off.

A run of several processes needs no shared disk: process 0 publishes and the others refresh their copies, at barriers
where they wait for each other anyway (`sync_processes`). `mirror` describes how a snapshot is published so that it
survives a kill at any moment.
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

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_mirrors: dict[str, Mirror] = {}  # by address; the copies that this process holds
_lock = threading.RLock()


def remote_address(path: str | os.PathLike[str]) -> str | None:
    """Returns `scheme://bucket/name` for a path in an object store, and None for a local path.

    `Path("gs://b/x")` collapses the two slashes into one; such paths are recognised as well.

    Raises:
      ValueError: the address names no bucket, or contains "..".
    """
    match = _ADDRESS.fullmatch(os.fspath(path))
    if match is None or match[1].lower() == "file":
        return None
    parts = [part for part in match[2].split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "::" in match[2]:
        raise ValueError(f"{os.fspath(path)!r} is not a valid object-store address; give one like gs://BUCKET/NAME")
    return f"{match[1].lower()}://{'/'.join(parts)}"


def local_copy(path: str | os.PathLike[str], argument: str = "", *, entire_run: bool = False) -> Path:
    """Returns a local path for `path`, after downloading it if it is in an object store.

    Args:
      path: local path or address, as the user gave it. An address under which nothing is stored yet is allowed.
      argument: the name of the setting it came from, for error messages.
      entire_run: also download the rest of the run that contains the path. Checkpoints are only downloaded by
        `refresh`.

    Raises:
      StoreError: the store cannot be read.
      ValueError: the address is invalid, or the stored directory is damaged.
    """
    try:
        address = remote_address(path)
        if address is None:
            return Path(re.sub(r"^file:/+", "/", os.fspath(path))).expanduser()
        return _download(address, entire_run)
    except (StoreError, ValueError) as error:
        raise type(error)(f"{argument}: {error}" if argument else str(error)) from error


def _download(address: str, entire_run: bool) -> Path:
    copy = scratch.copy_path(address)
    with _lock:
        if (mirror := _mirror_of(address)) is not None:
            below = copy.relative_to(mirror.directory).as_posix()
            mirror.pull("" if entire_run or below == "." else below)
            if not copy.exists() and copy != mirror.directory and Bucket(address).find():
                mirror.excluded.add(copy)  # files of another origin inside the directory that is mirrored
                if (inner := _mirror_without_manifest(address)) is not None:
                    inner.pull()
    return copy


def _mirror_of(address: str) -> Mirror | None:
    """The mirror of the directory that contains an address; None for a single object, which is downloaded here."""
    parts = address.split("/")
    candidates = ["/".join(parts[:end]) for end in range(len(parts), 2, -1)]
    for candidate in candidates:
        if candidate in _mirrors:
            return _mirrors[candidate]
    for candidate in candidates:
        try:
            if Bucket(candidate).read(MANIFEST, MAX_JSON) is not None:
                return _add_mirror(candidate)
        except StoreError:
            if candidate == address:
                raise
            # Without permission to read a parent directory, that parent is not ours.
    return _mirror_without_manifest(address)


def _mirror_without_manifest(address: str) -> Mirror | None:
    bucket = Bucket(address)
    if "" not in bucket.find():
        return _add_mirror(address)
    copy = scratch.copy_path(address)
    copy.parent.mkdir(parents=True, exist_ok=True)
    bucket.download("", copy)
    return None


def _add_mirror(address: str) -> Mirror:
    return _mirrors.setdefault(address, Mirror(address, scratch.copy_path(address)))


def display_paths(text: str) -> str:
    """Replaces the paths of local copies in a message by the addresses they stand for."""
    return scratch.with_addresses(text)


@contextlib.contextmanager
def addresses_in_errors() -> Iterator[None]:
    """Context manager that applies `display_paths` to the errors raised inside it."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.args = tuple(display_paths(arg) if isinstance(arg, str) else arg for arg in error.args)
        raise


def refresh(directory: Path | None = None) -> None:
    """Downloads what process 0 has published since; with `directory`, its checkpoints too, in every process."""
    if directory is not None:
        for mirror in _mirrors_containing(directory):
            below = directory.absolute().relative_to(mirror.directory).as_posix()
            mirror.pull("" if below == "." else below, include_checkpoints=True)
    elif not _is_first_process():
        for mirror in list(_mirrors.values()):
            mirror.pull_again()


def claim(directory: Path) -> None:
    """Makes this process the writer of a directory: completes or removes what a killed writer left in the store."""
    if _is_first_process():
        for mirror in _mirrors_containing(directory):
            mirror.claim()


def publish() -> None:
    """Uploads what has changed in the local copies; process 0 only.

    Raises:
      StoreError: the upload failed, or another run writes there. What was published before stays intact.
    """
    if _mirrors and _is_first_process():
        for mirror in list(_mirrors.values()):
            mirror.push()


def sync_processes(name: str) -> None:
    """Barrier over all processes of the run, after which each sees what process 0 had written, on any storage.

    Also needed before process 0 writes a file that the others may still look for: one that is late would find it, skip
    its own branch, and never reach the barrier that the others wait at.
    """
    import jax  # not at the top: `--help` does not need it
    from jax.experimental import multihost_utils

    publish()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
        refresh()


def discard_copies() -> None:
    """Deletes all local copies."""
    _mirrors.clear()
    scratch.remove()


def _mirrors_containing(directory: Path) -> list[Mirror]:
    return [mirror for mirror in _mirrors.values() if directory.absolute().is_relative_to(mirror.directory)]


def _is_first_process() -> bool:
    """Whether this is process 0; does not initialise a backend."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0
