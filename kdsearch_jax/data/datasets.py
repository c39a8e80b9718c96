"""Labelled images: read from where, split how, in which order, augmented and normalised.

`load` reads a data set whole, as uint8: the scikit-learn digits, the user's own arrays (`npz:FILE`), or any image
classification data set of TensorFlow Datasets in array_record form, without TensorFlow. Missing splits are held out by
class, from constants of this module: runs of every seed are validated and tested on the same images.

A TFDS data set that is too large for a device is not read but streamed: its splits hold what reads an example when it
is needed (`kdsearch_jax.data.streaming`). Anything but one class an image is read by `kdsearch_jax.data.examples`.
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
from kdsearch_jax.data.examples import SPLIT_SEED, SPLITS, TEST_SHARE, Dataset, Split, hold_out, only_input, own
from kdsearch_jax.data.progress import Progress
from kdsearch_jax.data.settings import RULES, DataConfig
from kdsearch_jax.data.streaming import Framing, Reader, Records, resized
from kdsearch_jax.data.tfds import bad
from kdsearch_jax.storage.files import DamagedError, one_line, read_arrays, total_memory

LARGEST = 4 * 2**30  # bytes of a split, as uint8, that may lie on every device; what is larger is streamed
SAMPLE = 1000  # images of a streamed split on which mean and std are measured
_CHUNK = 1000  # examples read at a time


def load(config: DataConfig, seed: int = 0) -> Dataset:
    """Reads and checks a data set.

    A data set without a test split is tested on its validation split; one with neither, on a tenth held out. Where no
    validation split is left, the share `config.validation` of what the source calls training is held out. Both are
    stratified: each class gives its share, give or take one example. With `config.train_limit`, that many training
    images are drawn at random, a held-out validation split shrinks in proportion (neither by class: labels are unknown
    before images are read), and only what is used is decoded. Of what is streamed no split is held out by class either,
    and mean and std are those of `SAMPLE` images.

    Args:
      config: see `DataConfig`.
      seed: draws the images that `train_limit` leaves, on which mean and std are measured; all else is the same.

    Raises:
      ValueError: setting out of range, unknown data set, missing package, unusable or damaged contents, too large.
      FileNotFoundError: no such file; or a data set that is not on this machine, with no network to fetch it.
    """
    _check_settings(config)
    if config.inputs is not None or _feeds_itself(config.name):
        return _own(config, seed)
    train, validation, test, names, scale = _source(config)
    framing = Framing(config.framing, config.image_size, config.least_area)
    streams = _streams(config, train, framing)
    held = max(1, round(config.validation * len(train)))
    if test is None:
        validation, test = None, validation
    if test is None:
        train, test = _hold_out(train, max(1, round(TEST_SHARE * len(train))), 0, framing, streams)
    keep = len(train) if validation is not None else len(train) - held
    if keep < 1:
        raise bad(config.name, "has too few examples to be split into training, validation and test")
    if config.train_limit is not None and config.train_limit < keep:
        order = np.random.default_rng([SPLIT_SEED, 1]).permutation(len(train))
        if validation is None:
            held = max(1, round(held * config.train_limit / keep))
            validation, order = train[np.sort(order[:held])], order[held:]
        chosen = np.random.default_rng([SPLIT_SEED, 2, seed]).choice(order, config.train_limit, replace=False)
        train = train[np.sort(chosen)]
    elif validation is None:
        train, validation = _hold_out(train, held, 1, framing, streams)
    parts = {"train": train, "validation": validation, "test": test}
    if streams:
        return _streamed(config, parts, names, framing)
    splits = {key: _read(part, framing) for key, part in parts.items()}
    for key, split in splits.items():
        _check_size(f"{config.name} {key}", split.images.shape)
    if config.image_size is not None:
        splits = {
            key: Split.of(_resize(split.images, config.image_size), split.labels) for key, split in splits.items()
        }
    _check_splits(config, splits, names)
    for key, split in splits.items():
        low, high = split.labels.min(), split.labels.max()
        if low < 0 or high >= len(names):
            raise bad(config.name, f"has {key} labels from {low} to {high}, but {len(names)} classes in training")
    mean, std = _normalisation(config, splits["train"].images)
    return Dataset(config.name, **splits, num_classes=len(names), mean=mean, std=std, class_names=names, scale=scale)


# --- streaming ------------------------------------------------------------------------------------------------------


def _streams(config: DataConfig, train: Any, framing: Framing) -> bool:
    """Whether examples are read when they are needed: as the settings say, else where the training split is too large.

    A split that is too large to be kept is never decoded to find that out: its first image says how large all are.
    """
    if not isinstance(train, Records):
        if config.stream or config.framing == "crop":
            key = "data.stream" if config.stream else "data.framing"
            value = getattr(config, key.removeprefix("data."))
            raise ValueError(f"{key}: {value!r} needs a TFDS data set; {config.name!r} is read whole, leave it out")
        return False
    if config.stream is not None or config.framing == "crop":
        return bool(config.stream) or config.framing == "crop"
    count = len(train) if config.train_limit is None else min(config.train_limit, len(train))
    try:
        return count * math.prod(Reader.of(train, framing).shape) > LARGEST
    except ValueError:  # an image that may not even be used
        return False


def _streamed(config: DataConfig, parts: dict[str, Records], names: tuple[str, ...], framing: Framing) -> Dataset:
    """The data set, of which nothing is read but what it takes to know the shape of its images, and mean and std."""
    if importlib.util.find_spec("grain") is None:
        raise ValueError(f"data.stream: to stream {config.name!r} grain is missing: pip install 'kdsearch-jax[tfds]'")
    readers = {
        key: Reader.of(dataclasses.replace(part, classes=len(names)), framing, config.workers, config.prefetch)
        for key, part in parts.items()
    }
    splits = {key: Split(dict(reader.columns())) for key, reader in readers.items()}
    _check_splits(config, splits, names)
    sample = np.empty((0, 0, 0, readers["train"].shape[-1]), np.uint8)
    if config.mean is None or config.std is None:
        spread = np.linspace(0, len(splits["train"]) - 1, SAMPLE).astype(int)
        sample = splits["train"].images[np.unique(spread)]
    mean, std = _normalisation(config, sample)
    return Dataset(config.name, **splits, num_classes=len(names), mean=mean, std=std, class_names=names, scale=255.0)


def _hold_out(part: Any, count: int, stream: int, framing: Framing, streams: bool) -> tuple[Any, Any]:
    """The part without `count` examples, and these: by class, but where classes are only known once all is read."""
    if not streams:
        return hold_out(_read(part, framing), count, stream)
    shuffled = np.random.default_rng([SPLIT_SEED, stream]).permutation(len(part))
    return part[np.sort(shuffled[count:])], part[np.sort(shuffled[:count])]


# --- sources --------------------------------------------------------------------------------------------------------


def _source(config: DataConfig) -> tuple[Any, Any, Any, tuple[str, ...], float]:
    """Training, validation and test examples, each `Split` or `Records` or None, names of classes, and the scale."""
    if config.name == "digits":
        return _digits()
    if config.name.startswith("npz:"):
        return _npz(config.name)
    if config.name.endswith(".npz"):
        raise bad(config.name, f"is unknown; did you mean npz:{config.name}?")
    return *tfds.records(config.name, config.data_dir), 255.0


def _digits() -> tuple[Split, None, Split, tuple[str, ...], float]:
    """1797 grey 8×8 images, 0 to 16 stretched to 0 to 255; a fifth is for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = hold_out(Split.of(images, labels.astype(np.int32)), round(0.2 * len(labels)), 0)
    return train, None, test, tuple("0123456789"), 16.0


