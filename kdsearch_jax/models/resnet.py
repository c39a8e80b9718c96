"""ResNets for large images, as in torchvision: the stride of a bottleneck is in its 3x3 convolution ("v1.5").

ResNeXt (Xie et al. 2017) divides that convolution into groups; a whole group is then one unit.

Weights of torchvision load with `kdsearch_jax.models.pretrained`. `stem="small"` replaces the 7x7 convolution and the
pooling by one 3x3 convolution, as is usual for 32x32 images.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks

STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
PADDING: Any = ((1, 1), (1, 1))  # Any, because flax declares the padding of max_pool a str
EXPANSION = 4  # a bottleneck's output channels per inner channel


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.

    Attributes:
      features: output channels.
      groups: of the 3x3 convolution.
      group_width: channels of each group; None for `features` / 4 inner channels in total.
    """

    features: int
    stride: int = 1
    shortcut: blocks.Shortcut = "identity"
    groups: int = 1
    group_width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        inner = self.groups * self.group_width if self.group_width else self.features // EXPANSION
        y = nn.relu(blocks.batch_norm(train, name="bn1")(blocks.conv(inner, 1, name="conv1")(x)))
        y = blocks.conv(inner, 3, stride=self.stride, groups=self.groups, name="conv2")(y)
        y = nn.relu(blocks.batch_norm(train, name="bn2")(y))
        y = blocks.batch_norm(train, name="bn3")(blocks.conv(self.features, 1, name="conv3")(y))
        if self.shortcut == "project":
            x = blocks.conv(self.features, 1, stride=self.stride, name="shortcut_conv")(x)
            x = blocks.batch_norm(train, name="shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Four stages of basic blocks or bottlenecks with `width` · (1, 2, 4, 8) inner channels.

    With `group_width`, bottlenecks have `groups` · `group_width` · (1, 2, 4, 8) inner channels.
    """

    stage_blocks: tuple[int, ...]
    num_classes: int
    bottleneck: bool = False
    stem: Literal["large", "small"] = "large"
    width: int = 64
    groups: int = 1
    group_width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        large = self.stem == "large"
        x = blocks.conv(self.width, 7 if large else 3, stride=2 if large else 1, name="conv")(x)
        x = nn.relu(blocks.batch_norm(train, name="bn")(x))
        if large:
            x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=PADDING)
        for i, count in enumerate(self.stage_blocks):
            block: Any = blocks.BasicBlock
            if self.bottleneck:
                group_width = self.group_width and self.group_width * 2**i
                block = partial(Bottleneck, groups=self.groups, group_width=group_width)
            x = blocks.Stage(
                block=block,
                blocks=count,
                features=self.width * 2**i * (EXPANSION if self.bottleneck else 1),
                stride=1 if i == 0 else 2,
                shortcut="identity" if i == 0 and not self.bottleneck else "project",
                name=f"stage{i + 1}",
            )(x, train)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


def resnet(*, num_classes: int, depth: int = 50, stem: Literal["large", "small"] = "large", width: int = 64) -> ResNet:
    """A ResNet for images such as ImageNet's.

    Args:
      num_classes: number of classes.
      depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
      stem: "large" divides the image's sides by 4, "small" keeps them.
      width: channels of the stem and inner channels of the first stage.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, width=width)
    blocks.check_choice("depth", depth, tuple(STAGE_BLOCKS))
    blocks.check_choice("stem", stem, ("large", "small"))
    return ResNet(STAGE_BLOCKS[depth], num_classes, depth >= 50, stem, width)


def resnext(
    *,
    num_classes: int,
    depth: int = 50,
    groups: int = 32,
    group_width: int = 4,
    stem: Literal["large", "small"] = "large",
    width: int = 64,
) -> ResNet:
    """A ResNeXt; the defaults are ResNeXt-50 32x4d. `groups=1, group_width=128` is torchvision's Wide ResNet-50-2.

    Args:
      num_classes: number of classes.
      depth: 50, 101 or 152.
      groups: groups of each 3x3 convolution.
      group_width: channels of a group in the first stage.
      stem: "large" divides the image's sides by 4, "small" keeps them.
      width: channels of the stem; the first stage has four times as many output channels.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, groups=groups, group_width=group_width, width=width)
    blocks.check_choice("depth", depth, tuple(depth for depth in STAGE_BLOCKS if depth >= 50))
    blocks.check_choice("stem", stem, ("large", "small"))
    return ResNet(STAGE_BLOCKS[depth], num_classes, True, stem, width, groups, group_width)
