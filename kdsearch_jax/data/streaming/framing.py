"""How an encoded image becomes a square of a fixed side.

    stretch   all of it, stretched: the aspect ratio is not kept. In training as in evaluation
    crop      in training a box of random area (`least` to 1 of the image, uniform) and random aspect ratio (3/4 to 4/3,
              uniform in its logarithm) at a random place, as Szegedy et al. 2015 (arXiv 1409.4842, section 6) train;
              in evaluation the box in the middle with 7/8 of the shorter side, which is what resizing the shorter side
              to 8/7 of the square's and cutting out its middle shows

A box is cut out and resized in one pass (bilinear, over as many pixels as there are), so its corners may lie between
pixels.
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
_TRIES = 10
_SPARE = 2  # a JPEG is decoded at a fraction of its size (1/2, 1/4, 1/8) where so many times the pixels needed are left

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Framing:
    """size: side in pixels; None keeps images as they are. least: smallest share of an image that training sees."""

    kind: Literal["stretch", "crop"] = "stretch"
    size: int | None = None
    least: float = 0.08

    def image(
        self, records: Records, encoded: bytes, index: int, random: np.random.Generator | None = None
    ) -> NDArray[np.uint8]:
        """(height, width, channels) of an encoded image; random: in training."""
        image = records.opened(encoded, index)
        if self.kind == "stretch" or self.size is None:
            array = records.pixels(image, index)
            return array if self.size is None else resized(array, self.size)
        width, height = image.size
        box = middle_box(width, height) if random is None else random_box(random, width, height, self.least)
        # Only of a JPEG, and only to a size that is not below the one asked for.
        image.draft(None, tuple(math.ceil(_SPARE * self.size * side / min(_sides(box))) for side in image.size))
        across, down = image.width / width, image.height / height
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return resized(records.converted(image, index), self.size, box)


def random_box(random: np.random.Generator, width: int, height: int, least: float) -> Box:
    """A box within an image, in whole pixels; where none of ten fits, the largest of an allowed ratio in the middle."""
    area, log = width * height, math.log(RATIO)
    for _ in range(_TRIES):
        chosen, ratio = area * random.uniform(least, 1.0), math.exp(random.uniform(-log, log))
        across, down = round(math.sqrt(chosen * ratio)), round(math.sqrt(chosen / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = random.integers(0, (width - across + 1, height - down + 1)).tolist()
            return left, top, left + across, top + down
    across, down = min(width, round(height * RATIO)), min(height, round(width * RATIO))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def middle_box(width: int, height: int) -> Box:
    """The square in the middle of an image that evaluation sees."""
    side = MIDDLE * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def resized(image: Any, size: int, box: Box | None = None) -> NDArray[np.uint8]:
    """(size, size, channels) of an array (height, width, channels) or a Pillow image, or of a box of it.

    Each channel by itself, as it may be anything.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.shape[:2] == (size, size) and box is None:
            return image
        each = (image,) if image.shape[-1] == 3 else np.moveaxis(image, -1, 0)
        bands = tuple(Image.fromarray(np.ascontiguousarray(band)) for band in each)
    else:  # Pillow would multiply colours by a fourth channel
        bands = (image,) if image.mode in ("L", "RGB") else image.split()
    resampled = [band.resize((size, size), Image.Resampling.BILINEAR, box) for band in bands]
    return np.concatenate([np.asarray(band).reshape(size, size, -1) for band in resampled], axis=-1)


def _sides(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]
