"""ResNets for small images (He et al. 2016, section 4.2): a 3x3 stem and three stages of n basic blocks, 6n + 2 layers.

With `shortcut="A"` the network is that of github.com/akamaster/pytorch_resnet_cifar10, whose weights it can load
(`kdsearch_jax.models.pretrained`). Option A hard-codes the number of zero channels, so the channels of the residual
stream that they join are frozen; its other channels, the inner channels of the blocks, and whole blocks can be pruned.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks


class CifarResNet(nn.Module):
    """Three stages of `stage_blocks` basic blocks with `width`, 2·`width` and 4·`width` channels."""

    stage_blocks: int
    num_classes: int
    shortcut: blocks.Shortcut = "pad"
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        x = blocks.conv(self.width, 3, name="conv")(x)
        x = nn.relu(blocks.batch_norm(train, name="bn")(x))
        for i in range(3):
            x = blocks.Stage(
                block=blocks.BasicBlock,
                blocks=self.stage_blocks,
                features=self.width * 2**i,
                stride=1 if i == 0 else 2,
                shortcut="identity" if i == 0 else self.shortcut,
                name=f"stage{i + 1}",
            )(x, train)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


def cifar_resnet(
    *, num_classes: int, depth: int = 20, shortcut: Literal["A", "B"] = "A", width: int = 16
) -> CifarResNet:
    """A CIFAR ResNet.

    Args:
      num_classes: number of classes.
      depth: 6n + 2 layers: 8, 14, 20, 32, 44, 56, 110, ….
      shortcut: "A" pads with zero channels, "B" projects by a 1x1 convolution where the size changes.
      width: channels of the first stage, an even number for "A".

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, depth=depth, width=width)
    blocks.check_choice("shortcut", shortcut, ("A", "B"))
    if depth < 8 or depth % 6 != 2:
        nearest = max(8, 6 * round((depth - 2) / 6) + 2)
        raise ValueError(
            f"depth of a cifar_resnet must be 6n + 2 (8, 14, 20, 32, 44, 56, 110, …), got {depth}; nearest is {nearest}"
        )
    if shortcut == "A" and width % 2:
        raise ValueError(f'width must be even with shortcut="A" (half the zero channels each side), got {width}')
    return CifarResNet((depth - 2) // 6, num_classes, "pad" if shortcut == "A" else "project", width)
