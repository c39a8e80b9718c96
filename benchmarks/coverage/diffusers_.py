"""Flax networks of `diffusers`: the conditional U-Net, the autoencoder and ControlNet, small and as published."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.coverage.variant import CallSpec, Package, Variant, images

TWO = {"block_out_channels": (32, 64), "layers_per_block": 1}
UNET: dict[str, Any] = {
    **TWO,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CONTROL = {key: value for key, value in UNET.items() if key not in ("up_block_types", "out_channels")}
VAE: dict[str, Any] = {
    **TWO,
    "norm_num_groups": 8,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def _unet(arguments: dict[str, Any], size: int = 8, width: int = 32) -> CallSpec:
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    return CallSpec(FlaxUNet2DConditionModel(**arguments), _noisy(size, width), {})


def _controlnet(arguments: dict[str, Any], size: int = 8, width: int = 32) -> CallSpec:
    from diffusers.models.controlnets.controlnet_flax import FlaxControlNetModel

    return CallSpec(FlaxControlNetModel(**arguments), (*_noisy(size, width), images(3, 8 * size, 8 * size)), {})


def _vae(arguments: dict[str, Any], size: int = 16) -> CallSpec:
    from diffusers.models.vae_flax import FlaxAutoencoderKL

    return CallSpec(FlaxAutoencoderKL(**arguments), (images(3, size, size),), {})


def _noisy(size: int, width: int) -> tuple[np.ndarray, ...]:
    return images(4, size, size), np.array([3, 70], np.int32), images(6, width)


SD: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}

PACKAGE = Package(
    "diffusers",
    (
        "diffusers==0.35.2",
        "huggingface-hub<1",
        "regex",
        "requests",
        "tqdm",
        "filelock",
        "packaging",
        "pyyaml",
        "pillow",
        "charset-normalizer",
        "idna",
        "urllib3",
        "certifi",
        "fsspec",
        "importlib_metadata",
        "zipp",
    ),
    (
        Variant("U-Net", partial(_unet, UNET)),
        Variant("U-Net, two layers a block", partial(_unet, {**UNET, "layers_per_block": 2})),
        Variant("U-Net, linear projection", partial(_unet, {**UNET, "use_linear_projection": True})),
        Variant("U-Net, heads split", partial(_unet, {**UNET, "split_head_dim": True})),
        Variant("U-Net, cross attention only", partial(_unet, {**UNET, "only_cross_attention": True})),
        Variant("U-Net, two transformer layers", partial(_unet, {**UNET, "transformer_layers_per_block": 2})),
        Variant("ControlNet", partial(_controlnet, CONTROL)),
        Variant("ControlNet, linear projection", partial(_controlnet, {**CONTROL, "use_linear_projection": True})),
        Variant("autoencoder", partial(_vae, VAE)),
        Variant("autoencoder, two layers a block", partial(_vae, {**VAE, "layers_per_block": 2})),
        Variant("Stable Diffusion 1.5 U-Net, full size", partial(_unet, SD, 64, 768), True),
        Variant(
            "Stable Diffusion autoencoder, full size",
            partial(
                _vae,
                {
                    "block_out_channels": (128, 256, 512, 512),
                    "layers_per_block": 2,
                    "sample_size": 256,
                    "down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4,
                },
                256,
            ),
            True,
        ),
    ),
)
