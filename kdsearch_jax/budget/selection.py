"""The exact landing: which units are kept, given what each is worth."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.budget.limits import FLOOR, BudgetError, Limits, multiple
from kdsearch_jax.budget.multipliers import balance
from kdsearch_jax.tracing.topology import Topology

TRIALS = 200  # choices that `select` looks at before it gives up


def select(
    topology: Topology, limits: Limits, importance: np.ndarray, *, per_cost: bool = True, rounds: int = 20
) -> dict[str, np.ndarray]:
    """The units to keep: greedily removes the least important per cost until the budget is met, then fills it up.

    What goes in large pieces (a branch, `round_to` units) can overshoot. Then at least one piece that went is in every
    choice that lands, so each is tried as one that stays, the most important first: given time, whatever exists is
    found.

    Args:
      importance: (units,) ≥ 0; units of importance 0 go first.
      per_cost: rank by importance per marginal cost; False ranks by importance alone.
      rounds: how often costs are re-evaluated on the way.

    Returns:
      {group: (size,) bool} with pressure in [FLOOR, 1].

    Raises:
      BudgetError: where no choice was found that lands there.
    """
    if not limits.names:  # what is bounded is not measured yet
        return _named(topology, np.ones(topology.units))
    chunks = _chunks(topology, importance, limits)

    def land(weights: np.ndarray | None) -> np.ndarray:
        return _land(topology, limits, importance, chunks, _Ranking(weights, per_cost, rounds))

    if len(limits.names) == 1 or not per_cost:
        return _named(topology, land(None))

    def outcome(weights: np.ndarray) -> np.ndarray:
        ranking = _Ranking(weights, per_cost, rounds)
        return limits.pressures(topology, _remove(topology, limits, importance, chunks, frozenset(), ranking)[0])

    # The multipliers are right for units without size; where these are large, equal weights may do better.
    landed, failed = [], None
    for weights in (balance(outcome, len(limits.names)), None):
        try:
            landed.append(land(weights))
        except BudgetError as error:
            failed = failed or error
    if not landed and failed is not None:
        raise failed
    return _named(topology, max(landed, key=lambda keep: float(importance @ keep)))


def _named(topology: Topology, keep: np.ndarray) -> dict[str, np.ndarray]:
    return {name: vector > 0 for name, vector in topology.unflatten(keep).items()}


def _land(
    topology: Topology, limits: Limits, importance: np.ndarray, chunks: list[_Chunk], ranking: _Ranking
) -> np.ndarray:
    """(units,) `select` by one ranking."""
    nearest, best, queue, seen = 0.0, np.zeros(topology.units), deque([frozenset[int]()]), {frozenset[int]()}
    for _ in range(TRIALS):
        if not queue:
            break
        staying = queue.popleft()
        keep, gone = _remove(topology, limits, importance, chunks, staying, ranking)
        pressure = limits.pressure(topology, keep)
        if pressure > 1.0:  # what stays is too much by itself
            continue
        gone = _fill(topology, limits, keep, chunks, gone)
        pressure = limits.pressure(topology, keep)
        if pressure >= FLOOR:
            return keep
        if pressure > nearest:
            nearest, best = pressure, keep
        for i in reversed(gone):
            if staying | {i} not in seen:
                seen.add(staying | {i})
                queue.append(staying | {i})
    ways = [] if limits.round_to == 1 else ["lower budget.round_to"]
    ways += ["free more gates.kinds", _met_by(topology, limits, best) if nearest else "ask for another budget"]
    raise BudgetError(
        f"budget: the nearest student costs {nearest:.3f} of it, outside [{FLOOR}, 1]: one more "
        f"{'unit' if limits.round_to == 1 else 'piece'} is too much; {', '.join(ways[:-1])}, or {ways[-1]}"
    )


def _met_by(topology: Topology, limits: Limits, keep: np.ndarray) -> str:
    """What to ask for instead: counted bounds that a student meets exactly, as shares of the teacher's."""
    if limits.measured:
        return "ask for another budget"
    told = []
    for name, cost, whole in zip(("macs", "params"), topology.cost(keep), topology.total(), strict=True):
        if name in limits.names:
            digits = max(4, 4 - math.floor(math.log10(cost / whole)) - 1)
            told.append(f"budget.{name} {math.ceil(cost / whole * 10**digits) / 10**digits:.{digits}f}")
    return f"ask for what it costs: {' and '.join(told)} of the teacher's"


