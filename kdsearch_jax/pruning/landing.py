"""The landing: the final choice of units, made on the host with exact integer costs.

Units with g > 0 stay if together they are within the budget, so the student computes what the gated network does;
removed units return to fill the budget. If those units exceed the budget, or the budget cannot be filled with all of
them, units are chosen anew, and the least important per cost go first.
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
from kdsearch_jax.tracing.topology import Cost, Group, Topology

Keep = dict[str, np.ndarray]


def land(topology: Topology, limits: Limits, gates: np.ndarray, importance: np.ndarray, least: np.ndarray) -> Selection:
    """The units to keep after a search.

    Args:
      gates, importance: (units,) not negative.
      least: (groups,) units that must stay.

    Returns:
      the selection, with a note if it costs less than 0.98 of the budget.

    Raises:
      BudgetError: no choice of units is within the budget.
    """
    chosen = choose(topology, limits, np.where(gates > 0, importance + 1e-30, 0.0), least)
    open_units = effective_units(topology, gates)
    widths = np.array(
        [
            _width(limits, group, int(open_units[units].sum()), count)
            for (units, count), group in zip(_groups(topology, least), topology.groups, strict=True)
        ]
    )
    worth = importance + np.where(open_units, importance.max(initial=0.0) + 1.0, 0.0)
    if limits.pressure(topology, _largest(topology, worth, widths)) > 1.0:
        return chosen
    preserving = choose(topology, limits, worth, widths)
    if not preserving.note:
        return preserving
    better = min(chosen.pressure, FLOOR) > min(preserving.pressure, FLOOR)
    return chosen if better else replace(preserving, note=chosen.note, exact=chosen.exact)


def _width(limits: Limits, group: Group, units: int, least: int) -> int:
    """The smallest permitted width of a group that holds so many units."""
    step = 1 if group.kind == "branches" else budget_lib.multiple(limits.round_to, group)
    return min(-(-max(units, least) // step) * step, group.size)


def _largest(topology: Topology, worth: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(units,) 1.0 for the most important units of each group, so many as its width; 0.0 elsewhere."""
    keep = np.zeros(topology.units)
    for units, width in _groups(topology, widths):
        keep[units[np.argsort(-worth[units], kind="stable")[:width]]] = 1.0
    return keep


def warn_of(selection: Selection, stacklevel: int = 2) -> None:
    """Emits the selection's note as a `BudgetWarning`; stacklevel: that of the caller's caller is 2."""
    if selection.note:
        warnings.warn(selection.note, BudgetWarning, stacklevel=stacklevel + 1)


def _named(topology: Topology, keep: np.ndarray) -> Keep:
    return {name: vector > 0 for name, vector in topology.unflatten(keep.astype(float)).items()}


def effective_units(topology: Topology, gates: np.ndarray) -> np.ndarray:
    """(units,) bool: units with g > 0 that are not inside a removed residual branch."""
    alive = {name: vector > 0 for name, vector in topology.unflatten(np.asarray(gates)).items()}
    for branch, inside in within(topology).items():
        if not alive[branch].all():
            for name in inside:
                alive[name] = np.zeros_like(alive[name])
    return topology.flatten(alive).astype(bool)


def choose(
    topology: Topology, limits: Limits, worth: np.ndarray, least: np.ndarray, *, per_cost: bool = True
) -> Selection:
    """The most important units that cost [0.98, 1] of the budget, or the nearest below; `least` of each group stay.

    Args:
      worth: (units,) importance, not negative.
      per_cost: rank by importance per cost, or by importance alone.

    Raises:
      BudgetError: even the smallest student costs more.
    """
    pinned = np.zeros(topology.units, bool)
    for (units, count), group in zip(_groups(topology, least), topology.groups, strict=True):
        step = 0 if group.kind == "branches" else budget_lib.multiple(limits.round_to, group)  # stays in any case
        pinned[units[np.argsort(-worth[units], kind="stable")[: max(count - step, 0)]]] = True
    free, bounds = _without(topology, limits, pinned)
    found = budget_lib.choose(free, bounds, worth[~pinned], per_cost=per_cost, rounds=20 if per_cost else 1)
    keep = pinned.copy()
    keep[~pinned] = free.flatten(found.keep)
    return replace(found, keep=_named(topology, keep))


def _without(topology: Topology, limits: Limits, pinned: np.ndarray) -> tuple[Topology, Limits]:
    """The topology and its limits as functions of the units that are not pinned; pinned units are kept."""
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
    return _PinnedPolynomial(cost, topology, pinned) if hasattr(cost, "polynomial") else _Pinned(cost, topology, pinned)


class _Pinned:
    """A measured cost whose pinned units are kept."""

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


class _PinnedPolynomial(_Pinned):
    """A measured cost that is a polynomial, whose pinned units are kept."""

    def polynomial(self, _: Topology) -> tuple[float, tuple[tuple[float, Cost], ...]]:
        """As `Estimate.polynomial`."""
        offset, costs = self.cost.polynomial(self.topology)
        return offset, tuple((scale, _kept(cost, self.pinned)) for scale, cost in costs)


def _groups(topology: Topology, least: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """(indices of its units, how many must stay) of each group."""
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    return [(np.arange(a, b), int(n)) for a, b, n in zip(starts, starts[1:], least, strict=False)]
