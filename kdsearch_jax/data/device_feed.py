"""How examples get to the devices: from their own memory, where all of a split lies, or batch by batch from disk.

Training takes a `Feed`. Which examples an update sees is a pure function of its number (`batches.batch_indices`), for
both kinds alike, so a run goes on anywhere; what a feed remembers only makes it fast. A streamed batch is decoded, and
brought to the devices, while the updates before it are computed; every process decodes the rows of its own devices.

Evaluation takes `in_order`, which has every example once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
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


class Feed(Protocol):
    """What training takes batches from.

    Attributes:
      resident: what lies on all devices for all of training: mean and std, and the examples where they are kept.
      resides: whether a batch is indices into them, and else itself.
      waited: seconds in which updates have waited for data, of those in which nothing else was done.
    """

    resident: dict[str, Any]
    resides: bool
    waited: float

    def take(self, first: int, count: int, seed: int) -> Any:
        """The batches of the updates `first`, …, `first + count − 1`: a function of the arguments alone."""

    def close(self) -> None:
        """Ends whatever works ahead."""


def make(dataset: Dataset, batch_size: int, mesh: Mesh, steps: int) -> Feed:
    """The feed of a data set's training split. steps: of the stage; nothing is read for updates beyond."""
    constants = {name: np.asarray(getattr(dataset, name), np.float32) for name in ("mean", "std")}
    reader = streaming.reader_of(dataset.train.arrays)
    if reader is None:
        return Resident(dataset, batch_size, replicate({"arrays": dataset.train.arrays, **constants}, mesh))
    return Streamed(reader, batch_size, replicate(constants, mesh), NamedSharding(mesh, PartitionSpec("data")), steps)


class Resident:
    """A `Feed` of examples that lie on the devices: sends indices, (updates, batch)."""

    resides, waited = True, 0.0

    def __init__(self, dataset: Dataset, batch_size: int, resident: dict[str, Any]):
        self.resident, self._examples, self._batch_size = resident, len(dataset.train), batch_size

    def take(self, first: int, count: int, seed: int) -> NDArray[np.int32]:
        """As of `Feed`."""
        return batch_indices(seed, self._examples, self._batch_size, first, count)

    def close(self) -> None:
        """As of `Feed`."""


class Streamed:
    """A `Feed` of examples on disk: sends batches, each on the devices when it is asked for, or soon after."""

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
        self._next: tuple[int, int] | None = None  # (seed, update) of what `_batches` gives next
        self._batches: Any = None

    def take(self, first: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """As of `Feed`; goes on where the call before has ended, or begins anew elsewhere."""
        for step in range(first, first + count):
            start = time.perf_counter()
            if self._next != (seed, step):
                self._open(seed, step)
            batch = _next(self._batches, self._reader)
            self._next = seed, step + 1
            self.waited += time.perf_counter() - start
            yield batch

    def close(self) -> None:
        """As of `Feed`."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._next = None

    def _open(self, seed: int, first: int) -> None:
        self.close()
        rows, size = local_rows(self._sharding, self._batch_size), self._batch_size
        order = streaming.Order(seed, len(self._reader), size, rows)
        put = partial(assemble, held=rows, sharding=self._sharding, rows=size)
        stop = max(self._steps, first + 1)
        self._batches = iter(streaming.batches(self._reader, order, len(rows), first, stop, put))


def in_order(
    arrays: Mapping[str, Any], batch_size: int, sharding: NamedSharding
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32], Any]]:
    """Every example once, on the devices: (indices, weights, arrays) as `padded_batches` has them."""
    reader, examples = streaming.reader_of(arrays), len(jax.tree.leaves(arrays)[0])
    if reader is None:
        for indices, weights in padded_batches(examples, batch_size):
            yield indices, weights, place(jax.tree.map(lambda x, i=indices: x[i], arrays), sharding)
        return
    rows, count = local_rows(sharding, batch_size), -(-examples // batch_size)
    put = partial(assemble, held=rows, sharding=sharding, rows=batch_size)
    place_of = streaming.InOrder(examples, batch_size, rows)
    with closing(iter(streaming.batches(reader, place_of, len(rows), 0, count, put))) as made:
        for indices, weights in padded_batches(examples, batch_size):
            batch = _next(made, reader)
            yield indices, weights, {entry: batch[entry] for entry in arrays}


def _next(batches: Any, reader: streaming.Reader) -> Any:
    """The next batch; ValueError where a process that decodes has ended."""
    try:
        return next(batches)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        why = str(error).partition(". ")[0]
        raise ValueError(
            f"data.workers: a process that decodes {reader.records.what} has ended ({why}); where memory is short, "
            "give fewer, or a smaller data.prefetch"
        ) from error
