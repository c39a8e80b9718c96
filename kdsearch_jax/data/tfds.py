"""Opens data sets of TensorFlow Datasets in array_record format, without TensorFlow.

A data set must consist of classified images: one feature is the image, one the label. At most its first example is read
here.
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


def open_splits(
    name: str, data_dir: str | None = None
) -> tuple[Records, Records | None, Records | None, tuple[str, ...]]:
    """Opens a data set, after preparing it if possible: (training, validation, test, class names).

    Validation and test are None if the data set has no such split, or its labels are not public.

    Raises:
      ValueError: the data set is unknown, unusable, or in another format; or a package is missing.
      FileNotFoundError: it is not on this machine, and there is no network to download it.
    """
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"data.name: {name!r} is not digits or npz:FILE, and reading it as a TFDS data set needs {error.name}: "
            "pip install 'kdsearch-jax[tfds]'"
        ) from error
    arguments = {} if data_dir is None else {"data_dir": _local_data_dir(data_dir, name)}
    builder = _open(tfds, name, arguments)
    image = find_feature(name, builder, tfds.features.Image, "image")
    label = find_feature(name, builder, tfds.features.ClassLabel, "label")
    builder = _prepare(tfds, name, builder, arguments)
    features = builder.info.features
    channels, dtype = features[image].shape[-1], np.dtype(features[image].np_dtype)
    if channels not in (1, 3, 4) or dtype != np.uint8:
        raise data_error(name, f"has {dtype} images of {channels} channels; they must be uint8 of 1, 3 or 4")
    splits = {}
    for split in ("train", "validation", "test"):
        if split in builder.info.splits:
            try:
                source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
            except Exception as error:
                raise data_error(name, f"cannot be read ({one_line(error)})") from error
            records = Records(source, f"{name} {split}", image, label, channels)
            # For competitions whose test labels are not public, TFDS writes −1.
            if len(records) and (split == "train" or records.read([0])[0][1] >= 0):
                splits[split] = records
    if "train" not in splits:
        raise data_error(name, f"has no training split, only {', '.join(builder.info.splits)}; give another data set")
    return splits["train"], splits.get("validation"), splits.get("test"), tuple(features[label].names)


def _local_data_dir(directory: str, name: str) -> str:
    """The directory to pass to TFDS; from an object store the whole data set is copied."""
    if storage.remote_address(directory) is None:
        return str(storage.local_copy(directory))
    return str(storage.local_copy(f"{directory}/{re.split('[/:]', name)[0]}", "data.data_dir").parent)


def _open(tfds: Any, name: str, arguments: dict[str, str]) -> Any:
    """The builder of a data set, prepared or not."""
    try:
        builder = tfds.builder(name, **arguments)
        _ = builder.info.features
    except tfds.core.DatasetNotFoundError as error:
        # Community data sets need the network, and TensorFlow.
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3) or ["digits", "npz:FILE", "cifar10"]
        raise data_error(name, f"is unknown; did you mean {' or '.join(near)}?") from error
    except Exception as error:
        raise data_error(name, f"cannot be opened by TFDS ({one_line(error)})") from error
    return builder


def _prepare(tfds: Any, name: str, builder: Any, arguments: dict[str, str]) -> Any:
    """The builder of a data set in array_record format on this machine, downloaded first if possible."""
    path = Path(builder.data_path)
    call = ", ".join([repr(name), "file_format='array_record'", *(f"{k}={v!r}" for k, v in arguments.items())])
    command = f'python -c "import tensorflow_datasets as t; t.builder({call}).download_and_prepare()"'
    if builder.is_prepared():
        formats = sorted(format.value for format in builder.info.available_file_formats())
        if "array_record" not in formats:
            raise data_error(
                name,
                f"is stored in {path} as {', '.join(formats)}, but only array_record can be read without TensorFlow; "
                f"give another data.data_dir, or delete it and run {command}",
            )
        return builder
    if not _online():
        raise FileNotFoundError(
            f"data.name: {name!r} is not in {path} and there is no network; on a connected machine run {command}"
        )
    try:
        builder = tfds.builder(name, file_format="array_record", **arguments)
        builder.download_and_prepare()
    except Exception as error:
        needed = ", with tensorflow installed for this step only" if "tensorflow" in str(error).lower() else ""
        raise data_error(
            name, f"is not in {path} and could not be prepared ({one_line(error)}); for details run {command}{needed}"
        ) from error
    return builder


def _online() -> bool:
    """Whether host names resolve: without a network TFDS retries for more than three minutes."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo("storage.googleapis.com", 443)
    except OSError:
        return False
    return True


def find_feature(name: str, builder: Any, kind: type, usual: str) -> str:
    """The name of the image or label feature: as declared, the usual name, or the only feature of this kind."""
    features = builder.info.features
    candidates = [key for key in features if type(features[key]) is kind] if hasattr(features, "keys") else []
    declared = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    for key in (*declared, usual, *(candidates if len(candidates) == 1 else ())):
        if key in candidates:
            return key
    listed = ", ".join(features) if hasattr(features, "keys") else type(features).__name__
    raise data_error(
        name, f"has no unique {kind.__name__} among its features ({listed}); only classified images are supported"
    )


def data_error(name: str, what: str) -> ValueError:
    """The error for a data set that cannot be used; `what` completes "data.name: NAME …"."""
    return ValueError(f"data.name: {name!r} {what}")
