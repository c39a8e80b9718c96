"""Data sets and their splits, and data sets made from a user's arrays.

A user's data set is a dictionary of arrays, or of pytrees of arrays, with one row per example. Which entries the
network takes is configured elsewhere (`kdsearch_jax.adapters.call_spec`); the others (labels, masks, boxes) are for
losses and metrics. They are passed on unchanged, except that uint8 images in the entry `images` are normalised on the
device. Missing splits are held out with constant seeds, so runs of every seed are validated and tested on the same
examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.data.batches import is_image

SPLIT_SEED = 20200829  # of held-out splits, independent of the run's seed
TEST_SHARE = 0.1  # held out from a data set without a test split
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Examples in a fixed order.

    arrays: {entry: pytree of arrays}, with one row per example. Classified images have the entries images, uint8
    (examples, height, width, channels) with 0 for black, and labels, int32 (examples,) from 0 to classes − 1.
    """

    arrays: dict[str, Any]

    @staticmethod
    def of(images: NDArray[np.uint8], labels: NDArray[np.int32]) -> Split:
        """A split of classified images."""
        return Split({"images": images, "labels": labels})

    @property
    def images(self) -> NDArray[np.uint8]:
        """The images."""
        return self.arrays["images"]

    @property
    def labels(self) -> NDArray[np.int32]:
        """The labels."""
        return self.arrays["labels"]

    def __len__(self) -> int:
        """The number of examples."""
        return len(jax.tree.leaves(self.arrays)[0])

    def __getitem__(self, indices: NDArray[np.integer]) -> Split:
        """The examples at `indices`, in that order."""
        return Split(jax.tree.map(lambda x: x[indices], self.arrays))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits of examples of equal shapes, and how to normalise their images.

    num_classes, class_names: 0 and () without labels; a class without a name is named by its number.
    mean, std: per channel, of images in [0, 1]; () if there are no uint8 images to normalise.
    scale: the source's value for white, for users who prepare their own images; images here are uint8.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    scale: float = 255.0


