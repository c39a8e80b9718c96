"""Batches of streamed examples, read and decoded ahead by grain, in threads or in processes.

An order maps the number of a row, counted over all batches of this process, to an example and its random generator. Any
batch can therefore be computed without the ones before it, and grain needs no stored state to continue.

Threads share the GIL, which Pillow releases while it decodes and resizes: enough for four to ten cores. Beyond that,
use processes; each makes whole batches in turn, so their number affects nothing but the speed.
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

RowOrder = Callable[[int], tuple[int, np.random.Generator | None]]  # row → (index of its example, its randomness)

_FRAMING_STREAM = 0xF4A3E  # keeps the randomness of framing apart
_MAX_THREADS = 32
_GRACE = 60  # seconds that a decoding process continues after SIGTERM


@dataclass(frozen=True)
class ShuffledOrder:
    """The training order, equal to `batch_indices`; this process makes the rows `rows` of each batch.

    The randomness of an example depends only on seed, epoch and the example.
    """

    seed: int
    examples: int
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, number: int) -> tuple[int, np.random.Generator]:
        """The example in row `number` of this process, and its random generator."""
        update, row = divmod(number, len(self.rows))
        epoch, batch = divmod(update, self.examples // self.batch_size)
        example = int(epoch_order(self.seed, epoch, self.examples)[batch * self.batch_size + self.rows[row]])
        return example, np.random.default_rng([self.seed, epoch, example, _FRAMING_STREAM])


@dataclass(frozen=True)
class SequentialOrder:
    """Every example once, in order, equal to `padded_batches`; this process makes the rows `rows` of each batch."""

    examples: int
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, number: int) -> tuple[int, None]:
        """The example in row `number` of this process."""
        batch, row = divmod(number, len(self.rows))
        example = batch * self.batch_size + self.rows[row]
        return (example if example < self.examples else 0), None


@dataclass(frozen=True)
class _ReadRow:
    reader: Reader
    order: RowOrder

    def __call__(self, number: Any) -> dict[str, np.ndarray]:
        index, random = self.order(int(number))
        return self.reader(index, random)


def batches(
    reader: Reader, order: RowOrder, rows: int, first: int, stop: int, put: Callable[[Any], Any] | None = None
) -> Any:
    """A grain data set of the batches `first`, …, `stop − 1`; close its iterator after use.

    Args:
      reader: reads an example.
      order: maps rows to examples.
      rows: number of rows per batch in this process.
      put: called with each batch, in a thread and one batch ahead, to send it to the devices.
    """
    import grain

    ahead = max(1, reader.prefetch)
    numbers = grain.MapDataset.range(first * rows, stop * rows).map(_ReadRow(reader, order))
    if reader.workers > 0:
        _parse_flags()
        dataset = numbers.batch(rows).to_iter_dataset(grain.ReadOptions(1, 1))
        options = grain.MultiprocessingOptions(reader.workers, ahead)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_exit_with_parent).map(_copy)
    else:
        threads = min(_MAX_THREADS, 2 + available_cores(), ahead * rows)  # some of them wait for the disk
        dataset = numbers.to_iter_dataset(grain.ReadOptions(threads, ahead * rows)).batch(rows)
    if put is not None:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset.map(put), prefetch_buffer_size=1)
    return dataset


def _copy(batch: Any) -> Any:
    """Copies a batch out of the memory that is shared with a decoding process, and returned to it."""
    return {entry: np.array(leaf) for entry, leaf in batch.items()}


def _parse_flags() -> None:
    """Marks absl's flags as parsed: grain passes them on to its processes, and nothing else here uses absl."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _exit_with_parent(index: int, count: int) -> None:
    """Runs in a decoding process: exits when the training process is gone, for whatever reason, and not before.

    A scheduler sends SIGTERM to all processes, but the training process still needs batches while it saves.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_later(*_: Any) -> None:
        timer = threading.Timer(_GRACE, os._exit, (1,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, exit_later)
