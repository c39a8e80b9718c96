"""Evaluation of networks in directories, on the data set that they were trained on or on another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import objective
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.runs.evaluation import EvaluatedNetwork, evaluate
from kdsearch_jax.runs.results import aligned
from kdsearch_jax.runs.teacher_source import LoadedNetwork


def evaluation_table(
    directories: Mapping[str, Path],
    data: str | None,
    data_dir: str | None,
    split: Literal["train", "validation", "test"],
    batch_size: int,
    trust_code: bool,
) -> str:
    """Evaluates the networks in these directories; the one named "teacher" is what others are compared with.

    Args:
      data: the data set's name; None for the one that the first network was trained on.
    """
    networks = {name: LoadedNetwork.of(path, trust_code=trust_code) for name, path in directories.items()}
    dataset = _load_data(next(iter(networks.values())), data, data_dir)
    for name, network in networks.items():
        _check_fits(directories[name], network, dataset)
    evaluations = evaluate(
        objective.classification(DistillConfig()),
        {
            name: EvaluatedNetwork(
                n.module, n.variables, n.architecture.call_spec, n.info.get("mean", dataset.mean),
                n.info.get("std", dataset.std),
            )
            for name, n in networks.items()
        },
        dataset,
        split,
        batch_size=batch_size,
        teacher="teacher" if "teacher" in networks else None,
    )  # fmt: skip
    rows = {directories[name]: evaluation.means for name, evaluation in evaluations.items()}
    return f"{len(getattr(dataset, split))} images of {dataset.name}, {split}\n{_table(rows)}"


def _load_data(network: LoadedNetwork, name: str | None, data_dir: str | None) -> Dataset:
    """The data set asked for, or the one that the network was trained on, at the network's image size and framing."""
    name = name or network.info.get("dataset")
    if not name:
        raise ValueError("data: the network does not say what it was trained on; give --data NAME")
    sides = set(network.architecture.input_shape[:2])
    framing = "crop" if network.info.get("framing") == "crop" and not name.startswith(("digits", "npz:")) else "stretch"
    return load(DataConfig(name, data_dir, image_size=sides.pop() if len(sides) == 1 else None, framing=framing))


def _check_fits(directory: Path, network: LoadedNetwork, dataset: Dataset) -> None:
    """Raises ValueError if the network cannot be evaluated on the data set."""
    call = network.architecture.call_spec
    if not network.architecture.input_shape:
        raise ValueError(
            f"{directory} does not take a single image ({', '.join(call.arguments)}), and this command evaluates image "
            "classifiers only; see results.json of its run for what was measured"
        )
    actual, expected = dataset.test.images.shape[1:], tuple(network.architecture.input_shape)
    if actual != expected:
        raise ValueError(
            f"{directory} takes images {expected}, those of {dataset.name} are {actual}; give another --data"
        )
    outputs = jax.eval_shape(
        lambda v, *inputs: apply_eval(network.module, v, inputs, call_spec=call), network.variables, *call.example(1)
    )
    classes = jax.tree.leaves(outputs)[0].shape[-1]
    if classes != dataset.num_classes:
        raise ValueError(
            f"{directory} has {classes} classes, {dataset.name} has {dataset.num_classes}; give the data set that the "
            "network was trained on as --data"
        )


def _table(rows: Mapping[Path, Mapping[str, float]]) -> str:
    """One line per network; shares in percent, losses in nats."""
    columns = {"accuracy": "accuracy", "accuracy_top5": "top 5", "loss": "loss", "kl": "KL", "agreement": "agreement"}
    shown = [name for name in columns if any(name in row for row in rows.values())]
    lines = [["", *(columns[name] for name in shown)]]
    for directory, row in rows.items():
        cells = [
            "–" if name not in row else f"{row[name]:.4f}" if name in ("loss", "kl") else f"{100 * row[name]:.2f}%"
            for name in shown
        ]
        lines.append([str(directory), *cells])
    return aligned(lines)
