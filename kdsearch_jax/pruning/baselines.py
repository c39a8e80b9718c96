"""Students made by hand, to compare with: which units of the teacher they keep.

- `uniform`: the same share of every layer; in each, the units of largest L1 norm.
- `magnitude`: the units of largest L1 norm over all layers, each layer's norms divided by their mean.
- `bn_scale`: the units of largest |scale| in the BatchNorm that follows them, over all layers: the criterion of Network
  Slimming (Liu et al. 2017), without its training. Layers without BatchNorm stay whole.
- `random`: units drawn at random over all layers.
- `layers`: whole residual branches, left out evenly over the depth.
- `both`: half of the reduction, on a log scale, by leaving out branches as `layers` does; the rest as `uniform`.

The L1 norm is that of the kernel slices that make a unit (Li et al., Pruning Filters for Efficient ConvNets, 2017).
Each is a rule (topology, variables, limits, rng) → keep. All but `layers` land in the budget as the searched student
does, or at the nearest cost below; `layers` takes the even choice that ends nearest. The first four drop no branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flax import traverse_util

from kdsearch_jax.pruning import budget as budget_lib
from kdsearch_jax.pruning.budget import FLOOR, BudgetError, Limits, Selection
from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.messages import format_distinct, nearest
from kdsearch_jax.tracing.topology import Group, Topology

Keep = dict[str, np.ndarray]  # {group: (size,) bool}
Rule = Callable[[Topology, Any, Limits, np.random.Generator], Keep]


def keep(name: str, variables: Any, topology: Topology, limits: Limits, rng: np.random.Generator | None = None) -> Keep:
    """{group: (size,) bool} of the named rule, within the limits; rng: for rules that draw.

    Raises:
      ValueError: for an unknown name. BudgetError: where no choice of the rule fits the budget.
    """
    if name not in RULES:
        raise ValueError(f"baselines: {name!r} is unknown; {nearest(name, NAMES)}")
    return RULES[name](topology, variables, limits, rng or np.random.default_rng(0))


def note(name: str, topology: Topology, limits: Limits, kept: Mapping[str, np.ndarray]) -> str:
    """What is to be said of a student that costs less than the budget; empty where it is near enough."""
    pressure = limits.pressure(topology, topology.flatten(kept).astype(float))
    if pressure >= FLOOR:
        return ""
    cost = format_distinct(pressure, FLOOR)[0]
    return f"baselines: the student {name} costs {cost} of the budget; none by this rule is nearer"


def check(topology: Topology, limits: Limits) -> None:
    """Raises BudgetError where rules that keep branches have no student within the budget, whatever the weights."""
    _select(topology, limits, {group.name: 1.0 + np.arange(group.size) for group in _free(topology).groups})


# --- channels -------------------------------------------------------------------------------------------------------


def uniform(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """The same share of every layer, the largest L1 norms in each."""
    return _select(topology, limits, _shares(topology, variables))


def magnitude(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """The largest L1 norms over all layers, relative to their layer's mean."""
    return _select(topology, limits, relative_norms(topology, variables))


