"""Data sets: round trips, disjoint splits, orders that are permutations, errors that say what to do."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import sys
import tempfile
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from kdsearch_jax.data import datasets
from kdsearch_jax.data import tfds as tfds_lib
from kdsearch_jax.data.batches import augment, batch_indices, normalise, padded_batches
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.examples import Dataset, Split, hold_out
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.data.streaming import reader_of
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.runs.teacher_source import call_spec_for

SPLITS = ("train", "validation", "test")


def numbered(count: int, size: int = 8, channels: int = 3, first: int = 0) -> np.ndarray:
    """uint8 images of noise, whose first pixel is the image's number, to recognise them by."""
    images = np.random.default_rng(first).integers(0, 256, (count, size, size, channels), np.uint8)
    numbers = first + np.arange(count)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = numbers // 256, numbers % 256
    return images


def number(images: np.ndarray) -> list[int]:
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).tolist()


def numbers(dataset: Dataset) -> dict[str, list[int]]:
    return {split: number(getattr(dataset, split).images) for split in SPLITS}


def write(path: Path, **arrays: np.ndarray) -> DataConfig:
    np.savez(path / "data.npz", **arrays)
    return DataConfig(f"npz:{path / 'data.npz'}")


# --- splits ---------------------------------------------------------------------------------------------------------


def test_digits_are_complete_without_duplicates():
    dataset = load(DataConfig())
    original = [tuple(image.astype(int)) for image in load_digits().data]
    images = np.concatenate([getattr(dataset, split).images for split in SPLITS])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255) and dataset.scale == load_digits().data.max()
    assert Counter(tuple(np.round(image.ravel() / 255 * 16).astype(int)) for image in images) == Counter(original)
    assert [len(getattr(dataset, split)) for split in SPLITS] == [1294, 144, 359]
    assert (dataset.num_classes, dataset.class_names) == (10, tuple("0123456789"))
    for split in SPLITS:
        labels = getattr(dataset, split).labels
        assert labels.dtype == np.int32
        np.testing.assert_allclose(np.bincount(labels) / len(labels), 0.1, atol=0.02)


@pytest.mark.parametrize("prefixes", [[""], ["train_", "test_"]])
def test_the_only_entry_besides_labels_is_the_input(tmp_path, prefixes):
    """As in `kdsearch_jax.search`; naming it gives the same."""
    x, labels = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32), np.arange(60) % 3
    config = write(tmp_path, **{f"{p}x": x for p in prefixes}, **{f"{p}labels": labels for p in prefixes})
    experiments = [Experiment(data=dataclasses.replace(config, crop=0, inputs=inputs)) for inputs in (None, ("x",))]
    plain, named = (call_spec_for(each, load(each.data)) for each in experiments)
    assert plain == named and plain[0] is not None and plain[0].arguments == ("x",) and not plain[1]


def test_splits_equal_those_of_earlier_versions():
    dataset = load(DataConfig(train_limit=100), seed=3)
    found = {split: zlib.crc32(getattr(dataset, split).images.tobytes()) for split in SPLITS}
    assert found == {"train": 2742199133, "validation": 1213799924, "test": 3366297244}, (
        "other images are held out or drawn than before: results reported so far cannot be compared with new ones. If "
        "that is meant, say so in the changelog and write the new numbers here"
    )


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_one_set_of_arrays_is_split_by_class(tmp_path, share):
    sizes = [203, 11, 90, 37]
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), sizes))
    images = numbered(len(labels))
    config = dataclasses.replace(write(tmp_path, images=images, labels=labels), validation=share)
    dataset = load(config)
    found = numbers(dataset)
    assert sorted(chain(*found.values())) == list(range(len(labels)))  # each once: disjoint and complete
    for split, part in (("train", 0.9 - share), ("validation", share), ("test", 0.1)):
        held = getattr(dataset, split)
        np.testing.assert_array_equal(held.images, images[found[split]])
        np.testing.assert_array_equal(held.labels, labels[found[split]])
        assert (np.abs(np.bincount(held.labels, minlength=4) - part * np.asarray(sizes)) <= 2).all()
        assert found[split] == sorted(found[split])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 5))
