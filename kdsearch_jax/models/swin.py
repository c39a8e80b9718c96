"""Swin transformers (Liu et al. 2021): attention within windows, which every second block shifts by half their side.

Each pair of places in a window has a learnt bias in every head ("relative position bias"). LayerNorm keeps the channels
of the residual stream together; heads, value sizes, MLP neurons and branches are free, as the attention asks its input
how many heads there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.models import blocks

MOST_PAIRS = 1 << 26  # numbers of a table of pixels' pairs, which an image and a window from elsewhere decide
FAR = -100.0  # added to the attention between pixels that only the shift has made neighbours

kernel_init = nn.initializers.truncated_normal(0.02)


def layer_norm(name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """LayerNorm with PyTorch's epsilon, which the published networks have."""
    return nn.LayerNorm(epsilon=epsilon, name=name)


def windows_of(x: jax.Array, size: int) -> jax.Array:
    """(batch, height, width, channels) as (batch, windows, size², channels), rows of windows first."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size * (width // size), size * size, channels)


def image_of(windows: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """The inverse of `windows_of`."""
    batch, _, _, channels = windows.shape
    x = windows.reshape(batch, height // size, width // size, size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, channels)


def relative_places(size: int) -> np.ndarray:
    """(size², size²) numbers, below (2·size − 1)², of the distances, down and right, of two places in a window."""
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    down, right = np.moveaxis(places[:, None] - places[None], -1, 0) + size - 1
    return down * (2 * size - 1) + right


def far_apart(height: int, width: int, size: int, shift: int) -> np.ndarray:
    """(windows, size², size²) FAR for pixels of a shifted image's window that were no neighbours before, else 0."""

    def region(sides: int) -> np.ndarray:  # the places that came around are in the last `shift`
        return np.searchsorted([sides - size, sides - shift], np.arange(sides), side="right")

    regions = 3 * region(height)[:, None] + region(width)[None]
    of_windows = regions.reshape(height // size, size, width // size, size).swapaxes(1, 2).reshape(-1, size * size)
    return np.where(of_windows[:, :, None] == of_windows[:, None], 0.0, FAR).astype(np.float32)


class WindowAttention(nn.Module):
    """Attention with relative position bias within windows of `window` pixels a side, or one window of a small image.

    Images are padded by zeros, at the bottom and on the right, to a whole number of windows.
    """

    heads: int
    window: int
    shifted: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        _, height, width, channels = x.shape
        size = min(self.window, height, width)
        if height * width * size**2 > MOST_PAIRS:
            raise ValueError(f"window={self.window} is too large for {height}x{width} patches")
        shift = size // 2 if self.shifted and size < min(height, width) else 0
        rows, columns = height + -height % size, width + -width % size
        x = jnp.pad(x, ((0, 0), (0, rows - height), (0, columns - width), (0, 0)))
        x = windows_of(jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x, size)

        split = (self.heads, channels // self.heads)
        query, key, value = (
            nn.DenseGeneral(split, kernel_init=kernel_init, name=name)(x) for name in ("query", "key", "value")
        )
        table = self.param("relative_bias", kernel_init, ((2 * size - 1) ** 2, query.shape[-2]))
        bias = table[relative_places(size)].transpose(2, 0, 1)[None, None]  # (batch, windows, heads, size², size²)
        if shift:
            bias = bias + far_apart(rows, columns, size, shift)[None, :, None].astype(bias.dtype)
        x = nn.dot_product_attention(query, key, value, bias)
        x = nn.DenseGeneral(channels, axis=(-2, -1), kernel_init=kernel_init, name="out")(x)

        x = image_of(x, size, rows, columns)
        return (jnp.roll(x, (shift, shift), (1, 2)) if shift else x)[:, :height, :width]


class SwinBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    heads: int
    window: int
    shifted: bool
    mlp_ratio: float
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        channels = x.shape[-1]
        y = layer_norm("norm1", self.epsilon)(x)
        x = x + WindowAttention(self.heads, self.window, self.shifted, name="attention")(y)
        y = layer_norm("norm2", self.epsilon)(x)
        y = nn.Dense(int(self.mlp_ratio * channels), kernel_init=kernel_init, name="dense1")(y)
        return x + nn.Dense(channels, kernel_init=kernel_init, name="dense2")(nn.gelu(y, approximate=False))


class PatchMerging(nn.Module):
    """Halves the sides: the four pixels of each 2x2 square side by side, normalised, then projected."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, channels) to (batch, ⌈height/2⌉, ⌈width/2⌉, features)."""
        _, height, width, _ = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
        return nn.Dense(self.features, use_bias=False, kernel_init=kernel_init, name="dense")(layer_norm("norm")(x))


class SwinStage(nn.Module):
    """`blocks` blocks in a row, named block1, block2, …; but for the first stage, behind a merging of patches."""

    blocks: int
    features: int
    heads: int
    window: int
    mlp_ratio: float
    merge: bool
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        if self.merge:
            x = PatchMerging(self.features, name="merge")(x)
        for i in range(self.blocks):
            x = SwinBlock(self.heads, self.window, i % 2 == 1, self.mlp_ratio, self.epsilon, name=f"block{i + 1}")(x)
        return x


class Swin(nn.Module):
    """Stages of `stage_blocks` blocks with `heads` heads; `width` channels in the first, twice as many in each next."""

    num_classes: int
    stage_blocks: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    width: int = 96
    window: int = 7
    patch: int = 4
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels).

        Raises:
          ValueError: the image is no whole number of patches.
        """
        blocks.check_patches("swin", x.shape, self.patch)
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", kernel_init=kernel_init, name="patches")(x)
        x = layer_norm("patches_norm")(x)
        for i, (count, heads) in enumerate(zip(self.stage_blocks, self.heads, strict=True)):
            x = SwinStage(
                blocks=count,
                features=self.width * 2**i,
                heads=heads,
                window=self.window,
                mlp_ratio=self.mlp_ratio,
                merge=i > 0,
                epsilon=self.epsilon,
                name=f"stage{i + 1}",
            )(x)
        x = layer_norm("norm", self.epsilon)(x).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="dense")(x)


def swin(
    *,
    num_classes: int,
    stage_blocks: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    width: int = 96,
    window: int = 7,
    patch: int = 4,
    mlp_ratio: float = 4.0,
    epsilon: float = 1e-5,
) -> Swin:
    """A Swin transformer; the defaults are Swin-T.

    Swin-S has stage_blocks=(2, 2, 18, 2), Swin-B these, width=128 and heads=(4, 8, 16, 32).

    Args:
      num_classes: how many logits.
      stage_blocks: blocks of each stage.
      heads: attention heads in the blocks of each stage.
      width: channels of the first stage, a multiple of its heads; each next stage has twice as many.
      window: side of a window in patches; an image of fewer is one window.
      patch: side of a patch in pixels.
      mlp_ratio: neurons of a block's MLP over its channels.
      epsilon: of the LayerNorms, but for those of the patches and of the merging.

    Raises:
      ValueError: no such network.
    """
    blocks.check_positive(num_classes=num_classes, width=width, window=window, patch=patch)
    counts, sizes = blocks.check_sizes("stage_blocks", stage_blocks), blocks.check_sizes("heads", heads)
    if len(counts) != len(sizes):
        raise ValueError(
            f"stage_blocks and heads must name as many stages, got {len(counts)} ({list(counts)}) and "
            f"{len(sizes)} ({list(sizes)})"
        )
    for i, number in enumerate(sizes):
        if width * 2**i % number:
            raise ValueError(f"heads[{i}] must divide the {width * 2**i} channels of its stage, got {number}")
    if (
        isinstance(mlp_ratio, bool)
        or not isinstance(mlp_ratio, (int, float))
        or not 1 <= mlp_ratio * width <= 64 * width
    ):
        raise ValueError(f"mlp_ratio must be a number up to 64 that leaves a neuron or more, got {mlp_ratio!r:.80}")
    blocks.check_rate("epsilon", epsilon)
    return Swin(num_classes, counts, sizes, width, window, patch, float(mlp_ratio), epsilon)