@dataclass(frozen=True)
class _Ranking:
    """In what order units go: weights of the bounds, None: of those not met, alike; the rest as in `select`."""

    weights: np.ndarray | None
    per_cost: bool
    rounds: int

    def cost(self, topology: Topology, limits: Limits, keep: np.ndarray) -> np.ndarray:
        """(units,) by what importance is divided."""
        if not self.per_cost:
            return np.ones(topology.units)
        if self.weights is None:
            return limits.marginal(topology, keep)
        return self.weights @ limits.prices(topology, keep)[0]


@dataclass(frozen=True)
class _Chunk:
    """Units that go together, after all of `before` (a chunk's number) has gone."""

    units: np.ndarray
    before: int | None


def _chunks(topology: Topology, importance: np.ndarray, limits: Limits) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    start = 0
    for group in topology.groups:
        order = start + np.argsort(importance[start : start + group.size], kind="stable")
        start += group.size
        if group.kind == "branches":
            chunks.append(_Chunk(order, None))
            continue
        step = multiple(limits.round_to, group)
        widths = [group.size, *range(step * ((group.size - 1) // step), 0, -step)]
        before = None
        for wide, narrow in itertools.pairwise(widths):
            chunks.append(_Chunk(order[group.size - wide : group.size - narrow], before))
            before = len(chunks) - 1
    return chunks


def _ratios(chunks: list[_Chunk], importance: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Importance per cost of each chunk, never below that of the chunk that goes before it."""
    ratios = np.zeros(len(chunks))
    for i, chunk in enumerate(chunks):
        price = cost[chunk.units].sum()
        ratios[i] = importance[chunk.units].sum() / price if price > 0 else np.inf
        if chunk.before is not None:
            ratios[i] = max(ratios[i], ratios[chunk.before])
    return ratios


def _remove(
    topology: Topology,
    limits: Limits,
    importance: np.ndarray,
    chunks: list[_Chunk],
    staying: frozenset[int],
    ranking: _Ranking,
) -> tuple[np.ndarray, list[int]]:
    """(what is kept, the chunks that went, in order): greedily, until the budget is met or nothing more may go."""
    keep, gone = np.ones(topology.units), []
    free = np.ones(len(chunks), bool)
    for i, chunk in enumerate(chunks):  # after one that stays, its successors stay
        free[i] = i not in staying and (chunk.before is None or bool(free[chunk.before]))
    for number in range(ranking.rounds):
        pressure = limits.pressure(topology, keep)
        if pressure <= 1.0:
            break
        goal = pressure + (1.0 - pressure) / (ranking.rounds - number)
        ratios = _ratios(chunks, importance, ranking.cost(topology, limits, keep))
        order = np.argsort(ratios, kind="stable")
        order = order[free[order] & np.isfinite(ratios[order])]
        count = _fewest(topology, limits, keep, [chunks[i].units for i in order], goal)
        for i in order[:count].tolist():
            keep[chunks[i].units] = 0.0
            free[i] = False
            gone.append(i)
    return keep, gone


def _fewest(topology: Topology, limits: Limits, keep: np.ndarray, sets: list[np.ndarray], goal: float) -> int:
    """How many of the sets, in order, must go to bring the pressure to `goal`; all where that is not enough."""

    def met(count: int) -> bool:
        trial = keep.copy()
        if count:
            trial[np.concatenate(sets[:count])] = 0.0
        return limits.pressure(topology, trial) <= goal

    low, high = 0, len(sets)
    if met(0):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return high


def _fill(topology: Topology, limits: Limits, keep: np.ndarray, chunks: list[_Chunk], gone: list[int]) -> list[int]:
    """Takes back what went, the last first, as far as the budget allows: changes `keep`, returns what is still gone."""
    rest: list[int] = []
    blocked: set[int | None] = set()  # before something that is gone for good
    price, room = limits.prices(topology, keep)
    for i in reversed(gone):
        units = chunks[i].units
        # The marginal price is at most the real one: most that do not fit are seen without counting the network anew.
        if i not in blocked and (price[:, units].sum(1) <= room).all():
            keep[units] = 1.0
            if limits.pressure(topology, keep) <= 1.0:
                price, room = limits.prices(topology, keep)
                continue
            keep[units] = 0.0
        blocked.add(chunks[i].before)
        rest.append(i)
    return rest[::-1]
