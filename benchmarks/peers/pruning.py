"""Torch-Pruning's rules, and the pruning ratios that meet a budget.

The first convolution, each block's second one and the classifier are ignored: Torch-Pruning does not see that the zero
channels of an option A shortcut are fixed, and cuts the residual stream wrongly otherwise. The channels inside of the
blocks are left.

Pruning is gradual, as in Torch-Pruning's own benchmark of CIFAR: ratios rise from 0 in `STEPS` steps, less than one
channel each, and importances are computed again in each, until the student is within the MACs.

    MACs alone            all channels are ranked together (`global_pruning`)
    MACs and parameters   those of stages 1 and 2 are ranked together, and those of stage 3. Parameters are mostly in
                          stage 3 and MACs in stage 1, so parameters fall with the share of the ratio that stage 3 gets;
                          the smallest share at which the student is within the parameters is found by bisection
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from benchmarks.peers.networks import SIZE, CifarResNet, batches, costs
from kdsearch_jax.data.examples import Dataset

STEPS = 400  # of gradual pruning, as in Torch-Pruning's benchmark
LARGEST_SHARE = 0.75  # of the ratio for stage 3: beyond it, half of the MACs cannot go

TITLES = {"group-l2": "group-L2", "taylor": "Taylor", "bn-scale": "BatchNorm scale", "group-sl": "group-SL"}


def importance(rule: str) -> Any:
    """Torch-Pruning's importance of a rule."""
    criteria = torch_pruning.importance
    if rule == "taylor":
        return criteria.GroupTaylorImportance()
    if rule == "bn-scale":
        return criteria.BNScaleImportance()
    # Its benchmark of CIFAR divides by the largest importance of a group after sparse learning.
    return criteria.GroupMagnitudeImportance(p=2, normalizer="max" if rule == "group-sl" else "mean")


def prepare(rule: str, network: CifarResNet, data: Dataset | None, options: Any) -> CifarResNet:
    """A copy of the network, as the rule scores it: with gradients for Taylor, after sparse learning for group-SL."""
    network = copy.deepcopy(network)
    if rule == "taylor":
        assert data is not None
        network.eval().zero_grad()
        for images, labels in batches(data, options.batch_size, options.taylor_batches, options.seed):
            (functional.cross_entropy(network(images), labels) / options.taylor_batches).backward()
    if rule == "group-sl":
        assert data is not None
        _learn_sparsely(network, data, options)
    return network


def _learn_sparsely(network: CifarResNet, data: Dataset, options: Any) -> None:
    """Trains by the labels with Torch-Pruning's group regulariser, which adds to the gradients."""
    pruner = torch_pruning.pruner.GroupNormPruner(
        network, torch.zeros(1, 3, SIZE, SIZE), importance("group-sl"), reg=options.sl_reg, global_pruning=True,
        ignored_layers=ignored(network),
    )  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), options.sl_rate, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.sl_steps)
    network.train()
    pruner.update_regularizer()
    for number, (images, labels) in enumerate(batches(data, options.batch_size, options.sl_steps, options.seed), 1):
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        pruner.regularize(network)
        optimizer.step()
        schedule.step()
        if number % 50 == 0:
            print(f"group-sl: sparse learning {number}/{options.sl_steps}, loss {float(loss.detach()):.3f}", flush=True)
    network.eval()


def ignored(network: CifarResNet) -> list[nn.Module]:
    """The layers whose outputs option A fixes, and the classifier."""
    return [network.conv1, network.linear, *(block.conv2 for stage in network.stages for block in stage)]  # type: ignore


def pruned(network: CifarResNet, rule: str, macs: float, late: float | None = None) -> CifarResNet | None:
    """A copy of the network without its least important channels; None if it cannot be pruned to these MACs.

    Args:
      late: share of the ratio for stage 3, in (0, 1); the rest is for stages 1 and 2. None: ranks all stages together.
    """
    student = copy.deepcopy(network)
    for own, original in zip(student.parameters(), network.parameters(), strict=True):
        own.grad = None if original.grad is None else original.grad.clone()
    by_stage = None
    if late is not None:
        first, second, third = student.stages
        larger = max(late, 1 - late)
        by_stage = {(*_inner(first), *_inner(second)): (1 - late) / larger, tuple(_inner(third)): late / larger}
    pruner = torch_pruning.pruner.BasePruner(
        student, torch.zeros(1, 3, SIZE, SIZE), importance(rule), global_pruning=True, pruning_ratio=1.0,
        pruning_ratio_dict=by_stage, iterative_steps=STEPS, ignored_layers=ignored(student),
    )  # fmt: skip
    classes = network.linear.out_features
    for _ in range(STEPS):
        if costs(student.widths, classes)[0] <= macs:
            return student.eval()
        pruner.step()
    return student.eval() if costs(student.widths, classes)[0] <= macs else None


def _inner(stage: nn.Sequential) -> list[nn.Module]:
    return [block.conv1 for block in stage]  # type: ignore


def within(network: CifarResNet, rule: str, macs: float, params: float | None) -> tuple[CifarResNet, float | None]:
    """The student closest to the budget, and the share of the ratio that stage 3 got (`pruned`).

    Args:
      macs, params: the most that it may cost; params None: not bounded.

    Raises:
      ValueError: no student meets the budget.
    """

    def fits(made: tuple[CifarResNet | None, float]) -> bool:
        return made[0] is not None and costs(made[0].widths, made[0].linear.out_features)[1] <= (params or math.inf)

    found: Any = (pruned(network, rule, macs), None)
    if params is not None:
        found = bisect(lambda late: (pruned(network, rule, macs, late), late), fits, LARGEST_SHARE)
    if found is None or found[0] is None:
        raise ValueError(
            f"macs: {rule} has no student of {macs:,.0f} MACs and {params} parameters; give a larger --macs"
        )
    return found


def bisect(make: Callable[[float], Any], fits: Callable[[Any], bool], high: float = 1.0, halvings: int = 12) -> Any:
    """What `make` returns at the smallest number in (0, high) where it fits; None if it fits nowhere."""
    low, best = 0.0, None
    for _ in range(halvings):
        middle = (low + high) / 2
        made = make(middle)
        if fits(made):
            high, best = middle, made
        else:
            low = middle
    return best