def _npz(name: str) -> tuple[Split, Split | None, Split | None, tuple[str, ...], float]:
    """`images`, `labels`, to be split; or `train_…`, `test_…` and perhaps `validation_…`. `class_names` is optional."""
    arrays = _npz_arrays(name)
    splits = {}
    for split, prefix in (("train", "train_"), ("validation", "validation_"), ("test", "test_"), ("all", "")):
        pair = [key for key in (f"{prefix}images", f"{prefix}labels") if key in arrays]
        if len(pair) == 2:
            splits[split] = _arrays(arrays[pair[0]], arrays[pair[1]], f"data.name: {name!r}, {pair[0]}")
    parts = {"train", "test"} <= splits.keys()
    if not parts and "all" not in splits:
        raise bad(
            name,
            f"holds {', '.join(arrays) or 'nothing'}; it must hold images and labels, or train_images, train_labels, "
            "test_images and test_labels; or say by --data.inputs which entries feed the network",
        )
    train = splits["train" if parts else "all"]
    if "class_names" in arrays:
        names = tuple(str(text) for text in arrays["class_names"].ravel())
    else:
        classes = np.unique(train.labels)
        gaps = np.flatnonzero(classes != np.arange(len(classes)))
        if len(gaps):
            raise bad(
                name,
                f"has no training example of class {gaps[0]}, but of class {classes[-1]}; number the classes from 0 "
                "without gaps, or add an array class_names",
            )
        names = tuple(map(str, classes))
    scale = 255.0 if arrays["train_images" if parts else "images"].dtype == np.uint8 else 1.0
    return train, splits.get("validation") if parts else None, splits["test"] if parts else None, names, scale


