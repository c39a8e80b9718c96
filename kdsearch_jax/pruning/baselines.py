"""Baselines to compare a search with: students whose units are chosen from the teacher by a simple rule.

- `uniform`: the same share of every layer; in each layer, the units of the largest L1 norm.
- `magnitude`: the units of the largest L1 norm over all layers, relative to the mean of their layer.
- `bn_scale`: the units of the largest |scale| in the BatchNorm after them, over all layers: the criterion of Network
  Slimming (Liu et al. 2017) without its training. Layers without BatchNorm stay whole.
- `random`: random units of all layers.
- `layers`: removes whole residual branches, evenly over the depth.
- `both`: half of the reduction, on a log scale, by removing branches as `layers` does; the rest as `uniform`.

The L1 norm is that of the kernel slices that produce a unit (Li et al., Pruning Filters for Efficient ConvNets, 2017).
All but `layers` land in the budget as the searched student does, or at the closest cost below; `layers` takes the even
choice that ends closest. The first four keep all branches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kdsearch_jax.pruning.budgets import FLOOR, BudgetError, Limits
from kdsearch_jax.pruning.criteria import batch_norm_scales, producer_norms, random_scores, relative_norms
from kdsearch_jax.pruning.selection import Selection, choose
from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.messages import format_distinct, nearest
from kdsearch_jax.tracing.topology import Topology

Keep = dict[str, np.ndarray]  # {group: (size,) bool}
Baseline = Callable[[Topology, Any, Limits, np.random.Generator], Keep]  # (topology, variables, limits, rng) → keep


def select(
    name: str, variables: Any, topology: Topology, limits: Limits, rng: np.random.Generator | None = None
) -> Keep:
    """{group: (size,) bool} that the named baseline keeps within the limits; rng: for `random`.

    Raises:
      ValueError: there is no baseline of this name.
      BudgetError: none of its students is within the budget.
    """
    if name not in BASELINES:
        raise ValueError(f"baselines: {name!r} is unknown; {nearest(name, BASELINES)}")
    return BASELINES[name](topology, variables, limits, rng or np.random.default_rng(0))


def note(name: str, topology: Topology, limits: Limits, keep: Mapping[str, np.ndarray]) -> str:
    """A warning about a baseline that costs less than the budget; empty if it is close enough."""
    pressure = limits.pressure(topology, topology.flatten(keep).astype(float))
    if pressure >= FLOOR:
        return ""
    cost = format_distinct(pressure, FLOOR)[0]
    return f"baselines: {name} costs {cost} of the budget, which is the closest this rule allows"


def check(topology: Topology, limits: Limits) -> None:
    """Raises BudgetError if baselines that keep all branches have no student within the budget."""
    _select(topology, limits, {group.name: 1.0 + np.arange(group.size) for group in _without_branches(topology).groups})


# --- units ----------------------------------------------------------------------------------------------------------


def uniform(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """The same share of every layer, the largest L1 norms in each."""
    return _select(topology, limits, _ranks(topology, variables))


def magnitude(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """The largest L1 norms over all layers, relative to the mean of their layer."""
    return _select(topology, limits, relative_norms(topology, variables))


def bn_scale(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """The largest |BatchNorm scale| over all layers that have one."""
    scores = batch_norm_scales(topology, variables)
    if not scores:
        raise BudgetError("baselines: bn_scale is not possible, no prunable unit is followed by a BatchNorm")
    unscored = [group.name for group in _without_branches(topology).groups if group.name not in scores]
    scored = topology.without(dict.fromkeys(unscored, "no BatchNorm follows"))
    return _complete(topology, _select(scored, limits, scores))


def random(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """Random units of all layers."""
    return _select(topology, limits, random_scores(topology, rng))


# --- residual branches ----------------------------------------------------------------------------------------------


def layers(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """Removes as few branches as the budget allows, evenly over the depth; of such choices the costliest within it."""
    pressures = [(limits.pressure(topology, _flat_without(topology, gone)), gone) for gone in _even_removals(topology)]
    within = [(pressure, gone) for pressure, gone in pressures if pressure <= 1.0]
    if not within:
        cost = format_distinct(min(pressure for pressure, _ in pressures), 1.0, digits=2)[0]
        raise BudgetError(f"baselines: without any residual branch the network still costs {cost} of the budget")
    fewest = min(len(gone) for _, gone in within)
    _, gone = max((pressure, gone) for pressure, gone in within if len(gone) == fewest)
    return {name: vector > 0 for name, vector in topology.unflatten(_flat_without(topology, gone)).items()}


def both(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """Removes branches for half of the reduction on a log scale, or as close as possible; then `uniform`."""
    half = 0.5 * np.log(limits.pressure(topology, np.ones(topology.units)))
    distances = [
        (abs(np.log(limits.pressure(topology, _flat_without(topology, gone))) - half), gone)
        for gone in _even_removals(topology)
    ]
    below: list[tuple[float, Keep]] = []
    for _, gone in sorted(distances):  # the closest choice whose widths land in the budget, or else the costliest
        remaining = _without_branches(_with_removed(topology, gone))
        with contextlib.suppress(BudgetError):
            selection = _choose(remaining, limits, _ranks(remaining, variables))
            keep = _complete(topology, selection.keep, gone)
            if selection.landed:
                return keep
            below.append((selection.pressure, keep))
    if below:
        return max(below, key=lambda student: student[0])[1]
    raise BudgetError("baselines: whichever branches are removed, no widths of the other layers meet the budget")


def _even_removals(topology: Topology) -> list[tuple[str, ...]]:
    """Names of branches to remove: for every number of them, all choices that are even over the depth."""
    names = [group.name for group in topology.groups if group.kind == "branches"]
    if not names:
        raise BudgetError("baselines: no residual branch may be removed; the network or gates.kinds has none")
    return [tuple(names[i] for i in places) for count in range(1, len(names) + 1) for places in even(len(names), count)]


def even(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """The choices of `count` of `total` places whose distances differ by one at most, the most central one first."""
    seen = set()
    for shift in sorted(range(total), key=lambda shift: abs(shift - (total - 1) / 2)):
        places = tuple((i * total + shift) // count for i in range(count))
        if places[-1] < total and places not in seen:
            seen.add(places)
            yield places


def _flat_without(topology: Topology, gone: tuple[str, ...]) -> np.ndarray:
    """The flat keep of the network without these branches."""
    return topology.flatten({g.name: np.full(g.size, g.name not in gone) for g in topology.groups}).astype(float)


def _with_removed(topology: Topology, gone: tuple[str, ...]) -> Topology:
    """The topology of the network without these branches."""
    numbers = np.flatnonzero(_flat_without(topology, gone) == 0)

    def reduced(cost: Cost) -> Cost:
        return replace(cost, constants=np.where(np.isin(cost.alive, numbers).any(1), 0.0, cost.constants))

    topology = replace(topology, macs=reduced(topology.macs), params=reduced(topology.params))
    return topology.without(dict.fromkeys(gone, "removed"))


# --- selection ------------------------------------------------------------------------------------------------------


def _without_branches(topology: Topology) -> Topology:
    """The topology with all branches frozen."""
    return topology.without({g.name: "baselines keep branches" for g in topology.groups if g.kind == "branches"})


def _select(topology: Topology, limits: Limits, scores: Mapping[str, np.ndarray]) -> Keep:
    if not scores:
        raise BudgetError("baselines: they keep branches, and gates allow nothing else; leave --baselines empty")
    try:
        return _complete(topology, _choose(_without_branches(topology), limits, scores).keep)
    except BudgetError as error:
        raise BudgetError(f"baselines: they keep branches: {error}; or leave --baselines empty") from error


def _choose(topology: Topology, limits: Limits, scores: Mapping[str, np.ndarray]) -> Selection:
    """The units of the highest scores over all groups."""
    if not scores:
        raise BudgetError("baselines: nothing but branches may be removed")
    return choose(topology, limits, topology.flatten(scores), per_cost=False)


def _complete(topology: Topology, keep: Mapping[str, np.ndarray], gone: tuple[str, ...] = ()) -> Keep:
    """`keep` for all groups of the topology: other groups stay whole, except for the branches in `gone`."""
    rest = {group.name: np.full(group.size, group.name not in gone) for group in topology.groups}
    return {name: keep.get(name, whole) for name, whole in rest.items()}


def _ranks(topology: Topology, variables: Any) -> dict[str, np.ndarray]:
    """{group: (size,) rank by L1 norm as a share of the group}."""
    ranks = {}
    for name, norms in producer_norms(topology, variables).items():
        rank = np.argsort(np.argsort(norms, kind="stable"), kind="stable")
        ranks[name] = (rank + 1) / len(norms)
    return ranks


BASELINES: dict[str, Baseline] = {
    "uniform": uniform,
    "magnitude": magnitude,
    "bn_scale": bn_scale,
    "random": random,
    "layers": layers,
    "both": both,
}