def bn_scale(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """The largest |BatchNorm scale| over all layers that have one."""
    scores = batch_norm_scales(topology, variables)
    if not scores:
        raise BudgetError("no unit that may go is followed by a BatchNorm, by whose scale it could be chosen")
    rest = {g.name: "no BatchNorm follows" for g in _free(topology).groups if g.name not in scores}
    return _whole(topology, _select(topology.without(rest), limits, scores))


def random(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """Units drawn at random over all layers."""
    return _select(topology, limits, {group.name: 1.0 + rng.random(group.size) for group in _free(topology).groups})


# --- layers ---------------------------------------------------------------------------------------------------------


def layers(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """As few branches left out as meet the budget, evenly over the depth; nearest below it among such choices."""
    pressures = [(limits.pressure(topology, _without(topology, gone)), gone) for gone in _spread(topology)]
    within = [(pressure, gone) for pressure, gone in pressures if pressure <= 1.0]
    if not within:
        least = min(pressure for pressure, _ in pressures)
        cost = format_distinct(least, 1.0, digits=2)[0]
        raise BudgetError(f"without any of its residual branches the network still costs {cost} of the budget")
    fewest = min(len(gone) for _, gone in within)
    _, gone = max((pressure, gone) for pressure, gone in within if len(gone) == fewest)
    return _bools(topology, _without(topology, gone))


def both(topology: Topology, variables: Any, limits: Limits, rng: np.random.Generator) -> Keep:
    """Branches left out for half of the reduction on a log scale, as near as they allow; then `uniform`."""
    half = 0.5 * np.log(limits.pressure(topology, np.ones(topology.units)))
    off = [
        (abs(np.log(limits.pressure(topology, _without(topology, gone))) - half), gone) for gone in _spread(topology)
    ]
    below: list[tuple[float, Keep]] = []
    for _, gone in sorted(off):  # the nearest choice from which widths lead into the budget, or else the costliest
        free = _free(_gone(topology, gone))
        with contextlib.suppress(BudgetError):
            found = _landed(free, limits, _shares(free, variables))
            whole = _whole(topology, found.keep, gone)
            if found.landed:
                return whole
            below.append((found.pressure, whole))
    if below:
        return max(below, key=lambda each: each[0])[1]
    raise BudgetError("whichever branches are left out, evenly over the depth, no widths of the rest meet the budget")


def _spread(topology: Topology) -> list[tuple[str, ...]]:
    """Names of branches to leave out: every number of them, evenly over the depth, from each possible place on."""
    names = [group.name for group in topology.groups if group.kind == "branches"]
    if not names:
        raise BudgetError("no residual branch may go: the network has none, or gates.kinds leaves them out")
    return [tuple(names[i] for i in places) for count in range(1, len(names) + 1) for places in even(len(names), count)]


def even(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """The ways to choose `count` of `total` places with distances that differ by one at most; the middle one first."""
    seen = set()
    for shift in sorted(range(total), key=lambda shift: abs(shift - (total - 1) / 2)):
        places = tuple((i * total + shift) // count for i in range(count))
        if places[-1] < total and places not in seen:
            seen.add(places)
            yield places


def _without(topology: Topology, gone: tuple[str, ...]) -> np.ndarray:
    """The flat keep of the network without these branches."""
    return topology.flatten({g.name: np.full(g.size, g.name not in gone) for g in topology.groups}).astype(float)


def _bools(topology: Topology, flat: np.ndarray) -> Keep:
    return {name: vector > 0 for name, vector in topology.unflatten(flat).items()}


def _gone(topology: Topology, gone: tuple[str, ...]) -> Topology:
    """The topology in which these branches are left out for good."""
    numbers = np.flatnonzero(_without(topology, gone) == 0)

    def reduced(cost: Cost) -> Cost:
        return replace(cost, constants=np.where(np.isin(cost.alive, numbers).any(1), 0.0, cost.constants))

    less = replace(topology, macs=reduced(topology.macs), params=reduced(topology.params))
    return less.without(dict.fromkeys(gone, "left out"))


# --- scores ---------------------------------------------------------------------------------------------------------


def relative_norms(topology: Topology, variables: Any) -> dict[str, np.ndarray]:
    """{group: (size,) L1 norms of the kernel slices that make its units, over their mean}; branches have none."""
    norms = {group.name: _norms(group, _flat(variables)) for group in _free(topology).groups}
    return {name: each / max(each.mean(), 1e-30) for name, each in norms.items()}


def batch_norm_scales(topology: Topology, variables: Any) -> dict[str, np.ndarray]:
    """{group: (size,) mean |scale| in the BatchNorms behind its units}, for groups that have one."""
    found = {group.name: _scales(group, _flat(variables)) for group in _free(topology).groups}
    return {name: scales for name, scales in found.items() if scales is not None}


# --- shared ---------------------------------------------------------------------------------------------------------


def _free(topology: Topology) -> Topology:
    """The topology in which no branch may go."""
    return topology.without({g.name: "baselines keep branches" for g in topology.groups if g.kind == "branches"})


def _select(topology: Topology, limits: Limits, scores: Mapping[str, np.ndarray]) -> Keep:
    if not scores:
        raise BudgetError("baselines: they drop no branches, and gates allow nothing else; leave --baselines empty")
    try:
        return _whole(topology, _landed(_free(topology), limits, scores).keep)
    except BudgetError as error:
        raise BudgetError(f"baselines: they drop no branches: {error}; or leave --baselines empty") from error


def _landed(free: Topology, limits: Limits, scores: Mapping[str, np.ndarray]) -> Selection:
    """The units of highest score, over all groups, that the budget has room for."""
    if not scores:
        raise BudgetError("there is nothing but branches that may go")
    return budget_lib.choose(free, limits, free.flatten(scores), per_cost=False, rounds=1)


def _whole(topology: Topology, found: Mapping[str, np.ndarray], gone: tuple[str, ...] = ()) -> Keep:
    """What was found, for all groups of the topology: the others stay whole, but for the branches in `gone`."""
    rest = {group.name: np.full(group.size, group.name not in gone) for group in topology.groups}
    return {name: found.get(name, stays) for name, stays in rest.items()}


def _flat(variables: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(variables, sep="/")


def _shares(topology: Topology, variables: Any) -> dict[str, np.ndarray]:
    """{group: (size,) rank by L1 norm as a share of the group}."""
    flat, shares = _flat(variables), {}
    for group in _free(topology).groups:
        rank = np.argsort(np.argsort(_norms(group, flat), kind="stable"), kind="stable")
        shares[group.name] = (rank + 1) / group.size
    return shares


def _norms(group: Group, flat: Mapping[str, Any]) -> np.ndarray:
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


def _scales(group: Group, flat: Mapping[str, Any]) -> np.ndarray | None:
    """(size,) mean |scale| of each unit in the normalisations over the batch; None where there is none."""
    total, count = np.zeros(group.size), np.zeros(group.size)
    for member in group.members:
        layer, _, last = member.leaf.removeprefix("params/").rpartition("/")
        own = member.leaf.startswith("params/") and last == "scale"
        if not own or member.units is None or not any(name.endswith(f"/{layer}/mean") for name in flat):
            continue
        owned = member.units >= 0
        np.add.at(total, member.units[owned], np.abs(np.asarray(flat[member.leaf]))[owned])
        np.add.at(count, member.units[owned], 1)
    return total / count if (count > 0).all() else None


RULES: dict[str, Rule] = {
    "uniform": uniform,
    "magnitude": magnitude,
    "bn_scale": bn_scale,
    "random": random,
    "layers": layers,
    "both": both,
}
NAMES = tuple(RULES)