def _npz_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file by name."""
    path = storage.local_copy(name.removeprefix("npz:"), "data.name")
    if not path.is_file():
        raise FileNotFoundError(f"data.name: {name!r} is not there: no file {path.absolute()}")
    try:
        return read_arrays(path, limit=total_memory())
    except (OSError, DamagedError) as error:
        why = one_line(error).rpartition(f"{path} is damaged, or ")[2]
        raise bad(name, f"is damaged, or {why}; write it with numpy.savez") from error


def _feeds_itself(name: str) -> bool:
    """Whether a file has one entry beside the labels, and it is not images: it is the input."""
    if not name.startswith("npz:"):
        return False
    path = storage.local_copy(name.removeprefix("npz:"), "data.name")
    if not path.is_file():  # a device may have no end
        return False
    try:
        with zipfile.ZipFile(path) as file:
            keys = {key.removesuffix(".npy") for key in file.namelist()}
    except (OSError, zipfile.BadZipFile):  # which reading it will say
        return False
    if any(key.startswith("train_") for key in keys):
        keys = {key.removeprefix(f"{split}_") for key in keys for split in SPLITS if key.startswith(f"{split}_")}
    return only_input(keys) not in (None, "images")


def _own(config: DataConfig, seed: int) -> Dataset:
    """Arrays of any names and shapes out of a file."""
    if not config.name.startswith("npz:"):
        raise ValueError(f"data.inputs: only npz:FILE has entries to choose from; leave it out for {config.name!r}")
    arrays = _npz_arrays(config.name)
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
                f"data.{key}: {getattr(config, key)} is not possible with data.inputs; arrays stay as they are"
            )
    return own(
        named if whole else arrays, config.name, validation=config.validation, mean=config.mean, std=config.std,
        train_limit=config.train_limit, seed=seed,
    )  # fmt: skip


def _arrays(images: np.ndarray, labels: np.ndarray, what: str) -> Split:
    """A user's arrays as a `Split`, or a ValueError that says what is wrong with them."""
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
            raise ValueError(f"{what}: {images.dtype} from {low:g} to {high:g}; scale to [0, 1], or give uint8")
        images = np.round(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"{what}: dtype {images.dtype} is neither uint8 nor a float in [0, 1]")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{what}: {len(images)} images, but labels of shape {labels.shape}; give one label an image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what}: labels of dtype {labels.dtype}; give whole numbers from 0")
    if labels.min() < 0 or labels.max() >= 2**31:
        raise ValueError(f"{what}: labels from {labels.min()} to {labels.max()}; number the classes from 0")
    return Split.of(images, labels.astype(np.int32))


# --- checks and helpers of load -------------------------------------------------------------------------------------


def _check_settings(config: DataConfig) -> None:
    for key, (holds, requirement) in RULES.items():
        value = getattr(config, key.removeprefix("data."), None) if key.startswith("data.") else None
        if value is not None and not holds(value):
            raise ValueError(f"{key}: {value!r} is not possible; {requirement}")
    if config.framing == "crop":
        if config.image_size is None:
            raise ValueError("data.framing: 'crop' needs the side of what is cut out; give data.image_size in pixels")
        if config.crop:
            raise ValueError(f"data.crop: {config.crop} shifts what data.framing 'crop' cuts out at random; give 0")
        if config.stream is False:
            raise ValueError("data.stream: False keeps decoded images, of which data.framing 'crop' cuts out others at "
                             "every epoch; leave one of both out")  # fmt: skip


def _check_size(what: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) > LARGEST:
        raise ValueError(
            f"data.name: {what} takes {math.prod(shape) / 2**30:.1f} GiB decoded ({shape[0]} images of "
            f"{'x'.join(map(str, shape[1:]))}), and at most {LARGEST / 2**30:g} are kept on a device; stream it "
            "(data.stream; TFDS data sets only), or give a smaller data.image_size or data.train_limit"
        )


def _check_splits(config: DataConfig, splits: dict[str, Split], names: tuple[str, ...]) -> None:
    if len(names) < 2:
        raise bad(config.name, f"has {len(names)} class; give 2 or more to tell apart")
    shape = splits["train"].images.shape[1:]
    for key, split in splits.items():
        found = split.images.shape[1:]
        if found != shape:
            more = "data.image_size" if found[2] == shape[2] else "all images the same channels"
            raise bad(config.name, f"has {key} images of {found}, but training images of {shape}; give {more}")


def _read(split: Split | Records, framing: Framing) -> Split:
    """A split in memory.

    By Pillow always: TFDS itself decodes by OpenCV where that is installed, and then JPEGs differ by a few units.
    """
    if isinstance(split, Split):
        return split
    count = len(split)
    reader = Reader.of(split, framing)
    _check_size(split.what, (count, *reader.shape))
    images, labels = np.empty((count, *reader.shape), np.uint8), np.empty(count, np.int32)
    with Progress(f"reading {split.what}", count, unit="images") if count > 5 * _CHUNK else nullcontext() as progress:
        for start in range(0, count, _CHUNK):
            chosen = range(start, min(start + _CHUNK, count))
            for i, (encoded, label) in zip(chosen, split.read(chosen), strict=True):
                images[i], labels[i] = reader.image(encoded, i), label
            if progress is not None:
                progress.update(chosen.stop, {})
    return Split.of(images, labels)


def _resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(examples, size, size, channels); each channel by itself, as it may be anything."""
    if images.shape[1:3] == (size, size):
        return images
    found = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        found[i] = resized(image, size)
    return found


def _normalisation(config: DataConfig, images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the config says, else per-channel mean and deviation of the images; 1 for a channel that never changes."""
    channels = images.shape[3]
    for key in ("mean", "std"):
        given = getattr(config, key)
        if given is not None and len(given) != channels:
            raise ValueError(f"data.{key}: {given} is not possible; images of {config.name!r} have {channels} channels")
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
