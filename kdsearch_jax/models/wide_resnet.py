"""Wide residual networks (Zagoruyko & Komodakis 2016): pre-activation blocks, 6n + 4 layers, `width` times wider.

WRN-40-2 is `depth=40, width=2`. Where the channels change, the 1x1 projection reads the activated input; elsewhere the
shortcut is the block's unactivated input. There is no dropout.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks


class WideBlock(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x))))))."""

    features: int
    stride: int = 1
    shortcut: blocks.Shortcut = "identity"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        y = nn.relu(blocks.batch_norm(train, name="bn1")(x))
        if self.shortcut == "project":
            x = blocks.conv(self.features, 1, stride=self.stride, name="shortcut_conv")(y)
        y = blocks.conv(self.features, 3, stride=self.stride, name="conv1")(y)
        y = nn.relu(blocks.batch_norm(train, name="bn2")(y))
        return x + blocks.conv(self.features, 3, name="conv2")(y)


class WideResNet(nn.Module):
    """Three stages of `stage_blocks` pre-activation blocks with `width` · (16, 32, 64) channels."""

    stage_blocks: int
    num_classes: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        x = blocks.conv(16, 3, name="conv")(x)
        for i in range(3):
            x = blocks.Stage(
                block=WideBlock,
                blocks=self.stage_blocks,
                features=16 * self.width * 2**i,
                stride=1 if i == 0 else 2,
                shortcut="identity" if i == 0 and self.width == 1 else "project",
                name=f"stage{i + 1}",
            )(x, train)
        x = nn.relu(blocks.batch_norm(train, name="bn")(x))
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


def wide_resnet(*, num_classes: int, depth: int = 40, width: int = 2) -> WideResNet:
    """A wide residual network.

    Args:
      num_classes: number of classes.
      depth: 6n + 4 layers: 10, 16, 22, 28, 40, ….
      width: multiplier of the 16, 32 and 64 channels of the stages.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, depth=depth, width=width)
    if depth < 10 or depth % 6 != 4:
        nearest = max(10, 6 * round((depth - 4) / 6) + 4)
        raise ValueError(
            f"depth of a wide_resnet must be 6n + 4 (10, 16, 22, 28, 40, …), got {depth}; nearest is {nearest}"
        )
    return WideResNet((depth - 4) // 6, num_classes, width)
