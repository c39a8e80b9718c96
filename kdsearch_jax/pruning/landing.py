"""The landing: the final choice of units, made on the host with exact integer costs.

Units with g > 0 stay if together they are within the budget, so the student computes what the gated network does;
removed units return to fill the budget. If those units exceed the budget, or the budget cannot be filled with all of
them, units are chosen anew, and the least important per cost go first.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from kdsearch_jax.pruning.budgets import FLOOR, BudgetWarning, Limits, width_multiple
from kdsearch_jax.pruning.costs import groups_inside_branches
from kdsearch_jax.pruning.selection import Selection, choose
from kdsearch_jax.tracing.topology import Group, Topology


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
    step = 1 if group.kind == "branches" else width_multiple(limits.round_to, group)
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


def effective_units(topology: Topology, gates: np.ndarray) -> np.ndarray:
    """(units,) bool: units with g > 0 that are not inside a removed residual branch."""
    alive = {name: vector > 0 for name, vector in topology.unflatten(np.asarray(gates)).items()}
    for branch, inside in groups_inside_branches(topology).items():
        if not alive[branch].all():
            for name in inside:
                alive[name] = np.zeros_like(alive[name])
    return topology.flatten(alive).astype(bool)


def _groups(topology: Topology, least: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """(indices of its units, how many must stay) of each group."""
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    return [(np.arange(a, b), int(n)) for a, b, n in zip(starts, starts[1:], least, strict=False)]
