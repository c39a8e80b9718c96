"""Examples: records of what is trained and tested on, and a user's own arrays as such.

A data set of one's own is a dictionary of arrays, or of pytrees of arrays, each with one row an example. Which entries
feed the network is said elsewhere (`kdsearch_jax.adapters.call_spec`); the others (labels, masks, boxes) are for
losses and metrics.
Nothing is done to them, but that images in uint8, under the name `images`, are normalised on the device. Missing splits
are held out, from constants of this module: runs of every seed are validated and tested on the same examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.data.batches import is_image

SPLIT_SEED = 20200829  # of what is held out; never that of a run
TEST_SHARE = 0.1  # of a data set without a test split
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Examples in a fixed order.

    arrays: {entry: pytree of arrays}, all with one row an example. Of a labelled set of images: images, uint8
    (examples, height, width, channels), 0 black to 255; labels, int32 (examples,), 0 … classes − 1.
    """

    arrays: dict[str, Any]

    @staticmethod
    def of(images: NDArray[np.uint8], labels: NDArray[np.int32]) -> Split:
        """Labelled images."""
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
        """The examples at `indices`, in their order."""
        return Split(jax.tree.map(lambda x: x[indices], self.arrays))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits of examples of one shape, and how to normalise their images.

    num_classes, class_names: 0 and () where there are no labels; a class without a name is called by its number.
    mean, std: per channel, of images in [0, 1]; () where no entry is images in uint8, which alone are normalised.
    scale: what the source's own values are divided by to lie in [0, 1]; it is told users, images here are uint8.
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


def own(
    arrays: Mapping[str, Any],
    name: str,
    *,
    validation: float = 0.1,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    train_limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set of a user's arrays.

    Args:
      arrays: {entry: pytree of arrays}, to be split; or {"train": such a dictionary, "test": …, "validation": …}.
      name: for messages and records.
      validation: share of what is for training that is held out where `arrays` has no validation split; a tenth is
        held out before where it has no test split.
      mean, std: per channel, for images in uint8, which need both: those that the teacher was trained with.
      train_limit, seed: use so many training examples, drawn by this seed.

    Raises:
      ValueError: names the entry, and what is wrong with it.
    """
    parts = _parts(arrays, name)
    splits = {split: Split(_checked(entries, f"{name}, {split}")) for split, entries in parts.items()}
    _check_alike(splits, name)
    train, test, held = splits["train"], splits.get("test"), splits.get("validation")
    if len(train) < 4:
        raise ValueError(f"data: {name} has {len(train)} training examples; give 4 or more")
    if test is None:
        train, test = hold_out(train, max(1, round(TEST_SHARE * len(train))), 0)
    if held is None:
        train, held = hold_out(train, max(1, round(validation * len(train))), 1)
    if train_limit is not None and train_limit < len(train):
        chosen = np.random.default_rng([SPLIT_SEED, 2, seed]).choice(len(train), train_limit, replace=False)
        train = train[np.sort(chosen)]
    if "images" in train.arrays and is_image("images", train.arrays["images"]):
        _check_normalisation(train.images.shape[-1], mean, std)
        return Dataset(name, train, held, test, 0, tuple(mean or ()), tuple(std or ()), ())
    if mean is not None or std is not None:
        raise ValueError("mean, std: there is nothing to normalise, as no entry is `images` in uint8; leave both out")
    return Dataset(name, train, held, test, 0, (), (), ())


def _check_normalisation(channels: int, mean: Any, std: Any) -> None:
    if mean is None or std is None:
        raise ValueError(
            "mean, std: images in uint8 are normalised as the teacher's were in training, (image/255 − mean)/std; give "
            "both, or images in float that are normalised already"
        )
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean {mean}, std {std}: give one value for each of the {channels} channels")


def _parts(arrays: Any, name: str) -> dict[str, Mapping[str, Any]]:
    """The splits that a user gives, each a dictionary of entries."""
    if not isinstance(arrays, Mapping) or not arrays or not all(isinstance(key, str) for key in arrays):
        raise ValueError(
            f"data: {type(arrays).__name__} is not possible; give a dictionary of arrays by name, such as "
            "{'images': …, 'labels': …}, or {'train': such a dictionary, 'test': …}"
        )
    if "train" in arrays and set(arrays) <= set(SPLITS):
        if not all(isinstance(part, Mapping) and part for part in arrays.values()):
            raise ValueError(f"data: {name}: each of train, validation and test must be a dictionary of arrays")
        return dict(arrays)
    return {"train": arrays}


def _checked(entries: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Entries as arrays that devices take, of one length."""
    made = {
        entry: jax.tree.map(lambda leaf, entry=entry: _array(leaf, entry, what), tree)
        for entry, tree in entries.items()
    }
    lengths = {
        entry + jax.tree_util.keystr(path): leaf.shape[0]
        for entry, tree in made.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    if not lengths:
        raise ValueError(f"data: {what} has no arrays")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{entry}: {length}" for entry, length in lengths.items())
        raise ValueError(f"data: {what} has entries of unequal lengths ({listed}); each needs one row an example")
    return made


def _array(leaf: Any, entry: str, what: str) -> np.ndarray:
    array = np.asarray(leaf)
    if array.ndim == 0 or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise ValueError(
            f"data: {what}: {entry} is {array.dtype} of shape {array.shape}; give numbers, with one row an example"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"data: {what}: some values of {entry} are NaN or infinite")
    small = {"int64": np.int32, "uint64": np.uint32, "float64": np.float32}.get(array.dtype.name)
    if small is None:
        return array
    if (
        array.dtype.kind in "iu"
        and array.size
        and not np.iinfo(small).min <= array.min() <= array.max() <= np.iinfo(small).max
    ):
        raise ValueError(f"data: {what}: {entry} has values from {array.min()} to {array.max()}, beyond 32 bits")
    return array.astype(small)


def _check_alike(splits: Mapping[str, Split], name: str) -> None:
    def shapes(split: Split) -> Any:
        return jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape[1:]}", split.arrays)

    for key, split in splits.items():
        if shapes(split) != shapes(splits["train"]):
            raise ValueError(
                f"data: {name}: {key} examples are {shapes(split)}, training examples {shapes(splits['train'])}; "
                "give the same entries, types and sizes"
            )


def only_input(entries: Iterable[str]) -> str | None:
    """The one entry beside the labels, which is what the network is fed; None where there are others."""
    others = [entry for entry in entries if entry != "labels"]
    return others[0] if len(others) == 1 else None


def hold_out(split: Split, count: int, stream: int) -> tuple[Split, Split]:
    """The split without `count` examples, and these: of every class, if there are any, its share, give or take one."""
    shuffled = np.random.default_rng([SPLIT_SEED, stream]).permutation(len(split))
    labels = split.arrays.get("labels")
    classes = isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu"
    by_class = shuffled[np.argsort(split.labels[shuffled], kind="stable")] if classes else shuffled
    held = by_class[((np.arange(count) + 0.5) * (len(split) / count)).astype(int)]
    return split[np.setdiff1d(shuffled, held)], split[np.sort(held)]
