"""Networks of `jax-models`: each of its architectures at small widths, and published ones to be traced only."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from benchmarks.coverage.variant import CallSpec, Package, Variant, images

FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1)}
PYRAMID = {**FOUR, "embed_dims": (8, 16, 16, 32)}
SWIN = {"emb_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "drop_path": 0.0}

SMALL: list[tuple[str, str, str, dict[str, Any], int]] = [
    (
        "convmixer",
        "conv_mixer",
        "ConvMixer",
        {"features": 16, "patch_size": 4, "num_mixer_layers": 2, "filter_size": 3},
        32,
    ),
    (
        "convmixer without head",
        "conv_mixer",
        "ConvMixer",
        {"features": 16, "patch_size": 4, "num_mixer_layers": 3, "attach_head": False},
        32,
    ),
    ("convnext", "convnext", "ConvNeXt", {**FOUR, "dims": (8, 16, 16, 32)}, 32),
    (
        "convnext without layer scale",
        "convnext",
        "ConvNeXt",
        {"depths": (2, 1, 1, 1), "dims": (8, 16, 16, 32), "layer_scale_init_value": 0.0},
        32,
    ),
    ("cait", "cait", "CaiT", {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}, 32),
    (
        "cait without bias",
        "cait",
        "CaiT",
        {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "use_att_bias": False},
        32,
    ),
    (
        "mlp-mixer",
        "mlp_mixer",
        "MLPMixer",
        {"patch_size": 8, "hidden_size": 16, "channels_dim": 32, "tokens_dim": 24, "attach_head": True},
        32,
    ),
    (
        "mlp-mixer without head",
        "mlp_mixer",
        "MLPMixer",
        {"patch_size": 8, "hidden_size": 16, "channels_dim": 32, "tokens_dim": 24},
        32,
    ),
    ("mpvit", "mpvit", "MPViT", {"channels_list": (16, 16, 32, 32), "num_layers_list": (1, 1, 1, 1)}, 64),
    ("patchconvnet", "patchconvnet", "PatchConvNet", {"depth": 2, "dim": 16}, 32),
    ("poolformer s12", "poolformer", "S12", {"attach_head": True}, 32),
    ("pvt v2", "pvit", "PyramidViT", {**PYRAMID, "num_heads": (1, 2, 2, 4)}, 64),
    ("pvt v2 linear", "pvit", "PyramidViT", {**PYRAMID, "num_heads": (1, 2, 2, 4), "linear": True}, 64),
    (
        "segformer",
        "segformer",
        "SegFormer",
        {
            **FOUR,
            "emb_dims": (8, 16, 16, 32),
            "num_heads": (1, 2, 2, 4),
            "decoder_emb": 16,
            "attach_head": True,
            "drop_path": 0.0,
        },
        64,
    ),
    (
        "segformer backbone",
        "segformer",
        "SegFormer",
        {**FOUR, "emb_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "drop_path": 0.0},
        64,
    ),
    ("swin", "swin_transformer", "SwinTransformer", SWIN, 64),
    ("swin with absolute positions", "swin_transformer", "SwinTransformer", {**SWIN, "use_abs_pos_emb": True}, 64),
    ("van", "van", "VAN", PYRAMID, 64),
    ("van deeper", "van", "VAN", {**PYRAMID, "depths": (2, 1, 2, 1), "mlp_ratios": (2, 2, 2, 2)}, 64),
    (
        "masked autoencoder",
        "masked_autoencoder",
        "MaskedAutoencoderViT",
        {
            "patch_size": 8,
            "emb_dim": 16,
            "dec_emb_dim": 16,
            "depth": 2,
            "dec_depth": 1,
            "num_heads": 4,
            "dec_num_heads": 4,
        },
        32,
    ),
]

FULL = [
    ("conv_mixer", "convmixer_768_32"),
    ("convnext", "convnext_tiny"),
    ("convnext", "convnext_small"),
    ("mlp_mixer", "mlpmixer_s16"),
    ("pvit", "pvit_b2"),
    ("segformer", "segformer_b0"),
    ("van", "van_base"),
    ("poolformer", "poolformer_s24"),
    ("patchconvnet", "patchconvnet_s60"),
    ("mpvit", "mpvit_small"),
]


def _call(file: str, name: str, arguments: dict[str, Any], size: int) -> CallSpec:
    make = getattr(importlib.import_module(f"jax_models.models.{file}"), name)
    return CallSpec(make(**arguments), (images(size, size, 3),), {"deterministic": True})


PACKAGE = Package(
    "jax-models",
    (
        "jax-models==0.0.5",
        "einops",
        "requests",
        "tqdm",
        "chex",
        "toolz",
        "charset-normalizer",
        "idna",
        "urllib3",
        "certifi",
    ),
    (
        *(Variant(name, partial(_call, file, kind, arguments, size)) for name, file, kind, arguments, size in SMALL),
        *(
            Variant(f"{name}, full size", partial(_call, file, name, {"attach_head": True}, 224), True)
            for file, name in FULL
        ),
    ),
)
