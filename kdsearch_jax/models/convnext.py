"""ConvNeXt (Liu et al. 2022): residual blocks of a 7x7 depthwise convolution, LayerNorm and a wide MLP.

The channels of each stage's residual stream, the MLPs' neurons and whole blocks can be pruned. Each block ends with a
learnt factor per channel ("layer scale"), initialised near 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks

EPSILON = 1e-6
EXPANSION = 4  # neurons of a block's MLP per channel

kernel_init = nn.initializers.truncated_normal(0.02)


def patches(features: int, size: int, *, name: str) -> nn.Conv:
    """A convolution with non-overlapping windows."""
    return nn.Conv(features, (size, size), (size, size), "VALID", kernel_init=kernel_init, name=name)


class ConvNeXtBlock(nn.Module):
    """x + scale · dense2(gelu(dense1(norm(conv(x)))))."""

    layer_scale: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        channels = x.shape[-1]
        y = nn.Conv(
            channels,
            (7, 7),
            padding=((3, 3), (3, 3)),
            feature_group_count=channels,
            kernel_init=kernel_init,
            name="conv",
        )(x)
        y = nn.LayerNorm(epsilon=EPSILON, name="norm")(y)
        y = nn.Dense(EXPANSION * channels, kernel_init=kernel_init, name="dense1")(y)
        y = nn.Dense(channels, kernel_init=kernel_init, name="dense2")(nn.gelu(y, approximate=False))
        scale = self.param("scale", nn.initializers.constant(self.layer_scale), (channels,))
        return x + y * scale.reshape(1, 1, 1, -1)


class ConvNeXtStage(nn.Module):
    """`blocks` blocks in sequence, named block1, block2, …; all stages but the first halve the sides first."""

    blocks: int
    features: int
    downsample: bool = True
    layer_scale: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        if self.downsample:
            x = nn.LayerNorm(epsilon=EPSILON, name="downsample_norm")(x)
            x = patches(self.features, 2, name="downsample_conv")(x)
        for i in range(self.blocks):
            x = ConvNeXtBlock(self.layer_scale, name=f"block{i + 1}")(x)
        return x


class ConvNeXt(nn.Module):
    """Stages of `stage_blocks` blocks with `widths` channels, on square patches of `patch` pixels.

    Attributes:
      epsilon: of the last LayerNorm; the others use 1e-6.
    """

    num_classes: int
    stage_blocks: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    layer_scale: float = 1e-6
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels).

        Raises:
          ValueError: the image is too small for the number of stages.
        """
        least = self.patch * 2 ** (len(self.widths) - 1)
        if min(x.shape[1:3]) < least:
            raise ValueError(
                f"convnext with patch={self.patch} and {len(self.widths)} stages needs images of at least {least} "
                f"pixels a side, got {x.shape[1]}x{x.shape[2]}"
            )
        x = patches(self.widths[0], self.patch, name="patches")(x)
        x = nn.LayerNorm(epsilon=EPSILON, name="patches_norm")(x)
        for i, (count, features) in enumerate(zip(self.stage_blocks, self.widths, strict=True)):
            x = ConvNeXtStage(count, features, i > 0, self.layer_scale, name=f"stage{i + 1}")(x)
        x = nn.LayerNorm(epsilon=self.epsilon, name="norm")(x.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="dense")(x)


def convnext(
    *,
    num_classes: int,
    stage_blocks: Sequence[int] = (3, 3, 9, 3),
    widths: Sequence[int] = (96, 192, 384, 768),
    patch: int = 4,
    layer_scale: float = 1e-6,
    epsilon: float = 1e-6,
) -> ConvNeXt:
    """A ConvNeXt; the defaults are ConvNeXt-T.

    ConvNeXt-S has stage_blocks=(3, 3, 27, 3), ConvNeXt-B also widths=(128, 256, 512, 1024).

    Args:
      num_classes: number of classes.
      stage_blocks: blocks of each stage.
      widths: channels of each stage.
      patch: side of a patch in pixels.
      layer_scale: initial value of each block's factors.
      epsilon: of the last LayerNorm.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, patch=patch)
    counts, sizes = blocks.check_sizes("stage_blocks", stage_blocks), blocks.check_sizes("widths", widths)
    if len(counts) != len(sizes):
        raise ValueError(
            f"stage_blocks and widths must have the same number of stages, got {len(counts)} ({list(counts)}) and "
            f"{len(sizes)} ({list(sizes)})"
        )
    for name, value in (("layer_scale", layer_scale), ("epsilon", epsilon)):
        blocks.check_rate(name, value)
    return ConvNeXt(num_classes, counts, sizes, patch, layer_scale, epsilon)
