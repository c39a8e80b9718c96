"""Filling a network from tensors by name: every leaf has its tensor, every tensor its leaf, or both sides are listed.

A *naming* tells, for the path and shape of one of our leaves, the `Source` that fills it: all that this file knows of
where tensors come from. `kdsearch_jax.models.pretrained.torchvision` has one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

LISTED = 10  # entries of a list in an error message

LeafPath = tuple[str, ...]  # ("params", "stage1", "block1", "conv1", "kernel")
Shape = tuple[int, ...]


class Source(NamedTuple):
    """The tensor that fills a leaf. Several leaves may be parts of one tensor.

    names: possible names in the file; the first one is what messages call it. shape: of the tensor.
    convert: from the tensor to the leaf, in our order of axes.
    """

    names: tuple[str, ...]
    shape: Shape
    convert: Callable[[np.ndarray], np.ndarray]


Naming = Callable[[LeafPath, Shape], Source]


def fill(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    module: nn.Module,
    input_shape: Shape,
    naming: Naming,
) -> dict[str, Any]:
    """The variables of `module` with the values of these tensors.

    Args:
      path: where they come from, for messages.
      tensors: {name: values}.
      module: the network.
      input_shape: of one example, (height, width, channels).
      naming: the source of each leaf.

    Raises:
      ValueError: a tensor is missing, left over, or of another shape: the message lists all of them.
    """
    spec = sources(module, input_shape, naming)
    named = {leaf: _present(source, tensors) for leaf, source in spec.items()}
    _check_same(path, module, tensors, {named[leaf]: source.shape for leaf, source in spec.items()})
    values = {leaf: jnp.asarray(source.convert(tensors[named[leaf]])) for leaf, source in spec.items()}
    return traverse_util.unflatten_dict(values)


def sources(module: nn.Module, input_shape: Shape, naming: Naming) -> dict[LeafPath, Source]:
    """The source of every leaf of `module`; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    leaves: dict[LeafPath, Any] = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), image))
    return {leaf: naming(leaf, spec.shape) for leaf, spec in leaves.items()}


# Layers as PyTorch has them

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def plain(leaf: LeafPath, shape: Shape, layers: Sequence[str]) -> Source:
    """The source of a leaf of an ordinary layer.

        convolution (out, in, h, w)         → kernel (h, w, in, out)
        dense layer (out, in)               → kernel (in, out)
        BatchNorm weight, bias, running_*   → scale, bias, mean, var

    Args:
      leaf: the leaf's path; only its last part counts.
      shape: the leaf's shape.
      layers: possible names of the layer in the file.
    """
    names = tuple(f"{layer}.{_LEAVES[leaf[-1]]}" for layer in layers)
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return Source(names, (outputs, inputs, height, width), lambda value: value.transpose(2, 3, 1, 0))
    return Source(names, shape[::-1], np.transpose)


def _present(source: Source, tensors: Mapping[str, Any]) -> str:
    """The first possible name that the file has, else the first possible one."""
    return next((name for name in source.names if name in tensors), source.names[0])


# Error messages


def _check_same(
    path: str | Path, module: nn.Module, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError with all that differs between a file and the names and shapes that the network needs."""

    def kernels_first(name: str) -> tuple[bool, str]:
        return len(shapes[name] if name in shapes else tensors[name].shape) < 2, name

    missing = sorted(shapes.keys() - tensors.keys(), key=kernels_first)
    unexpected = sorted(tensors.keys() - shapes.keys(), key=kernels_first)
    wrong = [
        f"{name}: {_text(tensors[name].shape)} in the file, {_text(shapes[name])} in the network"
        for name in sorted(shapes.keys() & tensors.keys(), key=kernels_first)
        if tensors[name].shape != shapes[name]
    ]
    if not (missing or unexpected or wrong):
        return
    lines = [
        f"{path} holds another network than this {type(module).__name__}; check its depth, width, classes and shortcut",
        *_listed(
            "the network needs, the file lacks",
            [*(_with_nearest(name, unexpected) for name in missing[:LISTED]), *missing[LISTED:]],
        ),
        *_listed("the file has, the network lacks", unexpected),
        *_listed("of another shape", wrong),
    ]
    raise ValueError("\n".join(lines))


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _with_nearest(name: str, choices: list[str]) -> str:
    nearest = difflib.get_close_matches(name, choices, n=1)
    return f"{name} (nearest in the file: {nearest[0]})" if nearest else name


def _listed(title: str, entries: list[str]) -> list[str]:
    """The first entries as lines of text under a title that counts them all; nothing for no entries."""
    if not entries:
        return []
    rest = [f"    … and {len(entries) - LISTED} more"] if len(entries) > LISTED else []
    return [f"  {title} ({len(entries)}):", *(f"    {entry}" for entry in entries[:LISTED]), *rest]
