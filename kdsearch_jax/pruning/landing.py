"""The landing: which units are kept in the end, decided on the host in exact integers.

What is alive stays as long as it is within the budget: then the student computes what the gated network does. What room
is left goes to dead units, the most important first. Where the living cost more than the budget, the least important
per cost go.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from kdsearch_jax import budget as budget_lib
from kdsearch_jax.budget import FLOOR, BudgetError, Limits
from kdsearch_jax.budget.estimate import within
from kdsearch_jax.tracing.topology import Topology

Keep = dict[str, np.ndarray]


def land(topology: Topology, limits: Limits, gates: np.ndarray, importance: np.ndarray, least: np.ndarray) -> Keep:
    """{group: (size,) bool}: the units to keep after a search.

    Args:
      gates, importance: (units,) ≥ 0; least: (groups,) units that must stay.

    Warns:
      UserWarning: the living alone cost less than 0.98 of the budget, and no dead unit fits into what is left.

    Raises:
      BudgetError: no choice of units is within the budget.
    """
    matters = effective(topology, gates)
    own = _filled(topology, limits, matters, importance, least)
    failed = None
    try:
        exact = select(topology, limits, np.where(gates > 0, importance + 1e-30, 0.0), least)
        if own is None or (topology.flatten(exact)[matters]).all():
            return exact
    except BudgetError as error:
        failed = error
    if own is None:
        assert failed is not None
        raise failed
    pressure = limits.pressure(topology, own.astype(float))
    if pressure < FLOOR:
        warnings.warn(
            f"finish: the student costs {pressure:.3f} of the budget: what died last was larger than what was too much,"
            " and nothing that fits is left to take back",
            stacklevel=4,
        )
    return {name: vector > 0 for name, vector in topology.unflatten(own.astype(float)).items()}


def effective(topology: Topology, gates: np.ndarray) -> np.ndarray:
    """(units,) bool: the living that the output can depend on: not those inside of a dead residual branch."""
    alive = {name: vector > 0 for name, vector in topology.unflatten(np.asarray(gates)).items()}
    for branch, inside in within(topology).items():
        if not alive[branch].all():
            for name in inside:
                alive[name] = np.zeros_like(alive[name])
    return topology.flatten(alive).astype(bool)


def select(topology: Topology, limits: Limits, worth: np.ndarray, least: np.ndarray, *, per_cost: bool = True) -> Keep:
    """{group: (size,) bool}: the worthiest units that land in [0.98, 1] of the budget; `least` of each group stay.

    per_cost: ranked by worth over what a unit costs, or by worth alone.

    Raises:
      BudgetError: no choice was found that lands there.
    """
    worth = np.array(worth, float)
    for units, count in _groups(topology, least):
        # Gone last of all: the smallest student is within the limits, so these never have to go.
        worth[units[np.argsort(-worth[units], kind="stable")[:count]]] = 1e30
    keep = budget_lib.select(topology, limits, worth, per_cost=per_cost, rounds=20 if per_cost else 1)
    for group, count in zip(topology.groups, least, strict=True):
        if keep[group.name].sum() < count:
            raise BudgetError(f"budget: no choice that leaves {count} units of {group.name} was found; relax its rule")
    return keep


def _filled(
    topology: Topology, limits: Limits, alive: np.ndarray, importance: np.ndarray, least: np.ndarray
) -> np.ndarray | None:
    """(units,) bool: the living, whole multiples of them, and dead units that fit besides; None where they are too many."""
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
