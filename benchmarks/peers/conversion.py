"""A CIFAR ResNet of PyTorch as a network directory of this package, with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util

from benchmarks.peers.networks import MEAN, SIZE, STD, CifarResNet
from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.pruning import gates, surgery
from kdsearch_jax.pruning.network import count, trace
from kdsearch_jax.storage.networks import save_network

TOLERANCE = 1e-4  # largest difference of two logits, relative to the largest logit
_LEAVES = {"weight": ("params", "scale"), "bias": ("params", "bias"), "running_mean": ("batch_stats", "mean"),
           "running_var": ("batch_stats", "var")}  # fmt: skip


def save(student: CifarResNet, directory: Path, name: str, dataset: str, **info: Any) -> dict[str, Any]:
    """Writes the student as a network directory.

    Args:
      name: its label in tables.
      dataset, info: recorded with it.

    Returns:
      {"macs", "params", "difference"}: its costs as counted from the written network, and the largest difference of
      its logits from PyTorch's, relative to the largest.

    Raises:
      AssertionError: the difference is above `TOLERANCE`.
    """
    architecture, module = _architecture(student)
    variables = _variables(student)
    difference = _difference(student, module, variables)
    assert difference <= TOLERANCE, f"{name}: logits differ by {difference:.1e} of their scale"
    cost = count(module, jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32), train=False)
    costs = {"macs": cost.macs, "params": cost.params}
    about = {"name": name, "dataset": dataset, "num_classes": student.linear.out_features}
    normalisation = {"mean": list(MEAN), "std": list(STD)}
    save_network(directory, architecture, variables, {**about, **normalisation, **costs, **info}, overwrite=True)
    return {**costs, "difference": difference}


def _architecture(student: CifarResNet) -> tuple[Architecture, Any]:
    """(architecture, module) with the student's widths."""
    stages = student.widths
    arguments = {"depth": 6 * len(stages[0]) + 2, "num_classes": student.linear.out_features}
    module = registry.build("cifar_resnet", arguments)
    whole = Architecture("cifar_resnet", arguments, input_shape=(SIZE, SIZE, 3))
    network = trace(module, jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32), train=False)
    keep = {group.name: np.ones(group.size, bool) for group in network.topology.groups}
    for stage, inner in enumerate(stages, 1):
        for block, width in enumerate(inner, 1):
            keep[f"stage{stage}/block{block}/conv1"][width:] = False  # which ones does not matter: only sizes are used
    zeros = jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, SIZE, SIZE, 3)))
    _, architecture = surgery.slice_network(zeros, gates.init(network.topology), keep, network, whole)
    return architecture, architecture.module()


def _variables(student: CifarResNet) -> dict[str, Any]:
    """The student's arrays in this package's layout."""
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, tensor in student.state_dict().items():
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        value = tensor.detach().numpy()
        if path[0].startswith("layer"):
            path = [f"stage{path[0][5:]}", f"block{int(path[1]) + 1}", path[2]]
        else:
            path = [{"conv1": "conv", "bn1": "bn", "linear": "dense"}[path[0]]]
        if value.ndim == 4:
            flat["params", *path, "kernel"] = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            flat["params", *path, "kernel"] = value.T
        else:
            collection, own = _LEAVES[leaf]
            flat[collection, *path, own] = value
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat))


def _difference(student: CifarResNet, module: Any, variables: Any) -> float:
    """The largest difference of two logits for random images, relative to the largest logit."""
    images = np.random.default_rng(0).normal(size=(16, SIZE, SIZE, 3)).astype(np.float32)
    with torch.inference_mode():
        theirs = student.eval()(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    ours = np.asarray(apply_eval(module, variables, jnp.asarray(images)))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
