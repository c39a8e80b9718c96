"""A split of a TFDS data set in array_record format, with random access to its encoded examples.

array_record checks the hash of each record that it reads, so a flipped byte never becomes a pixel.
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

_SAMPLE_BYTES, _SAMPLES = 1 << 16, 256  # of a split's files, for its fingerprint


@dataclass(frozen=True, eq=False)
class Records:
    """Some or all records of a split; can be pickled for decoding processes.

    source: what TFDS's `as_data_source` returned, with encoded images; what: for messages; image, label: names of the
    two features; classes: their number, to check labels, or None; chosen: numbers of the selected records within the
    split, in order; None for all.
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
        """The records at `indices`, without reading them."""
        return dataclasses.replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the records: name and version, sizes and samples of the files, and the selection.

        At most 16 MiB of a split are read: all of a small one, and samples at equal distances of a large one, which
        detects files prepared from other examples, but most likely not a byte changed in place.
        """
        info, chosen = self.source.dataset_info, None if self.chosen is None else self.chosen.tobytes()
        split = info.splits[self.source.split]
        name = f"{info.full_name} {self.source.split} {split.shard_lengths} {split.num_bytes}"
        return f"{name} {_sample_digest(map(Path, split.filepaths))} {zlib.crc32(chosen or b'')}"

    def number(self, index: int) -> int:
        """The number within the split of a selected record."""
        return int(index if self.chosen is None else self.chosen[index])

    def read(self, indices: Sequence[int]) -> list[tuple[bytes, int]]:
        """Reads (encoded image, label) of each record; ValueError names a damaged record and its file."""
        numbers = [self.number(index) for index in indices]
        examples = []
        if len(numbers) > 1:  # otherwise array_record would start a thread pool for a single record
            with contextlib.suppress(Exception):  # read one by one below, to name the record
                examples = self.source.__getitems__(numbers)
        examples = examples or [self._read_one(number) for number in numbers]
        pairs = []
        for number, example in zip(numbers, examples, strict=True):
            image, label = example[self.image], example[self.label]
            if not isinstance(image, bytes) or label is None:  # of a truncated file, some records read as empty
                raise self._damaged(number, "an empty record")
            pairs.append((image, label := int(label)))
            if self.classes is not None and not 0 <= label < self.classes:
                raise ValueError(
                    f"data.name: {self.what} has label {label} at example {number}, but only {self.classes} classes"
                )
        return pairs

    def _read_one(self, number: int) -> dict[str, Any]:
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

    def open_image(self, encoded: bytes, index: int) -> Any:
        """Opens an image without decoding it; as the two below, ValueError names the record."""
        return self._name_in_errors(index, images.open_image, encoded)

    def convert(self, image: Any, index: int) -> Any:
        """Decodes an opened image to a Pillow image with this split's number of channels."""
        return self._name_in_errors(index, images.convert, image, self.channels)

    def to_array(self, image: Any, index: int) -> NDArray[np.uint8]:
        """Decodes an opened image to (height, width, channels)."""
        return self._name_in_errors(index, images.to_array, image, self.channels)

    def _name_in_errors(self, index: int, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except DamagedError as error:
            number = self.number(index)
            raise ValueError(
                f"data.name: image {number} of {self.what} cannot be decoded ({error}; {self._file(number)})"
            ) from error


def _sample_digest(paths: Iterable[Path]) -> str:
    """A digest of the files' sizes and of samples of them; unreadable files are skipped and reported when needed."""
    digest, sizes = hashlib.sha256(), {}
    for path in paths:
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_size
    digest.update(str([*sizes.values()]).encode())
    distance, before = max(_SAMPLE_BYTES, -(-sum(sizes.values()) // _SAMPLES)), 0
    for path, size in sizes.items():
        with contextlib.suppress(OSError), path.open("rb") as file:
            for start in range(-before % distance, size, distance):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        before += size
    return digest.hexdigest()[:16]
