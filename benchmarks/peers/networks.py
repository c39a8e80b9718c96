"""The CIFAR ResNet with option A shortcuts in PyTorch, the data that rules look at, and what a student costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kdsearch_jax.data import datasets
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.settings import DataConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, CROP = 32, 4  # pixels of an image's side, and of its padding in augmentation


class Block(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))); option A pads `pad` zero channels on each side."""

    def __init__(self, features: int, inner: int, stride: int, inputs: int):
        super().__init__()
        self.stride, self.pad = stride, (features - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations (batch, channels, height, width)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """The network of github.com/akamaster/pytorch_resnet_cifar10, with its parameter names.

    Args:
      widths: inner channels of each block, stage by stage.
      classes: number of classes.
    """

    def __init__(self, widths: list[list[int]], classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        inputs = 16
        for stage, inner in enumerate(widths):
            blocks, features = [], 16 * 2**stage
            for number, width in enumerate(inner):
                blocks.append(Block(features, width, 2 if stage and not number else 1, inputs))
                inputs = features
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of images (batch, 3, 32, 32)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        return self.linear(x.mean((2, 3)))

    @property
    def stages(self) -> list[nn.Sequential]:
        """The three stages."""
        return [self.get_submodule(f"layer{stage}") for stage in (1, 2, 3)]  # type: ignore

    @property
    def widths(self) -> list[list[int]]:
        """Inner channels of each block, stage by stage."""
        return [[block.conv1.out_channels for block in stage] for stage in self.stages]  # type: ignore


def load(tensors: Mapping[str, np.ndarray]) -> CifarResNet:
    """The network with these weights, in inference mode. Raises ValueError if they are of another network."""
    widths: list[list[int]] = [[], [], []]
    for name in sorted(tensors, key=lambda n: [int(part) for part in re.findall(r"\d+", n)]):
        if match := re.fullmatch(r"layer([123])\.\d+\.conv1\.weight", name):
            widths[int(match[1]) - 1].append(len(tensors[name]))
    if not all(widths) or "linear.weight" not in tensors:
        raise ValueError(
            "weights: not a CIFAR ResNet with the names of pytorch_resnet_cifar10 (layer1.0.conv1.weight, …)"
        )
    network = CifarResNet(widths, len(tensors["linear.weight"]))
    state = {name: torch.tensor(np.asarray(value)) for name, value in tensors.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    if wrong:
        raise ValueError(f"weights: {wrong[0]} does not belong to a CIFAR ResNet with option A shortcuts")
    return network.eval()


def costs(widths: list[list[int]], classes: int) -> tuple[int, int]:
    """(MACs of one image, parameters) of the network with these inner channels, as this package counts them."""
    macs, params, inputs = 9 * 3 * 16 * SIZE**2 + 64 * classes, 9 * 3 * 16 + 2 * 16 + 65 * classes, 16
    for stage, inner in enumerate(widths):
        features, positions = 16 * 2**stage, (SIZE >> stage) ** 2
        for width in inner:
            kernels = 9 * width * (inputs + features)
            macs, params = macs + kernels * positions, params + kernels + 2 * (width + features)
            inputs = features
    return macs, params


# --- data -------------------------------------------------------------------------------------------------------------


def training_data(name: str, data_dir: str | None) -> Dataset:
    """The data set with the split of the package's CIFAR experiments, of which only training images are used."""
    return datasets.load(DataConfig(name, data_dir, validation=0.04, mean=MEAN, std=STD))


def normalised(images: np.ndarray) -> torch.Tensor:
    """(batch, 3, 32, 32) of uint8 images (batch, 32, 32, 3)."""
    pixels = (torch.tensor(images).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return pixels.permute(0, 3, 1, 2).contiguous()


def batches(data: Dataset, size: int, count: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` batches of augmented training images and their labels, of epochs in random order."""
    random, train = np.random.default_rng(seed), data.train
    order: Any = np.empty(0, np.int64)
    for _ in range(count):
        if len(order) < size:
            order = random.permutation(len(train))
        rows, order = order[:size], order[size:]
        images = np.pad(train.images[rows], ((0, 0), (CROP, CROP), (CROP, CROP), (0, 0)))
        cut = np.empty((size, SIZE, SIZE, 3), np.uint8)
        for i, (y, x) in enumerate(random.integers(0, 2 * CROP + 1, (size, 2))):
            image = images[i, y : y + SIZE, x : x + SIZE]
            cut[i] = image[:, ::-1] if random.random() < 0.5 else image
        yield normalised(cut), torch.tensor(train.labels[rows]).long()
