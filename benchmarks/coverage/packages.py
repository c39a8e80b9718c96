"""The packages whose networks are tried."""

from __future__ import annotations

from benchmarks.coverage import (
    diffusers_,
    flaxdiff_,
    flaxmodels_,
    jax_models_,
    jax_resnet_,
    own,
    smaller,
    transformers_,
)
from benchmarks.coverage.variant import Package

PACKAGES: tuple[Package, ...] = (
    own.PACKAGE,
    transformers_.PACKAGE,
    jax_models_.PACKAGE,
    jax_resnet_.PACKAGE,
    flaxmodels_.PACKAGE,
    diffusers_.PACKAGE,
    flaxdiff_.PACKAGE,
    *smaller.PACKAGES,
)


def package(name: str) -> Package:
    """The package of this name."""
    return next(item for item in PACKAGES if item.name == name)
