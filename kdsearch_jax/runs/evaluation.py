"""Predictions, scores, and what a call takes: time and memory."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.devices import data_mesh, place, replicate
from kdsearch_jax.adapters.memoize import memoize
from kdsearch_jax.data.batches import is_image, normalise, prepared
from kdsearch_jax.data.device_feed import in_order
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.distill import losses
from kdsearch_jax.distill.metrics import agreement, kl_to_teacher, top_k
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.reporting.intervals import interval


def predict(
    module: Any,
    variables: Any,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 500,
    call: CallSpec | None = None,
    largest: int = 0,
) -> np.ndarray:
    """Logits of all images, in inference mode and float32.

    Args:
      module, variables: the network.
      images: uint8 (examples, height, width, channels).
      mean, std: one number a channel, of images in [0, 1].
      batch_size: images a call, over all devices; rounded up to a multiple of their number.
      call: how the module is called; None where its signature says it all.
      largest: images of the largest split that the network is shown: of all of them one program is compiled.

    Returns:
      float32 (examples, classes), on every process.

    Raises:
      ValueError: there are no images, or batch_size is below 1.
    """
    if not len(images):
        raise ValueError("images: there are none; give a split with at least one example")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is not possible; give at least 1 image")
    mesh = data_mesh()
    size = -(-min(batch_size, max(len(images), largest)) // mesh.size) * mesh.size
    constants = replicate((variables, np.asarray(mean, np.float32), np.asarray(std, np.float32)), mesh)
    called = None if call is None else json.dumps(call.to_json())
    forward, spread = _forward(module, mesh, called), NamedSharding(mesh, PartitionSpec("data"))
    found = []
    for indices, weights, batch in in_order({"images": images}, size, spread):
        logits = np.asarray(forward(*constants, batch["images"]))
        found.append((indices[weights > 0], logits[weights > 0]))
    logits = np.empty((len(images), found[0][1].shape[-1]), np.float32)
    for indices, values in found:
        logits[indices] = values
    return logits


@memoize(16)
def _forward(module: Any, mesh: Mesh, called: str | None) -> Any:
    call = None if called is None else CallSpec.from_json(json.loads(called))  # which has no hash

    def forward(variables: Any, mean: jax.Array, std: jax.Array, images: jax.Array) -> jax.Array:
        return apply_eval(module, variables, normalise(images, mean, std), call_spec=call)

    return jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()))


def score(logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None = None) -> dict[str, float]:
    """Means over the examples.

    Args:
      logits, teacher_logits: (examples, classes).
      labels: (examples,).

    Returns:
      "loss" (cross-entropy in nats), "accuracy", "accuracy_top5" (1 where there are 5 classes or fewer); with a teacher
      "kl" (teacher ‖ network, temperature 1, in nats) and "agreement" (share of equal predictions).

    Raises:
      ValueError: a label has no logit, or the teacher tells apart another number of classes.
    """
    classes, labels = logits.shape[-1], np.asarray(labels)
    if labels.max() >= classes:
        raise ValueError(f"labels: there is a class {labels.max()}, but the network tells apart {classes} only")
    if teacher_logits is not None and teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_logits {teacher_logits.shape} do not fit logits {logits.shape}: both are (examples, classes)"
        )
    return {name: float(np.asarray(x, np.float64).mean()) for name, x in _each(logits, labels, teacher_logits).items()}


@jax.jit
def _each(logits: jax.Array, labels: jax.Array, teacher_logits: jax.Array | None) -> dict[str, jax.Array]:
    """The quantities of `score`, per example."""
    each = {"loss": losses.cross_entropy(logits, labels)}
    each |= {"accuracy": top_k(logits, labels, 1), "accuracy_top5": top_k(logits, labels, 5)}
    if teacher_logits is not None:
        each |= {"kl": kl_to_teacher(logits, teacher_logits), "agreement": agreement(logits, teacher_logits)}
    return each


def evaluate(
    module: Any,
    variables: Any,
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    batch_size: int = 500,
    teacher_logits: np.ndarray | None = None,
    call: CallSpec | None = None,
    largest: int = 0,
) -> dict[str, float]:
    """`score` of `predict` on a split, each example exactly once; arguments as there."""
    logits = predict(module, variables, split.images, mean, std, batch_size, call, largest)
    return score(logits, split.labels, teacher_logits)


def measurer(
    task: Objective,
    module: Any,
    split: Split,
    dataset: Dataset,
    *,
    batch_size: int = 500,
    teacher: tuple[Any, Any] | None = None,
    alone: bool = False,
) -> Callable[[Any], dict[str, float]]:
    """variables → means of `task.figures` over a split, each example exactly once, whatever the outputs are.

    A user's loss that is one number for a batch is the mean over whole batches; the last one is smaller, and two where
    the devices cannot share it evenly: as many examples as they can, and the rest on each of them.

    Args:
      dataset: by whose mean and std images are normalised.
      teacher: (module, variables) to compare with; alone: the comparisons are left out, as where there is none.
    """
    mesh = data_mesh()
    # Of the splits of a data set one program is compiled, but for a loss that is one number: padding would be in it.
    shown = (split,) if task.loss is not None else (split, dataset.validation, dataset.test)
    size = -(-min(batch_size, max(map(len, shown))) // mesh.size) * mesh.size
    whole, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    mean, std = (replicate(np.asarray(values, np.float32), mesh) for values in (dataset.mean, dataset.std))
    target_variables = replicate(None if teacher is None else teacher[1], mesh)
    called = json.dumps(task.call.to_json())
    run = inference(module, called)
    run_teacher = None if teacher is None else inference(teacher[0], called)
    figures, own = _figures(task, mesh)

    def measure(variables: Any) -> dict[str, float]:
        variables = replicate(variables, mesh)

        def of(arrays: Any) -> dict[str, np.ndarray]:
            batch = _prepared(arrays, mean, std)
            inputs = task.call.bind(batch)
            target = None if run_teacher is None else run_teacher(target_variables, inputs)
            found = jax.device_get(figures(run(variables, inputs), target, batch))
            return {name: value for name, value in found.items() if not alone or name in own}

        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for indices, weights, arrays in in_order(split.arrays, size, spread):
            found, real = of(arrays), int(weights.sum())
            if real < size and any(np.ndim(value) == 0 for value in found.values()):  # padding is part of such a number
                shared = real // mesh.size * mesh.size
                parts = [(indices[:shared], spread), (indices[shared:real], whole)]
                parts = [(len(rows) / real, of(place(split[rows].arrays, how))) for rows, how in parts if len(rows)]
                found = {
                    name: value if np.ndim(value) else sum(share * part[name] for share, part in parts)
                    for name, value in found.items()
                }
            for name, value in found.items():
                one = np.ndim(value) == 0
                sums[name] = sums.get(name, 0.0) + (float(value) * real if one else float((value * weights).sum()))
                counts[name] = counts.get(name, 0.0) + real
        return {name: total / counts[name] for name, total in sums.items()}

    return measure


@memoize(32)
def inference(module: Any, called: str) -> Any:
    """The jitted function (variables, inputs) → outputs in inference mode and float32, the same for equal modules.

    called: the call as JSON.
    """
    call = CallSpec.from_json(json.loads(called))
    return jax.jit(lambda variables, inputs: apply_eval(module, variables, inputs, call_spec=call))


def _prepared(arrays: Mapping[str, Any], mean: Any, std: Any) -> Mapping[str, Any]:
    """`batches.prepared`, compiled where there is anything to do."""
    return _normalised(arrays, mean, std) if any(is_image(*each) for each in arrays.items()) else arrays


_normalised = jax.jit(prepared)


@memoize(4)
def _figures(task: Objective, mesh: Mesh) -> tuple[Any, set[str]]:
    """(the jitted `Objective.figures`, the names of those that compare with nothing, known once it was called)."""
    own: set[str] = set()

    def figures(outputs: Any, target: Any, batch: Any) -> dict[str, jax.Array]:
        own.update(task.measure(outputs, batch))
        return task.measure(outputs, batch, target)

    return jax.jit(figures, out_shardings=NamedSharding(mesh, PartitionSpec())), own


# --- time -----------------------------------------------------------------------------------------------------------


def executable(module: Any, variables: Any, batch: int, call: CallSpec) -> tuple[Any, tuple[Any, Any]]:
    """(the network compiled for one device, in inference mode and float32; the arguments that it is called with)."""
    mesh = data_mesh(jax.local_devices()[:1])
    inputs = place(call.random(batch, np.random.default_rng(0)), NamedSharding(mesh, PartitionSpec("data")))
    arguments = (replicate(jax.tree.map(np.asarray, variables), mesh), inputs)
    return inference(module, json.dumps(call.to_json())).lower(*arguments).compile(), arguments


def clock(networks: Mapping[str, tuple[Any, Any]], batch: int, call: CallSpec) -> Callable[[], dict[str, float]]:
    """A function that gives the milliseconds of a call of each network, with `batch` examples.

    Compiled as `executable` says, run before. Networks take turns, one with each call of the function, to and fro, so
    that whatever else the machine does meets all of them alike. A turn repeats short calls until `TURN` seconds are
    over, each timed by itself, and gives their median; how many, the shortest of a few says, which others' work on the
    machine lengthens least: a single call a turn would be hit or missed as a whole.
    """
    calls = {name: executable(module, variables, batch, call) for name, (module, variables) in networks.items()}

    def seconds(name: str, count: int) -> list[float]:
        run, arguments = calls[name]
        times = []
        for _ in range(count):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times.append(time.perf_counter() - start)
        return times

    for name in calls:
        seconds(name, 1)
    counts = {name: max(1, min(100, round(TURN / max(min(seconds(name, 5)), 1e-9)))) for name in calls}
    order = itertools.cycle([list(counts), list(reversed(counts))])
    return lambda: {name: 1000 * statistics.median(seconds(name, counts[name])) for name in next(order)}


TURN = 4e-3


def measure_latency(
    networks: Mapping[str, tuple[Any, Any]],
    input_shape: Sequence[int],
    batch: int = 64,
    repeats: int = 30,
    call: CallSpec | None = None,
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds an example of each network: median over `repeats` turns of `clock`, and its interval's low and high.

    Args:
      networks: {name: (module, variables)}.
      input_shape: of one example, (height, width, channels).
      batch: examples a call.
      call: how the modules are called, where that is not with one image.
    """
    turn = clock(networks, batch, call or CallSpec.of_image(tuple(input_shape)))
    times = [turn() for _ in range(repeats)]
    return {name: interval([each[name] / batch for each in times]) for name in networks}


def measure_memory(networks: Mapping[str, tuple[Any, Any]], batch: int, call: CallSpec) -> dict[str, float]:
    """Bytes that a call of each network with `batch` examples takes on the device, as XLA has laid it out.

    Arguments (parameters, statistics and inputs), outputs, and the largest amount of temporary arrays at any time
    (activations above all), compiled as `executable` says. What kernels of a library allocate by themselves while they
    run is not known to XLA and not in it. The same program gives the same number.

    Raises:
      ValueError: this backend does not tell.
    """
    found = {}
    for name, (module, variables) in networks.items():
        told = executable(module, variables, batch, call)[0].memory_analysis()
        if told is None:
            raise ValueError(f"memory: the backend {jax.default_backend()!r} does not tell what a program takes")
        parts = (told.argument_size_in_bytes, told.output_size_in_bytes, told.temp_size_in_bytes)
        found[name] = float(sum(parts) - told.alias_size_in_bytes)
    return found
