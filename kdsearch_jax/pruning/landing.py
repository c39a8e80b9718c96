"""The landing: which units are kept in the end, decided on the host in exact integers.

What is alive stays as long as it is within the budget: then the student computes what the gated network does. What room
is left goes to dead units, the most important first. Where the living cost more than the budget, the least important
per cost go.
"""

from __future__ import annotations

import warnings

import numpy as np

from kdsearch_jax.pruning.budgets import FLOOR, BudgetWarning, Limits, width_multiple
from kdsearch_jax.pruning.costs import groups_inside_branches
from kdsearch_jax.pruning.selection import choose
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
    for branch, inside in groups_inside_branches(topology).items():
        if not alive[branch].all():
            for name in inside:
                alive[name] = np.zeros_like(alive[name])
    return topology.flatten(alive).astype(bool)


def _filled(
    topology: Topology, limits: Limits, alive: np.ndarray, importance: np.ndarray, least: np.ndarray
) -> np.ndarray | None:
    """(units,) bool: the living in whole multiples, and dead units that fit besides; None where these are too many."""
    keep = alive.copy()
    ranks = []
    for (units, count), group in zip(_groups(topology, least), topology.groups, strict=True):
        order = units[np.lexsort((-importance[units], ~alive[units]))]
        step = 1 if group.kind == "branches" else width_multiple(limits.round_to, group)
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
