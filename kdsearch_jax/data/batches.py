"""Batches of examples: their order, augmentation and normalisation.

The training order is a pure function, `batch_indices`: update n with seed s has the same batch in every run, so a
resumed run continues as if it had never stopped. Augmentation and normalisation are jittable and run on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray


def is_image(entry: str, leaf: Any) -> bool:
    """Whether an entry of a batch holds images to augment and normalise: it is named `images`, and uint8."""
    return entry == "images" and getattr(leaf, "ndim", 0) == 4 and leaf.dtype == np.uint8


def preprocess(
    arrays: Mapping[str, Any], mean: Any, std: Any, key: Array | None = None, **augmentation: Any
) -> dict[str, Any]:
    """A batch as networks and losses receive it: normalised images, after `augment` if a key is given; jittable."""

    def to_input(images: Array) -> Array:
        return normalise(images if key is None else augment(key, images, **augmentation), mean, std)

    return {entry: to_input(leaf) if is_image(entry, leaf) else leaf for entry, leaf in arrays.items()}


def batch_indices(seed: int, examples: int, batch_size: int, first_step: int, steps: int) -> NDArray[np.int32]:
    """The examples of the updates `first_step`, …, `first_step + steps − 1`; a pure function of its arguments.

    Each epoch is a new permutation, without the examples at its end that do not fill a batch.

    Returns:
      Indices (steps, batch_size), int32.

    Raises:
      ValueError: a batch would be empty or larger than an epoch.
    """
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size: {batch_size} is invalid with {examples} examples; give 1 to {examples}")
    batches = np.empty((steps, batch_size), np.int32)
    for row, step in enumerate(range(first_step, first_step + steps)):
        epoch, place = divmod(step, examples // batch_size)
        batches[row] = epoch_order(seed, epoch, examples)[place * batch_size : (place + 1) * batch_size]
    return batches


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, examples: int) -> NDArray[np.int64]:
    """The permutation of the examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def padded_batches(examples: int, batch_size: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Yields every example once, in order, in batches of equal size: (indices, weights), each (batch_size,).

    The last batch is padded with example 0 at weight 0; all other weights are 1. Without examples there are no batches.

    Raises:
      ValueError: batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is invalid; give at least 1")
    for start in range(0, examples, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        real = indices < examples
        yield np.where(real, indices, 0).astype(np.int32), real.astype(np.float32)


def augment(key: Array, images: Array, *, crop: int, flip: bool) -> Array:
    """Randomly shifts and mirrors each image; jittable.

    Args:
      key: random key.
      images: uint8 (batch, height, width, channels).
      crop: pixels, 0 or more. Each image is padded with this many zeros (black, whatever the mean) on each side and
        cropped to its original size at one of the (2·crop + 1)² positions, all equally likely.
      flip: whether to mirror left and right with probability ½.

    Returns:
      Images of the same shape and dtype.
    """
    crop_key, flip_key = jax.random.split(key)
    batch = len(images)
    if crop:
        padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * crop + 1)
        # One slice per image: fast on CPUs, and on accelerators faster than gathering single pixels.
        cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:]))
        images = cut(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def normalise(images: Array, mean: Any, std: Any, dtype: Any = jnp.float32) -> Array:
    """Computes (images/255 − mean)/std per channel, in float32; jittable.

    Args:
      images: uint8 (…, channels).
      mean, std: (channels,), of images in [0, 1].
      dtype: of the result.

    Raises:
      ValueError: images are not uint8, or their number of channels differs from that of mean and std.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images: {images.dtype} is invalid; give uint8 from 0 to 255, not yet normalised")
    shape = (1,) * (images.ndim - 1) + (images.shape[-1],)
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    if not mean.shape == std.shape == shape[-1:]:
        raise ValueError(f"mean {mean.shape} and std {std.shape} must have one value for each of {shape[-1]} channels")
    return ((images.astype(jnp.float32) / 255 - mean.reshape(shape)) / std.reshape(shape)).astype(dtype)
