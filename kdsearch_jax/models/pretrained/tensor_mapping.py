"""Loads a network's variables from named tensors: leaves and tensors must match one to one, or both sides are listed.

A `Naming` maps the path and shape of one of our leaves to the `TensorSource` that fills it. See
`kdsearch_jax.models.pretrained.torchvision` for an example.
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

LISTED = 10  # entries per list in an error message

LeafPath = tuple[str, ...]  # ("params", "stage1", "block1", "conv1", "kernel")
Shape = tuple[int, ...]


class TensorSource(NamedTuple):
    """The tensor that fills a leaf; several leaves may share one tensor.

    names: possible names in the file, the first of which is used in messages. shape: of the tensor.
    convert: converts the tensor to the leaf, with our order of axes.
    """

    names: tuple[str, ...]
    shape: Shape
    convert: Callable[[np.ndarray], np.ndarray]


Naming = Callable[[LeafPath, Shape], TensorSource]


def load_variables(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    module: nn.Module,
    input_shape: Shape,
    naming: Naming,
) -> dict[str, Any]:
    """Returns the variables of `module` with the values of the tensors.

    Args:
      path: where the tensors come from, for messages.
      tensors: {name: values}.
      module: the network.
      input_shape: of one example, (height, width, channels).
      naming: maps each leaf to its tensor.

    Raises:
      ValueError: tensors are missing, left over, or have another shape; lists all of them.
    """
    sources = leaf_sources(module, input_shape, naming)
    names = {leaf: _name_in_file(source, tensors) for leaf, source in sources.items()}
    _check_match(path, module, tensors, {names[leaf]: source.shape for leaf, source in sources.items()})
    values = {leaf: jnp.asarray(source.convert(tensors[names[leaf]])) for leaf, source in sources.items()}
    return traverse_util.unflatten_dict(values)


def leaf_sources(module: nn.Module, input_shape: Shape, naming: Naming) -> dict[LeafPath, TensorSource]:
    """The tensor of each leaf of `module`, from its abstract initialisation."""
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    leaves: dict[LeafPath, Any] = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), image))
    return {leaf: naming(leaf, spec.shape) for leaf, spec in leaves.items()}


# PyTorch's layers

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def layer_source(leaf: LeafPath, shape: Shape, layers: Sequence[str]) -> TensorSource:
    """The tensor of a leaf of a convolution, dense layer or normalisation.

        convolution (out, in, h, w)         → kernel (h, w, in, out)
        dense layer (out, in)               → kernel (in, out)
        BatchNorm weight, bias, running_*   → scale, bias, mean, var

    Args:
      leaf: path of the leaf, of which only the last part is used.
      shape: of the leaf.
      layers: possible names of the layer in the file.
    """
    names = tuple(f"{layer}.{_LEAVES[leaf[-1]]}" for layer in layers)
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return TensorSource(names, (outputs, inputs, height, width), lambda value: value.transpose(2, 3, 1, 0))
    return TensorSource(names, shape[::-1], np.transpose)


def _name_in_file(source: TensorSource, tensors: Mapping[str, Any]) -> str:
    """The first possible name that the file contains, otherwise the first possible name."""
    return next((name for name in source.names if name in tensors), source.names[0])


# Error messages


def _check_match(
    path: str | Path, module: nn.Module, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError with all differences between a file and the names and shapes that the network needs."""

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
        f"{path} does not match this {type(module).__name__}; check its depth, width, classes and shortcut",
        *_listed(
            "in the network but not in the file",
            [*(_with_nearest(name, unexpected) for name in missing[:LISTED]), *missing[LISTED:]],
        ),
        *_listed("in the file but not in the network", unexpected),
        *_listed("different shapes", wrong),
    ]
    raise ValueError("\n".join(lines))


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _with_nearest(name: str, choices: list[str]) -> str:
    nearest = difflib.get_close_matches(name, choices, n=1)
    return f"{name} (nearest in the file: {nearest[0]})" if nearest else name


def _listed(title: str, entries: list[str]) -> list[str]:
    """Lines of text with the first entries under a title with their number; none without entries."""
    if not entries:
        return []
    rest = [f"    … and {len(entries) - LISTED} more"] if len(entries) > LISTED else []
    return [f"  {title} ({len(entries)}):", *(f"    {entry}" for entry in entries[:LISTED]), *rest]
