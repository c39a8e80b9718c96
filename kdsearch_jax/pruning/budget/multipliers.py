"""Several bounds at once: what a unit costs when each bound has its own weight.

Keeping the most important units under several bounds is a knapsack. Its Lagrangian keeps unit j where I_j > Σ_b λ_b
c_bj: so with the right μ = λ / Σλ, removing units in the order of I_j / Σ_b μ_b c_bj brings every bound that binds to
its limit in the same moment, and a bound that does not bind has μ_b = 0. Equal weights leave one of them slack.

With two bounds, more weight on one lowers its cost and raises the other's: bisection. With more, weights follow the
pressures (an exponentiated subgradient), and the μ of the smallest gap Σ_b μ_b (1 − pressure_b) is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from kdsearch_jax.pruning.budget.limits import Limits, multiple
from kdsearch_jax.tracing.topology import Topology

BISECTIONS, TURNS = 10, 30  # with two bounds; with more


def cost_of(
    topology: Topology, limits: Limits, keep: np.ndarray, importance: np.ndarray, goal: float = 1.0
) -> np.ndarray:
    """(units,) what one more unit costs, in shares of the budget: Σ_b μ_b c_bj.

    Importances change on the way, and what is gone stays gone: weights that are right for the whole way may overshoot
    one bound before the other is met. With a `goal` above 1, the pressure asked for next, they are those for the next
    stretch, in which each bound goes the same share of what is left of its way.
    """
    pressures = limits.pressures(topology, keep)
    if len(limits.names) > 1 and goal > 1.0 and pressures.max() > goal:
        share = (pressures.max() - goal) / (pressures.max() - 1.0)
        limits = limits.times(np.maximum(pressures - share * (pressures - 1.0), 1.0))
    return multipliers(topology, limits, keep, importance) @ limits.prices(topology, keep)[0]


def multipliers(topology: Topology, limits: Limits, keep: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """(bounds,) μ ≥ 0 of sum 1, for the way from `keep` to the budget.

    Args:
      keep: (units,) 0 and 1; importance: (units,) ≥ 0. Both flat.
    """
    if len(limits.names) == 1:
        return np.ones(1)
    prices = limits.prices(topology, keep)[0]
    alive = keep > 0
    free = np.flatnonzero(alive & ~protected(topology, np.where(alive, importance, -1.0), limits.round_to))

    def outcome(weights: np.ndarray) -> np.ndarray:
        price = weights @ prices[:, free]
        paid = price > 0
        order = free[paid][np.argsort(importance[free][paid] / price[paid], kind="stable")]
        trial = keep.astype(float)
        trial[order[: fewest(topology, limits, trial, order)]] = 0.0
        return limits.pressures(topology, trial)

    return balance(outcome, len(prices))


def balance(outcome: Callable[[np.ndarray], np.ndarray], bounds: int) -> np.ndarray:
    """(bounds,) μ at which all bounds that bind do so together.

    Args:
      outcome: μ → (bounds,) pressures of what is kept when units go in the order that μ says, until all are at most 1.
    """
    if bounds == 2:
        return _bisect(outcome)
    weights, best, smallest_gap = np.full(bounds, 1.0 / bounds), np.full(bounds, 1.0 / bounds), np.inf
    logs = np.zeros(bounds)
    for turn in range(TURNS):
        pressures = outcome(weights)
        gap = float(weights @ np.abs(1.0 - pressures))
        if gap < smallest_gap:
            best, smallest_gap = weights, gap
        logs += 20.0 / (1.0 + 0.3 * turn) * (pressures - pressures.max())
        weights = np.exp(logs - logs.max())
        weights = weights / weights.sum()
    return best


def _bisect(outcome: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    def first_binds(share: float) -> bool:
        first, second = outcome(np.array([share, 1.0 - share]))
        return bool(first >= second)

    if first_binds(1.0):  # all weight on the first, and yet the second is not what stops it
        return np.array([1.0, 0.0])
    if not first_binds(0.0):
        return np.array([0.0, 1.0])
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if first_binds(middle) else (low, middle)
    return np.array([(low + high) / 2, 1.0 - (low + high) / 2])


def fewest(topology: Topology, limits: Limits, keep: np.ndarray, order: np.ndarray) -> int:
    """How many of the units, in order, must go to meet the budget; all where that is not enough."""
    low, high = -1, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        trial = keep.copy()
        trial[order[:middle]] = 0.0
        low, high = (low, middle) if limits.pressure(topology, trial) <= 1.0 else (middle, high)
    return high


def protected(topology: Topology, importance: np.ndarray, round_to: int | Mapping[str, int] = 1) -> np.ndarray:
    """(units,) bool: the most important unit (or `round_to` units) of each group, which stay; branches have none."""
    tree = {}
    for group, values in zip(topology.groups, topology.unflatten(importance).values(), strict=True):
        best = np.argsort(-values, kind="stable")[: 0 if group.kind == "branches" else multiple(round_to, group)]
        tree[group.name] = np.isin(np.arange(group.size), best)
    return topology.flatten(tree).astype(bool)
