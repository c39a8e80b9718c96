"""Hand-made students of the same cost, to compare with: which units they keep.

- `uniform`: the same share of every layer; in each, the units of largest L1 norm.
- `magnitude`: the units of largest L1 norm over all layers, each layer's norms divided by their mean.

The L1 norm is that of the kernel slices that make a unit (Li et al., Pruning Filters for Efficient ConvNets, 2017).
Neither drops a residual branch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import traverse_util

from kdsearch_jax import budget as budget_lib
from kdsearch_jax.budget import BudgetError, Limits
from kdsearch_jax.config import nearest
from kdsearch_jax.tracing.topology import Group, Topology

NAMES = ("uniform", "magnitude")


def keep(name: str, variables: Any, topology: Topology, limits: Limits) -> dict[str, np.ndarray]:
    """{group: (size,) bool} of the named baseline, within the limits as the searched student is.

    Raises:
      ValueError: for an unknown name. BudgetError: where no choice lands in the budget.
    """
    if name not in NAMES:
        raise ValueError(f"baselines: {name!r} is unknown; {nearest(name, NAMES)}")
    flat = traverse_util.flatten_dict(variables, sep="/")
    scores = {}
    for group in _free(topology).groups:
        norms = _norms(group, flat)
        rank = np.argsort(np.argsort(norms, kind="stable"), kind="stable")
        scores[group.name] = (rank + 1) / group.size if name == "uniform" else norms / max(norms.mean(), 1e-30)
    return _select(topology, limits, scores)


def check(topology: Topology, limits: Limits) -> None:
    """Raises BudgetError where no baseline lands in the budget, whatever the weights are."""
    _select(topology, limits, {group.name: 1.0 + np.arange(group.size) for group in _free(topology).groups})


def _free(topology: Topology) -> Topology:
    """The topology in which no branch may go."""
    return topology.without({g.name: "baselines keep branches" for g in topology.groups if g.kind == "branches"})


def _select(topology: Topology, limits: Limits, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not scores:
        raise BudgetError("baselines: they drop no branches, and gates allow nothing else; leave --baselines empty")
    free = _free(topology)
    try:
        found = budget_lib.select(free, limits, free.flatten(scores), per_cost=False, rounds=1)
    except BudgetError as error:
        raise BudgetError(f"baselines: they drop no branches: {error}; or leave --baselines empty") from error
    return {group.name: found.get(group.name, np.ones(group.size, bool)) for group in topology.groups}


def _norms(group: Group, flat: dict[str, Any]) -> np.ndarray:
    """(size,) mean absolute weight of the kernel slices that make each unit, summed over the kernels."""
    norms = np.zeros(group.size)
    for member in group.members:
        leaf = np.asarray(flat[member.leaf])
        if member.units is None or member.consumes or leaf.ndim < 2 or not member.leaf.startswith("params/"):
            continue
        slices = np.abs(np.moveaxis(leaf, member.axis, 0)).reshape(leaf.shape[member.axis], -1).mean(1)
        owned = member.units >= 0
        np.add.at(norms, member.units[owned], slices[owned])
    return norms
