"""The weights α_j of the penalty on gates: what decides which units go.

- `importance` (the default): α_j = (c_j / I_j)^s, re-estimated at every call of the compiled steps. c_j is what unit j
  adds to the cost (of several bounds so weighted that they are met together, see
  `cost_of`),
  I_j the running mean of (g_j ∂KL/∂g_j)², the Fisher information of the distillation loss at the gate: to second
  order, what the loss gains if the unit goes. So the teacher sets the weights. A penalty that is constant over the
  gates shrinks all of them for free where BatchNorm follows, and damages what should stay; this one is a re-weighted L1
  that takes the unimportant to zero within a few steps and leaves the important unshrunk. The sharpness s ≥ 1 sets how
  clearly: a unit worth k times the threshold shrinks k^s times slower than one at the threshold.
- `macs`, `params`: α_j = the marginal cost; `one`: α_j = 1. These are the plain readings of the method, for comparison.

In each group the most important unit has α_j = 0, so no layer is emptied; a residual branch goes as a whole, by its own
gate, when its own Fisher information per cost is the least. A branch so large that without it the cost would be below
the budget has α_j = 0 as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdsearch_jax.pruning.budgets import Limits, width_multiple
from kdsearch_jax.pruning.selection import balance
from kdsearch_jax.pruning.settings import GatesConfig
from kdsearch_jax.tracing.topology import Topology

RECALLED = 1000  # units looked at by one call of `recalled`; the next call goes on


def weights(
    topology: Topology,
    limits: Limits,
    config: GatesConfig,
    gates: np.ndarray,
    importance: np.ndarray,
    goal: float = 1.0,
) -> np.ndarray:
    """(units,) α_j as the module's docstring states it, up to a common factor (λ2 carries the scale).

    goal: the pressure that the gates are to be brought to next.
    """
    living = gates > 0
    alive = living.astype(float)
    if config.penalty == "one":
        alpha = np.ones(topology.units)
    elif config.penalty in ("macs", "params"):
        alpha = getattr(topology, config.penalty).marginal(alive)
        alpha = alpha / max(alpha[living].sum() / max(living.sum(), 1), 1e-30)
    else:
        # The scale is that of the living: what is dead is worth less at every step, and would carry it away.
        cost = cost_of(topology, limits, alive, importance, goal)
        floor = 1e-12 * max(importance[living].sum() / max(living.sum(), 1), 1e-30)
        with np.errstate(divide="ignore"):
            logs = config.sharpness * (np.log(cost) - np.log(importance + floor))
        finite = logs[living & np.isfinite(logs)]
        logs = logs - (np.median(finite) if len(finite) else 0.0)
        alpha = np.exp(np.clip(logs, -80.0, 80.0))
        alpha[cost <= 0] = 0.0
    alpha[protected(topology, np.where(gates > 0, importance, -1.0), limits.round_to)] = 0.0
    alpha[too_large(topology, limits, alive)] = 0.0
    return alpha


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
        best = np.argsort(-values, kind="stable")[: 0 if group.kind == "branches" else width_multiple(round_to, group)]
        tree[group.name] = np.isin(np.arange(group.size), best)
    return topology.flatten(tree).astype(bool)


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
