"""Settings of the data set: `Experiment.data`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """The data set: images and labels, or arrays of any kind.

    inputs: the network's inputs if they are not just images: entries of `npz:FILE` in the order of the call's
    arguments, or `keyword=entry`; the other entries are for the loss.
    name: `digits` (bundled), `npz:FILE` (arrays `images`, `labels`, or `train_images`, …), or a TFDS name (`cifar10`).
    data_dir: where TFDS stores its data; None is TFDS's default.
    validation: fraction of the training split to hold out if the data set has no validation split.
    image_size: side in pixels to which images are resized; None keeps their size.
    framing: how they are resized: `stretch` the whole image to the square, or `crop` a random box in training (at least
    the fraction `least_area`, aspect ratio 3/4 to 4/3, new in each epoch) and the centre in evaluation.
    stream: read examples from disk when they are needed (TFDS data sets only); None: if the training split would take
    more than 4 GiB, or is cropped. workers: decoding processes, 0 for threads of this process; prefetch: batches that
    each of them decodes ahead.
    mean, std: per-channel normalisation of images in [0, 1]; None measures both on the training split.
    crop: random crops after zero padding by this many pixels; flip: random horizontal mirroring.
    train_limit: use only this many training images.
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


# {setting: (condition, what to give instead)}; None is not checked.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.name": (bool, "give digits, npz:FILE or the name of a TFDS data set"),
    "data.validation": (lambda v: 0 < v < 1, "give a fraction of the training split between 0 and 1"),
    "data.image_size": (lambda v: v >= 1, "give at least 1 pixel"),
    "data.crop": (lambda v: v >= 0, "give 0 or more pixels"),
    "data.least_area": (lambda v: 0 < v <= 1, "give a fraction of the image above 0 and at most 1"),
    "data.workers": (lambda v: v >= 0, "give 0 or more processes"),
    "data.prefetch": (lambda v: v >= 1, "give at least 1 batch"),
    "data.inputs": (bool, "name at least one entry, or None for images"),
    "data.train_limit": (lambda v: v >= 1, "give at least 1 image, or None for all"),
}
