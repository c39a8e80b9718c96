"""The landing: which units are kept in the end, decided on the host in exact integers.

What is alive stays as long as it is within the budget: then the student computes what the gated network does. What room
is left goes to dead units, the most important first. Where the living cost more than the budget, the least important
per cost go.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from kdsearch_jax.pruning import budget as budget_lib
from kdsearch_jax.pruning.budget import FLOOR, BudgetWarning, Limits, Selection
from kdsearch_jax.pruning.budget.estimate import within
from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.topology import Topology

Keep = dict[str, np.ndarray]


def land(topology: Topology, limits: Limits, gates: np.ndarray, importance: np.ndarray, least: np.ndarray) -> Keep:
    """{group: (size,) bool}: the units to keep after a search.

    Args:
      gates, importance: (units,) ≥ 0; least: (groups,) units that must stay.

    Warns:
      BudgetWarning: the student costs less than 0.98 of the budget.

    Raises:
      BudgetError: no choice of units is within the budget.
    """
    matters = effective(topology, gates)
    own = _filled(topology, limits, matters, importance, least)
    chosen = choose(topology, limits, np.where(gates > 0, importance + 1e-30, 0.0), least)
    if own is None or topology.flatten(chosen.keep)[matters].all():
        _warn(chosen.note)
        return chosen.keep
    pressure = limits.pressure(topology, own.astype(float))
    if pressure < FLOOR:
        _warn(
            f"finish: the student costs {pressure:.3f} of the budget: what died last was larger than what was too much,"
            " and no dead unit fits into what is left"
        )
    return _named(topology, own)


def _warn(note: str) -> None:
    if note:
        warnings.warn(note, BudgetWarning, stacklevel=5)


def _named(topology: Topology, keep: np.ndarray) -> Keep:
    return {name: vector > 0 for name, vector in topology.unflatten(keep.astype(float)).items()}


def effective(topology: Topology, gates: np.ndarray) -> np.ndarray:
    """(units,) bool: the living that the output can depend on: not those inside of a dead residual branch."""
    alive = {name: vector > 0 for name, vector in topology.unflatten(np.asarray(gates)).items()}
    for branch, inside in within(topology).items():
        if not alive[branch].all():
            for name in inside:
                alive[name] = np.zeros_like(alive[name])
    return topology.flatten(alive).astype(bool)


def choose(
    topology: Topology, limits: Limits, worth: np.ndarray, least: np.ndarray, *, per_cost: bool = True
) -> Selection:
    """The worthiest units that land in [0.98, 1] of the budget, or nearest below; `least` of each group stay.

    per_cost: ranked by worth over what a unit costs, or by worth alone.

    Raises:
      BudgetError: even the smallest student costs more.
    """
    pinned = np.zeros(topology.units, bool)
    for (units, count), group in zip(_groups(topology, least), topology.groups, strict=True):
        step = 0 if group.kind == "branches" else budget_lib.multiple(limits.round_to, group)  # these stay in any case
        pinned[units[np.argsort(-worth[units], kind="stable")[: max(count - step, 0)]]] = True
    free, bounds = _without(topology, limits, pinned)
    found = budget_lib.choose(free, bounds, worth[~pinned], per_cost=per_cost, rounds=20 if per_cost else 1)
    keep = pinned.copy()
    keep[~pinned] = free.flatten(found.keep)
    return replace(found, keep=_named(topology, keep))


def select(topology: Topology, limits: Limits, worth: np.ndarray, least: np.ndarray, *, per_cost: bool = True) -> Keep:
    """{group: (size,) bool} of `choose`, with a `BudgetWarning` where that costs less than 0.98 of the budget."""
    found = choose(topology, limits, worth, least, per_cost=per_cost)
    _warn(found.note)
    return found.keep


def _without(topology: Topology, limits: Limits, pinned: np.ndarray) -> tuple[Topology, Limits]:
    """The topology and its limits without the pinned units, which are kept for good."""
    if not pinned.any():
        return topology, limits
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    sizes = [int((~pinned[a:b]).sum()) for a, b in itertools.pairwise(starts)]
    groups = tuple(replace(g, size=size) for g, size in zip(topology.groups, sizes, strict=True) if size)
    macs, params = (_kept(cost, pinned) for cost in (topology.macs, topology.params))
    measured = tuple((_pinned(cost, topology, pinned), bound) for cost, bound in limits.measured)
    return replace(topology, groups=groups, macs=macs, params=params), replace(limits, measured=measured)  # type: ignore


def _kept(cost: Cost, pinned: np.ndarray) -> Cost:
    """The cost as a function of the other units."""
    number = np.append(np.where(pinned, -1, np.cumsum(~pinned) - 1), -1)
    base = cost.base + np.asarray(cost.counts[:, pinned].sum(1)).ravel()
    return replace(cost, alive=number[cost.alive], base=base, counts=cost.counts[:, ~pinned].tocsr())


def _pinned(cost: Any, topology: Topology, pinned: np.ndarray) -> Any:
    """A measured cost as a function of the units that are not pinned."""
    return _Modelled(cost, topology, pinned) if hasattr(cost, "polynomial") else _Pinned(cost, topology, pinned)


class _Pinned:
    """See `_pinned`."""

    def __init__(self, cost: Any, topology: Topology, pinned: np.ndarray):
        self.cost, self.topology, self.pinned, self.name = cost, topology, pinned, cost.name

    def total(self, _: Topology, keep: np.ndarray) -> float:
        """The cost of keeping (free units,)."""
        return self.cost.total(self.topology, self._whole(keep))

    def marginal(self, _: Topology, keep: np.ndarray) -> np.ndarray:
        """(free units,) what one more adds."""
        return self.cost.marginal(self.topology, self._whole(keep))[~self.pinned]

    def _whole(self, keep: np.ndarray) -> np.ndarray:
        whole = np.ones(len(self.pinned))
        whole[~self.pinned] = keep
        return whole


class _Modelled(_Pinned):
    """One that is a polynomial."""

    def polynomial(self, _: Topology) -> tuple[float, tuple[tuple[float, Cost], ...]]:
        """As `Estimate.polynomial`."""
        offset, costs = self.cost.polynomial(self.topology)
        return offset, tuple((scale, _kept(cost, self.pinned)) for scale, cost in costs)


def _filled(
    topology: Topology, limits: Limits, alive: np.ndarray, importance: np.ndarray, least: np.ndarray
) -> np.ndarray | None:
    """(units,) bool: the living in whole multiples, and dead units that fit besides; None where these are too many."""
    keep = alive.copy()
    ranks = []
    for (units, count), group in zip(_groups(topology, least), topology.groups, strict=True):
        order = units[np.lexsort((-importance[units], ~alive[units]))]
        step = 1 if group.kind == "branches" else budget_lib.multiple(limits.round_to, group)
        wanted = max(int(alive[units].sum()), int(count))
        width = min(-(-wanted // step) * step, group.size)
        keep[order[:width]] = True
        pieces = [order[i : i + step] for i in range(width, group.size, step)]
        ranks += [(float(importance[piece].sum()), i, piece) for i, piece in enumerate(pieces)]
    if limits.pressure(topology, keep.astype(float)) > 1.0:
        return None
    blocked: set[int] = set()
    owner = np.repeat(np.arange(len(topology.groups)), [group.size for group in topology.groups])
    for _, _, piece in sorted(ranks, key=lambda rank: (-rank[0], rank[1])):
        group = int(owner[piece[0]])
        if group in blocked:  # of a group, pieces go back in their order
            continue
        keep[piece] = True
        if limits.pressure(topology, keep.astype(float)) > 1.0:
            keep[piece] = False
            blocked.add(group)
    return keep


def _groups(topology: Topology, least: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """(numbers of its units, how many must stay) of each group."""
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    return [(np.arange(a, b), int(n)) for a, b, n in zip(starts, starts[1:], least, strict=False)]
