"""The closed loop of the search: penalties, λ2 and recall as pure functions of gates and importances.

The penalty on gate j is γ_j = λ2 α_j. The weights α_j decide which units go:

- `importance` (the default): α_j = (c_j / I_j)^s. c_j is the cost that unit j adds, weighted under several bounds so
  that they are met together. I_j is the running mean of (g_j ∂L/∂g_j)², the Fisher information of the distillation loss
  at the gate: to second order, the loss increase when the unit goes. A penalty that is constant over the gates
  shrinks all of them for free where BatchNorm follows and damages units that should stay. This one is a re-weighted L1
  that takes unimportant gates to zero in a few steps and barely shrinks important ones. The sharpness s ≥ 1 sets the
  contrast: a unit worth k times the threshold shrinks k^s times slower than one at the threshold.
- `macs`, `params`: α_j is the marginal cost. `one`: α_j = 1. These are the literal readings of the method.

The most important unit of each group has α_j = 0, so no layer is emptied. A residual branch has a gate of its own, and
α_j = 0 while removing it would take the cost below the budget.

λ2 follows the budget. A proximal step with penalty γ_j takes η γ_j / (1 − μ) off gate j once its momentum has built up,
so gate j reaches zero within n steps if λ2 ≥ g_j (1 − μ) / (n η α_j). The controller takes the smallest λ2 that brings
the cost to its target. Gates at zero have the penalty `HOLD` and stay there, unless more units were removed than
necessary: then the most important ones per cost are recalled, as many as the budget allows.

Everything is float32 and runs on the device. Thresholds are found by bisection over the bits of a float32, which takes
32 evaluations of the cost. Large ratios are kept as logarithms. `Controller.__call__` can be jitted, scanned and
sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kdsearch_jax.pruning.budget_path import BudgetPath
from kdsearch_jax.pruning.counting import Costs
from kdsearch_jax.tracing.topology import Topology

HOLD = 1e6  # penalty on a gate at 0, which holds it there even while λ2 is 0, unless its unit is recalled
# λ2 grows by GAIN at each call while the cost is LAG times its target or more, and at the budget while it is above it.
LAG, GAIN, MOST_GAIN = 1.02, 1.5, 1e6
RECALLED = 1000  # units that one call tries to recall
BISECTIONS, SUBGRADIENT_STEPS = 10, 30  # to find μ under two bounds, and under more
_LARGEST = 69.0  # log of the largest penalty, 1e30, which takes any gate to 0 in one step

Penalty = Literal["importance", "macs", "params", "one"]


class Decision(NamedTuple):
    """The controller's output.

    Attributes:
      penalty: (units,) γ of each gate.
      gain: () factor on λ2, raised while the cost lags behind its target.
      lambda2: () λ2.
      pressure: () largest cost over its limit.
      shares: (costs,) costs of the units with g > 0, as shares of the whole network's.
    """

    penalty: Array
    gain: Array
    lambda2: Array
    pressure: Array
    shares: Array


@dataclass(frozen=True, eq=False)
class Controller:
    """Sets the penalty every few updates.

    All methods but `__call__` work on a single budget: on `at(k)`, where `per_limit` is (bounded,) and `floor` is ().

    Attributes:
      costs: of the network.
      bounded: indices of the costs that have a bound.
      path: the target pressure over the search.
      per_limit: (budgets, bounded) the whole network's cost over each limit.
      floor: (budgets,) pressure above which a budget counts as used up.
      least: (groups,) units that must stay in each group, 0 for branches.
      every: updates between two calls.
      rate: η / (1 − μ) of the proximal step on gates.
      penalty, sharpness: α, as in the module's docstring.
      lambda2: a fixed λ2 instead of the closed loop.
    """

    topology: Topology
    costs: Costs
    bounded: tuple[int, ...]
    path: BudgetPath
    per_limit: np.ndarray | Array
    floor: np.ndarray | Array
    least: np.ndarray
    every: int
    rate: float
    penalty: Penalty = "importance"
    sharpness: float = 8.0
    lambda2: float | None = None

    def __call__(self, step: Array, gates: Array, importance: Array, gain: Array) -> Decision:
        """The penalty for the next `every` updates.

        Args:
          step: () int32, updates done.
          gates, importance: (units,) float32, not negative.
          gain: () that of the previous decision, 1 at first.
        """
        leg = self.path.leg(step)
        goals = self.path.goal(step, leg), self.path.goal(step + self.every, leg)
        return self.at(leg).decide(goals, gates, importance, gain)

    def at(self, leg: int | Array) -> Controller:
        """The controller for one of the budgets."""
        if len(self.path.start) == 1:
            return replace(self, per_limit=self.per_limit[0], floor=self.floor[0])
        per_limit, floor = (jnp.asarray(limits, jnp.float32)[leg] for limits in (self.per_limit, self.floor))
        return replace(self, per_limit=per_limit, floor=floor)

    def decide(self, goals: tuple[Array, Array], gates: Array, importance: Array, gain: Array) -> Decision:
        """`__call__` for one budget; goals: target pressures now and after the next `every` updates."""
        alive = gates > 0
        counts = self.costs.classes.counts(alive)
        shares = self.costs.of_counts(counts)
        pressure = self._pressures(shares).max()
        now, goal = goals
        cost = self.cost_of(alive, importance, goal)
        log_alpha = self.log_alpha(gates, importance, cost)
        if self.lambda2 is None:
            behind = pressure > jnp.where(now > 1.0, now * LAG, 1.0)
            gain = jnp.where(behind, jnp.minimum(gain * GAIN, MOST_GAIN), jnp.maximum(gain / GAIN, 1.0))
            log_lambda = jnp.log(gain) + self.log_level(gates, log_alpha, goal)
        else:
            fixed = np.log(self.lambda2) if self.lambda2 > 0 else -np.inf
            log_lambda = jnp.where(pressure > 1.0, np.float32(fixed), -jnp.inf)
        free = alive | lax.cond(
            pressure < self.floor,
            lambda: self.recalled(alive, counts, importance, cost),
            lambda: jnp.zeros_like(alive),
        )
        penalty = jnp.where(free, jnp.exp(jnp.minimum(log_lambda + log_alpha, _LARGEST)), np.float32(HOLD))
        lambda2 = jnp.exp(jnp.minimum(log_lambda, _LARGEST))
        return Decision(penalty, gain.astype(jnp.float32), lambda2, pressure, shares)

    # --- bounded costs ----------------------------------------------------------------------------------------------

    def _pressures(self, shares: Array) -> Array:
        """(bounded,) costs over their limits; shares: (costs,)."""
        return shares[np.array(self.bounded)] * self.per_limit.astype(np.float32)

    def _pressures_of(self, counts: Array) -> Array:
        """(bounded,) costs over their limits; counts: (classes,)."""
        shares = jnp.stack([self.costs.shares[number](counts) for number in self.bounded])
        return shares * self.per_limit.astype(np.float32)

    def _prices(self, keep: Array) -> Array:
        """(bounded, units) what one more unit adds to each pressure."""
        return self.costs.marginal(keep, self.bounded) * self.per_limit.astype(np.float32)[:, None]

    # --- α ---------------------------------------------------------------------------------------------------------

    def log_alpha(self, gates: Array, importance: Array, cost: Array) -> Array:
        """(units,) log α, up to a common constant; −inf where α is 0. cost: (units,) from `cost_of`."""
        alive = gates > 0
        if self.penalty == "one":
            logs = jnp.zeros_like(gates)
        elif self.penalty in ("macs", "params"):
            slope = self.costs.marginal(alive, (self.costs.names.index(self.penalty),))[0]
            mean = (slope * alive).sum() / jnp.maximum(alive.sum(), 1)
            logs = _log(slope) - jnp.log(jnp.maximum(mean, 1e-30))
        else:
            # Normalised over units with g > 0: the importance of the others decays and would move the scale.
            mean = (importance * alive).sum() / jnp.maximum(alive.sum(), 1)
            logs = self.sharpness * (_log(cost) - jnp.log(importance + jnp.maximum(1e-12 * mean, 1e-37)))
            middle = jnp.nanmedian(jnp.where(alive & jnp.isfinite(logs), logs, jnp.nan))
            logs = logs - jnp.where(jnp.isfinite(middle), middle, 0.0)
            logs = jnp.where(cost > 0, jnp.clip(logs, -80.0, 80.0), -jnp.inf)
        stays = self.protected(jnp.where(alive, importance, -1.0)) | self.too_large(alive)
        return jnp.where(stays, -jnp.inf, logs)

    def protected(self, importance: Array) -> Array:
        """(units,) bool: the most important units of each group, as many as must stay."""
        group = _group_of_unit(self.topology)
        order = jnp.lexsort((-importance, group))
        starts = np.cumsum([0] + [g.size for g in self.topology.groups])[:-1]
        rank = np.arange(len(group)) - starts[group]  # groups lie in order, so sorting leaves each in its place
        return jnp.zeros(len(group), bool).at[order].set(rank < self.least[group])

    def too_large(self, alive: Array) -> Array:
        """(units,) bool: branches with g > 0 without which the cost would fall below the floor.

        Their gates must not reach zero: the selection at the end would have to keep such a branch, although it is off.
        """
        branches = _branch_units(self.topology)
        if not len(branches):
            return jnp.zeros_like(alive)
        counts = self.costs.classes.counts(alive)
        columns = self.costs.classes.of_unit[branches]

        def falls_short(column: Array) -> Array:
            return self._pressures_of(counts.at[column].set(0.0)).max() < self.floor

        short = jax.vmap(falls_short)(jnp.asarray(columns))
        return jnp.zeros_like(alive).at[branches].set(short & alive[branches])

    def cost_of(self, alive: Array, importance: Array, goal: Array) -> Array:
        """(units,) cost of one more unit in shares of the budget: Σ_b μ_b c_bj over the bounds b.

        Keeping the most important units under several bounds is a knapsack. Its Lagrangian keeps unit j if
        I_j > Σ_b λ_b c_bj. With μ = λ / Σλ, removing units in the order of I_j / Σ_b μ_b c_bj takes all active bounds
        to their limits at once; an inactive bound has μ_b = 0. While `goal` is above 1, μ is chosen for the way to
        `goal` only, on which each bound goes the same share of the rest of its way.
        """
        prices, factors = self._prices(alive), jnp.ones(len(self.bounded))
        if len(self.bounded) == 1:
            return prices[0]
        pressures = self._pressures_of(self.costs.classes.counts(alive))
        most = pressures.max()
        share = (most - goal) / jnp.maximum(most - 1.0, 1e-6)
        stretch = jnp.maximum(pressures - share * (pressures - 1.0), 1.0)
        factors = jnp.where((goal > 1.0) & (most > goal), stretch, factors)
        prices = prices / factors[:, None]
        return self._multipliers(alive, importance, prices, factors) @ prices

    def _multipliers(self, alive: Array, importance: Array, prices: Array, factors: Array) -> Array:
        """(bounded,) μ ≥ 0, of sum 1, at which all active bounds are met together."""
        free = alive & ~self.protected(jnp.where(alive, importance, -1.0))

        def outcome(weights: Array) -> Array:
            price = weights @ prices
            ratio = jnp.where(free & (price > 0), importance / jnp.maximum(price, 1e-37), jnp.inf)
            gone = ratio <= self.threshold(alive, ratio, lambda p: (p / factors).max() <= 1.0)
            return self._pressures_of(self.costs.classes.counts(alive & ~gone)) / factors

        return _bisected(outcome) if len(self.bounded) == 2 else _subgradient(outcome, len(self.bounded))

    # --- λ2 --------------------------------------------------------------------------------------------------------

    def log_level(self, gates: Array, log_alpha: Array, goal: Array) -> Array:
        """() log of the smallest λ2 that brings the pressure to `goal` within `every` updates; −inf if it is there."""
        alive = gates > 0
        critical = jnp.log(jnp.where(alive, gates, 1.0)) - np.log(self.every * self.rate) - log_alpha
        critical = jnp.where(alive, critical, jnp.inf)
        there = self._pressures_of(self.costs.classes.counts(alive)).max() <= goal
        found = self.threshold(alive, critical, lambda pressures: pressures.max() <= goal)
        return jnp.where(there | ~jnp.isfinite(critical).any(), -jnp.inf, found)

    def threshold(self, alive: Array, order: Array, met: Callable[[Array], Array]) -> Array:
        """() smallest τ such that `met` holds for the pressures once all units with `order` ≤ τ are removed.

        If no τ suffices, the largest finite value of `order`. Exact, since the bits of float32 are bisected.
        """
        keys = _sortable(order)
        top = jnp.max(jnp.where(jnp.isfinite(order), keys, _LOWEST))

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            distance = lax.bitcast_convert_type(high - low, jnp.uint32)  # may exceed the range of int32
            middle = low + (distance >> 1).astype(jnp.int32)
            enough = met(self._pressures_of(self.costs.classes.counts(alive & (keys > middle))))
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        low = jnp.min(jnp.where(alive, keys, top)) - 2  # τ is below all of them if none has to go
        return _unsortable(lax.fori_loop(0, 32, halve, (low, top))[1])

    # --- recall ----------------------------------------------------------------------------------------------------

    def recalled(self, alive: Array, counts: Array, importance: Array, cost: Array) -> Array:
        """(units,) bool: removed units that may return, where more were removed than necessary.

        The most important per cost first, as few as bring the cost back to the floor, and none that would take it above
        the budget. Releasing all would undo the search: without a penalty the loss lifts every gate.
        """
        worth = jnp.where(~alive & (cost > 0), importance / jnp.where(cost > 0, cost, 1.0), 0.0)
        order = jnp.argsort(-worth, stable=True)
        many = jnp.minimum((worth > 0).sum(), RECALLED)
        of_unit = jnp.asarray(self.costs.classes.of_unit)

        def more(state: tuple[Array, Array, Array, Array]) -> Array:
            place, _, _, pressure = state
            return (place < many) & (pressure < self.floor)

        def take(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            place, counts, found, pressure = state
            unit = order[place]
            trial = counts.at[of_unit[unit]].add(1.0)
            above = self._pressures_of(trial).max()
            fits = above <= 1.0
            return (
                place + 1,
                jnp.where(fits, trial, counts),
                found.at[unit].set(fits),
                jnp.where(fits, above, pressure),
            )

        start = (jnp.zeros_like(many), counts, jnp.zeros_like(alive), self._pressures_of(counts).max())
        return lax.while_loop(more, take, start)[2]


def _log(x: Array) -> Array:
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)


def _group_of_unit(topology: Topology) -> np.ndarray:
    return np.repeat(np.arange(len(topology.groups)), [group.size for group in topology.groups])


def _branch_units(topology: Topology) -> np.ndarray:
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    return np.array([a for a, g in zip(starts, topology.groups, strict=False) if g.kind == "branches"], int)


_LOWEST = np.iinfo(np.int32).min


def _sortable(x: Array) -> Array:
    """int32 in the order of float32."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _unsortable(keys: Array) -> Array:
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & np.int32(0x7FFFFFFF)), jnp.float32)


