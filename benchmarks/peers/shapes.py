"""Shapes found by other works, with the teacher's channels of the largest group-L2 norm in each layer.

`tas`: the ResNet-20 that TAS (Dong and Yang 2019, arXiv 1905.09717) found for CIFAR-10, from the configuration
C010-ResNet20 of github.com/D-X-Y/AutoDL-Projects. Option A shortcuts fix the residual stream, so only the widths inside
of the blocks can be used, and they are scaled by one factor to the budget; each is at most that of the teacher.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.peers.networks import CifarResNet, costs
from benchmarks.peers.pruning import bisect

TAS = (16, 6, 4, 4, 4, 4, 4, 32, 32, 12, 19, 32, 28, 64, 64, 64, 64, 64, 44)  # outputs of all convolutions
TITLES = {"tas": "TAS's shape, inner widths scaled"}


def within(network: CifarResNet, macs: float, params: float | None) -> tuple[CifarResNet, float]:
    """The network with TAS's inner widths, times the largest factor within the budget, and that factor.

    Raises:
      ValueError: the network is not a ResNet-20, or no factor meets the budget.
    """
    if [len(stage) for stage in network.widths] != [3, 3, 3]:
        raise ValueError("rules: tas is a shape of ResNet-20; give the weights of one")
    inner = iter(TAS[1::2])
    shape = [[next(inner) for _ in range(3)] for _ in range(3)]
    classes = network.linear.out_features

    def scaled(factor: float) -> list[list[int]]:
        return [
            [min(whole, max(1, round(factor * width))) for width, whole in zip(*pair, strict=True)]
            for pair in zip(shape, network.widths, strict=True)
        ]

    def fits(widths: list[list[int]]) -> bool:
        cost = costs(widths, classes)
        return cost[0] <= macs and (params is None or cost[1] <= params)

    # From the largest factor down: a ratio of 0 is four times the shape.
    found = bisect(lambda ratio: (scaled(4 * (1 - ratio)), 4 * (1 - ratio)), lambda made: fits(made[0]))
    if found is None:
        raise ValueError(f"macs: TAS's shape has no student of {macs:,.0f} MACs; give a larger --macs")
    return _with_widths(network, found[0]), found[1]


def _with_widths(network: CifarResNet, widths: list[list[int]]) -> CifarResNet:
    """A copy with the channels of the largest norm inside of each block, in their order."""
    student = copy.deepcopy(network)
    for stage, inner in zip(student.stages, widths, strict=True):
        blocks: Any = stage
        for block, width in zip(blocks, inner, strict=True):
            outgoing, incoming = block.conv1.weight.data, block.conv2.weight.data
            norm = outgoing.pow(2).sum((1, 2, 3)) + incoming.pow(2).sum((0, 2, 3)) + block.bn1.weight.data.pow(2)
            keep = norm.argsort(descending=True)[:width].sort().values
            block.conv1 = _convolution(block.conv1, outgoing[keep])
            block.conv2 = _convolution(block.conv2, incoming[:, keep])
            block.bn1 = _norm(block.bn1, keep)
    return student.eval()


def _convolution(layer: nn.Conv2d, weight: torch.Tensor) -> nn.Conv2d:
    new = nn.Conv2d(weight.shape[1], weight.shape[0], 3, layer.stride, 1, bias=False)
    new.weight.data.copy_(weight)
    return new


def _norm(layer: nn.BatchNorm2d, keep: torch.Tensor) -> nn.BatchNorm2d:
    new = nn.BatchNorm2d(len(keep))
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(new, name).data.copy_(getattr(layer, name).data[keep])
    return new
