"""A split of a TFDS data set in array_record form: any example by its number, as it was written.

Every record carries a hash, which array_record checks when it is read: a flipped byte is never seen as a pixel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.data import images
from kdsearch_jax.storage.files import DamagedError, one_line

_PIECE, _PIECES = 1 << 16, 256  # bytes, and how many such of a split tell its files from others


@dataclass(frozen=True, eq=False)
class Records:
    """Some or all records of a split; pickles, for processes that decode.

    source: what TFDS's `as_data_source` gave, its images not decoded; what: for messages; image, label: names of the
    two features; classes: their number, below which labels must be, or None not to look; chosen: numbers of the records
    within the split, in the order in which they count here; None: all.
    """

    source: Any
    what: str
    image: str
    label: str
    channels: int
    classes: int | None = None
    chosen: NDArray[np.integer] | None = None

    def __len__(self) -> int:
        """The number of records."""
        return len(self.source) if self.chosen is None else len(self.chosen)

    def __getitem__(self, indices: NDArray[np.integer]) -> Records:
        """Those at `indices`, none of them read."""
        return dataclasses.replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    @cached_property
    def identity(self) -> str:
        """What tells these records from others: name and version, the files' sizes and samples of them, which ones.

        Up to 16 MiB of a split are read: all of a small one; of a large one pieces at equal distances, so that files
        prepared anew from other examples are noticed, and a byte changed in place most likely not.
        """
        info, chosen = self.source.dataset_info, None if self.chosen is None else self.chosen.tobytes()
        split = info.splits[self.source.split]
        told = f"{info.full_name} {self.source.split} {split.shard_lengths} {split.num_bytes}"
        return f"{told} {_sampled(map(Path, split.filepaths))} {zlib.crc32(chosen or b'')}"

    def number(self, index: int) -> int:
        """The number within the split of a record here."""
        return int(index if self.chosen is None else self.chosen[index])

    def read(self, indices: Sequence[int]) -> list[tuple[bytes, int]]:
        """(encoded image, label) of each; ValueError names a record that cannot be read, and its file."""
        numbers = [self.number(index) for index in indices]
        found = []
        if len(numbers) > 1:  # of which array_record makes a pool of threads at every call
            with contextlib.suppress(Exception):  # it has many: one by one below, to name the record
                found = self.source.__getitems__(numbers)
        found = found or [self._one(number) for number in numbers]
        pairs = []
        for number, example in zip(numbers, found, strict=True):
            image, label = example[self.image], example[self.label]
            if not isinstance(image, bytes) or label is None:  # of a file that was cut off, some records read as empty
                raise self._damaged(number, "an empty record")
            pairs.append((image, label := int(label)))
            if self.classes is not None and not 0 <= label < self.classes:
                raise ValueError(
                    f"data.name: {self.what} has label {label} at example {number}, but {self.classes} classes"
                )
        return pairs

    def _one(self, number: int) -> dict[str, Any]:
        try:
            return self.source[number]
        except Exception as error:
            raise self._damaged(number, one_line(error)) from error

    def _damaged(self, number: int, why: str) -> ValueError:
        return ValueError(
            f"data.name: {self.what} is damaged or incomplete at example {number} of {self._file(number)} ({why}); "
            "delete it and prepare it again"
        )

    def _file(self, number: int) -> str:
        """The file of a record, for messages."""
        try:
            split = self.source.dataset_info.splits[self.source.split]
            return str(split.filepaths[int(np.searchsorted(np.cumsum(split.shard_lengths), number, side="right"))])
        except (AttributeError, KeyError, IndexError):
            return "its files"

    def opened(self, encoded: bytes, index: int) -> Any:
        """An image as Pillow has it, within bounds and not decoded yet."""
        return self._told(index, images.opened, encoded)

    def converted(self, image: Any, index: int) -> Any:
        """What `opened` gave, decoded, in Pillow's mode for this number of channels."""
        return self._told(index, images.converted, image, self.channels)

    def pixels(self, image: Any, index: int) -> NDArray[np.uint8]:
        """What `opened` gave, decoded: (height, width, channels)."""
        return self._told(index, images.pixels, image, self.channels)

    def _told(self, index: int, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except DamagedError as error:
            number = self.number(index)
            raise ValueError(
                f"data.name: image {number} of {self.what} cannot be decoded ({error}; {self._file(number)})"
            ) from error


def _sampled(paths: Iterable[Path]) -> str:
    """A digest of the files' sizes, and of pieces of them; one that cannot be read will be named when it is needed."""
    digest, sizes = hashlib.sha256(), {}
    for path in paths:
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_size
    digest.update(str([*sizes.values()]).encode())
    apart, before = max(_PIECE, -(-sum(sizes.values()) // _PIECES)), 0
    for path, size in sizes.items():
        with contextlib.suppress(OSError), path.open("rb") as file:
            for start in range(-before % apart, size, apart):
                file.seek(start)
                digest.update(file.read(_PIECE))
        before += size
    return digest.hexdigest()[:16]
