"""Loads data sets: the scikit-learn digits, a user's file of arrays (`npz:FILE`), or a TFDS data set.

`load` reads classified images into memory as uint8. From TensorFlow Datasets it reads any image classification data set
in array_record format, without TensorFlow. Missing splits are held out by class with constant seeds, so runs of every
seed are validated and tested on the same images.

A TFDS data set that is too large for a device is streamed: its splits read examples when they are needed
(`kdsearch_jax.data.streaming`). Anything other than classified images goes through `kdsearch_jax.data.examples`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import zipfile
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdsearch_jax import storage
from kdsearch_jax.data import tfds
from kdsearch_jax.data.examples import SPLIT_SEED, SPLITS, TEST_SHARE, Dataset, Split, from_arrays, hold_out, sole_input
from kdsearch_jax.data.progress import Progress
from kdsearch_jax.data.settings import RULES, DataConfig
from kdsearch_jax.data.streaming import Framing, Reader, Records, resize
from kdsearch_jax.data.tfds import data_error
from kdsearch_jax.storage.files import DamagedError, one_line, read_arrays, total_memory

LARGEST = 4 * 2**30  # bytes of a split, as uint8, that may reside on each device; larger ones are streamed
SAMPLE = 1000  # images of a streamed split from which mean and std are computed
_CHUNK = 1000  # examples read at a time


def load(config: DataConfig, seed: int = 0) -> Dataset:
    """Loads and checks a data set.

    A data set without a test split is tested on its validation split, or on a tenth held out if it has neither. If no
    validation split remains, the fraction `config.validation` of the source's training split is held out. Both are
    stratified by class to within one example. With `config.train_limit`, that many training images are drawn at random,
    a held-out validation split shrinks in proportion (neither is stratified, since labels are unknown before images are
    read), and only these images are decoded. Splits of streamed data are not stratified either, and mean and std are
    computed from `SAMPLE` images.

    Args:
      config: see `DataConfig`.
      seed: draws the images of `train_limit`, from which mean and std are computed; nothing else depends on it.

    Raises:
      ValueError: a setting is out of range, the data set is unknown, damaged, unusable or too large, or a package is
        missing.
      FileNotFoundError: there is no such file, or the data set is not on this machine and there is no network.
    """
    _check_settings(config)
    if config.inputs is not None or _has_other_input(config.name):
        return _load_arrays(config, seed)
    train, validation, test, names, scale = _source(config)
    framing = Framing(config.framing, config.image_size, config.least_area)
    streams = _is_streamed(config, train, framing)
    held_out = max(1, round(config.validation * len(train)))
    if test is None:
        validation, test = None, validation
    if test is None:
        train, test = _hold_out(train, max(1, round(TEST_SHARE * len(train))), 0, framing, streams)
    keep = len(train) if validation is not None else len(train) - held_out
    if keep < 1:
        raise data_error(config.name, "has too few examples to be split into training, validation and test")
    if config.train_limit is not None and config.train_limit < keep:
        order = np.random.default_rng([SPLIT_SEED, 1]).permutation(len(train))
        if validation is None:
            held_out = max(1, round(held_out * config.train_limit / keep))
            validation, order = train[np.sort(order[:held_out])], order[held_out:]
        chosen = np.random.default_rng([SPLIT_SEED, 2, seed]).choice(order, config.train_limit, replace=False)
        train = train[np.sort(chosen)]
    elif validation is None:
        train, validation = _hold_out(train, held_out, 1, framing, streams)
    parts = {"train": train, "validation": validation, "test": test}
    if streams:
        return _streamed_dataset(config, parts, names, framing)
    splits = {key: _read(part, framing) for key, part in parts.items()}
    for key, split in splits.items():
        _check_size(f"{config.name} {key}", split.images.shape)
    if config.image_size is not None:
        splits = {
            key: Split.of(_resize_all(split.images, config.image_size), split.labels) for key, split in splits.items()
        }
    _check_splits(config, splits, names)
    for key, split in splits.items():
        low, high = split.labels.min(), split.labels.max()
        if low < 0 or high >= len(names):
            raise data_error(
                config.name, f"has {key} labels from {low} to {high}, but {len(names)} classes in training"
            )
    mean, std = _normalisation(config, splits["train"].images)
    return Dataset(config.name, **splits, num_classes=len(names), mean=mean, std=std, class_names=names, scale=scale)


# --- streaming ------------------------------------------------------------------------------------------------------


def _is_streamed(config: DataConfig, train: Any, framing: Framing) -> bool:
    """Whether examples are streamed: as configured, or because the training split is too large.

    The size is computed from the first image, without decoding the split.
    """
    if not isinstance(train, Records):
        if config.stream or config.framing == "crop":
            key = "data.stream" if config.stream else "data.framing"
            value = getattr(config, key.removeprefix("data."))
            raise ValueError(f"{key}: {value!r} needs a TFDS data set; leave it out for {config.name!r}")
        return False
    if config.stream is not None or config.framing == "crop":
        return bool(config.stream) or config.framing == "crop"
    count = len(train) if config.train_limit is None else min(config.train_limit, len(train))
    try:
        return count * math.prod(Reader.of(train, framing).shape) > LARGEST
    except ValueError:  # an image that may not be used at all
        return False


def _streamed_dataset(
    config: DataConfig, parts: dict[str, Records], names: tuple[str, ...], framing: Framing
) -> Dataset:
    """A streamed data set; reads only what it takes to know the shape of its images, and mean and std."""
    if importlib.util.find_spec("grain") is None:
        raise ValueError(f"data.stream: streaming {config.name!r} needs grain: pip install 'kdsearch-jax[tfds]'")
    readers = {
        key: Reader.of(dataclasses.replace(part, classes=len(names)), framing, config.workers, config.prefetch)
        for key, part in parts.items()
    }
    splits = {key: Split(dict(reader.columns())) for key, reader in readers.items()}
    _check_splits(config, splits, names)
    sample = np.empty((0, 0, 0, readers["train"].shape[-1]), np.uint8)
    if config.mean is None or config.std is None:
        indices = np.linspace(0, len(splits["train"]) - 1, SAMPLE).astype(int)
        sample = splits["train"].images[np.unique(indices)]
    mean, std = _normalisation(config, sample)
    return Dataset(config.name, **splits, num_classes=len(names), mean=mean, std=std, class_names=names, scale=255.0)


def _hold_out(part: Any, count: int, stream: int, framing: Framing, streams: bool) -> tuple[Any, Any]:
    """The split without `count` examples, and those; stratified by class unless streamed."""
    if not streams:
        return hold_out(_read(part, framing), count, stream)
    shuffled = np.random.default_rng([SPLIT_SEED, stream]).permutation(len(part))
    return part[np.sort(shuffled[count:])], part[np.sort(shuffled[:count])]


# --- sources --------------------------------------------------------------------------------------------------------


def _source(config: DataConfig) -> tuple[Any, Any, Any, tuple[str, ...], float]:
    """Training, validation and test examples, each `Split`, `Records` or None; class names; and the scale."""
    if config.name == "digits":
        return _digits()
    if config.name.startswith("npz:"):
        return _npz(config.name)
    if config.name.endswith(".npz"):
        raise data_error(config.name, f"is unknown; did you mean npz:{config.name}?")
    return *tfds.open_splits(config.name, config.data_dir), 255.0


def _digits() -> tuple[Split, None, Split, tuple[str, ...], float]:
    """1797 grey 8×8 images, with values 0 to 16 scaled to 0 to 255; a fifth is held out for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = hold_out(Split.of(images, labels.astype(np.int32)), round(0.2 * len(labels)), 0)
    return train, None, test, tuple("0123456789"), 16.0


