"""Decodes images of a data set: JPEG, PNG, GIF and BMP, the formats of TFDS, and no other format that Pillow supports.

An image whose header declares more than `MAX_PIXELS` is refused before it is decoded, and so is one with more than 8
bits per channel, which would be truncated silently. As in TFDS, the first of several frames is used and the camera's
orientation is ignored.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.storage.files import DamagedError, one_line

FORMATS = ("JPEG", "PNG", "GIF", "BMP")
MAX_PIXELS = 1 << 26  # ImageNet's largest has 61 million
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def open_image(encoded: bytes) -> Any:
    """Opens an image with Pillow, within bounds, without decoding it (`draft` may still be called).

    Raises:
      DamagedError: the image has none of these formats, is too large, or has more than 8 bits per channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is the lower one
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise DamagedError(f"not an image in the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # each Pillow plug-in raises its own type
        raise DamagedError(one_line(error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise DamagedError(f"{image.width}x{image.height} pixels; the limit is {MAX_PIXELS}")
    if image.mode[0] in "IF":
        raise DamagedError(f"more than 8 bits per channel (mode {image.mode})")
    return image


def convert(image: Any, channels: int) -> Any:
    """Decodes an opened image to a Pillow image of 1 (grey), 3 (RGB) or 4 (RGBA) channels; raises DamagedError."""
    try:
        return image.convert(_MODES[channels])
    except Exception as error:
        raise DamagedError(one_line(error)) from None


def to_array(image: Any, channels: int) -> NDArray[np.uint8]:
    """Decodes an opened image to (height, width, channels); raises DamagedError."""
    array = np.asarray(convert(image, channels))
    return array.reshape(*array.shape[:2], channels)


def decode(encoded: bytes, channels: int) -> NDArray[np.uint8]:
    """Decodes an image to (height, width, channels), where 1 channel is grey, 3 RGB and 4 RGBA.

    Raises:
      DamagedError: the image cannot be decoded, or is too large; one line.
    """
    return to_array(open_image(encoded), channels)
