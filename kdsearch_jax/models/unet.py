"""U-Net (Ronneberger et al. 2015): an encoder, and a decoder that reads the encoder's activations of the same size.

With BatchNorm and padding, so that the output has the image's size. Channels of an encoder level are read twice, by the
next level and by the decoder, and are removed from both at once.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsearch_jax.models import blocks


class DoubleConv(nn.Module):
    """Twice: 3x3 convolution, BatchNorm, relu."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        x = nn.relu(blocks.batch_norm(train, name="bn1")(blocks.conv(self.features, 3, name="conv1")(x)))
        return nn.relu(blocks.batch_norm(train, name="bn2")(blocks.conv(self.features, 3, name="conv2")(x)))


class UNet(nn.Module):
    """`depth` halvings of the image, named down1, down2, …, and doublings, named up1 (full resolution), up2, …."""

    num_classes: int
    width: int = 64
    depth: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, height, width, num_classes) of normalised images (batch, height, width, channels).

        Raises:
          ValueError: the image's sides are not multiples of 2^depth.
        """
        if x.shape[1] % 2**self.depth or x.shape[2] % 2**self.depth:
            raise ValueError(
                f"unet with depth={self.depth} needs images whose sides are multiples of {2**self.depth}, got "
                f"{x.shape[1]}x{x.shape[2]}; pad the images or use a smaller depth"
            )
        seen = []
        for i in range(self.depth):
            x = DoubleConv(self.width * 2**i, name=f"down{i + 1}")(x, train)
            seen.append(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = DoubleConv(self.width * 2**self.depth, name="bottom")(x, train)
        for i in reversed(range(self.depth)):
            x = nn.ConvTranspose(self.width * 2**i, (2, 2), (2, 2), padding="VALID", name=f"up{i + 1}_conv")(x)
            x = jnp.concatenate([seen[i], x], axis=-1)
            x = DoubleConv(self.width * 2**i, name=f"up{i + 1}")(x, train)
        return nn.Conv(self.num_classes, (1, 1), name="head")(x)


def unet(*, num_classes: int, width: int = 64, depth: int = 4) -> UNet:
    """A U-Net.

    Args:
      num_classes: number of classes per pixel.
      width: channels of the first level; each next level has twice as many.
      depth: number of halvings.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, width=width, depth=depth)
    blocks.check_positive(**{"width * 2**depth": width * 2**depth})
    return UNet(num_classes, width, depth)
