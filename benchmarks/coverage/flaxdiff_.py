"""Networks of `flaxdiff`: U-Net, U-ViT, diffusion transformers."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np

from benchmarks.coverage.variant import CallSpec, Package, Variant, images

VIT: dict[str, Any] = {"patch_size": 4, "emb_features": 32, "num_layers": 2, "num_heads": 4}
UNET: dict[str, Any] = {
    "emb_features": 32,
    "feature_depths": (16, 32),
    "attention_configs": (None, {"heads": 4}),
    "num_res_blocks": 1,
    "norm_groups": 4,
}


def _call(file: str, name: str, arguments: dict[str, Any], size: int = 16, width: int = 32) -> CallSpec:
    module = getattr(importlib.import_module(f"flaxdiff.models.{file}"), name)(**arguments)
    return CallSpec(module, (images(size, size, 3), np.array([0.2, 0.9], np.float32), images(6, width)), {})


PACKAGE = Package(
    "flaxdiff",
    ("flaxdiff==0.2.11", "einops"),
    (
        Variant("U-Net", partial(_call, "simple_unet", "Unet", UNET)),
        Variant("U-Net, RMSNorm", partial(_call, "simple_unet", "Unet", {**UNET, "norm_groups": 0})),
        Variant(
            "U-Net without attention",
            partial(_call, "simple_unet", "Unet", {**UNET, "attention_configs": (None, None)}),
        ),
        Variant("UViT", partial(_call, "simple_vit", "UViT", VIT)),
        Variant("SimpleUDiT", partial(_call, "simple_vit", "SimpleUDiT", VIT)),
        Variant("SimpleDiT", partial(_call, "simple_dit", "SimpleDiT", VIT)),
        Variant("SimpleDiT, sigma learned", partial(_call, "simple_dit", "SimpleDiT", {**VIT, "learn_sigma": True})),
        Variant("SimpleMMDiT", partial(_call, "simple_mmdit", "SimpleMMDiT", VIT)),
        Variant(
            "HierarchicalMMDiT",
            partial(
                _call,
                "simple_mmdit",
                "HierarchicalMMDiT",
                {"base_patch_size": 2, "emb_features": (16, 32), "num_layers": (1, 1), "num_heads": (2, 4)},
            ),
        ),
        Variant(
            "HybridSSMAttentionDiT", partial(_call, "ssm_dit", "HybridSSMAttentionDiT", {**VIT, "ssm_state_dim": 8})
        ),
        Variant("SimpleDiT-B, full size", partial(_call, "simple_dit", "SimpleDiT", {}, 256, 768), True),
        Variant("U-Net, full size", partial(_call, "simple_unet", "Unet", {}, 128, 768), True),
    ),
)
