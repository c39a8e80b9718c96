"""Settings of the data: `Experiment.data`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """Examples: images and labels, or arrays of any kind.

    inputs: where the network is not fed images alone: entries of `npz:FILE`, in the order of the call's arguments, or
    `keyword=entry`; other entries are for the loss.
    name: `digits` (bundled), `npz:FILE` (arrays `images`, `labels`, or `train_images`, …), or a TFDS name (`cifar10`).
    data_dir: where TFDS keeps its data; None is TFDS's own default.
    validation: share of the training split held out where the data set has no validation split.
    image_size: side in pixels to which images are resized; None keeps them.
    framing: how: all of an image stretched to the square, or in training a random box of it (at least the share
    `least_area`, aspect ratio 3/4 to 4/3), another one at every epoch, and in evaluation its middle.
    stream: examples are read from disk when they are needed (TFDS data sets only); None: where the training split would
    take more than 4 GiB, or is cropped. workers: processes that decode, 0 for threads of this one; prefetch: batches
    decoded ahead, by each of them.
    mean, std: per-channel normalisation of images in [0, 1]; None measures both on the training split.
    crop: random crops after zero padding by so many pixels; flip: random horizontal mirroring.
    train_limit: use only so many training images.
    """

    name: str = "digits"
    data_dir: str | None = None
    validation: float = 0.1
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: int = 0
    flip: bool = False
    train_limit: int | None = None
    inputs: tuple[str, ...] | None = None
    framing: Literal["stretch", "crop"] = "stretch"
    least_area: float = 0.08
    stream: bool | None = None
    workers: int = 0
    prefetch: int = 2


# {setting or *.ending: (what holds, what to give instead)}; None is left alone.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.name": (bool, "give digits, npz:FILE or the name of a TFDS data set"),
    "data.validation": (lambda v: 0 < v < 1, "give a share of the training split between 0 and 1"),
    "data.image_size": (lambda v: v >= 1, "give at least 1 pixel"),
    "data.crop": (lambda v: v >= 0, "give 0 or more pixels"),
    "data.least_area": (lambda v: 0 < v <= 1, "give a share of the image above 0, up to 1"),
    "data.workers": (lambda v: v >= 0, "give 0 or more processes"),
    "data.prefetch": (lambda v: v >= 1, "give at least 1 batch"),
    "data.inputs": (bool, "name at least one entry, or None for images"),
    "data.train_limit": (lambda v: v >= 1, "give at least 1 image, or None for all"),
}
