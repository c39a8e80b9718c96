"""How examples reach the devices: resident there, streamed from disk batch by batch, or from the user's own iterator.

Training takes batches from a `Feed`. For resident and streamed examples, those of an update are a pure function of its
number (`batches.batch_indices`), so a run can continue anywhere; state in a feed only makes it fast. A streamed batch
is decoded and sent to the devices while earlier updates are computed; each process decodes the rows of its own devices.

`evaluation_batches` yields every example once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from kdsearch_jax.adapters.devices import assemble, local_rows, place, replicate
from kdsearch_jax.data import streaming
from kdsearch_jax.data.batches import batch_indices, padded_batches
from kdsearch_jax.data.examples import Dataset

OwnBatches = Callable[[int], Iterator[Mapping[str, Any]]]  # from an update on, see `kdsearch_jax.training.loop.fit`
# (first update, indices (updates, batch), resident) → {entry: array (updates, batch, …)}
UpdateEntries = Callable[[int, NDArray[np.int32], dict[str, Any]], dict[str, Any]]


@partial(jax.tree_util.register_dataclass, data_fields=["indices", "entries"], meta_fields=[])
@dataclass(frozen=True)
class IndexedBatches:
    """Batches of resident examples, with entries that differ from update to update.

    Attributes:
      indices: (updates, batch) or (batch,), into the resident examples.
      entries: {entry: array (updates, batch, …) or (batch, …)}, added to those of the examples.
    """

    indices: Any
    entries: dict[str, Any]

    def __iter__(self) -> Iterator[IndexedBatches]:
        """The batch of each update."""
        for update, indices in enumerate(self.indices):
            yield IndexedBatches(indices, {entry: values[update] for entry, values in self.entries.items()})


class Feed(Protocol):
    """A source of training batches.

    Attributes:
      resident: arrays that stay on all devices: mean and std, and the examples if they reside there.
      resides: whether batches are indices into the resident examples, as opposed to arrays.
      waited: seconds that updates have waited for data.
    """

    resident: dict[str, Any]
    resides: bool
    waited: float

    def take(self, first: int, count: int, seed: int) -> Any:
        """The batches of the updates `first`, …, `first + count − 1`, whose order depends on `seed`."""

    def close(self) -> None:
        """Stops threads and processes that work ahead."""


def training_feed(
    dataset: Dataset,
    batch_size: int,
    mesh: Mesh,
    steps: int,
    batches: OwnBatches | None = None,
    entries: UpdateEntries | None = None,
) -> Feed:
    """The feed of a data set's training split, or of `batches`.

    Args:
      steps: of the stage; nothing is read for later updates.
      entries: further entries of each update's batch; only for examples that reside on the devices.
    """
    constants = {name: np.asarray(getattr(dataset, name), np.float32) for name in ("mean", "std")}
    if batches is not None:
        return IteratorFeed(batches, batch_size, replicate(constants, mesh))
    reader = streaming.reader_of(dataset.train.arrays)
    if reader is None:
        resident = replicate({"arrays": dataset.train.arrays, **constants}, mesh)
        return ResidentFeed(dataset, batch_size, resident, entries)
    assert entries is None
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return StreamedFeed(reader, batch_size, replicate(constants, mesh), sharding, steps)


class ResidentFeed:
    """A `Feed` of examples that reside on the devices: sends indices, (updates, batch), and further entries."""

    resides, waited = True, 0.0

    def __init__(
        self, dataset: Dataset, batch_size: int, resident: dict[str, Any], entries: UpdateEntries | None = None
    ):
        self.resident, self._examples, self._batch_size = resident, len(dataset.train), batch_size
        self._entries = entries

    def take(self, first: int, count: int, seed: int) -> NDArray[np.int32] | IndexedBatches:
        """See `Feed`."""
        indices = batch_indices(seed, self._examples, self._batch_size, first, count)
        return (
            indices if self._entries is None else IndexedBatches(indices, self._entries(first, indices, self.resident))
        )

    def close(self) -> None:
        """See `Feed`."""


class StreamedFeed:
    """A `Feed` of examples on disk: sends batches, prefetched to the devices."""

    resides = False

    def __init__(
        self,
        reader: streaming.Reader,
        batch_size: int,
        resident: dict[str, Any],
        sharding: NamedSharding,
        steps: int,
    ):
        self.resident, self.waited = resident, 0.0
        self._reader, self._batch_size, self._sharding, self._steps = reader, batch_size, sharding, steps
        self._next: tuple[int, int] | None = None  # (seed, update) of the next batch in `_batches`
        self._batches: Any = None

    def take(self, first: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """See `Feed`; consecutive calls continue the same stream."""
        for step in range(first, first + count):
            start = time.perf_counter()
            if self._next != (seed, step):
                self._open(seed, step)
            batch = _next_batch(self._batches, self._reader)
            self._next = seed, step + 1
            self.waited += time.perf_counter() - start
            yield batch

    def close(self) -> None:
        """See `Feed`."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._next = None

    def _open(self, seed: int, first: int) -> None:
        self.close()
        rows, size = local_rows(self._sharding, self._batch_size), self._batch_size
        order = streaming.ShuffledOrder(seed, len(self._reader), size, rows)
        put = partial(assemble, held=rows, sharding=self._sharding, rows=size)
        stop = max(self._steps, first + 1)
        self._batches = iter(streaming.batches(self._reader, order, len(rows), first, stop, put))


