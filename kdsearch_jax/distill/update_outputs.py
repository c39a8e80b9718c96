"""Cached teacher outputs under augmentation: one entry for each training update.

Batches and augmentation are pure functions of (seed, update), so all students that are trained with the same seed see
the same images in the same update. The teacher's outputs for them are computed once, rounded to float16 and stored
(`kdsearch_jax.distill.output_store`). An update whose outputs are missing computes and stores them first, in a program
of its own, so the student's step is the same, and sees the same numbers, whether they were stored or not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from kdsearch_jax.adapters.apply import compiled_for
from kdsearch_jax.adapters.devices import data_mesh, place, replicate
from kdsearch_jax.data import streaming
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill.output_store import OutputStore
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.teacher_cache import KEY
from kdsearch_jax.training import loop
from kdsearch_jax.training.settings import RunConfig, StageConfig

LARGEST = 1 << 32  # bytes of a file of outputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpdateCache:
    """Where the outputs of a stage's updates are stored, for all stages that see the same batches.

    Attributes:
      directory: of an `OutputStore`.
      seed: of the stage's batches and augmentation.
      origin: what else the outputs depend on, as JSON: digests of teacher and data.
    """

    directory: Path
    seed: int
    origin: Mapping[str, Any]


@dataclass(eq=False)
class UpdateOutputs:
    """The teacher's outputs as entries of the batches, see `loop.fit`.

    Attributes:
      outputs: (variables, batch) → logits (batch, classes).
      variables: the teacher's.
    """

    store: OutputStore
    outputs: Any
    variables: Any
    data: DataConfig
    seed: int
    _resident: Any = field(default=None, init=False)

    def __call__(self, first: int, indices: NDArray[np.int32], resident: dict[str, Any]) -> dict[str, NDArray]:
        """{`teacher_cache.KEY`: (updates, batch, classes), float16}; arguments as of `loop.fit`'s `entries`."""
        rows = [self._row(first + number, batch, resident) for number, batch in enumerate(indices)]
        return {KEY: np.stack(rows)}

    def _row(self, update: int, indices: NDArray[np.int32], resident: dict[str, Any]) -> NDArray[np.float16]:
        if (found := self.store.read(update)) is not None:
            return found
        variables, run, by_batch = self._program
        rounded, overflows = run(variables, resident, place(indices, by_batch), np.int32(update))
        if overflows:
            raise ValueError(
                f"distill.cache: the teacher's outputs exceed float16's {np.finfo(np.float16).max:,.0f} at update "
                f"{update}; give --no-distill.cache and another --workdir"
            )
        return self.store.write(update, np.asarray(rounded))

    @cached_property
    def _program(self) -> tuple[Any, Any, NamedSharding]:
        """The teacher's variables on all devices, the compiled teacher, and the sharding of its batches."""
        mesh = data_mesh()
        inputs = loop.make_inputs(mesh, self.data, self.seed)

        def run(variables: Any, resident: Any, indices: Array, number: Array) -> tuple[Array, Array]:
            with compiled_for(mesh):
                exact = self.outputs(variables, inputs(resident, indices, number)[0])
            rounded = exact.astype(jnp.float16)
            return rounded, (jnp.isinf(rounded) & jnp.isfinite(exact)).any()

        compiled = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
        return replicate(self.variables, mesh), compiled, NamedSharding(mesh, PartitionSpec("data"))


def reason_not_to_cache(
    config: DistillConfig, run: RunConfig, stage: StageConfig, dataset: Dataset, teachers: int, shape: Any
) -> str | None:
    """Why a stage's outputs are not cached by update; None if they are.

    Args:
      teachers: their number.
      shape: of the teacher's outputs for a batch: a `jax.ShapeDtypeStruct`, or a pytree of them.
    """
    if not config.cache:
        return "distill.cache is off"
    if streaming.reader_of(dataset.train.arrays) is not None:
        return "examples are streamed"
    if run.spike is not None:
        return "run.spike may replace batches"
    if teachers > 1:
        return "there are several teachers"
    if not hasattr(shape, "shape") or shape.shape[:1] != (stage.batch_size,):
        return "the outputs are not one array of logits"
    if (size := 2 * shape.size * stage.steps) > LARGEST:
        return f"they take {size / 2**30:,.1f} GiB"
    return None


def open_outputs(
    cache: UpdateCache,
    outputs: Any,
    variables: Any,
    shape: tuple[int, ...],
    dataset: Dataset,
    data: DataConfig,
    run: RunConfig,
    stage: StageConfig,
) -> UpdateOutputs:
    """The outputs of a stage's updates, stored or to be computed.

    Args:
      outputs: (variables, batch) → logits (batch, classes); shape: theirs.

    Raises:
      ValueError: the directory holds outputs of another teacher, data, augmentation or seed.
    """
    origin = {
        **cache.origin,
        "examples": len(dataset.train),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "crop": data.crop,
        "flip": data.flip,
        "seed": cache.seed,
        "batch_size": stage.batch_size,
        "precision": run.precision,
    }
    store = OutputStore(cache.directory, origin, shape, stage.steps)
    log.info(
        "the teacher's outputs are cached by update in float16, %.1f MiB; %d of %d updates are stored",
        store.bytes / 2**20, store.count(stage.steps), stage.steps,
    )  # fmt: skip
    return UpdateOutputs(store, outputs, variables, data, cache.seed)
