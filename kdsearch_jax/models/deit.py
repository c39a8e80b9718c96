"""DeiT (Touvron et al. 2021): vision transformers of three sizes, trained on ImageNet alone.

With `distilled`, a second token has its own classifier, which is trained on a teacher's predictions. The logits are the
mean of both classifiers, as DeiT uses them at test time. The network is `kdsearch_jax.models.vit`.
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
      num_classes: number of classes.
      size: "tiny", "small" or "base", of 192, 384 or 768 channels.
      distilled: whether to add a distillation token with its own classifier.
      patch: side of a patch in pixels.
      dropout: as in `vit`.

    Raises:
      ValueError: an argument is out of range.
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
