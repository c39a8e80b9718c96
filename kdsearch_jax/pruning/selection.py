"""Selection: which units to keep within a budget, given what each unit is worth.

A student lands in the budget if its cost is in [FLOOR, 1] of it. If pieces are coarse (a residual branch, `round_to`
units, few units in total) there may be no such student. Then the costliest one below the budget is chosen, and the
selection carries a note that says so.

Several bounds are a knapsack problem. Its Lagrangian keeps unit j if I_j > Σ_b λ_b c_bj, so with the right weights
μ = λ / Σλ, removing units in the order of I_j / Σ_b μ_b c_bj meets all binding bounds at the same moment, and a bound
that does not bind has μ_b = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.pruning.budgets import FLOOR, BudgetError, Limits, fewest_units
from kdsearch_jax.pruning.exact_selection import best_selection
from kdsearch_jax.pruning.pieces import Pieces
from kdsearch_jax.tracing.messages import format_distinct, round_up
from kdsearch_jax.tracing.topology import Topology

FEW = 64  # pieces up to which the best selection is always computed exactly
EXCHANGES = 200  # exchanges of two pieces that are tried
ROUNDS = 20  # how often prices are recomputed during greedy removal
BISECTIONS, TURNS = 10, 30  # steps towards the weights of two bounds, and of more


@dataclass(frozen=True)
class Selection:
    """The units of a network to keep.

    Attributes:
      keep: {group: (size,) bool}.
      pressure: cost over the budget, at most 1.
      note: if the pressure is below FLOOR, a sentence with the cost and the budgets that would be met; else empty.
      exact: no student is closer to the budget. False: none was found that is.
    """

    keep: dict[str, np.ndarray]
    pressure: float
    note: str = ""
    exact: bool = True

    @property
    def landed(self) -> bool:
        """Whether the cost is in [FLOOR, 1] of the budget."""
        return not self.note


def choose(
    topology: Topology,
    limits: Limits,
    importance: np.ndarray,
    least: Sequence[int] | np.ndarray | None = None,
    *,
    per_cost: bool = True,
) -> Selection:
    """Removes the least important units per cost until the budget is met, then improves on that.

    Among the students that land in the budget one of high importance is found, and the best if there are few pieces.
    If no student lands, the costliest below the budget is chosen.

    Args:
      importance: (units,) ≥ 0; units of importance 0 are removed first.
      least: (groups,) units that must stay. None: one multiple of units in each group, no branch.
      per_cost: ranks units by importance over marginal cost; False: by importance alone.

    Raises:
      BudgetError: the smallest student costs more than the budget.
    """
    if not limits.names:  # the only bounds are on costs that are not measured yet
        return Selection(_named(topology, np.ones(topology.units)), 0.0)
    if least is None:
        least = [fewest_units(limits.round_to, {}, group) for group in topology.groups]
    pieces = Pieces.of(topology, importance, limits.round_to, least)
    selector = _Selector(topology, limits, pieces, importance, per_cost)
    selector.check()
    best = max((keep for weights in selector.weights() for keep in selector.greedy(weights)), key=selector.merit)
    outcome = None
    few = per_cost and len(pieces) <= FEW
    if len(pieces) and limits.are_polynomials and (selector.pressure(best) < FLOOR or few):
        outcome = best_selection(topology, limits, pieces)
        if outcome is not None and limits.pressure(topology, outcome.best) <= 1.0:
            best = selector.refilled(max(best, outcome.best, key=selector.merit))
    complete = not len(pieces) or (outcome is not None and outcome.complete)
    if per_cost and not complete:
        best = selector.exchanged(best)
    pressure = selector.pressure(best)
    if pressure >= FLOOR:
        return Selection(_named(topology, best), pressure)
    above = selector.next_above(best) if outcome is None or outcome.above is None else outcome.above
    return Selection(_named(topology, best), pressure, _note(topology, limits, best, above, complete), complete)


def _named(topology: Topology, keep: np.ndarray) -> dict[str, np.ndarray]:
    return {name: vector > 0 for name, vector in topology.unflatten(keep).items()}


# --- messages -------------------------------------------------------------------------------------------------------


def _note(topology: Topology, limits: Limits, keep: np.ndarray, above: np.ndarray | None, complete: bool) -> str:
    share, floor, _ = format_distinct(limits.pressure(topology, keep), FLOOR, 1.0)
    asked = " and ".join(f"budget.{name} {1 / whole:.4g}" for name, whole in _whole(topology, limits).items())
    text = (
        f"{asked}: no student {'exists' if complete else 'was found'} that costs {floor} to 1 of it; the closest one "
        f"below costs {share} of it; {_met(topology, limits, keep)} would be met exactly"
    )
    if above is not None and above.all():
        text += ", and the next larger one is the whole network"
    elif above is not None:
        text += f", and so would {_met(topology, limits, above)}, the closest above"
    return f"{text}; a lower budget.round_to allows closer ones" if limits.round_to != 1 else text


def _met(topology: Topology, limits: Limits, keep: np.ndarray) -> str:
    """The budget that a student meets exactly, in shares of the whole network: "budget.macs 0.4873"."""
    costs, whole = limits.pressures(topology, keep), _whole(topology, limits)
    shares = {name: round_up(cost / whole[name]) for name, cost in zip(limits.names, costs, strict=True)}
    return " with ".join(f"budget.{name} {share}" for name, share in shares.items())


def _whole(topology: Topology, limits: Limits) -> dict[str, float]:
    """{bound: pressure of the whole network}."""
    return dict(zip(limits.names, limits.pressures(topology, np.ones(topology.units)).tolist(), strict=True))


# --- greedy removal and local improvement ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Selector:
    """The arguments of one call of `choose`."""

    topology: Topology
    limits: Limits
    pieces: Pieces
    importance: np.ndarray
    per_cost: bool

    def pressure(self, keep: np.ndarray) -> float:
        return self.limits.pressure(self.topology, keep)

    def merit(self, keep: np.ndarray) -> tuple[float, float]:
        """Of a selection within the limits, larger is better: close enough to the budget first, then importance."""
        return min(self.pressure(keep), FLOOR), float(self.importance @ keep)

    def check(self) -> None:
        """Raises BudgetError if the smallest student costs too much."""
        least = np.ones(self.topology.units)
        least[self.pieces.units] = 0.0
        if (pressure := self.pressure(least)) > 1.0:
            share, _ = format_distinct(pressure, 1.0)
            raise BudgetError(
                f"budget: the smallest student costs {share} of it; ask for "
                f"{_met(self.topology, self.limits, least)} at least, or free more gates.kinds"
            )

    def weights(self) -> list[np.ndarray | None]:
        """Weights of the bounds to try. None: equal weights of the bounds that are not met yet."""
        if len(self.limits.names) == 1 or not self.per_cost:
            return [None]

        def outcome(weights: np.ndarray) -> np.ndarray:
            keep, _ = self.removed(weights)
            return self.limits.pressures(self.topology, keep)

        # The multipliers are exact for infinitely small units; for large ones equal weights may do better.
        return [balance(outcome, len(self.limits.names)), None]

    def greedy(self, weights: np.ndarray | None) -> list[np.ndarray]:
        """Selections within the limits by one ranking; a second one from small pieces if the first costs too little."""
        keep, gone = self.removed(weights)
        result = [self.filled(keep, gone)]
        if self.pressure(result[0]) < FLOOR:
            keep, gone = self.removed(weights, sparing=True)
            if self.pressure(keep) <= 1.0:
                result.append(self.filled(keep, gone))
        return result

    def removed(self, weights: np.ndarray | None, sparing: bool = False) -> tuple[np.ndarray, list[int]]:
        """(flat keep, removed pieces in order) of greedy removal until the budget is met or no piece is left.

        sparing: keeps pieces whose removal would bring the cost below FLOOR.
        """
        pieces, keep, gone = self.pieces, np.ones(self.topology.units), []
        rounds = ROUNDS if self.per_cost else 1
        free, number = np.ones(len(pieces), bool), 0
        while number < rounds and (pressure := self.pressure(keep)) > 1.0:
            goal = pressure + (1.0 - pressure) / (rounds - number)
            ratios = self.ratios(self.prices(keep, weights))
            order = np.argsort(ratios, kind="stable")
            order = order[free[order] & np.isfinite(ratios[order])]
            count = self.fewest(keep, order, goal)
            trial = pieces.without(keep, order[:count])
            spared = sparing and count > 0 and self.pressure(trial) < FLOOR
            if spared:
                count -= 1
                chain = pieces.chains[pieces.chain[order[count]]]
                free[[piece for piece in chain if piece >= order[count]]] = False
                trial = pieces.without(keep, order[:count])
            keep = trial
            free[order[:count]] = False
            gone += order[:count].tolist()
            number += not spared
        return keep, gone

    def prices(self, keep: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        """(units,) by which importance is divided."""
        if not self.per_cost:
            return np.ones(self.topology.units)
        if weights is None:
            return self.limits.marginal(self.topology, keep)
        return weights @ self.limits.prices(self.topology, keep)[0]

    def ratios(self, prices: np.ndarray) -> np.ndarray:
        """(pieces,) importance per cost, never below that of the piece that is removed before."""
        cost = self.pieces.sums(prices)
        ratios = np.divide(self.pieces.worth, cost, out=np.full(len(cost), np.inf), where=cost > 0)
        for chain in self.pieces.chains:
            ratios[list(chain)] = np.maximum.accumulate(ratios[list(chain)])
        return ratios

    def fewest(self, keep: np.ndarray, order: np.ndarray, goal: float) -> int:
        """How many pieces, in order, must be removed to bring the pressure to `goal`; all if that is not enough."""
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            met = self.pressure(self.pieces.without(keep, order[:middle])) <= goal
            low, high = (low, middle) if met else (middle, high)
        return high

    def filled(self, keep: np.ndarray, gone: list[int]) -> np.ndarray:
        """Restores removed pieces, the last first, as far as the budget allows."""
        blocked: set[int] = set()  # chains whose next piece does not fit
        price, room = self.prices_and_room(keep)
        for piece in reversed(gone):
            chain = int(self.pieces.chain[piece])
            # The marginal price is at most the real one, so most pieces that do not fit need no exact count.
            if chain not in blocked and (price[:, piece] <= room).all():
                more = self.pieces.with_piece(keep, piece)
                if self.pressure(more) <= 1.0:
                    keep = more
                    price, room = self.prices_and_room(keep)
                    continue
            blocked.add(chain)
        return keep

    def prices_and_room(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((bounds, pieces) least pressure that a piece adds, (bounds,) pressure left)."""
        price, room = self.limits.prices(self.topology, keep)
        return self.pieces.sums(price), room

    def exchanged(self, keep: np.ndarray) -> np.ndarray:
        """Exchanges pieces, or adds one, as long as that is better."""
        keep, tried, better = self.refilled(keep), 0, True
        while better and tried < EXCHANGES:
            better = False
            removable, restorable = self.pieces.ends(keep)
            for piece in sorted(removable, key=self.pieces.worth.__getitem__):
                tried += 1
                trial = self.exchange(keep, piece, restorable)
                if trial is not None:
                    keep, better = self.refilled(trial), True
                    break
        return keep

    def refilled(self, keep: np.ndarray) -> np.ndarray:
        """Restores what fits, the most important first."""
        gone = np.flatnonzero(self.pieces.is_removed(keep))
        return self.filled(keep, gone[np.argsort(self.pieces.worth[gone], kind="stable")].tolist())

    def exchange(self, keep: np.ndarray, piece: int, restorable: list[int]) -> np.ndarray | None:
        """The best selection with another piece in place of `piece`; None if none is better."""
        pieces, best_merit, best = self.pieces, self.merit(keep), None
        less = pieces.without(keep, [piece])
        price, room = self.prices_and_room(less)
        for other in restorable:
            if pieces.chain[other] == pieces.chain[piece] or (price[:, other] > room).any():
                continue
            trial = pieces.with_piece(less, other)
            if self.pressure(trial) <= 1.0 and _exceeds(merit := self.merit(trial), best_merit):
                best, best_merit = trial, merit
        return best

    def next_above(self, keep: np.ndarray) -> np.ndarray | None:
        """The cheapest selection beyond the budget with one more piece; None if nothing is removed."""
        more = [self.pieces.with_piece(keep, piece) for piece in self.pieces.ends(keep)[1]]
        return min((trial for trial in more if self.pressure(trial) > 1.0), key=self.pressure, default=None)


def _exceeds(merit: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a merit is above another by more than rounding."""
    if abs(merit[0] - other[0]) > 1e-12:
        return merit[0] > other[0]
    return merit[1] > other[1] * (1 + 1e-12)


# --- weights of several bounds --------------------------------------------------------------------------------------


def balance(outcome: Callable[[np.ndarray], np.ndarray], bounds: int) -> np.ndarray:
    """(bounds,) weights μ ≥ 0 of sum 1 with which all binding bounds are met together.

    Two bounds: bisection. More: an exponentiated subgradient, of whose weights those with the smallest gap
    Σ_b μ_b |1 − pressure_b| are returned.

    Args:
      outcome: μ → (bounds,) pressures after units are removed in the order given by μ, until all are at most 1.
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

    if first_binds(1.0):  # the second bound is met even with all weight on the first
        return np.array([1.0, 0.0])
    if not first_binds(0.0):
        return np.array([0.0, 1.0])
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if first_binds(middle) else (low, middle)
    return np.array([(low + high) / 2, 1.0 - (low + high) / 2])
