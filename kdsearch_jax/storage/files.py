"""Files of a run: text, JSON and arrays, written whole or not at all, read within bounds.

Whoever reads a file that `write_…` wrote finds the old content or the new one, whatever happened in between. Reading
trusts nobody: a file larger than any of its kind, or one that declares more than it holds, is refused before memory is
spent on it. Arrays are NumPy's npz without pickle; its zip format carries a CRC-32 of every array, which is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAX_SETTINGS = 1 << 20  # bytes of a JSON file of settings: values in memory can take 30 times as much
MAX_JSON = 1 << 26  # bytes; of what this package writes, nothing comes near
MAX_ARRAYS = 1 << 32
DEEPEST = 64  # nesting of JSON: whoever walks through it may recurse
_HEADER = 1 << 16  # bytes of a npy header at most


class DamagedError(ValueError):
    """A file does not hold what it should."""


def write_bytes(path: Path, content: bytes) -> None:
    """The file with this content, on the disk itself. Raises OSError, with the old content in place."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path), part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError say of which file it is, as it does of itself only where one is opened or renamed."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """The file with this text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """The file with this value as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, Any], *, compress: bool = False) -> None:
    """The npz file with these arrays by name."""
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """The value in a JSON file.

    Raises:
      FileNotFoundError: there is none.
      DamagedError: it is larger than `limit` bytes, or no JSON.
    """
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path} is no regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedError(f"{path} has more than {limit} bytes, as no file of its kind")
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {_line(error)}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or nested more than DEEPEST times."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} times") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {DEEPEST} times")


def read_object(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file; raises as `read_json`, also where it holds something else."""
    found = read_json(path, limit)
    if not isinstance(found, dict):
        raise DamagedError(f"{path} is damaged: a JSON object is expected, not {type(found).__name__}")
    return found


def seal(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """The file with this JSON object and its own digest, under "sha256"."""
    write_json(path, {**value, "sha256": seal(value)})


def read_sealed(path: Path, limit: int = MAX_JSON, *, has: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The object that `write_sealed` wrote; raises as `read_object`, also where it is not what was written.

    One without a digest, of an older version, is taken as it is.

    has: entries that must be there, of these types.
    """
    found = read_object(path, limit)
    if "sha256" in found and found.pop("sha256") != seal(found):
        raise DamagedError(f"{path} is damaged: its digest is not that of its content")
    for key, kind in (has or {}).items():
        if not isinstance(found.get(key), kind):
            raise DamagedError(f"{path} is damaged: {key!r} must be a {kind.__name__}, not {found.get(key)!r:.80}")
    return found


def read_arrays(path: Path, limit: int = MAX_ARRAYS) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name.

    limit: bytes of all arrays together, as the file declares them.

    Raises:
      FileNotFoundError: there is none.
      DamagedError: it is no npz file of plain arrays, declares more than `limit`, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it holds a single array, without a name")
        with zipfile.ZipFile(path) as archive:
            total = sum(_declared(archive, member) for member in archive.infolist())
            if total > limit:
                raise ValueError(f"its arrays take {total} bytes, and {limit} are allowed")
        with np.load(path, allow_pickle=False, max_header_size=_HEADER) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy and the file system each have their own
        raise DamagedError(f"{path} is damaged, or holds no plain arrays: {_line(error)}") from None


def _declared(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Bytes of the array that a member says it is; raises ValueError where it is none, or has another length."""
    if not member.filename.endswith(".npy"):
        raise ValueError(f"{member.filename!r:.80} is no array")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{member.filename!r:.80} has the npy version {version}, which is not known here")
        shape, _, dtype = read(file, max_header_size=_HEADER)
        header = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r:.80} holds Python objects, which would be unpickled")
    size = math.prod(shape) * dtype.itemsize
    if header + size != member.file_size:
        raise ValueError(f"{member.filename!r:.80} declares {size} bytes and has {member.file_size - header}")
    return size


def line(error: BaseException) -> str:
    """What an error says, or else its type, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def flush(path: Path) -> None:
    """Has the file system put a file or a directory on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, (ValueError, zipfile.BadZipFile)) and text else repr(error))[:300]
