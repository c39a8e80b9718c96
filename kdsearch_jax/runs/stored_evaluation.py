"""Networks in directories, on the data set that they were trained on or on another."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.runs.evaluation import predict, score
from kdsearch_jax.storage.networks import load_network

Network = tuple[Any, Any, Architecture, dict[str, Any]]  # as `load_network` gives it


def compared(
    directories: Mapping[str, Path],
    data: str | None,
    data_dir: str | None,
    split: str,
    batch_size: int,
    trust_code: bool,
) -> str:
    """A table of the networks of these directories; the one named "teacher" is what others are compared with.

    data: the data set's name, None for the one that the first network was trained on.
    """
    networks = {name: load_network(path, trust_code=trust_code) for name, path in directories.items()}
    dataset = _load_data(next(iter(networks.values())), data, data_dir)
    examples: Split = getattr(dataset, split)
    logits = {}
    for name, (module, variables, architecture, info) in networks.items():
        _check_fits(directories[name], networks[name], dataset)
        mean, std = info.get("mean", dataset.mean), info.get("std", dataset.std)
        logits[name] = predict(module, variables, examples.images, mean, std, batch_size, architecture.custom_call)
    rows = {name: score(values, examples.labels, logits.get("teacher")) for name, values in logits.items()}
    table = _table({directories[name]: row for name, row in rows.items()})
    return f"{len(examples)} images of {dataset.name}, {split}\n{table}"


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
            f"{directory} is not fed images alone ({', '.join(architecture.call_spec.arguments)}), which is all that "
            "this command shows a network; the table of its run, results.json, has what was measured"
        )
    found, expected = dataset.test.images.shape[1:], tuple(architecture.input_shape)
    if found != expected:
        raise ValueError(
            f"{directory} takes images {expected}, those of {dataset.name} are {found}; give another --data"
        )
    image = jax.ShapeDtypeStruct((1, *expected), jnp.float32)
    forward = partial(apply_eval, call_spec=architecture.custom_call)
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
