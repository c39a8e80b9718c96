"""How an encoded image becomes a square of a fixed size.

    stretch   the whole image, without keeping its aspect ratio, in training and evaluation
    crop      in training a box of random area (uniform from `least` to 1 of the image) and random aspect ratio (3/4 to
              4/3, uniform in its logarithm) at a random position, as in Szegedy et al. 2015 (arXiv 1409.4842, section
              6); in evaluation the central box with 7/8 of the shorter side, which equals resizing the shorter side to
              8/7 of the square and cropping its centre

A box is cropped and resized in one pass (bilinear, antialiased), so its corners may lie between pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.data.streaming.records import Records

RATIO = 4 / 3
MIDDLE = 7 / 8
_ATTEMPTS = 10
_OVERSAMPLING = 2  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if this multiple of the needed side is left

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Framing:
    """size: side in pixels; None keeps the image's size. least: minimum fraction of the image's area in training."""

    kind: Literal["stretch", "crop"] = "stretch"
    size: int | None = None
    least: float = 0.08

    def image(
        self, records: Records, encoded: bytes, index: int, random: np.random.Generator | None = None
    ) -> NDArray[np.uint8]:
        """Decodes and frames an image to (height, width, channels); `random` is given in training."""
        image = records.open_image(encoded, index)
        if self.kind == "stretch" or self.size is None:
            array = records.to_array(image, index)
            return array if self.size is None else resize(array, self.size)
        width, height = image.size
        box = central_box(width, height) if random is None else random_box(random, width, height, self.least)
        # Affects only JPEGs; the decoded size is never below the requested one.
        image.draft(None, tuple(math.ceil(_OVERSAMPLING * self.size * side / min(_sides(box))) for side in image.size))
        across, down = image.width / width, image.height / height
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return resize(records.convert(image, index), self.size, box)


def random_box(random: np.random.Generator, width: int, height: int, least: float) -> Box:
    """A random box in whole pixels; if none of ten fits, the largest central one with an allowed aspect ratio."""
    area, log = width * height, math.log(RATIO)
    for _ in range(_ATTEMPTS):
        target, ratio = area * random.uniform(least, 1.0), math.exp(random.uniform(-log, log))
        across, down = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = random.integers(0, (width - across + 1, height - down + 1)).tolist()
            return left, top, left + across, top + down
    across, down = min(width, round(height * RATIO)), min(height, round(width * RATIO))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def central_box(width: int, height: int) -> Box:
    """The central square of an image that is used in evaluation."""
    side = MIDDLE * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def resize(image: Any, size: int, box: Box | None = None) -> NDArray[np.uint8]:
    """Resizes an array (height, width, channels) or Pillow image, or a box of it, to (size, size, channels).

    Channels other than RGB are resized separately, as they may mean anything.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.shape[:2] == (size, size) and box is None:
            return image
        channels = (image,) if image.shape[-1] == 3 else np.moveaxis(image, -1, 0)
        bands = tuple(Image.fromarray(np.ascontiguousarray(channel)) for channel in channels)
    else:  # Pillow would multiply the colours by the alpha channel
        bands = (image,) if image.mode in ("L", "RGB") else image.split()
    resampled = [band.resize((size, size), Image.Resampling.BILINEAR, box) for band in bands]
    return np.concatenate([np.asarray(band).reshape(size, size, -1) for band in resampled], axis=-1)


def _sides(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]
