"""Batches ahead of who asks for them: grain reads and decodes, in threads of this process or in processes of its own.

A place is a function from the number of a row, counted over all batches that this process makes, to the example that
belongs there, and to its chance. So any batch can be had without those before it, and grain needs no state to go on.

Threads share Python's lock, which Pillow gives back while it decodes and resizes: some four to ten cores' worth. Beyond
that, processes; each makes whole batches in turn, so their number changes nothing but the time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdsearch_jax.data.batches import epoch_order
from kdsearch_jax.data.streaming.columns import Reader
from kdsearch_jax.storage.files import available_cores

Place = Callable[[int], tuple[int, np.random.Generator | None]]

_FRAMES = 0xF4A3E  # a stream of its own
_THREADS = 32
_GRACE = 60  # seconds that a process goes on after SIGTERM


@dataclass(frozen=True)
class Order:
    """Where examples are in training: those of `batch_indices`, of which this process makes the rows `rows`.

    The chance of an example depends on seed, epoch and the example alone.
    """

    seed: int
    examples: int
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, number: int) -> tuple[int, np.random.Generator]:
        """The example in row `number` of this process, and its chance."""
        update, row = divmod(number, len(self.rows))
        epoch, batch = divmod(update, self.examples // self.batch_size)
        example = int(epoch_order(self.seed, epoch, self.examples)[batch * self.batch_size + self.rows[row]])
        return example, np.random.default_rng([self.seed, epoch, example, _FRAMES])


@dataclass(frozen=True)
class InOrder:
    """Every example once, in order, as `padded_batches` has them; this process makes the rows `rows`."""

    examples: int
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, number: int) -> tuple[int, None]:
        """The example in row `number` of this process."""
        batch, row = divmod(number, len(self.rows))
        example = batch * self.batch_size + self.rows[row]
        return (example if example < self.examples else 0), None


@dataclass(frozen=True)
class _Example:
    reader: Reader
    place: Place

    def __call__(self, number: Any) -> dict[str, np.ndarray]:
        index, random = self.place(int(number))
        return self.reader(index, random)


def batches(
    reader: Reader, place: Place, rows: int, first: int, stop: int, put: Callable[[Any], Any] | None = None
) -> Any:
    """A grain dataset of the batches `first`, …, `stop − 1`, of `rows` examples each; close its iterator.

    put: what is done with each batch, in a thread of its own and one batch ahead: it brings them to the devices.
    """
    import grain

    ahead, process = max(1, reader.prefetch), reader.workers > 0
    numbers = grain.MapDataset.range(first * rows, stop * rows).map(_Example(reader, place))
    if process:
        _parse_flags()
        made = numbers.batch(rows).to_iter_dataset(grain.ReadOptions(1, 1))
        options = grain.MultiprocessingOptions(reader.workers, ahead)
        made = made.mp_prefetch(options, worker_init_fn=_leave_with_parent).map(_copied)
    else:
        threads = min(_THREADS, 2 + available_cores(), ahead * rows)  # some wait for the disk
        made = numbers.to_iter_dataset(grain.ReadOptions(threads, ahead * rows)).batch(rows)
    if put is not None:
        made = grain.experimental.ThreadPrefetchIterDataset(made.map(put), prefetch_buffer_size=1)
    return made


def _copied(batch: Any) -> Any:
    """Out of the memory shared with the process that made it, which goes back to it."""
    return {entry: np.array(leaf) for entry, leaf in batch.items()}


def _parse_flags() -> None:
    """grain hands its command line flags on to its processes, and nobody else has parsed them here."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _leave_with_parent(index: int, count: int) -> None:
    """In a process that decodes: ends it when the one that asked is gone, however that ended, and not before.

    A scheduler that takes a machine away tells all processes, but the one that trains goes on for a moment, to save.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_later(*_: Any) -> None:
        timer = threading.Timer(_GRACE, os._exit, (1,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, leave_later)
