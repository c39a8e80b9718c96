"""A small network without kinks, for `benchmarks/smooth_digits.py`: convolution, BatchNorm, silu."""

from __future__ import annotations

import flax.linen as nn
import jax

from kdsearch_jax.models.blocks import batch_norm, conv


class Unit(nn.Module):
    """Convolution, BatchNorm, silu."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        return nn.silu(batch_norm(train, name="bn")(conv(self.features, 3, stride=self.stride, name="conv")(x)))


class Smooth(nn.Module):
    """Three units, a residual block of two more between the second and the third."""

    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        x = Unit(self.width, name="stage1")(x, train)
        x = Unit(2 * self.width, stride=2, name="stage2")(x, train)
        x = x + Unit(2 * self.width, name="block2")(Unit(2 * self.width, name="block1")(x, train), train)
        x = Unit(4 * self.width, stride=2, name="stage3")(x, train)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


def make(*, num_classes: int, width: int = 8) -> nn.Module:
    """The network, by `--model smooth:make`."""
    return Smooth(num_classes, width)
