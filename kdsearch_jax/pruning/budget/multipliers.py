"""Weights of several bounds: the μ at which removing units meets all active bounds together.

Keeping the most important units under several bounds is a knapsack. Its Lagrangian keeps unit j where I_j > Σ_b λ_b
c_bj. With μ = λ / Σλ, removing units in the order of I_j / Σ_b μ_b c_bj takes all active bounds to their limits at
once; an inactive bound has μ_b = 0. Equal weights would leave one of them slack.

With two bounds, more weight on one lowers its cost and raises the other's: bisection. With more, weights follow the
pressures (an exponentiated subgradient), and the μ of the smallest gap Σ_b μ_b (1 − pressure_b) is taken.
`kdsearch_jax.pruning.control` does the same on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BISECTIONS, SUBGRADIENT_STEPS = 10, 30  # with two bounds, and with more


def balance(outcome: Callable[[np.ndarray], np.ndarray], bounds: int) -> np.ndarray:
    """(bounds,) μ ≥ 0, of sum 1, at which all active bounds are met together.

    Args:
      outcome: μ → (bounds,) pressures after removing units in the order that μ gives until all are at most 1.
    """
    if bounds == 2:
        return _bisect(outcome)
    weights, best, smallest_gap = np.full(bounds, 1.0 / bounds), np.full(bounds, 1.0 / bounds), np.inf
    logs = np.zeros(bounds)
    for turn in range(SUBGRADIENT_STEPS):
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

    if first_binds(1.0):  # even with all weight on the first
        return np.array([1.0, 0.0])
    if not first_binds(0.0):
        return np.array([0.0, 1.0])
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if first_binds(middle) else (low, middle)
    return np.array([(low + high) / 2, 1.0 - (low + high) / 2])
