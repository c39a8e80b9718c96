"""Budgets: what the student may cost, the closed loop that moves λ2 there, and the exact landing.

*Pressure* is the cost over its limit, the larger one where MACs and parameters are both limited: the network starts
above 1 and the student must lie in [`FLOOR`, 1].

The proximal step with penalty λ2 α_j takes η λ2 α_j / (1 − μ) off gate j in each step once its momentum has built up,
so in `steps` steps gate j dies where λ2 ≥ g_j (1 − μ) / (steps η α_j). `level` therefore finds, by bisection over the
gates in the order in which they would die, the smallest λ2 that brings the pressure to a target. Called again and
again with a falling target, it is the closed loop; no one has to know λ2.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.config import BudgetConfig
from kdsearch_jax.tracing.topology import Topology

FLOOR = 0.98
TRIALS = 200  # choices that `select` looks at before it gives up


class BudgetError(ValueError):
    """The budget cannot be met."""


@dataclass(frozen=True)
class Limits:
    """Absolute bounds; None: unbounded. round_to: widths are multiples of it, or untouched."""

    macs: float | None
    params: float | None
    round_to: int = 1

    def pressure(self, topology: Topology, keep: np.ndarray) -> float:
        """Cost of the flat `keep` over its limit; at most 1 is within the budget."""
        macs, params = topology.cost(keep)
        return max(macs / self.macs if self.macs else 0.0, params / self.params if self.params else 0.0)

    def prices(self, topology: Topology, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((bounds, units) what one more unit costs of each bound, (bounds,) what of each bound is left)."""
        costs = [(getattr(topology, name), bound) for name in ("macs", "params") if (bound := getattr(self, name))]
        slopes = np.stack([cost.marginal(keep) / bound for cost, bound in costs])
        return slopes, np.array([1.0 - cost.total(keep) / bound for cost, bound in costs]) + 1e-9

    def marginal(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(units,) what one more unit adds to the pressure, summed over the bounds not met yet, or over all."""
        macs, params = topology.cost(keep)
        parts = []
        if self.macs:
            parts.append((macs / self.macs, topology.macs.marginal(keep) / self.macs))
        if self.params:
            parts.append((params / self.params, topology.params.marginal(keep) / self.params))
        unmet = [slope for pressure, slope in parts if pressure > 1] or [slope for _, slope in parts]
        return np.sum(unmet, axis=0)


def resolve(config: BudgetConfig, topology: Topology) -> Limits:
    """The absolute limits of a budget for this network.

    Raises:
      BudgetError: a bound that is not positive, not below the network's own cost, or below what the smallest student
        costs (one unit, or `round_to` units, in each layer, and every removable branch gone).
    """
    if config.round_to < 1:
        raise BudgetError(f"budget.round_to: {config.round_to} must be at least 1")
    total: dict[str, int] = dict(zip(("macs", "params"), topology.total(), strict=True))
    bounds: dict[str, float] = {}
    for name, value in (("macs", config.macs), ("params", config.params)):
        if value is None:
            continue
        if not value > 0:
            raise BudgetError(
                f"budget.{name}: {value} must be above 0; 0.5 is half of the teacher's, 20e6 an absolute number"
            )
        bounds[name] = value * total[name] if value <= 1 else float(value)
        if bounds[name] >= total[name]:
            raise BudgetError(
                f"budget.{name}: {value} is not below the teacher's {total[name]:,}; nothing is to be removed"
            )
    if not bounds:
        raise BudgetError("budget: give budget.macs or budget.params")
    limits = Limits(bounds.get("macs"), bounds.get("params"), config.round_to)
    least, wide = topology.cost(smallest(topology, config.round_to)), config.round_to
    for name, cost in zip(("macs", "params"), least, strict=True):
        if name in bounds and cost > bounds[name]:
            units, share = f"{wide} unit{'s' * (wide > 1)}", cost / total[name]
            raise BudgetError(
                f"budget.{name}: {getattr(config, name)} is out of reach: with {units} a layer the student still costs "
                f"{cost:,} ({share:.3f} of the teacher's {total[name]:,}); give more, or free more gates.kinds"
            )
    return limits


def smallest(topology: Topology, round_to: int = 1) -> np.ndarray:
    """The flat keep of the smallest student: `round_to` units of each group, and no branch."""
    keep = {g.name: np.arange(g.size) < (0 if g.kind == "branches" else round_to) for g in topology.groups}
    return topology.flatten(keep).astype(float)


def target(pressure: float, step: int, warmup: int, end: int) -> float:
    """The pressure asked for at `step`: `pressure` up to `warmup`, then in a straight line down to 1 at `end`."""
    share = np.clip((step - warmup) / max(end - warmup, 1), 0.0, 1.0)
    return float(pressure + (1.0 - pressure) * share)


def protected(topology: Topology, importance: np.ndarray, round_to: int = 1) -> np.ndarray:
    """(units,) bool: the most important unit (or `round_to` units) of each group, which stay; branches have none."""
    tree = {}
    for group, values in zip(topology.groups, topology.unflatten(importance).values(), strict=True):
        best = np.argsort(-values, kind="stable")[: 0 if group.kind == "branches" else round_to]
        tree[group.name] = np.isin(np.arange(group.size), best)
    return topology.flatten(tree).astype(bool)


def too_large(topology: Topology, limits: Limits, keep: np.ndarray) -> np.ndarray:
    """(units,) bool: the branches of `keep` with which so much would go that the cost fell below [FLOOR, 1].

    The search must not take the gate of such a branch to zero: the landing would keep the branch, dead.
    """
    result = np.zeros(topology.units, bool)
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    for group, unit in zip(topology.groups, starts, strict=False):
        if group.kind == "branches" and keep[unit] > 0:
            less = keep.astype(float)
            less[unit] = 0.0
            result[unit] = limits.pressure(topology, less) < FLOOR
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
    chunks = _chunks(topology, importance, limits.round_to)
    nearest, queue, seen = 0.0, deque([frozenset[int]()]), {frozenset[int]()}
    for _ in range(TRIALS):
        if not queue:
            break
        staying = queue.popleft()
        keep, gone = _remove(topology, limits, importance, chunks, staying, per_cost, rounds)
        pressure = limits.pressure(topology, keep)
        if pressure > 1.0:  # what stays is too much by itself
            continue
        gone = _fill(topology, limits, keep, chunks, gone)
        pressure = limits.pressure(topology, keep)
        if pressure >= FLOOR:
            return {name: vector > 0 for name, vector in topology.unflatten(keep).items()}
        nearest = max(nearest, pressure)
        for i in reversed(gone):
            if staying | {i} not in seen:
                seen.add(staying | {i})
                queue.append(staying | {i})
    raise BudgetError(
        f"budget: the nearest student costs {nearest:.3f} of it, outside [{FLOOR}, 1]; its smallest step is too "
        "large: lower budget.round_to, free more gates.kinds, or ask for another budget"
    )


@dataclass(frozen=True)
class _Chunk:
    """Units that go together, after all of `before` (a chunk's number) has gone."""

    units: np.ndarray
    before: int | None


def _chunks(topology: Topology, importance: np.ndarray, round_to: int) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    start = 0
    for group in topology.groups:
        order = start + np.argsort(importance[start : start + group.size], kind="stable")
        start += group.size
        if group.kind == "branches":
            chunks.append(_Chunk(order, None))
            continue
        widths = [group.size, *range(round_to * ((group.size - 1) // round_to), 0, -round_to)]
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
    per_cost: bool,
    rounds: int,
) -> tuple[np.ndarray, list[int]]:
    """(what is kept, the chunks that went, in order): greedily, until the budget is met or nothing more may go."""
    keep, gone = np.ones(topology.units), []
    free = np.ones(len(chunks), bool)
    for i, chunk in enumerate(chunks):  # after one that stays, its successors stay
        free[i] = i not in staying and (chunk.before is None or bool(free[chunk.before]))
    for number in range(rounds):
        pressure = limits.pressure(topology, keep)
        if pressure <= 1.0:
            break
        goal = pressure + (1.0 - pressure) / (rounds - number)
        ratios = _ratios(chunks, importance, limits.marginal(topology, keep) if per_cost else np.ones(topology.units))
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
