"""MLP-Mixer (Tolstikhin et al. 2021): alternating MLPs over the patches and over the channels.

The channels of the residual stream, the neurons of both kinds of MLP and their branches can be pruned.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm with the epsilon of the published networks."""
    return nn.LayerNorm(epsilon=1e-6, name=name)


class MLPBlock(nn.Module):
    """dense2(gelu(dense1(x))) along the last axis, whose size does not change."""

    neurons: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, any, size) in and out."""
        y = nn.gelu(nn.Dense(self.neurons, name="dense1")(x), approximate=False)
        return nn.Dense(x.shape[-1], name="dense2")(y)


class MixerBlock(nn.Module):
    """x + tokens(norm1(x)ᵀ)ᵀ, then x + channels(norm2(x))."""

    token_neurons: int
    channel_neurons: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens (batch, tokens, width) in and out."""
        y = layer_norm("norm1")(x).swapaxes(1, 2)
        x = x + MLPBlock(self.token_neurons, name="tokens")(y).swapaxes(1, 2)
        return x + MLPBlock(self.channel_neurons, name="channels")(layer_norm("norm2")(x))


class Mixer(nn.Module):
    """`depth` mixer blocks, named block1, block2, …, on square patches of `patch` pixels."""

    num_classes: int
    patch: int
    width: int
    depth: int
    token_neurons: int
    channel_neurons: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels).

        Raises:
          ValueError: the image's sides are not multiples of the patch size.
        """
        blocks.check_patches("mixer", x.shape, self.patch)
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", name="patches")(x)
        batch, rows, columns, channels = x.shape
        x = x.reshape(batch, rows * columns, channels)
        for i in range(self.depth):
            x = MixerBlock(self.token_neurons, self.channel_neurons, name=f"block{i + 1}")(x)
        return nn.Dense(self.num_classes, name="dense")(layer_norm("norm")(x).mean(axis=1))


def mixer(
    *,
    num_classes: int,
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    token_neurons: int = 384,
    channel_neurons: int = 3072,
) -> Mixer:
    """An MLP-Mixer; the defaults are Mixer-B/16.

    Mixer-S/16 has width=512, depth=8, token_neurons=256, channel_neurons=2048; Mixer-L/16 width=1024, depth=24,
    token_neurons=512, channel_neurons=4096.

    Args:
      num_classes: number of classes.
      patch: side of a patch in pixels.
      width: channels of a token.
      depth: number of blocks.
      token_neurons: neurons of the MLPs across patches.
      channel_neurons: neurons of the MLPs across channels.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(
        num_classes=num_classes,
        patch=patch,
        width=width,
        depth=depth,
        token_neurons=token_neurons,
        channel_neurons=channel_neurons,
    )
    return Mixer(num_classes, patch, width, depth, token_neurons, channel_neurons)