def _npz(name: str) -> tuple[Split, Split | None, Split | None, tuple[str, ...], float]:
    """`images`, `labels`, to be split; or `train_…`, `test_…`, perhaps `validation_…`. `class_names` is optional."""
    arrays = _read_npz(name)
    splits = {}
    for split, prefix in (("train", "train_"), ("validation", "validation_"), ("test", "test_"), ("all", "")):
        pair = [key for key in (f"{prefix}images", f"{prefix}labels") if key in arrays]
        if len(pair) == 2:
            splits[split] = _to_split(arrays[pair[0]], arrays[pair[1]], f"data.name: {name!r}, {pair[0]}")
    parts = {"train", "test"} <= splits.keys()
    if not parts and "all" not in splits:
        raise data_error(
            name,
            f"has {', '.join(arrays) or 'no arrays'}; it must have images and labels, or train_images, train_labels, "
            "test_images and test_labels; or set --data.inputs to the entries that are the network's inputs",
        )
    train = splits["train" if parts else "all"]
    if "class_names" in arrays:
        names = tuple(str(text) for text in arrays["class_names"].ravel())
    else:
        classes = np.unique(train.labels)
        gaps = np.flatnonzero(classes != np.arange(len(classes)))
        if len(gaps):
            raise data_error(
                name,
                f"has no training example of class {gaps[0]}, but of class {classes[-1]}; number the classes from 0 "
                "without gaps, or add an array class_names",
            )
        names = tuple(map(str, classes))
    scale = 255.0 if arrays["train_images" if parts else "images"].dtype == np.uint8 else 1.0
    return train, splits.get("validation") if parts else None, splits["test"] if parts else None, names, scale