def test_splits_are_stratified_to_within_one_example(sizes, share, stream):
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    count = max(1, round(share * len(labels)))
    split = Split.of(np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1), labels)
    kept, held = hold_out(split, count, stream)
    assert len(held) == count
    assert sorted([*kept.images.ravel(), *held.images.ravel()]) == list(range(len(labels)))
    expected = count / len(labels) * np.asarray(sizes)
    assert (np.abs(np.bincount(held.labels, minlength=len(sizes)) - expected) <= 1 + 1e-9).all()


def parts(seed: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    arrays, first = {}, 0
    for split, count in sizes.items():
        arrays |= {f"{split}_images": numbered(count, first=first), f"{split}_labels": np.arange(count) % 5}
        first += count
    return arrays


def test_given_splits_are_kept(tmp_path):
    found = numbers(load(write(tmp_path, **parts(0, {"train": 50, "validation": 15, "test": 20}))))
    assert found == {"train": [*range(50)], "validation": [*range(50, 65)], "test": [*range(65, 85)]}


def test_validation_is_held_out_of_training(tmp_path):
    found = numbers(load(write(tmp_path, **parts(0, {"train": 50, "test": 20}))))
    assert found["test"] == [*range(50, 70)]
    assert len(found["validation"]) == 5 and sorted(found["train"] + found["validation"]) == [*range(50)]


@pytest.mark.parametrize("limit", [None, 20])
@pytest.mark.parametrize("sizes", [{"train": 100, "test": 20}, {"train": 100, "validation": 10, "test": 20}])
def test_every_seed_is_validated_on_the_same_images(tmp_path, sizes, limit):
    config = dataclasses.replace(write(tmp_path, **parts(0, sizes)), train_limit=limit)
    one, same, other = (numbers(load(config, seed)) for seed in (0, 0, 1))
    assert one == same
    assert (one["validation"], one["test"]) == (other["validation"], other["test"])
    assert (one["train"] == other["train"]) == (limit is None)
    for found in (one, other):
        assert len(found["train"]) == (limit or (90 if "validation" not in sizes else 100))
        assert len(set(chain(*found.values()))) == sum(map(len, found.values()))


@pytest.mark.parametrize("limit", [1, 89, 90, 91, 1000])
def test_a_limit_is_exact_and_reduces_validation(tmp_path, limit):
    config = dataclasses.replace(write(tmp_path, **parts(0, {"train": 100, "test": 20})), train_limit=limit)
    found = numbers(load(config))
    assert len(found["train"]) == min(limit, 90)
    assert len(found["validation"]) == max(1, round(min(limit, 90) / 9))
    assert not set(found["train"]) & set(found["validation"])


# --- contents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_images_become_bytes(tmp_path, dtype):
    images, labels = numbered(40), np.arange(40) % 2
    one = load(write(tmp_path, images=images, labels=labels))
    inexact = images + np.random.default_rng(0).uniform(-0.3, 0.3, images.shape)
    inexact = np.clip(inexact / 255, 0, 1).astype(dtype)
    two = load(write(tmp_path, images=inexact, labels=labels.astype(np.uint8)))
    np.testing.assert_array_equal(one.train.images, two.train.images)
    assert (one.scale, two.scale) == (255, 1)


def test_images_without_a_channel_axis_get_one(tmp_path):
    dataset = load(write(tmp_path, images=numbered(40, channels=1)[..., 0], labels=np.arange(40) % 2))
    assert dataset.train.images.shape == (32, 8, 8, 1)
    assert len(dataset.mean) == len(dataset.std) == 1


def test_classes_may_have_names(tmp_path):
    arrays = {"images": numbered(40), "labels": np.arange(40) % 2}
    assert load(write(tmp_path, **arrays)).class_names == ("0", "1")
    named = load(write(tmp_path, **arrays, class_names=np.asarray(["cat", "dog", "never seen"])))
    assert (named.num_classes, named.class_names) == (3, ("cat", "dog", "never seen"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_resizing_keeps_channels_apart(tmp_path, channels):
    """A constant channel stays constant, and images of the right size are unchanged."""
    images = np.tile(np.arange(0, 50 * channels, 50, dtype=np.uint8), (40, 12, 9, 1))
    config = write(tmp_path, images=images, labels=np.arange(40) % 2)
    small = load(dataclasses.replace(config, image_size=6)).train.images
    assert small.shape == (32, 6, 6, channels)
    assert (small == images[:32, :6, :6]).all()
    square = write(tmp_path, images=numbered(40), labels=np.arange(40) % 2)
    np.testing.assert_array_equal(load(square).test.images, load(dataclasses.replace(square, image_size=8)).test.images)


def test_splits_of_different_sizes_need_an_image_size(tmp_path):
    arrays = parts(0, {"train": 50, "test": 20}) | {"test_images": numbered(20, size=10)}
    config = write(tmp_path, **arrays)
    with pytest.raises(ValueError, match=r"test images of \(10, 10, 3\).* give data.image_size"):
        load(config)
    assert load(dataclasses.replace(config, image_size=7)).test.images.shape == (20, 7, 7, 3)


def test_mean_and_std_of_the_training_split(tmp_path):
    images = numbered(2500, channels=2)
    images[..., 1] = 51  # a channel that never changes has no deviation to divide by
    dataset = load(write(tmp_path, images=images, labels=np.arange(2500) % 2))
    train = dataset.train.images / 255
    np.testing.assert_allclose(dataset.mean, train.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(dataset.std, [train.std((0, 1, 2))[0], 1.0], rtol=1e-10)
    normal = np.asarray(normalise(jnp.asarray(dataset.train.images), dataset.mean, dataset.std))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal[..., 0].std(), 1, rtol=1e-5)
    given = load(dataclasses.replace(write(tmp_path, images=images, labels=np.arange(2500) % 2),
                                     mean=(0.5, 0.25), std=(1.0, 2.0)))  # fmt: skip
    assert (given.mean, given.std) == ((0.5, 0.25), (1.0, 2.0))


def swapped(**changes) -> dict[str, np.ndarray]:
    arrays = {"images": numbered(40), "labels": np.arange(40) % 2} | changes
    return {key: value for key, value in arrays.items() if value is not None}


BAD = {
    "no labels": (swapped(labels=None), "images and labels"),
    "nothing": ({}, "images and labels"),
    "no test": ({"train_images": numbered(40), "train_labels": np.arange(40) % 2}, "test_images"),
    "shape": (swapped(images=np.zeros((40, 9), np.uint8)), r"shape \(40, 9\) is not \(examples, height"),
    "empty": (swapped(images=np.zeros((0, 8, 8, 3), np.uint8), labels=np.arange(0)), r"shape \(0, 8, 8, 3\)"),
    "channels first": (swapped(images=np.zeros((40, 3, 8, 8), np.uint8)), "channels first"),
    "nan": (swapped(images=np.full((40, 8, 8, 3), np.nan)), "NaN or infinite"),
    "infinite": (swapped(images=np.full((40, 8, 8, 3), np.inf)), "NaN or infinite"),
    "scale": (swapped(images=255.0 * np.ones((40, 8, 8, 3))), r"from 255 to 255.*\[0, 1\]"),
    "negative": (swapped(images=-np.ones((40, 8, 8, 3))), "from -1 to -1"),
    "integers": (swapped(images=numbered(40).astype(np.int64)), "dtype int64"),
    "lengths": (swapped(labels=np.arange(39) % 2), r"40 images, but labels of shape \(39,\)"),
    "one-hot": (swapped(labels=np.eye(2)[np.arange(40) % 2]), r"labels of shape \(40, 2\)"),
    "fractions": (swapped(labels=np.arange(40) / 2), "labels of dtype float64"),
    "below zero": (swapped(labels=np.arange(40) % 3 - 1), "labels from -1 to 1"),
    "from one": (swapped(labels=np.arange(40) % 3 + 1), "class 0.*class 3"),
    "huge": (swapped(labels=np.arange(40) % 2 * 2**40), "labels from 0 to 1099511627776"),
    "one class": (swapped(labels=np.zeros(40, int)), "1 class"),
    "more than named": (swapped(class_names=np.asarray(["a"] * 2), labels=np.arange(40) % 3),
                        "train labels from 0 to 2.* 2 classes"),
    "only in test": (parts(0, {"train": 50, "test": 20}) | {"test_labels": np.arange(20)},
                     "test labels from 0 to 19.* 5 classes"),
    "two examples": (swapped(images=numbered(2), labels=np.arange(2)), "too few"),
    "objects": (swapped(labels=np.asarray([None] * 40)), "numpy.savez"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_unusable_arrays_are_refused_in_one_line(tmp_path, name):
    arrays, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        load(write(tmp_path, **arrays))
    assert str(caught.value).startswith("data.name: 'npz:") and "\n" not in str(caught.value)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    config = write(tmp_path, **swapped())
    path = tmp_path / "data.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", b"text", whole[:middle], whole[:middle] + b"\0" * 64 + whole[middle + 64 :]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="^data.name: .*numpy.savez") as caught:
            load(config)
        assert "\n" not in str(caught.value)
    with path.open("wb") as file:
        np.save(file, numbered(3))
    with pytest.raises(ValueError, match="single array"):
        load(config)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data.npz"):
        load(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "data.npz"}, "did you mean npz:data.npz?"),
        ({"validation": 0.0}, "data.validation: 0.0"),
        ({"validation": 0.99}, "too few"),
        ({"image_size": 0}, "data.image_size: 0"),
        ({"train_limit": 0}, "data.train_limit: 0"),
        ({"mean": (0.5, 0.5)}, r"data.mean: \(0.5, 0.5\) .*3 channels"),
        ({"std": (1.0,) * 4}, r"data.std: \(1.0, 1.0, 1.0, 1.0\)"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, changes, message):
    config = dataclasses.replace(write(tmp_path, **swapped()), **changes)
    with pytest.raises(ValueError, match=message):
        load(config)


def test_too_much_for_a_device_is_refused(tmp_path, monkeypatch):
    config = write(tmp_path, **swapped())
    monkeypatch.setattr(datasets, "LARGEST", 32 * 8 * 8 * 3)
    load(config)
    monkeypatch.setattr(datasets, "LARGEST", 32 * 8 * 8 * 3 - 1)
    with pytest.raises(ValueError, match="data.stream"):
        load(config)


# --- TensorFlow Datasets --------------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def make_builder(tfds, title: str, splits: dict[str, list], *, shape=(None, None, 3), features=None, keys=None):
    """A TFDS builder class of {split: [(PNG, label)]}; an Exception instead of `splits` is raised by the download."""

    class Tiny(tfds.core.GeneratorBasedBuilder):
        name = title
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = features or {"picture": tfds.features.Image(shape=shape),
                                 "kind": tfds.features.ClassLabel(names=["ant", "bee", "cow"])}  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds), supervised_keys=keys)

        def _split_generators(self, dl_manager):
            if isinstance(splits, Exception):
                raise splits
            return {split: self._examples(split) for split in splits}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self, split):
            image, label = list(self.info.features)[:2]
            for i, (content, kind) in enumerate(splits[split]):
                yield i, {image: io.BytesIO(content), label: kind}

    return Tiny


