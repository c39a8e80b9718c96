"""DeiT (Touvron et al. 2021): vision transformers of three sizes, trained on ImageNet alone.

With `distilled`, a second token learns from a teacher by a classifier of its own; at test time, and here always, the
logits are the mean of the two classifiers'. The network is that of `kdsearch_jax.models.vit`.
"""

from __future__ import annotations

from typing import Literal

from kdsearch_jax.models import blocks
from kdsearch_jax.models.vit import ViT, vit

HEADS = {"tiny": 3, "small": 6, "base": 12}  # of 64 channels each


def deit(
    *,
    num_classes: int,
    size: Literal["tiny", "small", "base"] = "small",
    distilled: bool = False,
    patch: int = 16,
    dropout: float = 0.0,
) -> ViT:
    """A DeiT.

    Args:
      num_classes: how many logits.
      size: "tiny", "small" or "base", of 192, 384 or 768 channels.
      distilled: whether there is a distillation token with a classifier of its own.
      patch: side of a patch in pixels.
      dropout: as in `vit`.

    Raises:
      ValueError: no such network.
    """
    blocks.check_choice("size", size, tuple(HEADS))
    blocks.check_choice("distilled", distilled, (False, True))
    heads = HEADS[size]
    return vit(
        num_classes=num_classes,
        patch=patch,
        width=64 * heads,
        depth=12,
        heads=heads,
        mlp_dim=256 * heads,
        distillation="head" if distilled else "none",
        dropout=dropout,
    )
