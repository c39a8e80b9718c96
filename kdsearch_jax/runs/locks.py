"""Locks a directory for one process at a time, with a lock that the system releases when its holder dies.

It is an advisory lock of the operating system on DIRECTORY/.lock. The file names its holder for people to read; its
presence alone means nothing.
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
    """Another process uses the directory."""


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """A context in which no other process uses the directory. Creates the directory if needed.

    Args:
      wait: wait for the other process to finish.

    Raises:
      InUseError: another process uses it, and `wait` is False.
      OSError: the directory cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{error.strerror}; --workdir must be a directory that can be created and written"
        raise OSError(error.errno, why, str(directory)) from error
    with _acquire(directory / NAME, wait):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (directory / NAME).unlink()  # while locked: a waiting process notices and retries


def check_free(directory: Path) -> None:
    """Raises InUseError if another process uses the directory now. Writes nothing."""
    path = directory / NAME
    if path.is_file():
        with path.open("r+", encoding="utf-8") as file:
            _lock(file, path, wait=False)


def _acquire(path: Path, wait: bool) -> IO[str]:
    """The file at `path`, locked, with this process's name in it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file, path, wait)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} of {platform.node()}\n")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its previous holder has removed it in the meantime


def _lock(file: IO[str], path: Path, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        if not wait:
            raise InUseError(
                f"{path.parent}: {holder} is using it; wait for it to finish, or choose another --workdir"
            ) from None
        log.info("%s: %s is using it; waiting", path.parent, holder)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("%s cannot be locked on this file system (%s); do not start another run in it", path.parent, error)
