"""CIFAR-10 or CIFAR-100 as one file whose test images are split once: 2,000 to choose by, 8,000 to report on.

python -m benchmarks.cifar_split {cifar10,cifar100} FILE.npz [--data-dir TFDS_DIR]

A published teacher has seen the whole training split, so images held out of it tell little about students. The file has
all 50,000 training images as the training split, 2,000 test images (drawn with seed 0) as the validation split, and the
other 8,000 as the test split. Give it as `--data.name npz:FILE.npz`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

CHOOSING = 2_000


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("cifar10", "cifar100"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--data-dir", help="where TFDS stores its data")
    options = parser.parse_args()
    import tensorflow_datasets as tfds

    source = tfds.builder(options.name, data_dir=options.data_dir)
    arrays = {split: _arrays(source.as_data_source(split)) for split in ("train", "test")}
    images, labels = arrays["test"]
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {"validation": np.sort(order[:CHOOSING]), "test": np.sort(order[CHOOSING:])}
    splits = {"train": arrays["train"], **{name: (images[part], labels[part]) for name, part in parts.items()}}
    named = {f"{split}_images": images for split, (images, _) in splits.items()}
    named |= {f"{split}_labels": labels for split, (_, labels) in splits.items()}
    np.savez(options.file, **named)
    print({name: array.shape for name, array in named.items()})


def _arrays(examples: object) -> tuple[np.ndarray, np.ndarray]:
    rows = [(example["image"], example["label"]) for example in examples]  # type: ignore[attr-defined]
    return np.stack([image for image, _ in rows]), np.array([label for _, label in rows], np.int32)


if __name__ == "__main__":
    main()