def from_arrays(
    arrays: Mapping[str, Any],
    name: str,
    *,
    validation: float = 0.1,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    train_limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Makes a data set from a user's arrays.

    Args:
      arrays: {entry: pytree of arrays}, to be split; or {"train": such a dictionary, "test": …, "validation": …}.
      name: for messages and records.
      validation: fraction of the training examples to hold out if `arrays` has no validation split. Without a test
        split, a tenth is held out first.
      mean, std: per channel, those the teacher was trained with; required for uint8 images.
      train_limit, seed: use only this many training examples, drawn with this seed.

    Raises:
      ValueError: names the entry and what is wrong with it.
    """
    given = _split_mappings(arrays, name)
    splits = {split: Split(_to_arrays(entries, f"{name}, {split}")) for split, entries in given.items()}
    _check_same_kind(splits, name)
    train, test, held_out = splits["train"], splits.get("test"), splits.get("validation")
    if len(train) < 4:
        raise ValueError(f"data: {name} has {len(train)} training examples; give 4 or more")
    if test is None:
        train, test = hold_out(train, max(1, round(TEST_SHARE * len(train))), 0)
    if held_out is None:
        train, held_out = hold_out(train, max(1, round(validation * len(train))), 1)
    if train_limit is not None and train_limit < len(train):
        chosen = np.random.default_rng([SPLIT_SEED, 2, seed]).choice(len(train), train_limit, replace=False)
        train = train[np.sort(chosen)]
    if "images" in train.arrays and is_image("images", train.arrays["images"]):
        _check_normalisation(train.images.shape[-1], mean, std)
        return Dataset(name, train, held_out, test, 0, tuple(mean or ()), tuple(std or ()), ())
    if mean is not None or std is not None:
        raise ValueError("mean, std: there is no entry `images` in uint8 to normalise; leave both out")
    return Dataset(name, train, held_out, test, 0, (), (), ())


def _check_normalisation(channels: int, mean: Any, std: Any) -> None:
    if mean is None or std is None:
        raise ValueError(
            "mean, std: uint8 images must be normalised as the teacher's were, (image/255 − mean)/std; give both, "
            "or float images that are normalised already"
        )
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean {mean}, std {std}: give one value for each of {channels} channels")


def _split_mappings(arrays: Any, name: str) -> dict[str, Mapping[str, Any]]:
    """{split: entries} of a user's arrays."""
    if not isinstance(arrays, Mapping) or not arrays or not all(isinstance(key, str) for key in arrays):
        raise ValueError(
            f"data: {type(arrays).__name__} is invalid; give a dictionary of arrays by name, such as "
            "{'images': …, 'labels': …}, or {'train': such a dictionary, 'test': …}"
        )
    if "train" in arrays and set(arrays) <= set(SPLITS):
        if not all(isinstance(entries, Mapping) and entries for entries in arrays.values()):
            raise ValueError(f"data: {name}: each of train, validation and test must be a dictionary of arrays")
        return dict(arrays)
    return {"train": arrays}


def _to_arrays(entries: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Entries as arrays of equal length, with dtypes that devices support."""
    arrays = {
        entry: jax.tree.map(lambda leaf, entry=entry: _to_array(leaf, entry, what), tree)
        for entry, tree in entries.items()
    }
    lengths = {
        entry + jax.tree_util.keystr(path): leaf.shape[0]
        for entry, tree in arrays.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    if not lengths:
        raise ValueError(f"data: {what} has no arrays")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{entry}: {length}" for entry, length in lengths.items())
        raise ValueError(f"data: {what} has entries of unequal lengths ({listed}); each needs one row per example")
    return arrays


def _to_array(leaf: Any, entry: str, what: str) -> np.ndarray:
    array = np.asarray(leaf)
    if array.ndim == 0 or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise ValueError(
            f"data: {what}: {entry} is {array.dtype} of shape {array.shape}; give numbers, with one row per example"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"data: {what}: some values of {entry} are NaN or infinite")
    narrow = {"int64": np.int32, "uint64": np.uint32, "float64": np.float32}.get(array.dtype.name)
    if narrow is None:
        return array
    if (
        array.dtype.kind in "iu"
        and array.size
        and not np.iinfo(narrow).min <= array.min() <= array.max() <= np.iinfo(narrow).max
    ):
        raise ValueError(
            f"data: {what}: {entry} has values from {array.min()} to {array.max()}, which do not fit in 32 bits"
        )
    return array.astype(narrow)


def _check_same_kind(splits: Mapping[str, Split], name: str) -> None:
    def shapes(split: Split) -> Any:
        return jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape[1:]}", split.arrays)

    for key, split in splits.items():
        if shapes(split) != shapes(splits["train"]):
            raise ValueError(
                f"data: {name}: {key} examples are {shapes(split)}, training examples {shapes(splits['train'])}; "
                "give the same entries, types and sizes"
            )


def sole_input(entries: Iterable[str]) -> str | None:
    """The only entry besides the labels, which must be the network's input; None if there are several."""
    inputs = [entry for entry in entries if entry != "labels"]
    return inputs[0] if len(inputs) == 1 else None


def hold_out(split: Split, count: int, stream: int) -> tuple[Split, Split]:
    """Returns the split without `count` examples, and those; stratified by class to within one example, if labelled."""
    shuffled = np.random.default_rng([SPLIT_SEED, stream]).permutation(len(split))
    labels = split.arrays.get("labels")
    labelled = isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu"
    by_class = shuffled[np.argsort(split.labels[shuffled], kind="stable")] if labelled else shuffled
    held_out = by_class[((np.arange(count) + 0.5) * (len(split) / count)).astype(int)]
    return split[np.setdiff1d(shuffled, held_out)], split[np.sort(held_out)]
