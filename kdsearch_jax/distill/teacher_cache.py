"""Cached teacher outputs: computed once for every training example.

Without augmentation, a teacher in inference mode has the same outputs for an example in every epoch. They are stored in
the training split under `KEY`, and the loop gathers them by index as it gathers labels. Under augmentation, see
`kdsearch_jax.distill.update_outputs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdsearch_jax.adapters.apply import compiled_for
from kdsearch_jax.adapters.devices import data_mesh, place, replicate
from kdsearch_jax.data import streaming
from kdsearch_jax.data.batches import padded_batches, preprocess
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.pruning import equality
from kdsearch_jax.training.settings import StageConfig

KEY = "teacher's outputs"
LARGEST = 1 << 29  # bytes on each device
TOLERANCE = 1e-4  # difference between an example's outputs in two batches, relative to their scale


def reason_not_to_cache(config: DistillConfig, data: DataConfig, stage: StageConfig, dataset: Dataset) -> str | None:
    """Why outputs are not cached in a stage; None if they are."""
    examples = len(dataset.train)
    if not config.cache:
        return "distill.cache is off"
    if streaming.reader_of(dataset.train.arrays) is not None:
        return "examples are streamed"
    if data.crop or data.flip:
        return "examples are augmented"
    if stage.steps * stage.batch_size <= examples:
        return "no example comes twice"
    return None


def cache_outputs(
    function: Callable[[Any, Any], Any], variables: Any, dataset: Dataset, batch_size: int
) -> tuple[Dataset | None, str]:
    """(the data set with a teacher's outputs for its training split, or None; a line for the log).

    Args:
      function: (variables, batch) → outputs, pytrees of arrays.
      batch_size: examples a call, over all devices; rounded up to a multiple of their number.
    """
    mesh, train = data_mesh(), dataset.train
    size = -(-min(batch_size, len(train)) // mesh.size) * mesh.size
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)

    def run(variables: Any, arrays: Any) -> Any:
        with compiled_for(mesh):
            return function(variables, preprocess(arrays, mean, std))

    def batch(indices: np.ndarray) -> Any:
        return place(train[indices].arrays, NamedSharding(mesh, PartitionSpec("data")))

    first = jax.eval_shape(run, variables, batch(np.zeros(size, np.int32)))
    bytes_ = sum(leaf.size // size * leaf.dtype.itemsize for leaf in jax.tree.leaves(first)) * len(train)
    if any(leaf.shape[:1] != (size,) for leaf in jax.tree.leaves(first)):
        return None, "not cached: the teacher's outputs have no row for each example"
    if bytes_ > LARGEST:
        return None, f"not cached: the teacher's outputs take {bytes_ / 2**20:,.0f} MiB"
    compiled = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
    everywhere = replicate(variables, mesh)
    found = jax.tree.map(lambda leaf: np.empty((len(train), *leaf.shape[1:]), leaf.dtype), first)
    for indices, weights in padded_batches(len(train), size):
        rows = jax.device_get(compiled(everywhere, batch(indices)))
        real = indices[weights > 0]
        for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(rows), strict=True):
            whole[real] = part[: len(real)]
    mixed = np.random.default_rng(0).integers(0, len(train), size)  # each with other examples
    if not _same(compiled, variables, mesh, batch(mixed), [leaf[mixed] for leaf in jax.tree.leaves(found)]):
        return None, "not cached: the teacher's outputs for an example depend on the others in its batch"
    split = Split({**train.arrays, KEY: found})
    return dataclasses.replace(dataset, train=split), f"the teacher's outputs are cached, {bytes_ / 2**20:,.1f} MiB"


def _same(compiled: Any, variables: Any, mesh: Mesh, batch: Any, found: list[np.ndarray]) -> bool:
    """Whether a batch has the outputs found before, each within `TOLERANCE` of its scale."""

    def run(variables: Any, arrays: Any) -> dict[str, np.ndarray]:
        outputs = jax.device_get(jax.tree.leaves(compiled(replicate(variables, mesh), arrays)))
        return {str(i): leaf for i, leaf in enumerate(outputs)}

    before = {str(i): leaf for i, leaf in enumerate(found)}
    again = run(variables, batch)
    if all(np.array_equal(again[name], leaf) for name, leaf in before.items()):
        return True
    rounding = equality.rounding_of(compiled.trace(replicate(variables, mesh), batch).jaxpr)
    return equality.difference(equality.reference_outputs(run, variables, (batch,), rounding), before) <= TOLERANCE


def split_outputs(batch: Any) -> tuple[Any, Any]:
    """(the batch without the teacher's outputs, these, with half-precision numbers in float32)."""

    def widened(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.float16 else leaf

    return {entry: value for entry, value in batch.items() if entry != KEY}, jax.tree.map(widened, batch[KEY])
