"""Networks of `jax-resnet`: its blocks and stems in small networks, and its published ones to be traced only."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.coverage.variant import CallSpec, Package, Variant, images

SMALL: list[tuple[str, str, str, dict[str, Any]]] = [
    ("basic blocks", "ResNetBlock", "ResNetStem", {}),
    ("bottlenecks", "ResNetBottleneckBlock", "ResNetStem", {}),
    ("wide bottlenecks", "ResNetBottleneckBlock", "ResNetStem", {"expansion": 2}),
    ("ResNeXt bottlenecks", "ResNetBottleneckBlock", "ResNetStem", {"groups": 4, "base_width": 16}),
    ("ResNet-D basic blocks", "ResNetDBlock", "ResNetDStem", {}),
    ("ResNet-D bottlenecks", "ResNetDBottleneckBlock", "ResNetDStem", {}),
    ("ResNeSt bottlenecks", "ResNeStBottleneckBlock", "ResNetDStem", {}),
    ("ResNeSt bottlenecks, pooled first", "ResNeStBottleneckBlock", "ResNetDStem", {"avg_pool_first": True}),
]
FULL = ("ResNet18", "ResNet50", "ResNet101", "ResNet152", "WideResNet50", "ResNeXt50", "ResNetD50", "ResNeSt50")


def _small(block: str, stem: str, options: dict[str, Any]) -> CallSpec:
    import jax_resnet

    block_class = partial(getattr(jax_resnet, block), **options)
    return _call(
        jax_resnet.ResNet(
            block_class, stage_sizes=(1, 2), n_classes=10, hidden_sizes=(8, 16), stem_cls=getattr(jax_resnet, stem)
        ),
        32,
    )


def _full(name: str) -> CallSpec:
    import jax_resnet

    return _call(getattr(jax_resnet, name)(n_classes=1000), 224)


def _call(module: Any, size: int) -> CallSpec:
    """BatchNorm uses its statistics unless they are mutable."""
    return CallSpec(module, (images(size, size, 3),), {})


PACKAGE = Package(
    "jax-resnet",
    ("jax-resnet==0.0.4",),
    (
        *(Variant(name, partial(_small, block, stem, options)) for name, block, stem, options in SMALL),
        *(Variant(f"{name}, full size", partial(_full, name), True) for name in FULL),
    ),
)
