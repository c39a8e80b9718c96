"""The project's own networks: every architecture at small sizes and with its options, and as published."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.coverage.variant import CallSpec, Package, Variant, images

TEN: dict[str, Any] = {"num_classes": 10}
VIT = {"patch": 8, "width": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
SWIN = {"stage_blocks": [2, 1], "heads": [2, 4], "width": 16, "window": 4}
MIXER = {"patch": 8, "width": 24, "depth": 2, "token_neurons": 12, "channel_neurons": 48}
CONVNEXT = {"stage_blocks": [1, 2, 1, 1], "widths": [8, 16, 16, 32]}

# (name, arguments, side of the image, whether CI tries it)
SMALL: list[tuple[str, dict[str, Any], int, bool]] = [
    ("mlp", {"hidden": [32, 16]}, 8, True),
    ("small_cnn", {}, 16, True),
    ("cifar_resnet", {"depth": 8, "width": 8}, 16, True),
    ("cifar_resnet", {"depth": 14, "width": 8, "shortcut": "B"}, 16, True),
    ("cifar_resnet", {"depth": 20, "width": 4}, 16, False),
    ("wide_resnet", {"depth": 10, "width": 1}, 16, True),
    ("wide_resnet", {"depth": 16, "width": 1}, 16, False),
    ("resnet", {"depth": 18, "width": 8}, 32, False),
    ("resnet", {"depth": 18, "width": 8, "stem": "small"}, 16, True),
    ("resnet", {"depth": 34, "width": 4, "stem": "small"}, 16, False),
    ("resnet", {"depth": 50, "width": 4}, 32, False),
    ("resnext", {"depth": 50, "groups": 4, "group_width": 2, "width": 8}, 32, False),
    ("resnext", {"depth": 50, "groups": 2, "group_width": 4, "width": 8, "stem": "small"}, 16, False),
    ("vgg", {"depth": 11, "width": 8, "pools": 3}, 16, True),
    ("vgg", {"depth": 11, "width": 8, "head": "flattened", "hidden": 32}, 32, False),
    ("vgg", {"depth": 13, "width": 8, "norm": False}, 32, False),
    ("vgg", {"depth": 16, "width": 4}, 32, False),
    ("vgg", {"depth": 19, "width": 4, "norm": False, "head": "flattened", "hidden": 16}, 32, False),
    ("cifar_densenet", {"depth": 10, "growth": 4}, 16, True),
    ("cifar_densenet", {"depth": 16, "growth": 6}, 16, False),
    ("densenet", {"depth": 121, "stem": "small"}, 16, False),
    ("mobilenet_v2", {"stem": "small", "width": 0.25}, 16, False),
    ("mobilenet_v2", {"width": 0.35}, 32, False),
    ("mobilenet_v3", {"size": "small"}, 32, False),
    ("mobilenet_v3", {"size": "large"}, 32, False),
    ("efficientnet", {"variant": 0}, 64, False),
    ("unet", {"width": 8, "depth": 2}, 16, True),
    ("unet", {"width": 4, "depth": 3}, 16, False),
    ("convnext", CONVNEXT, 32, True),
    ("convnext", {**CONVNEXT, "patch": 2}, 16, False),
    ("convnext", {**CONVNEXT, "layer_scale": 0.0}, 32, False),
    ("vit", VIT, 16, True),
    ("vit", {**VIT, "pool": "mean"}, 16, False),
    ("vit", {**VIT, "depth": 3, "heads": 2}, 16, False),
    ("deit", {"size": "tiny"}, 32, False),
    ("deit", {"size": "tiny", "distilled": True}, 32, False),
    ("swin", SWIN, 32, True),
    ("swin", {**SWIN, "window": 2, "mlp_ratio": 2.0}, 32, False),
    ("mixer", MIXER, 16, True),
    ("mixer", {**MIXER, "depth": 3}, 32, False),
]

FULL: list[tuple[str, dict[str, Any]]] = [
    ("resnet", {"depth": 50}),
    ("resnet", {"depth": 101}),
    ("resnet", {"depth": 152}),
    ("resnext", {"depth": 50}),
    ("vgg", {"depth": 16, "head": "flattened"}),
    ("densenet", {"depth": 121}),
    ("densenet", {"depth": 201}),
    ("mobilenet_v2", {}),
    ("mobilenet_v3", {"size": "large"}),
    ("efficientnet", {"variant": 0}),
    ("convnext", {}),
    ("unet", {}),
    ("vit", {}),
    ("vit", {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}),
    ("deit", {"size": "base", "distilled": True}),
    ("swin", {}),
    ("mixer", {}),
]


def _call(name: str, arguments: dict[str, Any], size: int) -> CallSpec:
    from kdsearch_jax.adapters.registry import build

    return CallSpec(build(name, {**TEN, **arguments}), (images(size, size, 3),), {"train": False})


def _title(name: str, arguments: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in arguments.items())]).replace(", ", ",")


def small(name: str, arguments: dict[str, Any], size: int) -> Variant:
    """A network that is proved."""
    return Variant(_title(name, arguments), partial(_call, name, arguments, size))


CI = tuple(small(name, arguments, size) for name, arguments, size, ci in SMALL if ci)

PACKAGE = Package(
    "kdsearch_jax",
    (),
    (
        *(small(name, arguments, size) for name, arguments, size, _ in SMALL),
        *(
            Variant(f"{_title(name, arguments)}, full size", partial(_call, name, arguments, 224), True)
            for name, arguments in FULL
        ),
    ),
    own=True,
)
