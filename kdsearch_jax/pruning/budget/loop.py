"""The closed loop: the λ2 that brings the cost to a target, called again and again with a falling target.

The proximal step with penalty λ2 α_j takes η λ2 α_j / (1 − μ) off gate j in each step once its momentum has built up,
so in `steps` steps gate j dies where λ2 ≥ g_j (1 − μ) / (steps η α_j). `level` therefore finds, by bisection over the
gates in the order in which they would die, the smallest λ2 that brings the pressure to a target. No one has to know λ2.
"""

from __future__ import annotations

import numpy as np

from kdsearch_jax.pruning.budget.limits import Limits
from kdsearch_jax.tracing.topology import Topology

RECALLED = 1000  # units looked at by one call of `recalled`; the next call goes on


def target(pressure: float, step: int, warmup: int, end: int) -> float:
    """The pressure asked for at `step`: `pressure` up to `warmup`, then in a straight line down to 1 at `end`."""
    share = np.clip((step - warmup) / max(end - warmup, 1), 0.0, 1.0)
    return float(pressure + (1.0 - pressure) * share)


def too_large(topology: Topology, limits: Limits, keep: np.ndarray) -> np.ndarray:
    """(units,) bool: the branches of `keep` with which so much would go that the cost fell below
    the floor of the limits.

    The search must not take the gate of such a branch to zero: the landing would keep the branch, dead.
    """
    result = np.zeros(topology.units, bool)
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    for group, unit in zip(topology.groups, starts, strict=False):
        if group.kind == "branches" and keep[unit] > 0:
            less = keep.astype(float)
            less[unit] = 0.0
            result[unit] = limits.pressure(topology, less) < limits.floor
    return result


def level(
    topology: Topology, limits: Limits, gates: np.ndarray, alpha: np.ndarray, rate: float, steps: int, goal: float
) -> float:
    """The smallest λ2 that brings the pressure to `goal` within `steps` proximal steps; 0 where it is there.

    Args:
      gates, alpha: (units,) g ≥ 0 and α ≥ 0. rate: η / (1 − μ).
    """
    alive = gates > 0
    if limits.pressure(topology, alive.astype(float)) <= goal:
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        critical = np.where(alive & (alpha > 0), gates / (steps * rate * alpha), np.inf)
    order = np.argsort(critical, kind="stable")
    order = order[np.isfinite(critical[order])]
    if not len(order):
        return 0.0

    def met(count: int) -> bool:
        keep = alive.astype(float)
        keep[order[:count]] = 0.0
        return limits.pressure(topology, keep) <= goal

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return float(critical[order[high - 1]])


def recalled(topology: Topology, limits: Limits, alive: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """(units,) bool: the dead units that may live again where more have died than had to; none elsewhere.

    The worthiest first, as few as bring the cost back to the floor; none that would bring it above the budget. All at
    once would undo the search: without a penalty the loss lifts every gate.

    worth: (units,) what a unit was worth per cost when it was alive; one that never was worth anything stays dead.
    """
    keep, found = alive.astype(float), np.zeros(topology.units, bool)
    order = np.argsort(-worth, kind="stable")
    order = order[(keep[order] == 0) & (worth[order] > 0)]
    pressure = limits.pressure(topology, keep)
    for unit in order[:RECALLED]:
        if pressure >= limits.floor:
            break
        keep[unit] = 1.0
        if (more := limits.pressure(topology, keep)) > 1.0:
            keep[unit] = 0.0
        else:
            pressure, found[unit] = more, True
    return found