@pytest.fixture
def tfds():
    pytest.importorskip("array_record")
    return pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def prepare(tfds, tmp_path):
    """Writes a data set as TFDS does, array_record without TensorFlow, and returns the setting that reads it."""

    def write_it(splits: dict[str, list], **options) -> DataConfig:
        with tfds.core.registered.skip_registration():
            builder = make_builder(tfds, "tiny", splits, **options)
        directory = tempfile.mkdtemp(dir=tmp_path)
        builder(data_dir=directory, file_format="array_record").download_and_prepare()
        return DataConfig("tiny", directory)

    return write_it


def examples(count: int, first: int = 0, label=lambda i: i % 3, **options) -> list[tuple[bytes, int]]:
    return [(png(image), label(i)) for i, image in enumerate(numbered(count, first=first, **options))]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tfds_examples_are_read_exactly(prepare, channels):
    config = prepare(
        {"train": examples(60, channels=channels), "test": examples(20, 60, channels=channels)},
        shape=(8, 8, channels), keys=("picture", "kind"),
    )  # fmt: skip
    dataset = load(config)
    found = numbers(dataset)
    originals = np.concatenate([numbered(60, channels=channels), numbered(20, first=60, channels=channels)])
    for split in SPLITS:
        held = getattr(dataset, split)
        np.testing.assert_array_equal(held.images, originals[found[split]])
        np.testing.assert_array_equal(held.labels, [(n if n < 60 else n - 60) % 3 for n in found[split]])
    assert sorted(found["test"]) == [*range(60, 80)]
    assert sorted(found["train"] + found["validation"]) == [*range(60)]
    assert np.bincount(dataset.validation.labels).tolist() == [2, 2, 2]
    assert dataset.class_names == ("ant", "bee", "cow")


