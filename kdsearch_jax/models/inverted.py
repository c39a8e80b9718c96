"""Inverted residual blocks, which MobileNetV2, MobileNetV3 and EfficientNet share.

A block expands its input with a 1x1 convolution, filters each channel with a depthwise convolution, optionally scales
the channels with squeeze-and-excitation, and projects them with another 1x1 convolution. An expanded channel is one
unit: it is removed with its filter, its scale and its row in the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks

Activation = Callable[[jax.Array], jax.Array]


class Style(NamedTuple):
    """Settings that all blocks of a model share.

    Attributes:
      squeeze, gate: activations after the first and second convolution of squeeze-and-excitation.
      padding: of strided convolutions, see `blocks.conv`.
    """

    activation: Activation
    squeeze: Activation = nn.relu
    gate: Activation = nn.sigmoid
    epsilon: float = 1e-5
    momentum: float = 0.9
    padding: blocks.Padding = "symmetric"


class Block(NamedTuple):
    """Sizes of one block.

    Attributes:
      features: output channels.
      expanded: channels of the depthwise convolution; the input channels if `expand` is False.
      size, stride: of the depthwise convolution.
      squeezed: inner channels of squeeze-and-excitation, 0 for none.
      residual: whether the input is added.
      activation: None for that of the style.
    """

    features: int
    expanded: int
    size: int = 3
    stride: int = 1
    squeezed: int = 0
    expand: bool = True
    residual: bool = False
    activation: Activation | None = None


class SqueezeExcitation(nn.Module):
    """x · gate(restore(act(reduce(mean of x over the image))))."""

    features: int
    squeezed: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, features) in and out."""
        y = x.mean(axis=(1, 2), keepdims=True)
        y = self.style.squeeze(blocks.conv(self.squeezed, 1, use_bias=True, name="reduce")(y))
        return x * self.style.gate(blocks.conv(self.features, 1, use_bias=True, name="restore")(y))


class InvertedResidual(nn.Module):
    """One block: [x +] project(scale(depthwise(expand(x))))."""

    block: Block
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        block, style, y = self.block, self.style, x
        activation = block.activation or style.activation
        if block.expand:
            y = blocks.conv(block.expanded, 1, name="expand_conv")(y)
            y = activation(batch_norm(style, train, name="expand_bn")(y))
        y = blocks.conv(
            block.expanded,
            block.size,
            stride=block.stride,
            groups=block.expanded,
            padding=style.padding,
            name="depthwise_conv",
        )(y)
        y = activation(batch_norm(style, train, name="depthwise_bn")(y))
        if block.squeezed:
            y = SqueezeExcitation(block.expanded, block.squeezed, style, name="squeeze")(y)
        y = batch_norm(style, train, name="project_bn")(blocks.conv(block.features, 1, name="project_conv")(y))
        return x + y if block.residual else y


class InvertedStage(nn.Module):
    """Blocks in sequence, named block1, block2, …."""

    blocks: tuple[Block, ...]
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        for i, block in enumerate(self.blocks):
            x = InvertedResidual(block, self.style, name=f"block{i + 1}")(x, train)
        return x


class InvertedNet(nn.Module):
    """A 3x3 convolution, stages of inverted residual blocks, a 1x1 convolution, the mean, and the classifier.

    Attributes:
      first, last: channels of the two convolutions.
      hidden: neurons of a dense layer before the classifier, 0 for none.
    """

    stages: tuple[tuple[Block, ...], ...]
    num_classes: int
    first: int
    last: int
    style: Style
    hidden: int = 0
    stem: Literal["large", "small"] = "large"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        style = self.style
        stride = 2 if self.stem == "large" else 1
        x = blocks.conv(self.first, 3, stride=stride, padding=style.padding, name="conv")(x)
        x = style.activation(batch_norm(style, train, name="bn")(x))
        for i, stage in enumerate(self.stages):
            x = InvertedStage(stage, style, name=f"stage{i + 1}")(x, train)
        x = blocks.conv(self.last, 1, name="last_conv")(x)
        x = style.activation(batch_norm(style, train, name="last_bn")(x)).mean(axis=(1, 2))
        if self.hidden:
            x = style.activation(nn.Dense(self.hidden, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(self.num_classes, name="dense")(x)


def batch_norm(style: Style, train: bool, *, name: str) -> nn.BatchNorm:
    """BatchNorm with the style's constants."""
    return blocks.batch_norm(train, epsilon=style.epsilon, momentum=style.momentum, name=name)


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by` that is at least `by` and at least 0.9 · `channels`."""
    nearest = max(by, int(channels + by / 2) // by * by)
    return nearest + by if nearest < 0.9 * channels else nearest


def check_width(width: float) -> None:
    """Raises ValueError unless a width multiplier is in (0, 64]."""
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 64:
        raise ValueError(f"width must be above 0 and at most 64 (1 is the published network), got {width!r:.80}")


def check_shared_arguments(num_classes: int, stem: str, dropout: float) -> None:
    """Raises ValueError if an argument that the factories share is out of range."""
    blocks.check_positive(num_classes=num_classes)
    blocks.check_choice("stem", stem, ("large", "small"))
    blocks.check_rate("dropout", dropout)
