"""Evaluation of networks on one split of a data set, each example exactly once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.devices import data_mesh, on_mesh, place, replicate
from kdsearch_jax.adapters.memoize import memoize
from kdsearch_jax.data.batches import is_image, preprocess
from kdsearch_jax.data.device_feed import evaluation_batches
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.distill.metrics import top_k
from kdsearch_jax.distill.objective import Objective

_LOGITS = " logits"  # no metric has this name


class EvaluatedNetwork(NamedTuple):
    """A network, how it is called, and the mean and std per channel that normalise its images in [0, 1]."""

    module: Any
    variables: Any
    call: CallSpec
    mean: Sequence[float]
    std: Sequence[float]


class Evaluation(NamedTuple):
    """Means over a split, and class logits (examples, classes) in float32 if they were asked for."""

    means: dict[str, float]
    logits: np.ndarray | None


def evaluate(
    objective: Objective,
    networks: Mapping[str, EvaluatedNetwork],
    dataset: Dataset,
    split: Literal["train", "validation", "test"] = "test",
    *,
    batch_size: int = 500,
    teacher: str | None = None,
    keep_logits: bool = False,
) -> dict[str, Evaluation]:
    """Evaluates networks in inference mode and float32, in one pass over the data, on all devices.

    The last batch is padded to the size of the others, so that one program serves all batches and all splits. A loss
    that returns one number per batch would include the padding; for such a loss the last batch is split instead.

    Args:
      objective: defines the metrics, see `Objective.measure`; classification adds `accuracy_top5`.
      batch_size: examples per call over all devices; rounded up to a multiple of the number of devices.
      teacher: the network that the others are compared with, one of `networks`.
      keep_logits: also return the logits. Only for objectives on class logits.

    Returns:
      {name: Evaluation}, the same on every process.

    Raises:
      ValueError: the split is empty, or batch_size is below 1.
    """
    examples: Split = getattr(dataset, split)
    if not len(examples):
        raise ValueError(f"{split}: the split is empty; give at least one example")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is not possible; give at least 1 example")
    mesh = data_mesh()
    compiled_for = (examples,) if objective.loss is not None else (examples, dataset.validation, dataset.test)
    size = -(-min(batch_size, max(map(len, compiled_for))) // mesh.size) * mesh.size
    sharded, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    evaluate_batch = _batch_evaluator(objective, networks, teacher, keep_logits, mesh)

    sums: dict[tuple[str, str], float] = {}
    logits: dict[str, np.ndarray] = {}
    for indices, weights, arrays in evaluation_batches(examples.arrays, size, sharded):
        real = int(weights.sum())
        values = evaluate_batch(arrays)
        if real < size and any(np.ndim(value) == 0 for value in values.values()):
            even = real // mesh.size * mesh.size  # as many examples as the devices can share
            parts = [(rows, how) for rows, how in ((indices[:even], sharded), (indices[even:real], whole)) if len(rows)]
            of_parts = [(len(rows), evaluate_batch(place(examples[rows].arrays, how))) for rows, how in parts]
            for key, value in values.items():
                if np.ndim(value) == 0:
                    values[key] = sum(count * part[key] for count, part in of_parts) / real
        for (name, metric), value in values.items():
            if metric == _LOGITS:
                store = logits.setdefault(name, np.empty((len(examples), value.shape[-1]), np.float32))
                store[indices[weights > 0]] = value[weights > 0]
                continue
            total = float(value) * real if np.ndim(value) == 0 else float(value.astype(np.float64) @ weights)
            sums[name, metric] = sums.get((name, metric), 0.0) + total
    means = {name: {m: s / len(examples) for (n, m), s in sums.items() if n == name} for name in networks}
    return {name: Evaluation(means[name], logits.get(name)) for name in networks}


def _batch_evaluator(
    objective: Objective, networks: Mapping[str, EvaluatedNetwork], teacher: str | None, keep_logits: bool, mesh: Mesh
) -> Any:
    """A function of a batch on the devices to {(network, metric): value per example, or () for the whole batch}."""
    order = sorted(networks, key=lambda name: name != teacher)  # the teacher first
    placed = {name: on_mesh(network.variables, mesh) for name, network in networks.items()}
    forward = {name: inference(n.module, json.dumps(n.call.to_json())) for name, n in networks.items()}
    scales = {name: (tuple(n.mean), tuple(n.std)) for name, n in networks.items()}
    constants = {s: replicate([np.asarray(values, np.float32) for values in s], mesh) for s in scales.values()}
    metrics = _metrics(objective, mesh, keep_logits)

    def evaluate_batch(arrays: Mapping[str, Any]) -> dict[tuple[str, str], np.ndarray]:
        has_images = any(is_image(*entry) for entry in arrays.items())
        batches = {s: _normalised(arrays, *values) if has_images else arrays for s, values in constants.items()}
        target, values = None, {}
        for name in order:
            batch = batches[scales[name]]
            outputs = forward[name](placed[name], networks[name].call.bind(batch))
            values[name] = metrics(outputs, target, batch)
            if name == teacher:
                target = outputs
        found = jax.device_get(values)
        return {(name, metric): value for name, row in found.items() for metric, value in row.items()}

    return evaluate_batch


_normalised = jax.jit(preprocess)


@memoize(32)
def inference(module: Any, call_json: str) -> Any:
    """The jitted function (variables, inputs) → outputs in inference mode and float32, shared by equal modules."""
    call = CallSpec.from_json(json.loads(call_json))  # the JSON has a hash, the record has none
    return jax.jit(lambda variables, inputs: apply_eval(module, variables, inputs, call_spec=call))


@memoize(8)
def _metrics(objective: Objective, mesh: Mesh, keep_logits: bool) -> Any:
    """The jitted function (outputs, teacher's outputs or None, batch) → {metric: values}, whole on every process."""

    def metrics(outputs: Any, target: Any, batch: Any) -> dict[str, jax.Array]:
        values = objective.measure(outputs, batch, target)
        if objective.classes and (logits := objective.logits(outputs)).ndim == 2:
            values["accuracy_top5"] = top_k(logits, batch["labels"], 5)
            if keep_logits:
                values[_LOGITS] = logits.astype(np.float32)
        return values

    return jax.jit(metrics, out_shardings=NamedSharding(mesh, PartitionSpec()))