def test_tfds_splits_are_used_as_named(prepare):
    config = prepare(
        {"train": examples(30), "validation": examples(9, 30), "test": examples(9, 39), "rest": examples(3)}
    )
    found = numbers(load(config))
    assert [sorted(found[split]) for split in SPLITS] == [[*range(30)], [*range(30, 39)], [*range(39, 48)]]


def test_a_test_split_without_labels_is_replaced_by_validation(prepare):
    """As for ImageNet, whose test labels are −1."""
    secret = examples(9, 39, label=lambda i: -1)
    found = numbers(load(prepare({"train": examples(30), "validation": examples(9, 30), "test": secret})))
    assert sorted(found["test"]) == [*range(30, 39)]
    assert sorted(found["train"] + found["validation"]) == [*range(30)]


def test_only_selected_images_are_decoded(prepare):
    """All training images but the selected one are unreadable."""
    readable = numbered(60)[7]
    config = prepare({"train": [(png(readable), 0), *[(b"", 1)] * 19], "validation": examples(6), "test": examples(6)})
    wins = 0
    for seed in range(40):
        try:
            train = load(dataclasses.replace(config, train_limit=1), seed).train
        except ValueError as error:
            assert "cannot be decoded" in str(error)
        else:
            np.testing.assert_array_equal(train.images[0], readable)
            wins += 1
    assert 0 < wins < 20


