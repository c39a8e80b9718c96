"""An entry of a split that is read from disk when it is indexed, in place of an array."""

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
_CHUNK = 1000  # records read at a time for their labels


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads examples: index → {"images": uint8 (height, width, channels), "labels": int32 ()}.

    shape: of each image. workers: decoding processes, 0 for threads of this one; prefetch: batches decoded ahead.
    """

    records: Records
    framing: Framing
    shape: tuple[int, ...]
    workers: int = 0
    prefetch: int = 2

    @staticmethod
    def of(records: Records, framing: Framing, workers: int = 0, prefetch: int = 2) -> Reader:
        """A reader of images with the framing's size, or else the size of the first image."""
        if framing.size is not None:
            return Reader(records, framing, (framing.size, framing.size, records.channels), workers, prefetch)
        ((encoded, _),) = records.read([0])
        return Reader(records, framing, framing.image(records, encoded, 0).shape, workers, prefetch)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.records)

    def __call__(self, index: int, random: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Reads an example; with `random`, framed as in training."""
        ((encoded, label),) = self.records.read([index])
        return {"images": self.image(encoded, index, random), "labels": np.asarray(label, np.int32)}

    def image(self, encoded: bytes, index: int, random: np.random.Generator | None = None) -> NDArray[np.uint8]:
        """The framed image of an example whose record has been read."""
        image = self.framing.image(self.records, encoded, index, random)
        if image.shape != self.shape:
            raise ValueError(
                f"data.image_size: None requires images of equal size, but {self.records.what} has {self.shape[:2]} "
                f"and {image.shape[:2]}; give a side in pixels"
            )
        return image

    @property
    def identity(self) -> str:
        """A fingerprint of the examples and their framing."""
        return f"{self.records.identity} {self.framing}"

    def columns(self) -> dict[str, Column]:
        """The entries of the split."""
        return {"images": Column(self, "images"), "labels": Column(self, "labels")}


@dataclass(frozen=True, eq=False)
class Column:
    """One entry of a reader's examples; has the shape and dtype of an array, and reads one when indexed."""

    reader: Reader
    entry: str
    _read: list[NDArray[np.int32]] = field(default_factory=list, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """See NumPy."""
        return (len(self.reader), *(self.reader.shape if self.entry == "images" else ()))

    @property
    def ndim(self) -> int:
        """See NumPy."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """See NumPy."""
        return np.dtype(np.uint8 if self.entry == "images" else np.int32)

    @property
    def identity(self) -> str:
        """See `Reader.identity`."""
        return self.reader.identity

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.reader)

    def __getitem__(self, indices: Any) -> np.ndarray:
        """The rows at an array of indices, or in a slice, framed as in evaluation."""
        rows = np.arange(len(self))[indices]
        if self.entry == "labels":
            return np.asarray(self)[rows] if self._read else self._read_labels(np.atleast_1d(rows)).reshape(rows.shape)
        images = [self.reader(int(index))["images"] for index in rows.ravel()]
        return np.array(images, np.uint8).reshape(*rows.shape, *self.reader.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All labels, which are read once without their images and cached; ValueError for images."""
        if self.entry == "images":
            raise ValueError("images: streamed images do not fit in memory; index some of them")
        if not self._read:
            self._read.append(self._read_labels(np.arange(len(self))))
        return self._read[0] if dtype is None else self._read[0].astype(dtype)

    def _read_labels(self, indices: NDArray[np.integer]) -> NDArray[np.int32]:
        chunks = (indices[start : start + _CHUNK].tolist() for start in range(0, len(indices), _CHUNK))
        return np.array([label for chunk in chunks for _, label in self.reader.records.read(chunk)], np.int32)


def reader_of(arrays: Mapping[str, Any]) -> Reader | None:
    """The reader of a streamed split's entries; None for arrays."""
    leaf = jax.tree.leaves(arrays)[0]
    return leaf.reader if isinstance(leaf, Column) else None
