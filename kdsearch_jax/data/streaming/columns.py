"""An entry of a split that is read from disk when it is indexed, and stands where else an array does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.data.streaming.framing import Framing
from kdsearch_jax.data.streaming.records import Records

ENTRIES = ("images", "labels")
_CHUNK = 1000  # records read at a time, where only labels are wanted


@dataclass(frozen=True, eq=False)
class Reader:
    """number of an example → {"images": uint8 (height, width, channels), "labels": int32 ()}.

    shape: of every image. workers: processes that decode, 0 for threads of this one; prefetch: batches decoded ahead.
    """

    records: Records
    framing: Framing
    shape: tuple[int, ...]
    workers: int = 0
    prefetch: int = 2

    @staticmethod
    def of(records: Records, framing: Framing, workers: int = 0, prefetch: int = 2) -> Reader:
        """A reader of images of the framing's size, or as large as the first."""
        if framing.size is not None:
            return Reader(records, framing, (framing.size, framing.size, records.channels), workers, prefetch)
        ((encoded, _),) = records.read([0])
        return Reader(records, framing, framing.image(records, encoded, 0).shape, workers, prefetch)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.records)

    def __call__(self, index: int, random: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """An example; random: as it is seen in training."""
        ((encoded, label),) = self.records.read([index])
        return {"images": self.image(encoded, index, random), "labels": np.asarray(label, np.int32)}

    def image(self, encoded: bytes, index: int, random: np.random.Generator | None = None) -> NDArray[np.uint8]:
        """The image of an example whose record has been read."""
        image = self.framing.image(self.records, encoded, index, random)
        if image.shape != self.shape:
            raise ValueError(
                f"data.image_size: None keeps sizes, but images of {self.records.what} differ in them, "
                f"{self.shape[:2]} and {image.shape[:2]}; give a side in pixels"
            )
        return image

    @property
    def identity(self) -> str:
        """What tells these examples from others."""
        return f"{self.records.identity} {self.framing}"

    def columns(self) -> dict[str, Column]:
        """The split's entries."""
        return {"images": Column(self, "images"), "labels": Column(self, "labels")}


@dataclass(frozen=True, eq=False)
class Column:
    """What a reader reads under one name: has shape and type of an array, and gives one when it is indexed."""

    reader: Reader
    entry: str
    _read: list[NDArray[np.int32]] = field(default_factory=list, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self.reader), *(self.reader.shape if self.entry == "images" else ()))

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """As of an array."""
        return np.dtype(np.uint8 if self.entry == "images" else np.int32)

    @property
    def identity(self) -> str:
        """As of the reader."""
        return self.reader.identity

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.reader)

    def __getitem__(self, indices: Any) -> np.ndarray:
        """The rows at an array of numbers, or in a slice, as evaluation sees them."""
        chosen = np.arange(len(self))[indices]
        if self.entry == "labels":
            return np.asarray(self)[chosen] if self._read else self._labels(np.atleast_1d(chosen)).reshape(chosen.shape)
        rows = [self.reader(int(index))["images"] for index in chosen.ravel()]
        return np.array(rows, np.uint8).reshape(*chosen.shape, *self.reader.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All labels, which are read once without their images and kept; ValueError for images."""
        if self.entry == "images":
            raise ValueError("images: they are streamed because they do not fit into memory; take some of them")
        if not self._read:
            self._read.append(self._labels(np.arange(len(self))))
        return self._read[0] if dtype is None else self._read[0].astype(dtype)

    def _labels(self, indices: NDArray[np.integer]) -> NDArray[np.int32]:
        parts = (indices[start : start + _CHUNK].tolist() for start in range(0, len(indices), _CHUNK))
        return np.array([label for part in parts for _, label in self.reader.records.read(part)], np.int32)


def reader_of(arrays: Mapping[str, Any]) -> Reader | None:
    """The reader behind a split's entries; None where they are arrays."""
    leaf = jax.tree.leaves(arrays)[0]
    return leaf.reader if isinstance(leaf, Column) else None
