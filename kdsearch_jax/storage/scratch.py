"""This process's scratch directory for copies of object-store directories; deleted when the process ends.

The copy of `gs://bucket/run` is SCRATCH/gs/bucket/run, so even a message that shows the local path tells what it is.
SCRATCH is created where Python creates temporary files (TMPDIR). Each process holds a lock on its own; directories
without a lock belonged to processes that were killed, and the next process deletes them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "kdsearch-copies-"
_GRACE = 60.0  # seconds; a younger directory may not have its lock yet


@functools.cache
def directory() -> Path:
    """This process's scratch directory."""
    _delete_abandoned()
    path = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
    _lock(path)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def copy_path(address: str) -> Path:
    """The path of the local copy of an address."""
    scheme, _, rest = address.partition("://")
    return directory() / scheme / rest


def with_addresses(text: str) -> str:
    """The text with the paths of local copies replaced by their addresses."""
    if not directory.cache_info().currsize:
        return text
    return re.sub(re.escape(str(directory())) + r"/([a-z0-9+.-]+)/", r"\1://", text)


def remove() -> None:
    """Deletes the scratch directory, if there is one."""
    if directory.cache_info().currsize:
        shutil.rmtree(directory(), ignore_errors=True)
        directory.cache_clear()


def _lock(path: Path) -> bool:
    """Locks a directory for the lifetime of this process (tmp cleaners respect that); False if another holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    return True


def _delete_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            ours = path.is_dir() and not path.is_symlink() and status.st_uid == os.getuid()
            if ours and time.time() - status.st_mtime > _GRACE and _lock(path):
                shutil.rmtree(path, ignore_errors=True)
