"""Pre-norm vision transformers (Dosovitskiy et al. 2021) with learnt positions and a class token or mean pooling.

The width of the residual stream, heads, query and value sizes and MLP neurons can be pruned.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsearch_jax.models import blocks

Distillation = Literal["none", "token", "head"]


class TransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); tokens (batch, tokens, width) in and out."""

    heads: int
    mlp_dim: int
    dropout: float = 0.0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Tokens (batch, tokens, width) in and out."""
        dropout = nn.Dropout(self.dropout, deterministic=not train, name="dropout")
        y = nn.LayerNorm(epsilon=self.epsilon, name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(num_heads=self.heads, name="attention")(y)
        x = x + dropout(y)
        y = nn.LayerNorm(epsilon=self.epsilon, name="norm2")(x)
        y = nn.Dense(self.mlp_dim, name="dense1")(y)
        y = dropout(nn.gelu(y, approximate=False))
        return x + dropout(nn.Dense(x.shape[-1], name="dense2")(y))


class ViT(nn.Module):
    """`depth` transformer blocks, named block1, block2, …, on square patches of `patch` pixels.

    Attributes:
      distillation: "token" adds a second token; "head" also gives it a classifier, and the logits are the mean of both.
    """

    num_classes: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    pool: Literal["token", "mean"] = "token"
    dropout: float = 0.0
    distillation: Distillation = "none"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels).

        Raises:
          ValueError: the image's sides are not multiples of the patch size.
        """
        blocks.check_patches("vit", x.shape, self.patch)
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", name="patches")(x)
        batch, rows, columns, channels = x.shape
        x = x.reshape(batch, rows * columns, channels)
        names = ["token", "distillation_token"][: (self.pool == "token") + (self.distillation != "none")]
        tokens = [self.param(name, nn.initializers.zeros, (1, 1, channels)) for name in names]
        x = jnp.concatenate([*(jnp.broadcast_to(token, (batch, 1, channels)) for token in tokens), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        for i in range(self.depth):
            x = TransformerBlock(self.heads, self.mlp_dim, self.dropout, self.epsilon, name=f"block{i + 1}")(x, train)
        x = nn.LayerNorm(epsilon=self.epsilon, name="norm")(x)
        logits = nn.Dense(self.num_classes, name="dense")(x[:, 0] if self.pool == "token" else x.mean(axis=1))
        if self.distillation == "head":
            logits = (logits + nn.Dense(self.num_classes, name="distillation_dense")(x[:, 1])) / 2
        return logits


def vit(
    *,
    num_classes: int,
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    mlp_dim: int = 3072,
    pool: Literal["token", "mean"] = "token",
    dropout: float = 0.0,
    distillation: Distillation = "none",
    epsilon: float = 1e-6,
) -> ViT:
    """A vision transformer; the defaults are ViT-B/16.

    ViT-S/16 has width=384, heads=6, mlp_dim=1536; ViT-L/16 width=1024, depth=24, heads=16, mlp_dim=4096.

    Args:
      num_classes: number of classes.
      patch: side of a patch in pixels.
      width: channels of a token, a multiple of `heads`.
      depth: number of blocks.
      heads: attention heads of a block.
      mlp_dim: neurons of a block's MLP.
      pool: the input of the classifier: a class "token", or the "mean" over the patches.
      dropout: rate after the positions, the attention and both MLP layers.
      distillation: adds a distillation "token", or also a "head" on it, as in DeiT; needs pool="token".
      epsilon: of the LayerNorms.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, patch=patch, width=width, depth=depth, heads=heads, mlp_dim=mlp_dim)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")
    blocks.check_choice("pool", pool, ("token", "mean"))
    blocks.check_choice("distillation", distillation, ("none", "token", "head"))
    if distillation != "none" and pool != "token":
        raise ValueError(f"distillation={distillation!r} needs pool='token', got pool={pool!r}")
    blocks.check_rate("dropout", dropout)
    blocks.check_rate("epsilon", epsilon)
    return ViT(num_classes, patch, width, depth, heads, mlp_dim, pool, dropout, distillation, epsilon)
