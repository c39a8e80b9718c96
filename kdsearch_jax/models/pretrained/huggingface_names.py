"""Hugging Face's tensor names for the layers of our networks.

If a layer has two names, the first is the one that `save_pretrained` writes and the second the one in memory in version
5 of `transformers`. Hugging Face flattens attention heads into one axis; ours have an axis for heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kdsearch_jax.models.pretrained.tensor_mapping import LeafPath, Naming, Shape, TensorSource, layer_source

# Maps the path of one of our layers, or of a parameter outside of such layers, to its possible names.
LayerNames = Callable[[LeafPath], list[str]]

# Suffixes of tensors that the configuration determines, or that a classifier does not use.
UNUSED = ("num_batches_tracked", "relative_position_index", "it.pooler.dense.weight", "it.pooler.dense.bias")

# Possible names of the classifier.
HEADS = {
    "resnet": ("classifier.1",),
    "vit": ("classifier",),
    "deit": ("cls_classifier", "classifier"),
    "convnext": ("classifier",),
    "swin": ("classifier",),
    "mobilenet_v2": ("classifier",),
}

_BARE = ("token", "distillation_token", "positions", "relative_bias")
_SPLIT = ("query", "key", "value", "out")


def naming(family: str, module: Any) -> Naming:
    """The tensor of each leaf of `module`, one of our networks of the given `model_type`."""
    layers: LayerNames = partial(_FAMILIES[family], module)

    def source(leaf: LeafPath, shape: Shape) -> TensorSource:
        path = leaf[1:]
        if path[-1] in _BARE or (path[-1] == "scale" and path[-2].startswith("block")):
            return TensorSource(tuple(layers(path)), shape, np.asarray)
        if path[-2] in _SPLIT:
            return _split_heads(leaf, shape, layers(path[:-1]))
        return layer_source(leaf, shape, layers(path[:-1]))

    return source


def _split_heads(leaf: LeafPath, shape: Shape, layers: list[str]) -> TensorSource:
    """An attention projection: a dense layer there, (in, heads, size) or (heads, size, out) in our network."""
    if len(shape) == 3:
        inputs = shape[:2] if leaf[-2] == "out" else shape[:1]
        flat = (math.prod(inputs), math.prod(shape) // math.prod(inputs))
    else:
        flat = (math.prod(shape),)
    source = layer_source(leaf, flat, layers)
    return source._replace(convert=lambda value: source.convert(value).reshape(shape))


def _number(name: str) -> int:
    """The index in a name, counted from 0: 2 for block3."""
    return int(name.lstrip("abcdefghijklmnopqrstuvwxyz")) - 1


def _resnet(module: Any, path: LeafPath) -> list[str]:
    if path == ("dense",):
        return ["classifier.1"]
    kind = "convolution" if "conv" in path[-1] else "normalization"
    if len(path) == 1:
        return [f"resnet.embedder.embedder.{kind}"]
    stage, block, part = path
    layer = "shortcut" if part.startswith("shortcut") else f"layer.{_number(part)}"
    return [f"resnet.encoder.stages.{_number(stage)}.layers.{_number(block)}.{layer}.{kind}"]


_TRANSFORMER = {
    "patches": "embeddings.patch_embeddings.projection",
    "token": "embeddings.cls_token",
    "distillation_token": "embeddings.distillation_token",
    "positions": "embeddings.position_embeddings",
    "patches_norm": "embeddings.norm",
    "norm": "layernorm",
}
_BLOCK = {  # of ViT, DeiT and Swin; ViT and DeiT have "attention.attention" in place of "attention.self"
    "norm1": ["layernorm_before"],
    "norm2": ["layernorm_after"],
    "query": ["attention.self.query", "attention.q_proj"],
    "key": ["attention.self.key", "attention.k_proj"],
    "value": ["attention.self.value", "attention.v_proj"],
    "out": ["attention.output.dense", "attention.o_proj"],
    "relative_bias": [
        "attention.self.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ],
    "dense1": ["intermediate.dense", "mlp.fc1"],
    "dense2": ["output.dense", "mlp.fc2"],
}


def _vit(prefix: str, module: Any, path: LeafPath) -> list[str]:
    if path == ("dense",):
        return ["cls_classifier" if module.distillation == "head" else "classifier"]
    if path == ("distillation_dense",):
        return ["distillation_classifier"]
    if len(path) == 1:
        return [f"{prefix}.{_TRANSFORMER[path[0]]}"]
    names = [name.replace("attention.self", "attention.attention") for name in _BLOCK[path[-1]]]
    number = _number(path[0])
    return [f"{prefix}.encoder.layer.{number}.{names[0]}", f"{prefix}.layers.{number}.{names[-1]}"]


def _swin(module: Any, path: LeafPath) -> list[str]:
    if path == ("dense",):
        return ["classifier"]
    if len(path) == 1:
        return [f"swin.{_TRANSFORMER[path[0]]}"]
    if path[1] == "merge":  # ends the previous stage
        part = {"norm": "norm", "dense": "reduction"}[path[2]]
        return [f"swin.encoder.layers.{_number(path[0]) - 1}.downsample.{part}"]
    return [f"swin.encoder.layers.{_number(path[0])}.blocks.{_number(path[1])}.{name}" for name in _BLOCK[path[-1]]]


def _convnext(module: Any, path: LeafPath) -> list[str]:
    if len(path) == 1:
        return {
            "patches": ["convnext.embeddings.patch_embeddings"],
            "patches_norm": ["convnext.embeddings.layernorm"],
            "norm": ["convnext.layernorm"],
            "dense": ["classifier"],
        }[path[0]]
    stage = f"convnext.encoder.stages.{_number(path[0])}"
    if path[1].startswith("downsample"):
        return [f"{stage}.downsampling_layer.{('downsample_norm', 'downsample_conv').index(path[1])}"]
    part = {
        "conv": "dwconv",
        "norm": "layernorm",
        "dense1": "pwconv1",
        "dense2": "pwconv2",
        "scale": "layer_scale_parameter",
    }[path[2]]
    return [f"{stage}.layers.{_number(path[1])}.{part}"]


def _mobilenet_v2(module: Any, path: LeafPath) -> list[str]:
    if path == ("dense",):
        return ["classifier"]
    kind = "convolution" if path[-1].endswith("conv") else "normalization"
    part = path[-1].removesuffix("conv").removesuffix("bn").removesuffix("_")
    if len(path) == 1:
        return [f"mobilenet_v2.{'conv_1x1' if part == 'last' else 'conv_stem.first_conv'}.{kind}"]
    stage, block = _number(path[0]), _number(path[1])
    part = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}[part]
    number = sum(len(blocks) for blocks in module.stages[:stage]) + block
    return [f"mobilenet_v2.{f'layer.{number - 1}' if number else 'conv_stem'}.{part}.{kind}"]


_FAMILIES: dict[str, Callable[[Any, LeafPath], list[str]]] = {
    "resnet": _resnet,
    "vit": partial(_vit, "vit"),
    "deit": partial(_vit, "deit"),
    "convnext": _convnext,
    "swin": _swin,
    "mobilenet_v2": _mobilenet_v2,
}
