"""Encoded images of a data set as arrays: JPEG, PNG, GIF and BMP, the formats of TFDS, and no other that Pillow knows.

An image says in its first bytes how large it is; what says more than `MAX_PIXELS` is refused before it is decoded, and
so is what has more than 8 bits a channel, which would be cut off silently. Of several frames the first is taken, and
the orientation that a camera has noted is not looked at: both as TFDS has it.
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


def opened(encoded: bytes) -> Any:
    """The image as Pillow has it, within bounds and not decoded yet (`draft` may still be called).

    Raises:
      DamagedError: it is of none of these formats, too large, or has more than 8 bits a channel; says which.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is the lower one
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise DamagedError(f"no image in the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # every plug-in of Pillow has its own
        raise DamagedError(one_line(error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise DamagedError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS} are decoded")
    if image.mode[0] in "IF":
        raise DamagedError(f"more than 8 bits a channel (mode {image.mode})")
    return image


def converted(image: Any, channels: int) -> Any:
    """What `opened` gave, decoded, as a Pillow image of 1 (grey), 3 (RGB) or 4 (RGBA) channels; raises DamagedError."""
    try:
        return image.convert(_MODES[channels])
    except Exception as error:
        raise DamagedError(one_line(error)) from None


def pixels(image: Any, channels: int) -> NDArray[np.uint8]:
    """(height, width, channels) of what `opened` gave; raises DamagedError as `converted`."""
    array = np.asarray(converted(image, channels))
    return array.reshape(*array.shape[:2], channels)


def decode(encoded: bytes, channels: int) -> NDArray[np.uint8]:
    """(height, width, channels) of an encoded image; 1 is grey, 3 RGB, 4 RGBA.

    Raises:
      DamagedError: it cannot be decoded, or is out of bounds: says why, in one line.
    """
    return pixels(opened(encoded), channels)
