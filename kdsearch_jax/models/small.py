"""Networks that train in seconds, for tests and the 8x8 digits: a small CNN and a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks


class ConvUnit(nn.Module):
    """Convolution, BatchNorm, relu."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        x = blocks.conv(self.features, 3, stride=self.stride, name="conv")(x)
        return nn.relu(blocks.batch_norm(train, name="bn")(x))


class SmallCNN(nn.Module):
    """Three convolutions with `width`, 2·`width` and 4·`width` channels and one residual block after the second."""

    num_classes: int
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        x = ConvUnit(self.width, name="stage1")(x, train)
        x = ConvUnit(2 * self.width, stride=2, name="stage2")(x, train)
        x = blocks.BasicBlock(2 * self.width, name="block")(x, train)
        x = ConvUnit(4 * self.width, stride=2, name="stage3")(x, train)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


class MLP(nn.Module):
    """Dense layers with relu, named dense1, dense2, …, on the flattened image."""

    num_classes: int
    hidden: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height * width * channels)
        for i, features in enumerate(self.hidden):
            x = nn.relu(nn.Dense(features, name=f"dense{i + 1}")(x))
        return nn.Dense(self.num_classes, name="dense")(x)


def small_cnn(*, num_classes: int, width: int = 16) -> SmallCNN:
    """A CNN with six layers; the first has `width` channels. Raises ValueError for sizes below 1."""
    blocks.check_positive(num_classes=num_classes, width=width)
    return SmallCNN(num_classes, width)


def mlp(*, num_classes: int, hidden: Sequence[int] = (128, 128)) -> MLP:
    """A multilayer perceptron with `hidden` neurons in its inner layers. Raises ValueError for sizes below 1."""
    if isinstance(hidden, str) or not isinstance(hidden, Sequence) or len(hidden) > blocks.DEEPEST:
        raise ValueError(f"hidden must be a list of at most {blocks.DEEPEST} layer sizes, got {hidden!r:.80}")
    blocks.check_positive(num_classes=num_classes, **{f"hidden[{i}]": size for i, size in enumerate(hidden)})
    return MLP(num_classes, tuple(hidden))
