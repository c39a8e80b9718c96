"""Torch-Pruning's rules, and the pruning ratios that meet a budget.

Channels of all inner groups are ranked together (`global_pruning`). The first convolution, each block's second one and
the classifier are ignored: Torch-Pruning does not see that the zero channels of an option A shortcut are fixed, and cuts
the residual stream wrongly otherwise.

    MACs alone            one ratio, by bisection: the smallest at which the student is within the budget
    MACs and parameters   two ratios, one for the channels of stages 1 and 2, one for those of stage 3, ranked together
                          within these. For a ratio of stage 3 the other follows from the MACs by bisection, and that of
                          stage 3 from the parameters: parameters are mostly in stage 3, MACs mostly in stage 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from benchmarks.peers.networks import SIZE, CifarResNet, batches, costs
from kdsearch_jax.data.examples import Dataset

STEPS = 24  # halvings of an interval of ratios
Ratios = tuple[float, ...]  # one for all stages, or (stages 1 and 2, stage 3)

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


def pruned(network: CifarResNet, rule: str, ratios: Ratios) -> CifarResNet:
    """A copy of the network without its least important channels."""
    student = copy.deepcopy(network)
    for own, original in zip(student.parameters(), network.parameters(), strict=True):
        own.grad = None if original.grad is None else original.grad.clone()
    by_stage = None
    if len(ratios) > 1:
        first, second, third = student.stages
        by_stage = {tuple([*_inner(first), *_inner(second)]): ratios[0], tuple(_inner(third)): ratios[1]}
    pruner = torch_pruning.pruner.BasePruner(
        student, torch.zeros(1, 3, SIZE, SIZE), importance(rule), global_pruning=True, pruning_ratio=ratios[0],
        pruning_ratio_dict=by_stage, ignored_layers=ignored(student),
    )  # fmt: skip
    pruner.step()
    return student.eval()


def _inner(stage: nn.Sequential) -> list[nn.Module]:
    return [block.conv1 for block in stage]  # type: ignore


def within(network: CifarResNet, rule: str, macs: float, params: float | None) -> tuple[CifarResNet, Ratios]:
    """The student closest to the budget, and its ratios.

    Args:
      macs, params: the most that it may cost; params None: not bounded.

    Raises:
      ValueError: no ratio meets the budget.
    """
    classes = network.linear.out_features

    def cost(student: CifarResNet) -> tuple[int, int]:
        return costs(student.widths, classes)

    def by_macs(make: Callable[[float], Ratios]) -> tuple[CifarResNet, Ratios] | None:
        return bisect(lambda ratio: (pruned(network, rule, make(ratio)), make(ratio)), lambda s: cost(s[0])[0] <= macs)

    if params is None:
        found = by_macs(lambda ratio: (ratio,))
    else:
        found = bisect(
            lambda late: by_macs(lambda early: (early, late)), lambda s: s is not None and cost(s[0])[1] <= params
        )
    if found is None:
        raise ValueError(f"macs: {rule} has no student of {macs:,.0f} MACs and {params} parameters; give a larger --macs")
    return found


def bisect(make: Callable[[float], Any], fits: Callable[[Any], bool]) -> Any:
    """What `make` returns at the smallest ratio in [0, 1) where it fits; None if it fits nowhere."""
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS if best is None else 0):
        ratio = (low + high) / 2
        made = make(ratio)
        if fits(made):
            high, best = ratio, made
        else:
            low = ratio
        if high - low < 1e-4:
            break
    return best
