"""The closed loop of the search on the device: α, λ2 and recall as pure functions of gates and importances.

The mathematics is that of `kdsearch_jax.pruning.penalty` and `kdsearch_jax.pruning.budget`, in float32 and without a
sort of pieces: a
threshold is found by bisection over the bits of a float32, 32 evaluations of the cost. Large ratios are kept as
logarithms. `Controller.__call__` is what the optimiser calls every few updates; all of it can be jitted, scanned and
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

from kdsearch_jax.pruning.budgets import FLOOR
from kdsearch_jax.pruning.counting import Costs
from kdsearch_jax.tracing.topology import Topology

HOLD = 1e6  # penalty of a dead gate: it stays dead even while λ2 is 0, unless it is recalled
LAG, GAIN, MOST_GAIN = 1.02, 1.5, 1e6  # λ2 grows by GAIN at each call while the cost is LAG times its target or more
RECALLED = 1000  # dead units that one call looks at
WEIGHTINGS, TURNS = 10, 30  # steps towards the weights of two bounds; of more
_LARGEST = 69.0  # log of the largest penalty, 1e30: far beyond what takes any gate to 0

Penalty = Literal["importance", "macs", "params", "one"]


class Decision(NamedTuple):
    """penalty: (units,) γ of each gate; gain: () of the closed loop; lambda2, pressure: (); shares: (costs,)."""

    penalty: Array
    gain: Array
    lambda2: Array
    pressure: Array
    shares: Array


class Path(NamedTuple):
    """The pressure asked for, by legs, one for each budget: `start` up to update `begin`, 1 from `arrive` to `end`."""

    start: tuple[float, ...]
    begin: tuple[int, ...]
    arrive: tuple[int, ...]
    end: tuple[int, ...]

    def leg(self, step: Array) -> Array:
        """() int32: the leg that the update after `step` belongs to."""
        return (step >= np.array(self.end[:-1], np.int32)).sum().astype(jnp.int32)

    def goal(self, step: Array, leg: Array) -> Array:
        """() float32: the pressure that a leg asks for at a step; in a straight line between `begin` and `arrive`."""
        start = jnp.asarray(self.start, jnp.float32)[leg]
        begin, arrive = (jnp.asarray(each, jnp.int32)[leg] for each in (self.begin, self.arrive))
        share = (step - begin).astype(jnp.float32) / jnp.maximum(arrive - begin, 1).astype(jnp.float32)
        return start + (1.0 - start) * jnp.clip(share, 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Controller:
    """What moves the penalty.

    costs: of the network; bounded: numbers of those with a bound; per_limit: (legs, bounded) the whole network's cost
    over each limit of each leg; least: (groups,) units that stay in each group, 0 for branches. every: updates between
    calls; rate: η / (1 − μ) of the gates' proximal step. lambda2: fixed instead of the closed loop. floor: the pressure
    from which on a budget counts as met.

    Everything but `__call__` is of one leg's limits: `at(leg)`, where `per_limit` is (bounded,).
    """

    topology: Topology
    costs: Costs
    bounded: tuple[int, ...]
    per_limit: np.ndarray | Array
    path: Path
    least: np.ndarray
    every: int
    rate: float
    penalty: Penalty = "importance"
    sharpness: float = 8.0
    lambda2: float | None = None
    floor: float = FLOOR

    def __call__(self, step: Array, gates: Array, importance: Array, gain: Array) -> Decision:
        """The penalty for the next `every` updates.

        Args:
          step: () int32, updates done; gates, importance: (units,) float32 ≥ 0; gain: () from the call before.
        """
        leg = self.path.leg(step)
        goals = self.path.goal(step, leg), self.path.goal(step + self.every, leg)
        return self.at(leg).decide(goals, gates, importance, gain)

    def at(self, leg: int | Array) -> Controller:
        """The controller with the limits of one leg."""
        several = len(self.path.start) > 1
        return replace(self, per_limit=jnp.asarray(self.per_limit, jnp.float32)[leg] if several else self.per_limit[0])

    def decide(self, goals: tuple[Array, Array], gates: Array, importance: Array, gain: Array) -> Decision:
        """`__call__` for one leg; goals: the pressures asked for now and after the next `every` updates."""
        alive = gates > 0
        counts = self.costs.classes.counts(alive)
        shares = self.costs.of_counts(counts)
        pressure = self._pressures(shares).max()
        now, goal = goals
        cost = self.cost_of(alive, importance, goal)
        log_alpha = self.log_alpha(gates, importance, cost)
        if self.lambda2 is None:
            behind = pressure > now * LAG
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

    # --- what is bounded -------------------------------------------------------------------------------------------

    def _pressures(self, shares: Array) -> Array:
        """(bounded,) costs over their limits, of (costs,) shares."""
        return shares[np.array(self.bounded)] * self.per_limit.astype(np.float32)

    def _pressures_of(self, counts: Array) -> Array:
        """(bounded,) the same of (classes,) counts, without the costs that have no bound."""
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
            # The scale is that of the living: what the dead are worth falls at every step, and would carry it away.
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
        """(units,) bool: living branches without which the cost would fall below what a landing can fill."""
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
        """(units,) what one more unit costs, in shares of the budget: Σ_b μ_b c_bj; see `budget.multipliers`."""
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
        """(bounded,) μ ≥ 0 of sum 1 at which all bounds that bind do so together."""
        free = alive & ~self.protected(jnp.where(alive, importance, -1.0))

        def outcome(weights: Array) -> Array:
            price = weights @ prices
            ratio = jnp.where(free & (price > 0), importance / jnp.maximum(price, 1e-37), jnp.inf)
            gone = ratio <= self.threshold(alive, ratio, lambda p: (p / factors).max() <= 1.0)
            return self._pressures_of(self.costs.classes.counts(alive & ~gone)) / factors

        return _bisected(outcome) if len(self.bounded) == 2 else _subgradient(outcome, len(self.bounded))

    # --- λ2 --------------------------------------------------------------------------------------------------------

    def log_level(self, gates: Array, log_alpha: Array, goal: Array) -> Array:
        """() log of the smallest λ2 that brings the pressure to `goal` in `every` updates; −inf where it is there."""
        alive = gates > 0
        critical = jnp.log(jnp.where(alive, gates, 1.0)) - np.log(self.every * self.rate) - log_alpha
        critical = jnp.where(alive, critical, jnp.inf)
        there = self._pressures_of(self.costs.classes.counts(alive)).max() <= goal
        found = self.threshold(alive, critical, lambda pressures: pressures.max() <= goal)
        return jnp.where(there | ~jnp.isfinite(critical).any(), -jnp.inf, found)

    def threshold(self, alive: Array, order: Array, met: Callable[[Array], Array]) -> Array:
        """() the smallest τ at which `met` holds of the pressures without the living units of `order` ≤ τ.

        The largest finite value of `order` where none is enough. Exact: `order` is float32, and its bits are bisected.
        """
        keys = _sortable(order)
        top = jnp.max(jnp.where(jnp.isfinite(order), keys, _LOWEST))

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            distance = lax.bitcast_convert_type(high - low, jnp.uint32)  # may be more than an int32 holds
            middle = low + (distance >> 1).astype(jnp.int32)
            enough = met(self._pressures_of(self.costs.classes.counts(alive & (keys > middle))))
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        low = jnp.min(jnp.where(alive, keys, top)) - 2  # where nothing has to go, τ is below all of them
        return _unsortable(lax.fori_loop(0, 32, halve, (low, top))[1])

    # --- recall ----------------------------------------------------------------------------------------------------

    def recalled(self, alive: Array, counts: Array, importance: Array, cost: Array) -> Array:
        """(units,) bool: the dead units that may live again where more died than had to; see `budget.recalled`."""
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
    low, high = lax.fori_loop(0, WEIGHTINGS, halve, (zero, one))
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
    return lax.fori_loop(0, TURNS, turn, start)[2]
