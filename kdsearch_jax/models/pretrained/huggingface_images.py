"""Hugging Face's preprocessor_config.json: how images are prepared for a network. Of its keys, known ones are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdsearch_jax.models.pretrained.huggingface_options import MOST_PIXELS, Options, is_size, read_json


class Preparation(NamedTuple):
    """How images are prepared: (height, width) that the network sees, and for each channel, of images in [0, 1], the
    mean and the standard deviation that normalise them; None for what is not told."""

    sides: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def preparation(path: Path, channels: int) -> Preparation:
    """What preprocessor_config.json tells; nothing where there is no such file.

    Raises:
      ValueError: a value that makes no sense, or a step that is not supported.
    """
    if not path.is_file():
        return Preparation()
    options = Options(path, read_json(path))
    options.only("rescale_offset", False)
    factor = options.number("rescale_factor", 1 / 255, 1e-9, 1e9) if options.get("do_rescale", True) else 1.0
    mean, std = (0.0,) * channels, (1.0,) * channels
    if options.get("do_normalize", True):
        mean, std = (_per_channel(options, key, channels) for key in ("image_mean", "image_std"))
        if mean is None or std is None:
            return Preparation(_sides(options))
    # (255 x · factor − mean) / std of x in [0, 1] is (x − mean / (255 factor)) / (std / (255 factor)).
    whole = 255 * factor
    return Preparation(_sides(options), tuple(m / whole for m in mean), tuple(s / whole for s in std))


def _per_channel(options: Options, key: str, channels: int) -> tuple[float, ...] | None:
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


def _sides(options: Options) -> tuple[int, int] | None:
    """What is cropped to, or else resized to: a number, or {"height": …, "width": …}, or {"shortest_edge": …}."""
    key = "crop_size" if options.get("do_center_crop", False) and options.get("crop_size", None) else "size"
    value = options.get(key, None)
    if value is None:
        return None
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        value = [value.get("height", edge), value.get("width", edge)]
    elif not isinstance(value, list):
        value = [value, value]
    if len(value) != 2 or not all(is_size(side, MOST_PIXELS) for side in value):
        raise options.error(key, f"sides of 1 to {MOST_PIXELS} pixels")
    return value[0], value[1]
