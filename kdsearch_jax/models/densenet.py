"""Densely connected networks with bottlenecks and compression (Huang et al. 2017, "DenseNet-BC").

Every layer reads all earlier channels of its block and appends `growth` channels. A channel is read by many kernels and
is removed from all of them at once. Weights of torchvision load with `kdsearch_jax.models.pretrained`.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsearch_jax.models import blocks

BLOCK_LAYERS = {121: (6, 12, 24, 16), 161: (6, 12, 36, 24), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
PADDING: Any = ((1, 1), (1, 1))  # Any, because flax declares the padding of max_pool a str
BOTTLENECK = 4  # channels between a layer's two convolutions, per growth channel


class DenseLayer(nn.Module):
    """conv2(relu(bn2(conv1(relu(bn1(x)))))): 1x1 and 3x3 convolutions, each after normalisation."""

    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) to (batch, height, width, growth)."""
        y = nn.relu(blocks.batch_norm(train, name="bn1")(x))
        y = blocks.conv(BOTTLENECK * self.growth, 1, name="conv1")(y)
        y = nn.relu(blocks.batch_norm(train, name="bn2")(y))
        return blocks.conv(self.growth, 3, name="conv2")(y)


class DenseBlock(nn.Module):
    """`layers` layers, named layer1, layer2, …, each reading the block's input and the output of all earlier layers."""

    layers: int
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) to (batch, height, width, channels + layers · growth)."""
        for i in range(self.layers):
            x = jnp.concatenate([x, DenseLayer(self.growth, name=f"layer{i + 1}")(x, train)], axis=-1)
        return x


class Transition(nn.Module):
    """Normalisation, 1x1 convolution, 2x2 mean pooling."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) to (batch, height / 2, width / 2, features)."""
        x = nn.relu(blocks.batch_norm(train, name="bn")(x))
        x = blocks.conv(self.features, 1, name="conv")(x)
        return nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4


class DenseNet(nn.Module):
    """Dense blocks named block1, …, with transitions between them that halve the channels and the image's sides.

    Attributes:
      first: channels of the stem.
    """

    block_layers: tuple[int, ...]
    num_classes: int
    growth: int
    first: int
    stem: Literal["large", "small"] = "large"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        if self.stem == "large":
            x = blocks.conv(self.first, 7, stride=2, name="conv")(x)
            x = nn.relu(blocks.batch_norm(train, name="stem_bn")(x))
            x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=PADDING)
        else:
            x = blocks.conv(self.first, 3, name="conv")(x)
        channels = self.first
        for i, layers in enumerate(self.block_layers):
            if i > 0:
                channels //= 2
                x = Transition(channels, name=f"transition{i}")(x, train)
            x = DenseBlock(layers, self.growth, name=f"block{i + 1}")(x, train)
            channels += layers * self.growth
        x = nn.relu(blocks.batch_norm(train, name="bn")(x))
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


def densenet(*, num_classes: int, depth: int = 121, stem: Literal["large", "small"] = "large") -> DenseNet:
    """A DenseNet for images such as ImageNet's.

    Args:
      num_classes: number of classes.
      depth: 121, 161 (the widest), 169 or 201.
      stem: "large" divides the image's sides by 4, "small" keeps them.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes)
    blocks.check_choice("depth", depth, tuple(BLOCK_LAYERS))
    blocks.check_choice("stem", stem, ("large", "small"))
    growth = 48 if depth == 161 else 32
    return DenseNet(BLOCK_LAYERS[depth], num_classes, growth, 2 * growth, stem)


def cifar_densenet(*, num_classes: int, depth: int = 100, growth: int = 12) -> DenseNet:
    """A DenseNet for small images: three blocks of n layers, 6n + 4 convolutions and dense layers.

    Args:
      num_classes: number of classes.
      depth: 6n + 4: 10, 16, …, 100, 190, 250, ….
      growth: channels that each layer appends.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, depth=depth, growth=growth)
    if depth < 10 or depth % 6 != 4:
        nearest = max(10, 6 * round((depth - 4) / 6) + 4)
        raise ValueError(
            f"depth of a cifar_densenet must be 6n + 4 (10, 16, …, 100, 190, …), got {depth}; nearest is {nearest}"
        )
    return DenseNet(((depth - 4) // 6,) * 3, num_classes, growth, 2 * growth, "small")
