"""The landing: the final choice of units, made on the host with exact integer costs.

Units with g > 0 stay if together they are within the budget, so the student computes what the gated network does;
removed units return to fill the budget. If those units exceed the budget, units are chosen by importance per cost.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from kdsearch_jax.pruning.budgets import FLOOR, BudgetError, BudgetWarning, Limits, fewest_units
from kdsearch_jax.pruning.costs import groups_inside_branches
from kdsearch_jax.pruning.selection import Selection, choose
from kdsearch_jax.tracing.topology import Topology


def land(
    topology: Topology,
    limits: Limits,
    gates: np.ndarray,
    importance: np.ndarray,
    least: np.ndarray,
    *,
    fill: bool = False,
) -> Selection:
    """The units to keep after a search.

    Args:
      gates, importance: (units,) not negative.
      least: (groups,) units that must stay.
      fill: choose units by importance per cost, also among those with g > 0, if only that comes within 0.98 of the
        budget. The student then has to be trained further, because it is not the gated network.

    Returns:
      the selection, with a note if it costs less than 0.98 of the budget.

    Raises:
      BudgetError: no choice of units is within the budget.
    """
    chosen = choose(topology, limits, np.where(gates > 0, importance + 1e-30, 0.0), least)
    effective = effective_units(topology, gates)
    counts = [int(units.sum()) for units in topology.unflatten(effective).values()]
    widths = [
        fewest_units(limits.round_to, {group.name: max(count, int(fewest))}, group)
        for group, count, fewest in zip(topology.groups, counts, least, strict=True)
    ]
    worth = importance + np.where(effective, importance.max(initial=0.0) + 1.0, 0.0)
    try:
        preserving = choose(topology, limits, worth, widths)
    except BudgetError:  # the units with g > 0 exceed the budget
        return chosen
    if not preserving.note or not fill:
        return preserving
    better = min(chosen.pressure, FLOOR) > min(preserving.pressure, FLOOR)
    return chosen if better else replace(preserving, note=chosen.note, exact=chosen.exact)


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
