"""The exact landing: which units are kept, given what each is worth.

A student lands where its cost lies in [FLOOR, 1] of the budget. Pieces that are coarse (a branch, `round_to` units, few
units in all) may have no such student: then the costliest below is taken, and what it costs is said.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.pruning.budget import exact
from kdsearch_jax.pruning.budget.limits import FLOOR, BudgetError, BudgetWarning, Limits
from kdsearch_jax.pruning.budget.multipliers import balance
from kdsearch_jax.pruning.budget.pieces import Pieces
from kdsearch_jax.tracing.messages import format_distinct, round_up
from kdsearch_jax.tracing.topology import Topology

FEW = 64  # pieces of which the best selection is always looked for exactly
MOVES = 200  # exchanges of two pieces that are looked at


@dataclass(frozen=True)
class Selection:
    """What is kept of a network.

    keep: {group: (size,) bool}; pressure: its cost over the budget. note: where that is below FLOOR, what it costs and
    which budgets would be met, else empty. exact: no student is nearer; else none was found that is.
    """

    keep: dict[str, np.ndarray]
    pressure: float
    note: str = ""
    exact: bool = True

    @property
    def landed(self) -> bool:
        """Whether the cost is in [FLOOR, 1] of the budget."""
        return not self.note


def select(
    topology: Topology, limits: Limits, importance: np.ndarray, *, per_cost: bool = True, rounds: int = 20
) -> dict[str, np.ndarray]:
    """The units to keep: greedily removes the least important per cost until the budget is met, then improves on that.

    Among the students that cost [FLOOR, 1] of the budget one of high importance is found; where there are few pieces
    the best. Where there is no such student, the costliest below is taken, with a `BudgetWarning` that says what it
    costs and which budgets would be met.

    Args:
      importance: (units,) ≥ 0; units of importance 0 go first.
      per_cost: rank by importance per marginal cost; False ranks by importance alone.
      rounds: how often costs are re-evaluated on the way.

    Returns:
      {group: (size,) bool}, of a cost within the limits.

    Raises:
      BudgetError: even the smallest student costs more.
    """
    found = choose(topology, limits, importance, per_cost=per_cost, rounds=rounds)
    if found.note:
        warnings.warn(found.note, BudgetWarning, stacklevel=2)
    return found.keep


def choose(
    topology: Topology, limits: Limits, importance: np.ndarray, *, per_cost: bool = True, rounds: int = 20
) -> Selection:
    """`select` with what it found: no warning, a note instead."""
    if not limits.names:  # what is bounded is not measured yet
        return Selection(_named(topology, np.ones(topology.units)), 0.0)
    task = _Task(topology, limits, Pieces.of(topology, limits, importance), importance, per_cost, rounds)
    task.check()
    best = max((found for weights in task.weights() for found in task.greedy(weights)), key=task.merit)
    outcome = None
    few = per_cost and len(task.pieces) <= FEW
    if len(task.pieces) and limits.are_polynomials and (task.pressure(best) < FLOOR or few):
        outcome = exact.search(topology, limits, task.pieces)
        if outcome is not None and limits.pressure(topology, outcome.best) <= 1.0:
            best = task.refilled(max(best, outcome.best, key=task.merit))
    complete = not len(task.pieces) or (outcome is not None and outcome.complete)
    if per_cost and not complete:
        best = task.exchanged(best)
    pressure = task.pressure(best)
    if pressure >= FLOOR:
        return Selection(_named(topology, best), pressure)
    above = task.next_above(best) if outcome is None or outcome.above is None else outcome.above
    return Selection(_named(topology, best), pressure, _note(topology, limits, best, above, complete), complete)


def _named(topology: Topology, keep: np.ndarray) -> dict[str, np.ndarray]:
    return {name: vector > 0 for name, vector in topology.unflatten(keep).items()}


# --- what is said ---------------------------------------------------------------------------------------------------


def _note(topology: Topology, limits: Limits, keep: np.ndarray, above: np.ndarray | None, complete: bool) -> str:
    share, floor, _ = format_distinct(limits.pressure(topology, keep), FLOOR, 1.0)
    asked = " and ".join(f"budget.{name} {1 / whole:.4g}" for name, whole in _whole(topology, limits).items())
    text = (
        f"{asked}: no student {'exists' if complete else 'was found'} that costs {floor} to 1 of it; the nearest below "
        f"is taken, which costs {share} of it; {_met(topology, limits, keep)} would be met exactly"
    )
    if above is not None and above.all():
        text += ", and above that there is only the whole network"
    elif above is not None:
        text += f", and so would {_met(topology, limits, above)}, the nearest above"
    return f"{text}; a lower budget.round_to has nearer ones" if limits.round_to != 1 else text


def _met(topology: Topology, limits: Limits, keep: np.ndarray) -> str:
    """The budget, in shares of the whole network, that a student meets exactly: "budget.macs 0.4873"."""
    costs, whole = limits.pressures(topology, keep), _whole(topology, limits)
    shares = {name: round_up(cost / whole[name]) for name, cost in zip(limits.names, costs, strict=True)}
    return " with ".join(f"budget.{name} {share}" for name, share in shares.items())


def _whole(topology: Topology, limits: Limits) -> dict[str, float]:
    """{bound: what the whole network costs of it}."""
    return dict(zip(limits.names, limits.pressures(topology, np.ones(topology.units)).tolist(), strict=True))


# --- how it is found ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One call of `choose`."""

    topology: Topology
    limits: Limits
    pieces: Pieces
    importance: np.ndarray
    per_cost: bool
    rounds: int

    def pressure(self, keep: np.ndarray) -> float:
        return self.limits.pressure(self.topology, keep)

    def merit(self, keep: np.ndarray) -> tuple[float, float]:
        """The larger the better, of a selection within the limits: near enough first, then what it keeps."""
        return min(self.pressure(keep), FLOOR), float(self.importance @ keep)

    def check(self) -> None:
        """Raises BudgetError where nothing fits."""
        least = np.ones(self.topology.units)
        least[self.pieces.units] = 0.0
        if (pressure := self.pressure(least)) > 1.0:
            share, _ = format_distinct(pressure, 1.0)
            raise BudgetError(
                f"budget: even the smallest student costs {share} of it; ask for "
                f"{_met(self.topology, self.limits, least)} at least, or free more gates.kinds"
            )

    def weights(self) -> list[np.ndarray | None]:
        """Weights of the bounds to try; None: of those not met, alike."""
        if len(self.limits.names) == 1 or not self.per_cost:
            return [None]

        def outcome(weights: np.ndarray) -> np.ndarray:
            keep, _ = self.removed(weights)
            return self.limits.pressures(self.topology, keep)

        # The multipliers are right for units without size; where these are large, equal weights may do better.
        return [balance(outcome, len(self.limits.names)), None]

    def greedy(self, weights: np.ndarray | None) -> list[np.ndarray]:
        """Selections within the limits by one ranking: as it comes, and if that costs too little by small pieces."""
        keep, gone = self.removed(weights)
        found = [self.filled(keep, gone)]
        if self.pressure(found[0]) < FLOOR:
            keep, gone = self.removed(weights, sparing=True)
            if self.pressure(keep) <= 1.0:
                found.append(self.filled(keep, gone))
        return found

    def removed(self, weights: np.ndarray | None, sparing: bool = False) -> tuple[np.ndarray, list[int]]:
        """(what is kept, the pieces that went, in order): greedily, until the budget is met or nothing more may go.

        sparing: pieces whose loss would bring the cost below FLOOR stay.
        """
        pieces, keep, gone = self.pieces, np.ones(self.topology.units), []
        free, number = np.ones(len(pieces), bool), 0
        while number < self.rounds and (pressure := self.pressure(keep)) > 1.0:
            goal = pressure + (1.0 - pressure) / (self.rounds - number)
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
        """(units,) by what importance is divided."""
        if not self.per_cost:
            return np.ones(self.topology.units)
        if weights is None:
            return self.limits.marginal(self.topology, keep)
        return weights @ self.limits.prices(self.topology, keep)[0]

    def ratios(self, prices: np.ndarray) -> np.ndarray:
        """Importance per cost of each piece, never below that of the piece that goes before it."""
        cost = self.pieces.sums(prices)
        ratios = np.divide(self.pieces.worth, cost, out=np.full(len(cost), np.inf), where=cost > 0)
        for chain in self.pieces.chains:
            ratios[list(chain)] = np.maximum.accumulate(ratios[list(chain)])
        return ratios

    def fewest(self, keep: np.ndarray, order: np.ndarray, goal: float) -> int:
        """How many pieces, in order, must go to bring the pressure to `goal`; all where that is not enough."""
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            met = self.pressure(self.pieces.without(keep, order[:middle])) <= goal
            low, high = (low, middle) if met else (middle, high)
        return high

    def filled(self, keep: np.ndarray, gone: list[int]) -> np.ndarray:
        """Takes back what went, the last first, as far as the budget allows."""
        blocked: set[int] = set()  # chains of which a piece does not fit
        price, room = self.prices_and_room(keep)
        for piece in reversed(gone):
            chain = int(self.pieces.chain[piece])
            # The marginal price is at most the real one: most that do not fit are seen without another count.
            if chain not in blocked and (price[:, piece] <= room).all():
                more = self.pieces.added(keep, piece)
                if self.pressure(more) <= 1.0:
                    keep = more
                    price, room = self.prices_and_room(keep)
                    continue
            blocked.add(chain)
        return keep

    def prices_and_room(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((bounds, pieces) what one more piece costs at least, (bounds,) what of each bound is left)."""
        price, room = self.limits.prices(self.topology, keep)
        return self.pieces.sums(price), room

    def exchanged(self, keep: np.ndarray) -> np.ndarray:
        """Exchanges one piece for another, or adds one, for as long as that is better."""
        keep, looked, better = self.refilled(keep), 0, True
        while better and looked < MOVES:
            better = False
            leaving, back = self.pieces.ends(keep)
            for piece in sorted(leaving, key=self.pieces.worth.__getitem__):
                looked += 1
                trial = self.exchange(keep, piece, back)
                if trial is not None:
                    keep, better = self.refilled(trial), True
                    break
        return keep

    def refilled(self, keep: np.ndarray) -> np.ndarray:
        """Takes back what fits, the most important first."""
        gone = np.flatnonzero(self.pieces.is_gone(keep))
        return self.filled(keep, gone[np.argsort(self.pieces.worth[gone], kind="stable")].tolist())

    def exchange(self, keep: np.ndarray, piece: int, back: list[int]) -> np.ndarray | None:
        """The best selection with one of the pieces `back` in place of this one; None where none is better."""
        pieces, least, best = self.pieces, self.merit(keep), None
        less = pieces.without(keep, [piece])
        price, room = self.prices_and_room(less)
        for other in back:
            if pieces.chain[other] == pieces.chain[piece] or (price[:, other] > room).any():
                continue
            trial = pieces.added(less, other)
            if self.pressure(trial) <= 1.0 and _more(merit := self.merit(trial), least):
                best, least = trial, merit
        return best

    def next_above(self, keep: np.ndarray) -> np.ndarray | None:
        """The least costly of the selections that have one piece more; None where nothing is gone."""
        more = [self.pieces.added(keep, piece) for piece in self.pieces.ends(keep)[1]]
        beyond = [each for each in more if self.pressure(each) > 1.0]
        return min(beyond, key=self.pressure, default=None)


def _more(merit: tuple[float, float], than: tuple[float, float]) -> bool:
    """Whether one merit is above another by more than rounding."""
    if abs(merit[0] - than[0]) > 1e-12:
        return merit[0] > than[0]
    return merit[1] > than[1] * (1 + 1e-12)
