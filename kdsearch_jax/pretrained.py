"""Trained PyTorch weights in our networks: `.safetensors`, and `.pth`, `.pt`, `.th` where PyTorch is installed.

    names in the file                 of github.com/akamaster/pytorch_resnet_cifar10, of torchvision
    convolution (out, in, h, w)       → kernel (h, w, in, out)
    dense layer (out, in)             → kernel (in, out); behind a flattened image, from (c, h, w) to (h, w, c) order
    BatchNorm weight, bias, running_* → scale, bias, mean, var; `num_batches_tracked` is of no use here

Every tensor of the file must find its place in the network and every leaf of the network its tensor, of the right
shape; otherwise nothing is loaded and the error lists both sides. No code from a file is ever run: unpickling is
PyTorch's restricted kind, which takes tensors only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kdsearch_jax.models.cifar_resnet import CifarResNet
from kdsearch_jax.models.resnet import ResNet
from kdsearch_jax.models.vgg import VGG

TORCH_SUFFIXES = (".pth", ".pt", ".th")
LISTED = 10  # entries of a list in an error message

LeafPath = tuple[str, ...]  # ("params", "stage1", "block1", "conv1", "kernel")
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load_torch(path: str | Path, module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """The variables of `module` with the weights in a PyTorch file.

    Args:
      path: `.safetensors` (needs no PyTorch), or `.pth`, `.pt`, `.th`: a state dict, or a checkpoint that holds one
        under "state_dict" or "model".
      module: a network of `cifar_resnet`, `resnet` or `vgg`.
      input_shape: of one example, (height, width, channels).

    Returns:
      {"params": …, "batch_stats": …}, float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, or that holds another network than `module`.
      ImportError: PyTorch is needed and not installed.
    """
    path = Path(path)
    layers = _layer_names(module)
    tensors = read_tensors(path)
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    expected: dict[LeafPath, Any] = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), image))

    names = {leaf: _tensor_name(leaf, layers, tensors) for leaf in expected}
    shapes = {names[leaf]: _torch_shape(spec.shape) for leaf, spec in expected.items()}
    _check_same(path, module, tensors, shapes)
    values = {leaf: _converted(tensors[name], leaf, module, input_shape) for leaf, name in names.items()}
    return traverse_util.unflatten_dict({leaf: jnp.asarray(value) for leaf, value in values.items()})


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a PyTorch file by name, without `module.` prefixes and `num_batches_tracked`.

    Raises FileNotFoundError, ValueError and ImportError as `load_torch` does.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        tensors = _read_torch(path)
    else:
        raise ValueError(
            f"{path} is no PyTorch weights file by its name; expected one of .safetensors, {', '.join(TORCH_SUFFIXES)}"
        )
    if any(name.startswith("params/") for name in tensors):
        raise ValueError(f"{path} was exported by kdsearch_jax; load the student's directory with kdsearch_jax.load")
    if tensors and all(name.startswith("module.") for name in tensors):  # saved from DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return {name: _checked(path, name, value) for name, value in tensors.items()}


def _checked(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """The tensor as float32, which must be of floating point and finite."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{path}: {name} is of type {value.dtype}; only floating point weights can be loaded")
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: {name} holds values that are not finite; the file is damaged or training diverged")
    return value


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); is it complete?") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an extra of its own
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch: pip install torch, or, wherever PyTorch is, convert the state dict once by "
            "safetensors.torch.save_file and load the .safetensors file"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, tar and PyTorch's own errors, by what is wrong where
        # PyTorch's own message advises weights_only=False, which runs whatever code the file holds: not repeated.
        said = "" if "weights_only" in str(error) else f": {error}".split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as PyTorch tensors ({type(error).__name__}{said}); either it is damaged, or it "
            "holds more than tensors and would run code: then save its state_dict alone, where it came from"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: tensors by name, at the top or under 'state_dict' or 'model'")
    # By way of float32, as NumPy lacks bfloat16; integers stay, to be refused by name.
    return {str(k): (v.float() if v.is_floating_point() else v).numpy() for k, v in content.items()}


# PyTorch's names


def _layer_names(module: nn.Module) -> Callable[[LeafPath], list[str]]:
    """The function from the path of one of our layers to its possible names in PyTorch."""
    if isinstance(module, VGG):
        return _vgg_names(module)
    if isinstance(module, (CifarResNet, ResNet)):
        return _resnet_names
    raise ValueError(
        f"there are no PyTorch names for a {type(module).__name__}; "
        "weights can be loaded into cifar_resnet, resnet and vgg"
    )


def _resnet_names(layer: LeafPath) -> list[str]:
    if len(layer) == 1:
        return {"conv": ["conv1"], "bn": ["bn1"], "dense": ["fc", "linear"]}[layer[0]]
    stage, block, part = layer
    prefix = f"layer{stage.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}."
    if part.startswith("shortcut"):
        index = ("shortcut_conv", "shortcut_bn").index(part)
        return [f"{prefix}{name}.{index}" for name in ("downsample", "shortcut")]
    return [prefix + part]


def _vgg_names(module: VGG) -> Callable[[LeafPath], list[str]]:
    """torchvision's layers are numbered through: convolution, BatchNorm, relu, and one more for each pooling."""
    names: dict[LeafPath, list[str]] = {("dense",): ["classifier", "classifier.0", "fc"]}
    if module.head == "flattened":  # dense, relu, dropout, dense, relu, dropout, dense
        names = {("dense1",): ["classifier.0"], ("dense2",): ["classifier.3"], ("dense",): ["classifier.6"]}
    index = 0
    for i, convs in enumerate(module.stage_convs, 1):
        for j in range(1, convs + 1):
            names[f"stage{i}", f"conv{j}"] = [f"features.{index}"]
            names[f"stage{i}", f"bn{j}"] = [f"features.{index + 1}"]
            index += 3
        index += i <= module.pools
    return names.__getitem__


def _tensor_name(leaf: LeafPath, layers: Callable[[LeafPath], list[str]], tensors: Mapping[str, Any]) -> str:
    """The name of a leaf's tensor: the first possible one that the file has, else the first possible one."""
    names = [f"{layer}.{LEAVES[leaf[-1]]}" for layer in layers(leaf[1:-1])]
    return next((name for name in names if name in tensors), names[0])


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch gives to a leaf of this shape of ours."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _converted(value: np.ndarray, leaf: LeafPath, module: nn.Module, input_shape: tuple[int, ...]) -> np.ndarray:
    """The tensor, whose shape is right, in our order of axes."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if isinstance(module, VGG) and leaf[1:] == ("dense1", "kernel"):
        height, width = (side // 2**module.pools for side in input_shape[:2])
        value = value.reshape(len(value), -1, height, width).transpose(0, 2, 3, 1).reshape(value.shape)
    return value.T


# Error messages


def _check_same(
    path: Path, module: nn.Module, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
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