def _bisected(outcome: Callable[[Array], Array]) -> Array:
    def first_binds(share: Array) -> Array:
        pressures = outcome(jnp.stack([share, 1.0 - share]))
        return pressures[0] >= pressures[1]

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        binds = first_binds(middle)
        return jnp.where(binds, middle, low), jnp.where(binds, high, middle)

    zero, one = jnp.float32(0.0), jnp.float32(1.0)
    low, high = lax.fori_loop(0, BISECTIONS, halve, (zero, one))
    share = jnp.where(first_binds(one), one, jnp.where(first_binds(zero), (low + high) / 2, zero))
    return jnp.stack([share, 1.0 - share])


def _subgradient(outcome: Callable[[Array], Array], bounds: int) -> Array:
    def turn(number: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        logs, weights, best, smallest = state
        pressures = outcome(weights)
        gap = weights @ jnp.abs(1.0 - pressures)
        best, smallest = jnp.where(gap < smallest, weights, best), jnp.minimum(gap, smallest)
        logs = logs + 20.0 / (1.0 + 0.3 * number) * (pressures - pressures.max())
        return logs, jax.nn.softmax(logs), best, smallest

    even = jnp.full(bounds, 1.0 / bounds, jnp.float32)
    start = (jnp.zeros(bounds, jnp.float32), even, even, jnp.float32(jnp.inf))
    return lax.fori_loop(0, SUBGRADIENT_STEPS, turn, start)[2]