class IteratorFeed:
    """A `Feed` of the user's own batches."""

    resides = False

    def __init__(self, batches: OwnBatches, batch_size: int, resident: dict[str, Any]):
        self.resident, self.waited = resident, 0.0
        self._open, self._batch_size = batches, batch_size
        self._batches: Iterator[Mapping[str, Any]] | None = None

    def take(self, first: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """See `Feed`; the order is the iterator's, which is never opened again."""
        if self._batches is None:
            self._batches = iter(self._open(first))
        for step in range(first, first + count):
            start = time.perf_counter()
            batch = next(self._batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                raise ValueError(f"batches: the iterator ended at update {step}; give one for all steps of the stage")
            for entry, tree in batch.items():
                for leaf in jax.tree.leaves(tree):
                    if np.shape(leaf)[:1] != (self._batch_size,):
                        raise ValueError(
                            f"batches: {entry!r} has shape {np.shape(leaf)} at update {step}; its first axis must be "
                            f"batch_size={self._batch_size}"
                        )
            yield dict(batch)

    def close(self) -> None:
        """See `Feed`."""


def evaluation_batches(
    arrays: Mapping[str, Any], batch_size: int, sharding: NamedSharding
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32], Any]]:
    """Every example once, on the devices: (indices, weights, arrays), with the padding of `padded_batches`."""
    reader, examples = streaming.reader_of(arrays), len(jax.tree.leaves(arrays)[0])
    if reader is None:
        for indices, weights in padded_batches(examples, batch_size):
            yield indices, weights, place(jax.tree.map(lambda x, i=indices: x[i], arrays), sharding)
        return
    rows, count = local_rows(sharding, batch_size), -(-examples // batch_size)
    put = partial(assemble, held=rows, sharding=sharding, rows=batch_size)
    order = streaming.SequentialOrder(examples, batch_size, rows)
    with closing(iter(streaming.batches(reader, order, len(rows), 0, count, put))) as batches:
        for indices, weights in padded_batches(examples, batch_size):
            batch = _next_batch(batches, reader)
            yield indices, weights, {entry: batch[entry] for entry in arrays}


def _next_batch(batches: Any, reader: streaming.Reader) -> Any:
    """The next batch; ValueError if a decoding process has died."""
    try:
        return next(batches)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        why = str(error).partition(". ")[0]
        raise ValueError(
            f"data.workers: a process that decodes {reader.records.what} has died ({why}); if memory is short, use "
            "fewer, or a smaller data.prefetch"
        ) from error
