"""Swin transformers (Liu et al. 2021): attention within windows, which every second block shifts by half a window.

Each head has a learnt bias for every relative position in a window. Heads, query and value sizes, MLP neurons and
branches can be pruned, since the attention reads the number of heads from its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.models import blocks

MOST_PAIRS = 1 << 26  # bounds the pairs of positions, which an untrusted architecture decides
FAR = -100.0  # added to attention logits between pixels that are neighbours only because of the shift

kernel_init = nn.initializers.truncated_normal(0.02)


def layer_norm(name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """LayerNorm with PyTorch's default epsilon, as in the published networks."""
    return nn.LayerNorm(epsilon=epsilon, name=name)


def split_windows(x: jax.Array, size: int) -> jax.Array:
    """Reshapes (batch, height, width, channels) to (batch, windows, size², channels), windows in row-major order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size * (width // size), size * size, channels)


def merge_windows(windows: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """The inverse of `split_windows`."""
    batch, _, _, channels = windows.shape
    x = windows.reshape(batch, height // size, width // size, size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, channels)


def relative_positions(size: int) -> np.ndarray:
    """(size², size²) indices below (2·size − 1)² of the relative position of each pair of positions in a window."""
    positions = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    down, right = np.moveaxis(positions[:, None] - positions[None], -1, 0) + size - 1
    return down * (2 * size - 1) + right


def shift_mask(height: int, width: int, size: int, shift: int) -> np.ndarray:
    """(windows, size², size²) `FAR` for pairs of pixels that were not in one region before the shift, else 0."""

    def region(sides: int) -> np.ndarray:  # the last `shift` positions were rolled around
        return np.searchsorted([sides - size, sides - shift], np.arange(sides), side="right")

    regions = 3 * region(height)[:, None] + region(width)[None]
    of_windows = regions.reshape(height // size, size, width // size, size).swapaxes(1, 2).reshape(-1, size * size)
    return np.where(of_windows[:, :, None] == of_windows[:, None], 0.0, FAR).astype(np.float32)


class WindowAttention(nn.Module):
    """Attention with relative position bias within windows of `window` x `window` pixels, or the size of a small image.

    Images are zero-padded at the bottom and on the right to a multiple of the window.
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
        x = split_windows(jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x, size)

        split = (self.heads, channels // self.heads)
        query, key, value = (
            nn.DenseGeneral(split, kernel_init=kernel_init, name=name)(x) for name in ("query", "key", "value")
        )
        table = self.param("relative_bias", kernel_init, ((2 * size - 1) ** 2, query.shape[-2]))
        bias = table[relative_positions(size)].transpose(2, 0, 1)[None, None]  # (batch, windows, heads, size², size²)
        if shift:
            bias = bias + shift_mask(rows, columns, size, shift)[None, :, None].astype(bias.dtype)
        x = nn.dot_product_attention(query, key, value, bias)
        x = nn.DenseGeneral(channels, axis=(-2, -1), kernel_init=kernel_init, name="out")(x)

        x = merge_windows(x, size, rows, columns)
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
    """Halves the sides: concatenates the pixels of each 2x2 square, normalises and projects them."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, height, width, channels) to (batch, ⌈height/2⌉, ⌈width/2⌉, features)."""
        _, height, width, _ = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
        return nn.Dense(self.features, use_bias=False, kernel_init=kernel_init, name="dense")(layer_norm("norm")(x))


class SwinStage(nn.Module):
    """`blocks` blocks in sequence, named block1, block2, …; all stages but the first merge patches first."""

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
    """Stages of `stage_blocks` blocks with `heads` heads; the first has `width` channels, each next twice as many."""

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
          ValueError: the image's sides are not multiples of the patch size.
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

    Swin-S has stage_blocks=(2, 2, 18, 2), Swin-B also width=128 and heads=(4, 8, 16, 32).

    Args:
      num_classes: number of classes.
      stage_blocks: blocks of each stage.
      heads: attention heads per block of each stage.
      width: channels of the first stage, a multiple of its heads; each next stage has twice as many.
      window: side of a window in patches; a smaller image is one window.
      patch: side of a patch in pixels.
      mlp_ratio: neurons of a block's MLP per channel.
      epsilon: of the LayerNorms, except those of the patches and of patch merging.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, width=width, window=window, patch=patch)
    counts, sizes = blocks.check_sizes("stage_blocks", stage_blocks), blocks.check_sizes("heads", heads)
    if len(counts) != len(sizes):
        raise ValueError(
            f"stage_blocks and heads must have the same number of stages, got {len(counts)} ({list(counts)}) and "
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
        raise ValueError(f"mlp_ratio must be at most 64 and give at least one neuron, got {mlp_ratio!r:.80}")
    blocks.check_rate("epsilon", epsilon)
    return Swin(num_classes, counts, sizes, width, window, patch, float(mlp_ratio), epsilon)
