"""torchvision's tensor names for the layers of our networks, and akamaster's for CIFAR ResNets.

torchvision numbers the layers of a `Sequential`, including ReLU and pooling; ours have names. Each function here maps
the path of one of our layers to its possible names in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from kdsearch_jax.models.cifar_resnet import CifarResNet
from kdsearch_jax.models.densenet import DenseNet
from kdsearch_jax.models.efficientnet import EfficientNet
from kdsearch_jax.models.inverted import Block
from kdsearch_jax.models.mobilenet import MobileNetV2, MobileNetV3
from kdsearch_jax.models.pretrained.tensor_mapping import LeafPath, Naming, Shape, TensorSource, layer_source
from kdsearch_jax.models.resnet import ResNet
from kdsearch_jax.models.vgg import VGG

LayerPath = tuple[str, ...]  # ("stage1", "block1", "conv1")
LayerNames = Callable[[LayerPath], list[str]]


def naming(module: nn.Module, input_shape: Shape) -> Naming:
    """The tensor of each leaf of one of our networks.

    Args:
      module: the network.
      input_shape: of one example, (height, width, channels); a flattened image's size depends on it.

    Raises:
      ValueError: there is no such network in torchvision.
    """
    layers = _layers(module)

    def leaf_source(leaf: LeafPath, shape: Shape) -> TensorSource:
        source = layer_source(leaf, shape, layers(leaf[1:-1]))
        if isinstance(module, VGG) and leaf[1:] == ("dense1", "kernel"):
            height, width = (side // 2**module.pools for side in input_shape[:2])
            return source._replace(convert=lambda value: _flattened(value, height, width))
        return source

    return leaf_source


def _flattened(value: np.ndarray, height: int, width: int) -> np.ndarray:
    """A dense layer after a flattened image: from (c, h, w) to (h, w, c) order."""
    return value.reshape(len(value), -1, height, width).transpose(0, 2, 3, 1).reshape(value.shape).T


def _layers(module: nn.Module) -> LayerNames:
    """The function that maps the path of one of our layers to its possible names."""
    for kind, of in _FAMILIES.items():
        if isinstance(module, kind):
            return of(module)
    raise ValueError(
        f"no PyTorch names are known for a {type(module).__name__}; weights can be loaded into cifar_resnet, resnet, "
        "resnext, vgg, densenet, mobilenet_v2, mobilenet_v3 and efficientnet"
    )


def _resnet(module: nn.Module) -> LayerNames:
    return _resnet_names


def _resnet_names(layer: LayerPath) -> list[str]:
    if len(layer) == 1:
        return {"conv": ["conv1"], "bn": ["bn1"], "dense": ["fc", "linear"]}[layer[0]]
    stage, block, part = layer
    prefix = f"layer{stage.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}."
    if part.startswith("shortcut"):
        index = ("shortcut_conv", "shortcut_bn").index(part)
        return [f"{prefix}{name}.{index}" for name in ("downsample", "shortcut")]
    return [prefix + part]


def _vgg(module: VGG) -> LayerNames:
    """Numbers convolutions, optional BatchNorm, ReLU, and pooling."""
    names: dict[LayerPath, list[str]] = {("dense",): ["classifier", "classifier.0", "fc"]}
    if module.head == "flattened":  # dense, relu, dropout, dense, relu, dropout, dense
        names = {("dense1",): ["classifier.0"], ("dense2",): ["classifier.3"], ("dense",): ["classifier.6"]}
    index = 0
    for i, convs in enumerate(module.stage_convs, 1):
        for j in range(1, convs + 1):
            names[f"stage{i}", f"conv{j}"] = [f"features.{index}"]
            names[f"stage{i}", f"bn{j}"] = [f"features.{index + 1}"]
            index += 3 if module.norm else 2
        index += i <= module.pools
    return names.__getitem__


def _densenet(module: DenseNet) -> LayerNames:
    last = f"features.norm{len(module.block_layers) + 1}"
    top = {"conv": "features.conv0", "stem_bn": "features.norm0", "bn": last, "dense": "classifier"}

    def names(layer: LayerPath) -> list[str]:
        if len(layer) == 1:
            return [top[layer[0]]]
        part = layer[-1].replace("bn", "norm")
        if layer[0].startswith("transition"):
            return [f"features.{layer[0]}.{part}"]
        return [f"features.dense{layer[0]}.dense{layer[1]}.{part}"]

    return names


def _mobilenet_v2(module: MobileNetV2) -> LayerNames:
    """features.0 is the stem, followed by consecutively numbered blocks and the last convolution."""
    names = _ends(1 + sum(map(len, module.stages)), dense="classifier.1")
    index = 1
    for i, stage in enumerate(module.stages, 1):
        for j, block in enumerate(stage, 1):
            prefix, k = f"features.{index}.conv", int(block.expand)
            place = {"project_conv": f"{prefix}.{k + 1}", "project_bn": f"{prefix}.{k + 2}"}
            place |= _pair("expand", f"{prefix}.0") | _pair("depthwise", f"{prefix}.{k}")
            names |= {(f"stage{i}", f"block{j}", part): [name] for part, name in place.items()}
            index += 1
    return names.__getitem__


def _mobilenet_v3(module: MobileNetV3) -> LayerNames:
    """As MobileNetV2, with different blocks and an additional dense layer."""
    names = _ends(1 + sum(map(len, module.stages)), dense="classifier.3")
    names["hidden",] = ["classifier.0"]
    index = 1
    for i, stage in enumerate(module.stages, 1):
        for j, block in enumerate(stage, 1):
            names |= _block(block, (f"stage{i}", f"block{j}"), f"features.{index}.block")
            index += 1
    return names.__getitem__


def _efficientnet(module: EfficientNet) -> LayerNames:
    """features.0 is the stem, followed by the stages and the last convolution."""
    names = _ends(1 + len(module.stages), dense="classifier.1")
    for i, stage in enumerate(module.stages, 1):
        for j, block in enumerate(stage, 1):
            names |= _block(block, (f"stage{i}", f"block{j}"), f"features.{i}.{j - 1}.block")
    return names.__getitem__


def _ends(last: int, *, dense: str) -> dict[LayerPath, list[str]]:
    """The layers before and after the blocks."""
    place = {"conv": "features.0.0", "bn": "features.0.1", "dense": dense} | _pair("last", f"features.{last}")
    return {(part,): [name] for part, name in place.items()}


def _pair(part: str, name: str) -> dict[str, str]:
    """A convolution and BatchNorm in a `Sequential`."""
    return {f"{part}_conv": f"{name}.0", f"{part}_bn": f"{name}.1"}


def _block(block: Block, path: LayerPath, prefix: str) -> dict[LayerPath, list[str]]:
    """The layers of a block; those that it lacks are not numbered."""
    parts = ["expand"] * block.expand + ["depthwise"] + ["squeeze"] * bool(block.squeezed) + ["project"]
    names: dict[LayerPath, list[str]] = {}
    for k, part in enumerate(parts):
        if part == "squeeze":
            names |= {(*path, part, "reduce"): [f"{prefix}.{k}.fc1"], (*path, part, "restore"): [f"{prefix}.{k}.fc2"]}
        else:
            names |= {(*path, key): [name] for key, name in _pair(part, f"{prefix}.{k}").items()}
    return names


_FAMILIES: dict[type[nn.Module], Callable[[Any], LayerNames]] = {
    CifarResNet: _resnet,
    ResNet: _resnet,
    VGG: _vgg,
    DenseNet: _densenet,
    MobileNetV2: _mobilenet_v2,
    MobileNetV3: _mobilenet_v3,
    EfficientNet: _efficientnet,
}
