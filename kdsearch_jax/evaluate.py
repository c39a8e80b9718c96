"""What a network is worth: predictions on a split, each example exactly once, and time per image.

    python -m kdsearch_jax.evaluate NETWORK_DIR [--teacher DIR] [--data NAME]

`predict` runs the network over all devices; the last batch is padded to the size of the others, so that there is one
compilation, and what was padded is dropped. `score` compares logits with labels, and with a teacher's logits. Images
are normalised as the network was trained, by the numbers stored with it, whatever data it is shown.
"""

# No `from __future__ import annotations` here: tyro, imported by `main` alone, must see types and not their names.

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdsearch_jax import cli, losses, storage
from kdsearch_jax.batches import normalise, prepared
from kdsearch_jax.call import Call
from kdsearch_jax.checkpoint import load_network
from kdsearch_jax.config import DataConfig
from kdsearch_jax.data import load
from kdsearch_jax.devices import data_mesh, place, replicate
from kdsearch_jax.examples import Dataset, Split
from kdsearch_jax.feeding import in_order
from kdsearch_jax.forward import apply_eval
from kdsearch_jax.metrics import agreement, kl_to_teacher, top_k
from kdsearch_jax.spread import interval
from kdsearch_jax.student import Architecture
from kdsearch_jax.task import Task

Network = tuple[Any, Any, Architecture, dict[str, Any]]  # as `load_network` gives it


def predict(
    module: Any,
    variables: Any,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 500,
    call: Call | None = None,
) -> np.ndarray:
    """Logits of all images, in inference mode and float32.

    Args:
      module, variables: the network.
      images: uint8 (examples, height, width, channels).
      mean, std: one number a channel, of images in [0, 1].
      batch_size: images a call, over all devices; rounded up to a multiple of their number.
      call: how the module is called; None where its signature says it all.

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
    size = -(-min(batch_size, len(images)) // mesh.size) * mesh.size
    constants = replicate((variables, np.asarray(mean, np.float32), np.asarray(std, np.float32)), mesh)
    forward, spread = _forward(module, mesh, call), NamedSharding(mesh, PartitionSpec("data"))
    found = []
    for indices, weights, batch in in_order({"images": images}, size, spread):
        logits = np.asarray(forward(*constants, batch["images"]))
        found.append((indices[weights > 0], logits[weights > 0]))
    logits = np.empty((len(images), found[0][1].shape[-1]), np.float32)
    for indices, values in found:
        logits[indices] = values
    return logits


def _forward(module: Any, mesh: Mesh, call: Call | None) -> Any:
    try:
        return _cached_forward(module, mesh, None if call is None else json.dumps(call.to_json()))
    except TypeError:  # a module with an attribute that has no hash is compiled at every call
        return _cached_forward.__wrapped__(module, mesh, None if call is None else json.dumps(call.to_json()))


@lru_cache(maxsize=16)
def _cached_forward(module: Any, mesh: Mesh, called: str | None) -> Any:
    call = None if called is None else Call.from_json(json.loads(called))  # which has no hash

    def forward(variables: Any, mean: jax.Array, std: jax.Array, images: jax.Array) -> jax.Array:
        return apply_eval(module, variables, normalise(images, mean, std), call=call)

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
    call: Call | None = None,
) -> dict[str, float]:
    """`score` of `predict` on a split, each example exactly once; arguments as there."""
    return score(predict(module, variables, split.images, mean, std, batch_size, call), split.labels, teacher_logits)


def measurer(
    task: Task,
    module: Any,
    split: Split,
    dataset: Dataset,
    *,
    batch_size: int = 500,
    teacher: tuple[Any, Any] | None = None,
) -> Callable[[Any], dict[str, float]]:
    """variables → means of `task.figures` over a split, each example exactly once, whatever the outputs are.

    A user's loss that is one number for a batch is the mean over whole batches; the last one is smaller, and two where
    the devices cannot share it evenly: as many examples as they can, and the rest on each of them.

    Args:
      dataset: by whose mean and std images are normalised.
      teacher: (module, variables) to compare with.
    """
    mesh = data_mesh()
    size = -(-min(batch_size, len(split)) // mesh.size) * mesh.size
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)
    whole, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    target_variables = replicate(None if teacher is None else teacher[1], mesh)

    def figures(variables: Any, target_variables: Any, arrays: Any) -> dict[str, jax.Array]:
        batch = prepared(arrays, mean, std)
        inputs = task.call.bind(batch)
        target = None if teacher is None else apply_eval(teacher[0], target_variables, inputs, call=task.call)
        return task.figures(apply_eval(module, variables, inputs, call=task.call), batch, target)

    compiled = jax.jit(figures, out_shardings=whole)

    def measure(variables: Any) -> dict[str, float]:
        variables = replicate(variables, mesh)

        def of(arrays: Any) -> dict[str, np.ndarray]:
            return jax.device_get(compiled(variables, target_variables, arrays))

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


# --- time -----------------------------------------------------------------------------------------------------------


def executable(module: Any, variables: Any, batch: int, call: Call) -> tuple[Any, tuple[Any, Any]]:
    """(the network compiled for one device, in inference mode and float32; the arguments that it is called with)."""
    device = jax.local_devices()[0]
    inputs = jax.device_put(call.random(batch, np.random.default_rng(0)), device)
    arguments = (jax.device_put(jax.tree.map(np.asarray, variables), device), inputs)
    run = jax.jit(lambda leaves, xs: apply_eval(module, leaves, xs, call=call))
    return run.lower(*arguments).compile(), arguments


def clock(networks: Mapping[str, tuple[Any, Any]], batch: int, call: Call) -> Callable[[], dict[str, float]]:
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
    call: Call | None = None,
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds an example of each network: median over `repeats` turns of `clock`, and its interval's low and high.

    Args:
      networks: {name: (module, variables)}.
      input_shape: of one example, (height, width, channels).
      batch: examples a call.
      call: how the modules are called, where that is not with one image.
    """
    turn = clock(networks, batch, call or Call.of_image(tuple(input_shape)))
    times = [turn() for _ in range(repeats)]
    return {name: interval([each[name] / batch for each in times]) for name in networks}


