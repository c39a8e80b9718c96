"""Readers of untrusted array files: safetensors and Flax's msgpack.

No code in a file is run, and what a file declares is compared with its actual size before memory is allocated: no file
may be larger than this machine's memory, arrays may not take more bytes than their file, and the number of values in a
msgpack file (where one byte can become a dictionary of 64 bytes) and the size of a header are bounded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdsearch_jax.storage.files import DamagedError, one_line, total_memory

LARGEST = 16 << 30  # bytes of a file
MAX_HEADER = 1 << 24  # bytes of a safetensors header: 100,000 arrays
MAX_VALUES = 1 << 20  # values in a msgpack file; an array counts as four


def check_file(path: Path, limit: int = LARGEST) -> int:
    """Returns the size in bytes of a file that is about to be read into memory.

    Raises:
      DamagedError: it is a pipe or a device, or larger than `limit` or this machine's memory.
    """
    if not path.is_file():
        raise DamagedError(f"{path} is not a regular file")
    size, limit = path.stat().st_size, min(limit, total_memory())
    if size > limit:
        raise DamagedError(f"{path} has {size} bytes, more than the limit of {limit}")
    return size


def check_directory(path: Path, allow_links: bool = True) -> int:
    """Returns the total size in bytes of all files below a directory.

    Raises:
      DamagedError: a file is, or links to, a pipe or a device; or it is a link, which a copy would follow, and
        `allow_links` is False.
    """
    total = 0
    for entry in path.rglob("*"):
        if not allow_links and entry.is_symlink():
            raise DamagedError(f"{entry} is a link; replace it by its target")
        if entry.is_file():
            total += entry.stat().st_size
        elif not entry.is_dir():
            raise DamagedError(f"{entry} is not a regular file")
    return total


def check_declared(tree: Any, limit: int) -> None:
    """Checks the sizes that Orbax's metadata declare.

    Args:
      tree: a pytree with leaves of `orbax.checkpoint.metadata.ArrayMetadata` and other types.
      limit: bytes that all arrays together may take.

    Raises:
      DamagedError: the arrays exceed the limit, or an array is stored in chunks larger than itself.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            continue
        size, storage = math.prod(shape), getattr(leaf, "storage", None)
        total += size * np.dtype(dtype).itemsize
        chunk = getattr(storage, "chunk_shape", None) or ()
        if size < 0 or math.prod(chunk) > max(size, 1):
            raise DamagedError(f"an array of shape {tuple(shape)} is stored in chunks of {tuple(chunk)}")
    if total > limit:
        raise DamagedError(f"its arrays take {total} bytes, more than the limit of {limit}")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file: (arrays by name, metadata).

    Raises:
      DamagedError: it is not a safetensors file, incomplete, or too large.
    """
    with _safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata without the arrays; raises as `read_safetensors` does."""
    with _safetensors(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """Opens a safetensors file."""
    import safetensors

    size = check_file(path)
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if not 0 < header <= min(size - 8, MAX_HEADER):
            raise ValueError(f"its header declares {header} bytes; the file has {size}, the limit is {MAX_HEADER}")
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except Exception as error:  # safetensors' own, and NumPy's for unsupported types and shapes
        raise DamagedError(f"{path} cannot be read as safetensors ({one_line(error)}); is it complete?") from error


def read_msgpack(path: Path) -> Any:
    """Reads the pytree in a file that `flax.serialization.to_bytes` wrote.

    Raises:
      DamagedError: it is not such a file, incomplete, or too large.
    """
    from flax import serialization

    check_file(path)
    try:
        content = path.read_bytes()
        count_values(content)
        return serialization.msgpack_restore(content)
    except Exception as error:  # msgpack's own, and NumPy's
        raise DamagedError(f"{path} cannot be read as Flax's msgpack ({one_line(error)}); is it complete?") from error


def count_values(content: bytes) -> int:
    """Counts the values in a msgpack file, including those inside Flax's arrays; reads headers only.

    Raises:
      ValueError: there are more than MAX_VALUES, or the file ends inside a value.
    """
    values, ends = 0, [len(content)]  # where the file, and the array that `at` is inside of, end
    at, open_ = 0, [1]  # number of values still to come in each
    while open_:
        if not open_[-1]:
            if at != ends[-1]:
                raise ValueError(f"unexpected content at byte {at}")
            open_.pop()
            ends.pop()
            continue
        values += 1
        if values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        if at >= ends[-1]:
            raise ValueError(f"it ends at byte {at}")
        at, inner, nested = _header(content, at)
        if at > ends[-1]:
            raise ValueError(f"a value extends beyond byte {ends[-1]}")
        open_[-1] += inner - 1
        if nested is not None and len(open_) < 2:  # Flax unpacks these, but nothing nested inside them
            open_.append(1)
            ends.append(at)
            at = nested
    return values


# By first byte: (bytes of the length n that follows, values for each of n, bytes of the extension type).
_SIZED = {
    **{0xC4 + i: (1 << i, 0, 0) for i in range(3)},  # bytes
    **{0xC7 + i: (1 << i, 0, 1) for i in range(3)},  # extensions, with a byte for their type
    **{0xD9 + i: (1 << i, 0, 0) for i in range(3)},  # text
    **{0xDC + i: (2 << i, 1, 0) for i in range(2)},  # lists
    **{0xDE + i: (2 << i, 2, 0) for i in range(2)},  # dictionaries
}
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8} | {0xCC + i: 1 << i % 4 for i in range(8)}


def _header(content: bytes, at: int) -> tuple[int, int, int | None]:
    """(end of the header or value at `at`, number of values it contains, start of the payload of a Flax extension)."""
    first = content[at]
    if first < 0x80 or first >= 0xE0:  # a small number
        return at + 1, 0, None
    if first < 0x90:
        return at + 1, 2 * (first & 15), None
    if first < 0xA0:
        return at + 1, first & 15, None
    if first < 0xC0:
        return at + 1 + (first & 31), 0, None
    if first in _FIXED:
        return at + 1 + _FIXED[first], 0, None
    if 0xD4 <= first <= 0xD8:  # extensions of 1 to 16 bytes
        return at + 2 + (1 << first - 0xD4), 0, _payload(content, at + 1)
    if first not in _SIZED:
        raise ValueError(f"no value starts at byte {at}")
    width, values_each, type_bytes = _SIZED[first]
    length, start = int.from_bytes(content[at + 1 : at + 1 + width], "big"), at + 1 + width
    if values_each:
        return start, values_each * length, None
    return start + type_bytes + length, 0, _payload(content, start) if type_bytes else None


def _payload(content: bytes, at: int) -> int | None:
    """Start of an extension's payload, if Flax unpacks its type: array, complex or scalar."""
    return at + 1 if content[at : at + 1] in (b"\1", b"\2", b"\3") else None
