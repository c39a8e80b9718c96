"""What both kinds of directories need: sealed JSON, one-line reasons, directories that are written whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdsearch_jax import storage
from kdsearch_jax.storage.files import DamagedError, flush, seal

T = TypeVar("T")


class CheckpointError(DamagedError):
    """What is stored is damaged, or is not what was asked for."""


def sealed(payload: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their digest; `unsealed` inverts it, or raises CheckpointError."""
    return {"payload": dict(payload), "sha256": seal(payload)}


def unsealed(record: Any) -> dict[str, Any]:
    """What `sealed` sealed."""
    if not isinstance(record, dict) or record.get("sha256") != seal(record.get("payload")):
        raise CheckpointError("its JSON is not what was saved")
    return record["payload"]


def plain(value: Any, what: str) -> Any:
    """`value` as it will be read back from JSON."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be plain JSON values: {error}") from None


def local(directory: str | Path) -> Path:
    """The absolute path, of a copy where the directory is in an object store."""
    return storage.local(directory, "directory").absolute()


def reason(error: BaseException) -> str:
    """An exception on one line; what the operating system said, where TensorStore buries it in paths."""
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    text = text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
    return f"{text[:150]} … {text[-150:]}" if len(text) > 300 else text


def check_room(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises OSError where the disk is too full, before Orbax has filled it and covered stderr with tracebacks."""
    needed, free = sum(array.nbytes for array in arrays.values()) + (1 << 20), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{os.strerror(errno.ENOSPC)}: {needed >> 20} MiB needed, {free >> 20} MiB free")


def attempt(read: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """(What `read` returns, "") or (None, why not), as Orbax and TensorStore have dozens of ways to say "damaged"."""
    try:
        return read(*args), ""
    except Exception as error:
        return None, reason(error)


def meet(name: str) -> None:
    """Waits for all processes of the run; each sees then what the first had written, also through an object store.

    Also to be called before the first writes what others may be looking for: who is late would find it, and go on
    without the barrier that the others wait at.
    """
    storage.publish()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
        storage.follow()


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` at the end, in place of what was there; an error changes nothing.

    Raises:
      OSError: it cannot be written.
    """
    temporary, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{end}") for end in ("tmp", "old"))
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        flush(target.parent)
    except Exception as error:
        raise OSError(f"{target} could not be written: {reason(error)}; what was there before is intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