def _read_npz(name: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name."""
    path = storage.local_copy(name.removeprefix("npz:"), "data.name")
    if not path.is_file():
        raise FileNotFoundError(f"data.name: {name!r} does not exist: no file {path.absolute()}")
    try:
        return read_arrays(path, limit=total_memory())
    except (OSError, DamagedError) as error:
        raise data_error(name, f"cannot be read ({one_line(error)}); write it with numpy.savez") from error


def _has_other_input(name: str) -> bool:
    """Whether a file has a single entry besides the labels that is not `images`: it is the network's input."""
    if not name.startswith("npz:"):
        return False
    path = storage.local_copy(name.removeprefix("npz:"), "data.name")
    if not path.is_file():  # a device may be endless
        return False
    try:
        with zipfile.ZipFile(path) as file:
            keys = {key.removesuffix(".npy") for key in file.namelist()}
    except (OSError, zipfile.BadZipFile):  # reading it will say so
        return False
    if any(key.startswith("train_") for key in keys):
        keys = {key.removeprefix(f"{split}_") for key in keys for split in SPLITS if key.startswith(f"{split}_")}
    return sole_input(keys) not in (None, "images")


def _load_arrays(config: DataConfig, seed: int) -> Dataset:
    """A file of arrays with any names and shapes."""
    if not config.name.startswith("npz:"):
        raise ValueError(f"data.inputs: only npz:FILE has entries to select; leave it out for {config.name!r}")
    arrays = _read_npz(config.name)
    prefixes = {split: f"{split}_" for split in SPLITS}
    parts = {
        split: {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        for split, prefix in prefixes.items()
    }
    named = {split: part for split, part in parts.items() if part}
    whole = sum(map(len, named.values())) == len(arrays) and "train" in named
    for key in ("crop", "image_size", "stream"):
        if getattr(config, key):
            raise ValueError(
                f"data.{key}: {getattr(config, key)} is not supported with data.inputs, whose arrays are used unchanged"
            )
    return from_arrays(
        named if whole else arrays, config.name, validation=config.validation, mean=config.mean, std=config.std,
        train_limit=config.train_limit, seed=seed,
    )  # fmt: skip


def _to_split(images: np.ndarray, labels: np.ndarray, what: str) -> Split:
    """A user's arrays as a `Split`; ValueError says what is wrong with them."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{what}: shape {images.shape} is not (examples, height, width[, channels]), each 1 or more")
    if images.shape[1] <= 4 < images.shape[3]:
        raise ValueError(f"{what}: shape {images.shape} has channels first; transpose to (…, height, width, channels)")
    if np.issubdtype(images.dtype, np.floating):
        low, high = images.min(), images.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{what}: some values are NaN or infinite")
        if low < 0 or high > 1:
            raise ValueError(f"{what}: {images.dtype} from {low:g} to {high:g}; scale it to [0, 1], or give uint8")
        images = np.round(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"{what}: dtype {images.dtype} is neither uint8 nor a float in [0, 1]")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{what}: {len(images)} images, but labels of shape {labels.shape}; give one label per image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what}: labels of dtype {labels.dtype}; give integers from 0")
    if labels.min() < 0 or labels.max() >= 2**31:
        raise ValueError(f"{what}: labels from {labels.min()} to {labels.max()}; number the classes from 0")
    return Split.of(images, labels.astype(np.int32))


# --- checks and preparation -----------------------------------------------------------------------------------------


def _check_settings(config: DataConfig) -> None:
    for key, (holds, requirement) in RULES.items():
        value = getattr(config, key.removeprefix("data."), None) if key.startswith("data.") else None
        if value is not None and not holds(value):
            raise ValueError(f"{key}: {value!r} is invalid; {requirement}")
    if config.framing == "crop":
        if config.image_size is None:
            raise ValueError("data.framing: 'crop' needs the size of the crops; give data.image_size in pixels")
        if config.crop:
            raise ValueError(
                f"data.crop: {config.crop} cannot be combined with data.framing 'crop', which crops at random; give 0"
            )
        if config.stream is False:
            raise ValueError("data.stream: False cannot be combined with data.framing 'crop', which needs the encoded "
                             "images in each epoch; leave one of them out")  # fmt: skip


def _check_size(what: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) > LARGEST:
        raise ValueError(
            f"data.name: {what} takes {math.prod(shape) / 2**30:.1f} GiB decoded ({shape[0]} images of "
            f"{'x'.join(map(str, shape[1:]))}), and the limit for a device is {LARGEST / 2**30:g}; stream it "
            "(data.stream; TFDS data sets only), or give a smaller data.image_size or data.train_limit"
        )


def _check_splits(config: DataConfig, splits: dict[str, Split], names: tuple[str, ...]) -> None:
    if len(names) < 2:
        raise data_error(config.name, f"has {len(names)} class; at least 2 are needed")
    shape = splits["train"].images.shape[1:]
    for key, split in splits.items():
        other = split.images.shape[1:]
        if other != shape:
            fix = "data.image_size" if other[2] == shape[2] else "all images the same channels"
            raise data_error(config.name, f"has {key} images of {other}, but training images of {shape}; give {fix}")


def _read(split: Split | Records, framing: Framing) -> Split:
    """Decodes a split into memory.

    Always with Pillow: TFDS uses OpenCV if it is installed, whose JPEGs differ by a few units.
    """
    if isinstance(split, Split):
        return split
    count = len(split)
    reader = Reader.of(split, framing)
    _check_size(split.what, (count, *reader.shape))
    images, labels = np.empty((count, *reader.shape), np.uint8), np.empty(count, np.int32)
    with Progress(f"reading {split.what}", count, unit="images") if count > 5 * _CHUNK else nullcontext() as progress:
        for start in range(0, count, _CHUNK):
            chunk = range(start, min(start + _CHUNK, count))
            for i, (encoded, label) in zip(chunk, split.read(chunk), strict=True):
                images[i], labels[i] = reader.image(encoded, i), label
            if progress is not None:
                progress.update(chunk.stop, {})
    return Split.of(images, labels)


def _resize_all(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(examples, size, size, channels)."""
    if images.shape[1:3] == (size, size):
        return images
    result = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        result[i] = resize(image, size)
    return result


def _normalisation(config: DataConfig, images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The configured mean and std, or those of the images per channel; std is 1 for a constant channel."""
    channels = images.shape[3]
    for key in ("mean", "std"):
        value = getattr(config, key)
        if value is not None and len(value) != channels:
            raise ValueError(f"data.{key}: {value} is invalid; images of {config.name!r} have {channels} channels")
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), _CHUNK):
        for c in range(channels):
            counts[c] += np.bincount(images[start : start + _CHUNK, :, :, c].ravel(), minlength=256)
    values, share = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    std[std == 0] = 1.0
    return config.mean or tuple(mean.tolist()), config.std or tuple(std.tolist())
