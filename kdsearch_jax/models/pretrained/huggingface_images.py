"""Reads the size and normalisation of images from Hugging Face's preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdsearch_jax.models.pretrained.config_reader import MAX_PIXELS, ConfigReader, is_size, read_json


class Preprocessing(NamedTuple):
    """How images are prepared; None for what is not specified.

    size: (height, width) of the network's input. mean, std: per channel, of images in [0, 1].
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_preprocessing(path: Path, channels: int) -> Preprocessing:
    """Reads preprocessor_config.json, if it exists.

    Raises:
      ValueError: a value is invalid, or a preprocessing step is not supported.
    """
    if not path.is_file():
        return Preprocessing()
    options = ConfigReader(path, read_json(path))
    options.require("rescale_offset", False)
    factor = options.number("rescale_factor", 1 / 255, 1e-9, 1e9) if options.get("do_rescale", True) else 1.0
    mean, std = (0.0,) * channels, (1.0,) * channels
    if options.get("do_normalize", True):
        mean, std = (_per_channel(options, key, channels) for key in ("image_mean", "image_std"))
        if mean is None or std is None:
            return Preprocessing(_input_size(options))
    # (255 x · factor − mean) / std of x in [0, 1] is (x − mean / (255 factor)) / (std / (255 factor)).
    scale = 255 * factor
    return Preprocessing(_input_size(options), tuple(m / scale for m in mean), tuple(s / scale for s in std))


def _per_channel(options: ConfigReader, key: str, channels: int) -> tuple[float, ...] | None:
    value = options.get(key, None)
    if value is None:
        return None
    low = 1e-9 if key == "image_std" else -1e9
    values = [value] * channels if isinstance(value, (int, float)) else value
    if not isinstance(values, list) or len(values) != channels or not all(_is_number(v, low, 1e9) for v in values):
        raise options.error(key, f"{channels} numbers" + (" above 0" if key == "image_std" else ""))
    return tuple(map(float, values))


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _input_size(options: ConfigReader) -> tuple[int, int] | None:
    """The size cropped to, or else resized to: a number, {"height": …, "width": …} or {"shortest_edge": …}."""
    key = "crop_size" if options.get("do_center_crop", False) and options.get("crop_size", None) else "size"
    value = options.get(key, None)
    if value is None:
        return None
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        value = [value.get("height", edge), value.get("width", edge)]
    elif not isinstance(value, list):
        value = [value, value]
    if len(value) != 2 or not all(is_size(side, MAX_PIXELS) for side in value):
        raise options.error(key, f"sides of 1 to {MAX_PIXELS} pixels")
    return value[0], value[1]