def test_only_training_is_split_three_ways(prepare):
    found = numbers(load(prepare({"train": examples(50)})))
    assert [len(found[split]) for split in SPLITS] == [40, 5, 5]
    assert sorted(chain(*found.values())) == [*range(50)]


def test_images_of_different_sizes_need_an_image_size(prepare):
    config = prepare({"train": examples(30) + examples(30, size=11), "test": examples(9)})
    with pytest.raises(ValueError, match=r"data.image_size: None .*tiny train"):
        load(config)
    assert load(dataclasses.replace(config, image_size=9)).train.images.shape == (54, 9, 9, 3)


def test_grey_among_colour_becomes_colour(prepare):
    grey = examples(30, channels=1)
    dataset = load(prepare({"train": grey + examples(30, 30), "test": examples(9)}))
    spread = np.ptp(dataset.train.images.astype(int), axis=3).max(axis=(1, 2))
    assert dataset.train.images.shape == (54, 8, 8, 3)
    assert 20 < (spread == 0).sum() <= 30


def test_the_usual_names_and_single_features_are_found(prepare, tfds):
    image, label = tfds.features.Image(shape=(8, 8, 3)), tfds.features.ClassLabel(num_classes=3)
    several = {"image": image, "label": label, "fine": tfds.features.ClassLabel(num_classes=9)}
    splits = {"train": examples(30), "test": examples(9)}
    for example_features in ({"a": image, "b": label}, {"image": image, "label": label}):
        assert load(prepare(splits, features=example_features)).num_classes == 3
    with pytest.raises(ValueError, match="ClassLabel"):
        tfds_lib.find_feature("x", Info({"kind": label, "fine": label}), tfds.features.ClassLabel, "label")
    assert tfds_lib.find_feature("x", Info(several), tfds.features.ClassLabel, "label") == "label"
    assert tfds_lib.find_feature("x", Info(several, ("image", "fine")), tfds.features.ClassLabel, "label") == "fine"


class Info:
    """The part of a builder that describes features."""

    def __init__(self, features, keys=None):
        self.info, self.features, self.supervised_keys = self, features, keys


def test_other_kinds_of_data_sets_are_refused(prepare, tfds):
    text = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
    with tfds.core.registered.skip_registration():
        builder = make_builder(tfds, "words", {}, features=text)
    with pytest.raises(ValueError, match=r"Image .*\(text, label\)"):
        tfds_lib.find_feature("words", builder(data_dir="unused"), tfds.features.Image, "image")
    deep = tfds.features.Image(shape=(8, 8, 3), dtype=np.uint16, encoding_format="png")
    config = prepare({"train": examples(9)}, features={"image": deep, "label": text["label"]})
    with pytest.raises(ValueError, match="uint16 images of 3 channels"):
        load(config)


