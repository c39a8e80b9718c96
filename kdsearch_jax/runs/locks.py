"""One process at a time in a directory: a lock that the system forgets when its holder dies, however it dies.

It is an advisory lock of the operating system on DIRECTORY/.lock. The file says who holds it, for people; that it is
there means nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

NAME = ".lock"


class InUseError(OSError):
    """Another process is at work in the directory."""


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Within this context no other process is at work in the directory, which is made where it is not there.

    wait: for the other to end.

    Raises:
      InUseError: there is another, and it is not waited for.
      OSError: the directory cannot be made, or not be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{error.strerror}; --workdir must be a directory that can be made and written"
        raise OSError(error.errno, why, str(directory)) from error
    with _held(directory / NAME, wait):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (directory / NAME).unlink()  # while it is held: who waits for it sees that it is gone, and comes again


def check_free(directory: Path) -> None:
    """Raises InUseError where another process is at work in the directory now; writes nothing."""
    path = directory / NAME
    if path.is_file():
        with path.open("r+", encoding="utf-8") as file:
            _take(file, path, wait=False)


def _held(path: Path, wait: bool) -> IO[str]:
    """The file, locked, with this process's name in it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _take(file, path, wait)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} of {platform.node()}\n")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its holder has removed it meanwhile


def _take(file: IO[str], path: Path, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read(200).strip() or "another process"
        if not wait:
            raise InUseError(
                f"{path.parent}: {who} is at work in it; wait until it ends, or choose another --workdir"
            ) from None
        log.info("%s: %s is at work in it; waiting", path.parent, who)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("%s cannot be locked on this file system (%s); start nothing else in it", path.parent, error)
