"""The directory of this process for local copies of what lies in a store; it goes when the process ends.

`gs://bucket/run` has its copy at SCRATCH/gs/bucket/run, so that even a message which names the copy says what is meant.
SCRATCH is made where Python makes temporary files (TMPDIR). A process holds a lock on its own; those of processes that
were killed are found without one, and removed by the next.
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
_YOUNG = 60.0  # seconds within which one may not have its lock yet


@functools.cache
def directory() -> Path:
    """This process's scratch directory."""
    _sweep()
    path = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
    _locked(path)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def place(address: str) -> Path:
    """Where the copy of an address is."""
    scheme, _, rest = address.partition("://")
    return directory() / scheme / rest


def shown(text: str) -> str:
    """The text with addresses in place of their copies' paths."""
    if not directory.cache_info().currsize:
        return text
    return re.sub(re.escape(str(directory())) + r"/([a-z0-9+.-]+)/", r"\1://", text)


def remove() -> None:
    """Removes the scratch directory now, where there is one."""
    if directory.cache_info().currsize:
        shutil.rmtree(directory(), ignore_errors=True)
        directory.cache_clear()


def _locked(path: Path) -> bool:
    """Whether this process has now locked the directory, as long as it lives (cleaners of temporary files heed it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    return True


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            told = path.lstat()
            ours = path.is_dir() and not path.is_symlink() and told.st_uid == os.getuid()
            if ours and time.time() - told.st_mtime > _YOUNG and _locked(path):
                shutil.rmtree(path, ignore_errors=True)