def test_an_unreadable_image_is_named(prepare):
    with pytest.raises(ValueError, match=r"image \d+ of tiny test .*JPEG"):
        load(prepare({"train": examples(30), "test": [*examples(9), (b"not an image", 1)]}))
    noise = numbered(1, size=64)[0]
    with pytest.raises(ValueError, match="image 0 of tiny test .*truncated"):
        load(prepare({"train": examples(30, size=64), "test": [(png(noise)[:6000], 1)]}))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_damaged_records_are_refused_in_one_line(prepare, damage):
    config = prepare({"train": examples(300, size=16), "test": examples(9, size=16)})
    (path,) = Path(str(config.data_dir)).rglob("tiny-train.array_record*")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[1000] ^= 0xFF
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(ValueError, match="data.name: tiny train ") as caught:
        load(config)
    assert "\n" not in str(caught.value)


def test_tfrecord_is_refused_with_the_way_out(prepare):
    config = prepare({"train": examples(30), "test": examples(9)})
    (path,) = Path(str(config.data_dir)).rglob("dataset_info.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"tfrecord.* file_format='array_record'"):
        load(config)


def test_too_many_records_are_refused_before_they_are_decoded(prepare, monkeypatch):
    config = prepare({"train": [*examples(1), *[(png(numbered(1)[0]), 1)] * 30], "test": examples(9)})
    monkeypatch.setattr(datasets, "LARGEST", 31 * 8 * 8 * 3 - 1)
    with pytest.raises(ValueError, match="tiny train .*data.stream"):
        load(dataclasses.replace(config, stream=False))
    for fits in ({"image_size": 7}, {"train_limit": 20}):
        assert isinstance(load(dataclasses.replace(config, **fits)).train.images, np.ndarray)
    assert reader_of(load(config).train.arrays) is not None  # without being asked to


def test_an_unknown_name_suggests_the_nearest(tfds, tmp_path):
    with pytest.raises(ValueError, match="'cifar1O' .*cifar10 "):
        load(DataConfig("cifar1O", str(tmp_path)))
    with pytest.raises(ValueError, match="'digit' .*digits"):
        load(DataConfig("digit", str(tmp_path)))
    with pytest.raises(ValueError, match="'cifar10:0.0.1' ") as caught:
        load(DataConfig("cifar10:0.0.1", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_without_tfds_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'kdsearch-jax\[tfds\]'"):
        load(DataConfig("cifar10"))


def test_without_a_network_the_error_says_what_to_run(tfds, tmp_path, monkeypatch):
    def nobody(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(FileNotFoundError, match=r"python -c .*builder\('mnist'") as caught:
        load(DataConfig("mnist", str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_with_a_network_a_data_set_is_prepared_first(tfds, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a network, for all that `load` can know
    make_builder(tfds, "tiny_fetched", {"train": examples(30), "test": examples(9)})
    dataset = load(DataConfig("tiny_fetched", str(tmp_path)))
    assert sorted(numbers(dataset)["test"]) == [*range(9)]


# --- order ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.data())
def test_each_epoch_is_another_permutation(seed, size, draw):
    examples = draw.draw(st.integers(size, 200))
    steps = examples // size
    first, second = (batch_indices(seed, examples, size, epoch * steps, steps) for epoch in (0, 1))
    assert first.shape == (steps, size) and first.dtype == np.int32
    for epoch in (first, second):
        assert len(set(epoch.ravel().tolist())) == steps * size
        assert epoch.min() >= 0 and epoch.max() < examples
    if examples > 30:
        assert (first != second).any()


@given(st.integers(0, 5), st.integers(1, 30), st.integers(0, 50), st.lists(st.integers(0, 20), max_size=5))
def test_resumed_batches_equal_those_of_an_uninterrupted_run(seed, size, start, lengths):
    whole = batch_indices(seed, 61, size, start, sum(lengths))
    pieces, step = [np.empty((0, size), np.int32)], start
    for length in lengths:
        pieces.append(batch_indices(seed, 61, size, step, length))
        step += length
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_seeds_differ_and_batches_are_the_callers_own():
    one = batch_indices(0, 50, 10, 0, 5)
    assert (one != batch_indices(1, 50, 10, 0, 5)).any()
    one[:] = 0
    assert batch_indices(0, 50, 10, 0, 5).any()


@pytest.mark.parametrize("size", [0, -1, 11])
def test_impossible_batches_are_refused(size):
    with pytest.raises(ValueError, match=f"batch_size: {size} .* 10 examples"):
        batch_indices(0, 10, size, 0, 1)
    if size < 1:
        with pytest.raises(ValueError, match=f"batch_size: {size}"):
            list(padded_batches(10, size))


@given(st.integers(0, 100), st.integers(1, 40))
def test_padded_batches_count_every_example_once(examples, size):
    counted = np.zeros(max(examples, 1))
    for indices, weights in padded_batches(examples, size):
        assert indices.shape == weights.shape == (size,)
        assert (indices.dtype, weights.dtype) == (np.int32, np.float32)
        np.add.at(counted, indices, weights)
        assert not indices[weights == 0].any()
    assert (counted[:examples] == 1).all() and counted.sum() == examples


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_without_crop_and_flip_nothing_changes(key):
    images = jnp.asarray(numbered(5))
    np.testing.assert_array_equal(augment(key, images, crop=0, flip=False), images)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("crop", "flip"), [(2, False), (0, True), (1, True)])
def test_every_image_is_a_window_of_the_padded_one(key, channels, crop, flip):
    images = numbered(40, size=6, channels=channels)[:, :, :5]  # not square
    changed = np.asarray(augment(key, jnp.asarray(images), crop=crop, flip=flip))
    assert changed.shape == images.shape and changed.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    for image, old in zip(changed, padded, strict=True):
        windows = [old[y : y + 6, x : x + 5] for y in range(2 * crop + 1) for x in range(2 * crop + 1)]
        windows += [window[:, ::-1] for window in windows if flip]
        assert any((image == window).all() for window in windows)


def test_crops_and_flips_are_uniform(key):
    """Pearson's χ² of 9 windows × 2 directions; 40.8 is its 99.9% point at 17 degrees of freedom."""
    images = jnp.tile(jnp.asarray(numbered(1, size=4)), (3600, 1, 1, 1))
    changed = np.asarray(augment(key, images, crop=1, flip=True))
    counts = np.asarray(sorted(Counter(image.tobytes() for image in changed).values()))
    assert len(counts) == 18
    assert ((counts - 200) ** 2 / 200).sum() < 40.8


def test_a_second_flip_keeps_the_distribution(key):
    """Half of the images are unchanged, independently of the first flip."""
    image = numbered(1, size=4)
    images = jnp.tile(jnp.asarray(image), (2000, 1, 1, 1))
    once = augment(jax.random.fold_in(key, 0), images, crop=0, flip=True)
    twice = augment(jax.random.fold_in(key, 1), once, crop=0, flip=True)
    same = [(np.asarray(found) == image).all(axis=(1, 2, 3)) for found in (once, twice)]
    assert all(900 < plain.sum() < 1100 for plain in same)
    assert 900 < (same[0] == same[1]).sum() < 1100
    mirrored = augment(jax.random.fold_in(key, 0), images[:, :, ::-1], crop=0, flip=True)
    np.testing.assert_array_equal(mirrored, once[:, :, ::-1])


def test_augmentation_is_a_function_of_its_key(key):
    images = jnp.asarray(numbered(30))
    compiled = jax.jit(augment, static_argnames=("crop", "flip"))
    one, other = (compiled(jax.random.fold_in(key, i), images, crop=2, flip=True) for i in (0, 1))
    np.testing.assert_array_equal(one, augment(jax.random.fold_in(key, 0), images, crop=2, flip=True))
    assert (one != other).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalise(dtype, channels):
    images, mean, std = numbered(4, channels=channels), (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.25)[:channels]
    compiled = jax.jit(normalise, static_argnames="dtype")
    found = compiled(jnp.asarray(images), np.float32(mean), np.float32(std), dtype=dtype)
    assert found.dtype == dtype
    expected = (images / 255 - np.asarray(mean)) / np.asarray(std)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=1e-5 if dtype == jnp.float32 else 0.02)


def test_invalid_normalisation_is_refused():
    images = jnp.asarray(numbered(2))
    with pytest.raises(ValueError, match="images: float32"):
        normalise(normalise(images, (0.5,) * 3, (0.2,) * 3), (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(ValueError, match=r"mean \(1,\) and std \(1,\) .* 3 channels"):
        normalise(images, (0.5,), (0.2,))
