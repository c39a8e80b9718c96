"""Data sets of TensorFlow Datasets in array_record form, opened without TensorFlow.

A data set is classified images: one feature is the image, one the label. At most its first example is read here.
"""

from __future__ import annotations

import difflib
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from kdsearch_jax import storage
from kdsearch_jax.data.streaming import Records
from kdsearch_jax.storage.files import one_line


def records(name: str, data_dir: str | None = None) -> tuple[Records, Records | None, Records | None, tuple[str, ...]]:
    """(training, validation, test, names of the classes) of a data set, prepared first where it can be.

    Validation and test are None where there are none, or nobody knows their labels.

    Raises:
      ValueError: it is unknown, unusable, or in another form; a package is missing.
      FileNotFoundError: it is not on this machine, and there is no network to fetch it.
    """
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"data.name: {name!r} is not digits or npz:FILE, and to read it as a TFDS data set {error.name} is "
            "missing: pip install 'kdsearch-jax[tfds]'"
        ) from error
    given = {} if data_dir is None else {"data_dir": _local(data_dir, name)}
    builder = _open(tfds, name, given)
    image = feature(name, builder, tfds.features.Image, "image")
    label = feature(name, builder, tfds.features.ClassLabel, "label")
    builder = _prepared(tfds, name, builder, given)
    features = builder.info.features
    channels, dtype = features[image].shape[-1], np.dtype(features[image].np_dtype)
    if channels not in (1, 3, 4) or dtype != np.uint8:
        raise bad(name, f"has {dtype} images of {channels} channels; they must be uint8 of 1, 3 or 4")
    splits = {}
    for split in ("train", "validation", "test"):
        if split in builder.info.splits:
            try:
                source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
            except Exception as error:
                raise bad(name, f"cannot be read ({one_line(error)})") from error
            found = Records(source, f"{name} {split}", image, label, channels)
            # Competitions keep the labels of their test split for themselves: TFDS writes −1.
            if len(found) and (split == "train" or found.read([0])[0][1] >= 0):
                splits[split] = found
    if "train" not in splits:
        raise bad(name, f"has no split train, only {', '.join(builder.info.splits)}; give another data set")
    return splits["train"], splits.get("validation"), splits.get("test"), tuple(features[label].names)


def _local(directory: str, name: str) -> str:
    """Where TFDS finds a data set; out of an object store it is copied, all of it."""
    if storage.remote_address(directory) is None:
        return str(storage.local_copy(directory))
    return str(storage.local_copy(f"{directory}/{re.split('[/:]', name)[0]}", "data.data_dir").parent)


def _open(tfds: Any, name: str, given: dict[str, str]) -> Any:
    """The builder of a data set, prepared or not."""
    try:
        builder = tfds.builder(name, **given)
        _ = builder.info.features
    except tfds.core.DatasetNotFoundError as error:
        # Community data sets are asked for over the network, and without TensorFlow not even that works.
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3) or ["digits", "npz:FILE", "cifar10"]
        raise bad(name, f"is unknown; did you mean {' or '.join(near)}?") from error
    except Exception as error:
        raise bad(name, f"cannot be opened by TFDS ({one_line(error)})") from error
    return builder


def _prepared(tfds: Any, name: str, builder: Any, given: dict[str, str]) -> Any:
    """The builder of a data set that is on this machine in array_record form; fetches it where it can."""
    where = Path(builder.data_path)
    arguments = ", ".join([repr(name), "file_format='array_record'", *(f"{k}={v!r}" for k, v in given.items())])
    by_hand = f'python -c "import tensorflow_datasets as t; t.builder({arguments}).download_and_prepare()"'
    if builder.is_prepared():
        formats = sorted(found.value for found in builder.info.available_file_formats())
        if "array_record" not in formats:
            raise bad(
                name,
                f"lies in {where} as {', '.join(formats)}, but only array_record can be read without TensorFlow; give "
                f"another data.data_dir, or delete it and run {by_hand}",
            )
        return builder
    if not _online():
        raise FileNotFoundError(
            f"data.name: {name!r} is not in {where} and there is no network; on a connected machine run {by_hand}"
        )
    try:
        builder = tfds.builder(name, file_format="array_record", **given)
        builder.download_and_prepare()
    except Exception as error:
        needed = ", and install tensorflow, for this one step only" if "tensorflow" in str(error).lower() else ""
        raise bad(
            name, f"is not in {where} and could not be prepared ({one_line(error)}); run {by_hand} to see more{needed}"
        ) from error
    return builder


def _online() -> bool:
    """Whether names can be looked up: TFDS by itself tries in vain for more than three minutes."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo("storage.googleapis.com", 443)
    except OSError:
        return False
    return True


def feature(name: str, builder: Any, kind: type, usual: str) -> str:
    """The name of the image or of the label: as the data set declares, the usual name, or the only one of its kind."""
    features = builder.info.features
    found = [key for key in features if type(features[key]) is kind] if hasattr(features, "keys") else []
    declared = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    for key in (*declared, usual, *(found if len(found) == 1 else ())):
        if key in found:
            return key
    there = ", ".join(features) if hasattr(features, "keys") else type(features).__name__
    raise bad(name, f"has no single {kind.__name__} among its features ({there}); give images of one class each")


def bad(name: str, what: str) -> ValueError:
    """The error that says what a data set is or has, that cannot be."""
    return ValueError(f"data.name: {name!r} {what}")
