"""Files of a run: text, JSON and arrays, written atomically and read within bounds.

A reader finds the old content or the new one, whatever happens while a file or directory is being written. Reading
trusts no file: one that is larger than any of its kind, or that declares more than it contains, is refused before
memory is allocated for it. Arrays are stored as NumPy's npz without pickle; zip's CRC-32 of every array is checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

MAX_SETTINGS = 1 << 20  # bytes of a JSON settings file, whose values can take 30 times as much in memory
MAX_JSON = 1 << 26  # bytes; no file of this package comes near
MAX_ARRAYS = 1 << 32  # bytes
MAX_DEPTH = 64  # nesting of JSON, since code that walks through it may recurse
_MAX_NPY_HEADER = 1 << 16  # bytes

T = TypeVar("T")


class DamagedError(ValueError):
    """A file does not contain what it should."""


class CheckpointError(DamagedError):
    """A stored network or checkpoint is damaged, or does not match what was asked for."""


# --- writing --------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically and flushes it to disk; an OSError leaves the old content in place."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with name_in_errors(path), part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; see `write_bytes`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object together with its digest, under the key "sha256"."""
    write_json(path, {**value, "sha256": json_digest(value)})


def write_arrays(path: Path, arrays: Mapping[str, Any], *, compress: bool = False) -> None:
    """Writes arrays by name as an npz file; see `write_bytes`."""
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory that replaces `target` at the end of the block; an error changes nothing.

    Raises:
      OSError: the directory could not be written.
    """
    temporary, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{end}") for end in ("tmp", "old"))
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        fsync(target.parent)
    except Exception as error:
        raise OSError(f"{target} could not be written: {one_line(error)}; its previous content is intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_free_space(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises OSError if the arrays do not fit on the disk. Orbax would fill it first and print tracebacks."""
    needed, free = sum(array.nbytes for array in arrays.values()) + (1 << 20), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{os.strerror(errno.ENOSPC)}: {needed >> 20} MiB needed, {free >> 20} MiB free")


@contextlib.contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError that lacks it (only `open` and `rename` set it)."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync(path: Path) -> None:
    """Flushes a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- JSON -----------------------------------------------------------------------------------------------------------


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Reads a JSON file of at most `limit` bytes.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedError: the file is larger than `limit`, or not JSON.
    """
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path} is not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedError(f"{path} is larger than the limit of {limit} bytes")
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {one_line(error)}") from None


def parse_json(text: str) -> Any:
    """Parses JSON; ValueError if it is invalid or nested deeper than MAX_DEPTH."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def read_json_object(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Reads a JSON object; raises as `read_json` does, and DamagedError for any other JSON value."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


def read_sealed(path: Path, limit: int = MAX_JSON, *, has: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Reads what `write_sealed` wrote; raises as `read_json_object` does, and DamagedError if the digest differs.

    Files of older versions have no digest and are accepted.

    Args:
      has: entries that must be present, with their types.
    """
    value = read_json_object(path, limit)
    if "sha256" in value and value.pop("sha256") != json_digest(value):
        raise DamagedError(f"{path} is damaged: its content does not match its digest")
    for key, kind in (has or {}).items():
        if not isinstance(value.get(key), kind):
            raise DamagedError(f"{path} is damaged: {key!r} must be a {kind.__name__}, not {value.get(key)!r:.80}")
    return value


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(as_json(value, "value"), sort_keys=True).encode()).hexdigest()


def as_json(value: Any, argument: str) -> Any:
    """`value` as it will be read back from JSON; ValueError, naming the argument, if it is not plain JSON."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must consist of plain JSON values: {error}") from None


def seal(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Wraps JSON values together with their digest; `unseal` inverts it."""
    return {"payload": dict(payload), "sha256": json_digest(payload)}


def unseal(record: Any) -> dict[str, Any]:
    """The values that `seal` wrapped; CheckpointError if their digest differs."""
    if not isinstance(record, dict) or record.get("sha256") != json_digest(record.get("payload")):
        raise CheckpointError("its JSON does not match its digest")
    return record["payload"]


# --- arrays ---------------------------------------------------------------------------------------------------------


def read_arrays(path: Path, limit: int = MAX_ARRAYS) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file by name.

    Args:
      limit: bytes that all arrays together may take, as declared in the file.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedError: it is not an npz file of plain arrays, declares more than `limit`, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is a single array without a name")
        with zipfile.ZipFile(path) as archive:
            total = sum(_declared_bytes(archive, member) for member in archive.infolist())
            if total > limit:
                raise ValueError(f"its arrays take {total} bytes, more than the limit of {limit}")
        with np.load(path, allow_pickle=False, max_header_size=_MAX_NPY_HEADER) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy and the file system each raise their own types
        raise DamagedError(f"{path} is damaged, or not a file of plain arrays: {one_line(error)}") from None


def _declared_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Bytes of an array according to its header; ValueError if there is no header, or the member's length differs."""
    if not member.filename.endswith(".npy"):
        raise ValueError(f"{member.filename!r:.80} is not an array")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{member.filename!r:.80} has the unknown npy version {version}")
        shape, _, dtype = read(file, max_header_size=_MAX_NPY_HEADER)
        header = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r:.80} holds Python objects, which would have to be unpickled")
    size = math.prod(shape) * dtype.itemsize
    if header + size != member.file_size:
        raise ValueError(f"{member.filename!r:.80} declares {size} bytes but has {member.file_size - header}")
    return size


# --- errors and the machine -----------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """Describes an exception in one line of at most 300 characters.

    TensorStore buries the operating system's message in paths; only that message is kept.
    """
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    if not text or not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 300 else f"{text[:150]} … {text[-147:]}"


def attempt(function: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """Returns (the function's value, ""), or (None, the error in one line): Orbax has dozens of ways to fail."""
    try:
        return function(*args), ""
    except Exception as error:
        return None, one_line(error)


def total_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def core_numbers() -> tuple[int, ...]:
    """The CPU cores that this process may use; () where the system does not tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()  # not on macOS


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
