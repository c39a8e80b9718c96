"""Arrays out of files that anybody may have written: safetensors, and Flax's msgpack.

No code of a file is run, and what a file declares is held against what it has before memory is spent on it: no file is
larger than this machine's memory, none of arrays takes more than it has bytes, and the parts of msgpack (a byte can
stand for a dictionary of 64) and of a header are bounded in number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdsearch_jax.storage.files import DamagedError, line, memory

LARGEST = 16 << 30  # bytes of a file
MAX_HEADER = 1 << 24  # bytes of a safetensors header: 100,000 arrays
MAX_VALUES = 1 << 20  # values in a msgpack file, an array being four


def check_file(path: Path, limit: int = LARGEST) -> int:
    """The bytes of a file that may be read whole.

    Raises:
      DamagedError: it is a pipe or a device, or larger than `limit` or this machine's memory.
    """
    if not path.is_file():
        raise DamagedError(f"{path} is no regular file")
    size, limit = path.stat().st_size, min(limit, memory())
    if size > limit:
        raise DamagedError(f"{path} has {size} bytes; at most {limit} are read")
    return size


def check_directory(path: Path, links: bool = True) -> int:
    """The bytes of all files below a directory.

    Raises:
      DamagedError: one is, or links to, a pipe or a device; or, without `links`, is a link, which a copy would follow.
    """
    total = 0
    for entry in path.rglob("*"):
        if not links and entry.is_symlink():
            raise DamagedError(f"{entry} is a link; put what it leads to in its place")
        if entry.is_file():
            total += entry.stat().st_size
        elif not entry.is_dir():
            raise DamagedError(f"{entry} is no regular file")
    return total


def check_declared(tree: Any, limit: int) -> None:
    """Holds what Orbax's metadata declare against a number of bytes.

    tree: a pytree of `orbax.checkpoint.metadata.ArrayMetadata` and others.

    Raises:
      DamagedError: all arrays together take more, or one is stored in pieces larger than itself.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            continue
        size, storage = math.prod(shape), getattr(leaf, "storage", None)
        total += size * np.dtype(dtype).itemsize
        pieces = getattr(storage, "chunk_shape", None) or ()
        if size < 0 or math.prod(pieces) > max(size, 1):
            raise DamagedError(f"an array of {tuple(shape)} is stored in pieces of {tuple(pieces)}")
    if total > limit:
        raise DamagedError(f"its arrays take {total} bytes, and {limit} are allowed")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a safetensors file.

    Raises:
      DamagedError: it is none, incomplete, or out of bounds.
    """
    with _safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, without reading the arrays. Raises as above."""
    with _safetensors(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened."""
    import safetensors

    size = check_file(path)
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if not 0 < header <= min(size - 8, MAX_HEADER):
            raise ValueError(f"its header declares {header} bytes, the file has {size}, and {MAX_HEADER} are allowed")
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except Exception as error:  # its own, and NumPy's, for types and shapes that NumPy has not
        raise DamagedError(f"{path} cannot be read as safetensors ({line(error)}); is it complete?") from error


def read_msgpack(path: Path) -> Any:
    """The pytree in a file that `flax.serialization.to_bytes` wrote.

    Raises:
      DamagedError: it is none, incomplete, or out of bounds.
    """
    from flax import serialization

    check_file(path)
    try:
        content = path.read_bytes()
        count_values(content)
        return serialization.msgpack_restore(content)
    except Exception as error:  # msgpack's own, and NumPy's
        raise DamagedError(f"{path} cannot be read as Flax's msgpack ({line(error)}); is it complete?") from error


def count_values(content: bytes) -> int:
    """How many values a msgpack file holds, those within Flax's arrays included; reads headers only.

    Raises:
      ValueError: there are more than MAX_VALUES, or the file ends within one.
    """
    values, ends = 0, [len(content)]  # where the file, and the arrays around the place, end
    at, open_ = 0, [1]  # values yet to come in each
    while open_:
        if not open_[-1]:
            if at != ends[-1]:
                raise ValueError(f"something follows at byte {at}")
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
            raise ValueError(f"a value reaches beyond byte {ends[-1]}")
        open_[-1] += inner - 1
        if nested is not None and len(open_) < 2:  # Flax unpacks these, and nothing within them
            open_.append(1)
            ends.append(at)
            at = nested
    return values


# After the first byte: (bytes that give a number n, values that follow for each, bytes of their own that follow).
_SIZED = {
    **{0xC4 + i: (1 << i, 0, 0) for i in range(3)},  # bytes
    **{0xC7 + i: (1 << i, 0, 1) for i in range(3)},  # extensions, with a byte for their kind
    **{0xD9 + i: (1 << i, 0, 0) for i in range(3)},  # text
    **{0xDC + i: (2 << i, 1, 0) for i in range(2)},  # lists
    **{0xDE + i: (2 << i, 2, 0) for i in range(2)},  # dictionaries
}
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8} | {0xCC + i: 1 << i % 4 for i in range(8)}


def _header(content: bytes, at: int) -> tuple[int, int, int | None]:
    """(end of the value at `at`, values that follow and are its own, where the payload of one of Flax's begins)."""
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
        raise ValueError(f"byte {at} begins no value")
    width, each, kind = _SIZED[first]
    number, start = int.from_bytes(content[at + 1 : at + 1 + width], "big"), at + 1 + width
    if each:
        return start, each * number, None
    return start + kind + number, 0, _payload(content, start) if kind else None


def _payload(content: bytes, at: int) -> int | None:
    """Where an extension's payload begins, if its kind is one that Flax unpacks: an array, a complex, a scalar."""
    return at + 1 if content[at : at + 1] in (b"\1", b"\2", b"\3") else None