def measure_memory(networks: Mapping[str, tuple[Any, Any]], batch: int, call: Call) -> dict[str, float]:
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


# --- command --------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Prints the accuracy of a network, and of its teacher if one is given, on a split of a data set."""
    import tyro

    @dataclass(frozen=True)
    class EvaluateOptions(cli.Options):
        """What to evaluate, and on which data."""

        network: tyro.conf.Positional[Path] = field(kw_only=True)
        """A network's directory (RUN/student, RUN/teacher/network, …)."""
        teacher: Path | None = None
        """A network's directory to compare with: divergence and agreement."""
        data: str | None = None
        """digits, npz:FILE or a TFDS name; the data set that the network was trained on if left out."""
        data_dir: str | None = None
        """Where TFDS keeps its data."""
        split: Literal["test", "validation", "train"] = "test"
        """Which examples."""
        batch_size: int = 500
        """Images a call, over all devices."""

    options = cli.parse_options(
        argv, EvaluateOptions, "kdsearch_jax.evaluate", "Accuracy of a network on a data set, each example once."
    )
    named = {"network": options.network, **({"teacher": options.teacher} if options.teacher else {})}
    networks = {name: load_network(path, trust_code=options.trust_code) for name, path in named.items()}
    dataset = _load_data(networks["network"], options.data, options.data_dir)
    split: Split = getattr(dataset, options.split)
    logits = {}
    for name, (module, variables, architecture, info) in networks.items():
        _check_fits(named[name], networks[name], dataset)
        mean, std = info.get("mean", dataset.mean), info.get("std", dataset.std)
        logits[name] = predict(module, variables, split.images, mean, std, options.batch_size, architecture.call)
    rows = {name: score(values, split.labels, logits.get("teacher")) for name, values in logits.items()}
    if jax.process_index() == 0:
        print(f"{len(split)} images of {dataset.name}, {options.split}")
        print(storage.shown(_table({named[name]: row for name, row in rows.items()})))
    return 0


def _load_data(network: Network, name: str | None, data_dir: str | None) -> Dataset:
    """The data set asked for, or the one that the network was trained on, at the size of the network's images.

    Framed as then: whether a network sees an image's middle or all of it makes a difference of some percent.
    """
    _, _, architecture, info = network
    name = name or info.get("dataset")
    if not name:
        raise ValueError("data: the network does not say what it was trained on; give --data NAME")
    sides = set(architecture.input_shape[:2])
    framing = "crop" if info.get("framing") == "crop" and not name.startswith(("digits", "npz:")) else "stretch"
    return load(DataConfig(name, data_dir, image_size=sides.pop() if len(sides) == 1 else None, framing=framing))


def _check_fits(directory: Path, network: Network, dataset: Dataset) -> None:
    """Raises ValueError where the data set is not one that the network can be shown."""
    module, variables, architecture, _ = network
    if not architecture.input_shape:
        raise ValueError(
            f"{directory} is not fed images alone ({', '.join(architecture.called.arguments)}), which is all that this "
            "command shows a network; the table of its run, results.json, has what was measured"
        )
    found, expected = dataset.test.images.shape[1:], tuple(architecture.input_shape)
    if found != expected:
        raise ValueError(
            f"{directory} takes images {expected}, those of {dataset.name} are {found}; give another --data"
        )
    image = jax.ShapeDtypeStruct((1, *expected), jnp.float32)
    forward = partial(apply_eval, call=architecture.call)
    classes = jax.eval_shape(partial(forward, module), variables, image).shape[-1]
    if classes != dataset.num_classes:
        raise ValueError(
            f"{directory} tells apart {classes} classes, {dataset.name} has {dataset.num_classes}; give the data set "
            "that the network was trained on as --data"
        )


def _table(rows: Mapping[Path, Mapping[str, float]]) -> str:
    """One line a network: shares in percent, losses in nats."""
    columns = {"accuracy": "accuracy", "accuracy_top5": "top 5", "loss": "loss", "kl": "KL", "agreement": "agreement"}
    shown = [name for name in columns if all(name in row for row in rows.values())]
    lines = [["", *(columns[name] for name in shown)]]
    for directory, row in rows.items():
        cells = [f"{row[name]:.4f}" if name in ("loss", "kl") else f"{100 * row[name]:.2f}%" for name in shown]
        lines.append([str(directory), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = (
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    )
    return "\n".join("  ".join(cells) for cells in aligned)


if __name__ == "__main__":
    cli.run(main)
