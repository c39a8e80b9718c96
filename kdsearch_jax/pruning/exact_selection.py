"""The best selection of all, by dynamic programming over the chains of pieces.

Chains are decided one after the other. If everything that follows costs the same for two partial selections, they are
one state and only the one of higher worth is kept: a stack of similar blocks has few states, however many selections
there are. A state is dropped if all of its completions cost too much or too little. If there are too many states, the
one of highest worth in each range of costs survives, and the result is the best one found instead of the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from kdsearch_jax.pruning.budgets import FLOOR, Limits
from kdsearch_jax.pruning.pieces import Pieces
from kdsearch_jax.tracing.topology import Topology

WORK = 1_000_000  # states visited in total, about a second
SLACK = 1e-9  # tolerance to rounding when a state is dropped by its cost
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Outcome:
    """Flat selections.

    Attributes:
      best: within the limits: the one of highest worth in [FLOOR, 1] of them, or else the costliest below.
      above: the cheapest selection beyond the limits; None if there is none, or if `best` is in [FLOOR, 1].
      complete: no state was left out, so `best` is the optimum.
    """

    best: np.ndarray
    above: np.ndarray | None
    complete: bool


def best_selection(topology: Topology, limits: Limits, pieces: Pieces, work: int = WORK) -> Outcome | None:
    """Visits the selections; None if none of those visited is within the limits."""
    costs = _ChainCosts.of(topology, limits, pieces)
    states, history = _States.initial(costs), []
    bottom, top, complete = 0.0, np.inf, True
    rows = max(work // len(pieces.chains), 1000)
    for position, chain in enumerate(costs.order):
        states = states.expanded(costs, pieces, chain)
        lowest, highest = costs.pressures(states.sizes, states.totals, position)
        both = np.concatenate([lowest, highest])
        if ((both >= FLOOR) & (both <= 1.0)).any():
            bottom, top = FLOOR, 1.0
        else:
            bottom = max(bottom, both[both <= 1.0].max(initial=0.0))
            top = min(top, both[both > 1.0].min(initial=np.inf))
        index = np.flatnonzero((lowest <= top * (1 + SLACK)) & (highest >= bottom * (1 - SLACK)))
        keys = costs.keys(states.sizes[index], states.totals[index], position)
        index = index[_best_by_key(keys, states.worth[index])]
        next_levels = len(pieces.chains[costs.order[position + 1]]) + 1 if position + 1 < len(costs.order) else 1
        if len(index) * next_levels > rows:
            index = index[_best_by_cost(lowest[index], states.worth[index], max(rows // next_levels, 1))]
            complete = False
        states = states.at(index).with_finished_terms(costs, position)
        history.append((chain, states.parent, states.level))
    pressures = (states.totals / costs.limits).max(1)
    best = _best_within(pressures, states.worth)
    if best is None:
        return None
    beyond = np.where(pressures > 1.0, pressures, np.inf)
    cheapest = int(beyond.argmin()) if pressures[best] < FLOOR and np.isfinite(beyond).any() else None
    above = None if cheapest is None else _keep_of(topology, pieces, history, cheapest)
    return Outcome(_keep_of(topology, pieces, history, best), above, complete)


def _best_by_key(keys: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """Numbers of the rows of highest worth among those of equal keys; keys: (rows, n) integers."""
    if not len(keys):
        return np.zeros(0, int)
    mixed = keys.view(np.uint64) * np.cumprod(np.full(keys.shape[1], MIX))
    mixed = (mixed ^ (mixed >> np.uint64(29))).sum(1, dtype=np.uint64)
    return _first_in_bucket(mixed, worth)


def _best_by_cost(cost: np.ndarray, worth: np.ndarray, count: int) -> np.ndarray:
    """Numbers of `count` rows over the whole range of costs, the one of highest worth in each part of the range."""
    rank = np.argsort(np.argsort(cost, kind="stable"), kind="stable")
    return _first_in_bucket(rank * count // len(cost), worth)


def _first_in_bucket(bucket: np.ndarray, worth: np.ndarray) -> np.ndarray:
    order = np.lexsort((-worth, bucket))
    bucket = bucket[order]
    return np.sort(order[np.append(True, bucket[1:] != bucket[:-1])])


def _best_within(pressures: np.ndarray, worth: np.ndarray) -> int | None:
    """The state that `Outcome.best` describes."""
    if not (pressures <= 1.0).any():
        return None
    reached = np.where(pressures <= 1.0, np.minimum(pressures, FLOOR), -1.0)
    return int(np.lexsort((worth, reached))[-1])


def _keep_of(
    topology: Topology, pieces: Pieces, history: list[tuple[int, np.ndarray, np.ndarray]], state: int
) -> np.ndarray:
    """The flat keep of a final state, traced back through its parents."""
    keep = np.ones(topology.units)
    for chain, parent, level in reversed(history):
        keep = pieces.without(keep, pieces.chains[chain][: level[state]])
        state = int(parent[state])
    return keep


@dataclass(frozen=True)
class _States:
    """Partial selections.

    sizes: (states, sizes) if every undecided piece is removed; totals: (states, bounds) of the terms that are decided;
    worth: (states,) of the pieces kept; parent, level: the state each came from, and how many pieces it removed.
    """

    sizes: np.ndarray
    totals: np.ndarray
    worth: np.ndarray
    parent: np.ndarray
    level: np.ndarray

    @staticmethod
    def initial(costs: _ChainCosts) -> _States:
        """The state before any decision."""
        sizes = costs.sums.base[None]
        totals = costs.offsets + costs.of_terms(sizes, np.flatnonzero(costs.first < 0))
        return _States(sizes, totals, np.zeros(1), np.zeros(1, int), np.zeros(1, int))

    def expanded(self, costs: _ChainCosts, pieces: Pieces, chain: int) -> _States:
        """Every state with every number of pieces of a chain removed."""
        adds, worth = costs.adds[chain], pieces.worth[list(pieces.chains[chain])]
        kept_worth = np.append(np.cumsum(worth[::-1])[::-1], 0.0)  # by number of pieces removed
        parent = np.repeat(np.arange(len(self.worth)), len(adds))
        level = np.tile(np.arange(len(adds)), len(self.worth))
        sizes = self.sizes[parent] + adds[level]
        return _States(sizes, self.totals[parent], self.worth[parent] + kept_worth[level], parent, level)

    def at(self, index: np.ndarray) -> _States:
        """The states of these numbers."""
        return _States(self.sizes[index], self.totals[index], self.worth[index], self.parent[index], self.level[index])

    def with_finished_terms(self, costs: _ChainCosts, position: int) -> _States:
        """The terms that depend on no chain after `position` are added to the totals."""
        ended = costs.of_terms(self.sizes, np.flatnonzero(costs.last == position))
        return _States(self.sizes, self.totals + ended, self.worth, self.parent, self.level)


# --- costs by what is decided of each chain ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Costs as sums of products of sizes, each size a constant plus what the kept pieces add to it.

    constants: (terms,); bounds: (terms,) the bound that a term adds to; factors: (terms, k) numbers of sizes, padded
    with 0, a size that is always 1; base: (sizes,) with every piece removed; adds: (sizes, pieces).
    """

    constants: np.ndarray
    bounds: np.ndarray
    factors: np.ndarray
    base: np.ndarray
    adds: np.ndarray

    @staticmethod
    def of(topology: Topology, limits: Limits, pieces: Pieces) -> _Sums:
        """The costs that the limits bound. Whether a branch is kept is a size as well."""
        always = np.ones(topology.units)
        always[pieces.units] = 0.0
        owner = np.repeat(np.arange(len(pieces)), np.diff(pieces.starts))
        member = sparse.csr_array((np.ones(len(owner)), (pieces.units, owner)), shape=(topology.units, len(pieces)))
        constants, bounds, factors = [], [], []
        base, adds, count = [np.ones(1)], [np.zeros((1, len(pieces)))], 1
        for number, polynomial in enumerate(limits.polynomials(topology)):
            for scale, cost in polynomial.costs:
                branches = np.unique(cost.alive[cost.alive >= 0])
                alive = np.where(cost.alive >= 0, np.searchsorted(branches, cost.alive) + count + len(cost.base), 0)
                factors.append(np.concatenate([cost.factors + count, alive], 1))
                constants.append(scale * cost.constants)
                bounds.append(np.full(len(cost.constants), number))
                base += [cost.base + cost.counts @ always, always[branches]]
                adds += [
                    sparse.csr_array(cost.counts @ member).toarray(),
                    sparse.csr_array(member[branches]).toarray(),
                ]
                count += len(cost.base) + len(branches)
        width = max(numbers.shape[1] for numbers in factors)
        factors = [np.pad(numbers, ((0, 0), (0, width - numbers.shape[1]))) for numbers in factors]
        return _Sums(*map(np.concatenate, (constants, bounds, factors, base, adds)))

    def simplified(self) -> _Sums:
        """Equal sizes merged, constant sizes moved into the constants, terms of the same sizes added up."""
        rows = np.concatenate([self.base[:, None], self.adds], 1)
        rows, number = np.unique(rows, axis=0, return_inverse=True)
        varies = (rows[:, 1:] != 0).any(1)
        number = number.ravel()[self.factors]
        constants = self.constants * np.where(varies, 1.0, rows[:, 0])[number].prod(1)
        factors = np.sort(np.where(varies, np.cumsum(varies), 0)[number], 1)
        terms, where = np.unique(np.concatenate([self.bounds[:, None], factors], 1), axis=0, return_inverse=True)
        constants = np.bincount(where.ravel(), constants, len(terms))
        one = np.zeros((1, self.adds.shape[1]))
        adds = np.concatenate([one, rows[varies, 1:]])
        return _Sums(constants, terms[:, 0], terms[:, 1:], np.append(1.0, rows[varies, 0]), adds)


@dataclass(frozen=True)
class _ChainCosts:
    """Costs by how many pieces of each chain are removed.

    order: the chains in the order of decision; limits, offsets: (bounds,); sums: the costs; adds: for each chain
    (levels, sizes), what it adds to the sizes by the number of its pieces removed; used: (terms, sizes) whether a size
    is a factor of a term; first, last: (terms,) position in `order` of the first and last chain that a term depends on,
    −1 for none.
    """

    order: tuple[int, ...]
    limits: np.ndarray
    offsets: np.ndarray
    sums: _Sums
    adds: tuple[np.ndarray, ...]
    used: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @staticmethod
    def of(topology: Topology, limits: Limits, pieces: Pieces) -> _ChainCosts:
        """The costs that the limits bound; there must be at least one piece."""
        sums = _Sums.of(topology, limits, pieces).simplified()
        none = np.zeros((1, len(sums.base)))
        kept = [sums.adds[:, list(chain)].T[::-1].cumsum(0)[::-1] for chain in pieces.chains]
        adds = tuple(np.concatenate([levels, none]) for levels in kept)
        used = np.zeros((len(sums.constants), len(sums.base)), bool)
        used[np.arange(len(used))[:, None], sums.factors] = True
        used[:, 0] = False
        depends = used @ np.stack([levels[0] != 0 for levels in adds]).T  # (terms, chains)
        order = _decision_order(depends, [len(levels) for levels in adds])
        ordered = depends[:, list(order)]
        first = np.where(ordered.any(1), ordered.argmax(1), -1)
        last = np.where(ordered.any(1), len(order) - 1 - ordered[:, ::-1].argmax(1), -1)
        polynomials = limits.polynomials(topology)
        bounds, offsets = (np.array([getattr(p, name) for p in polynomials]) for name in ("limit", "offset"))
        return _ChainCosts(order, bounds, offsets, sums, adds, used, first, last)

    def of_terms(self, sizes: np.ndarray, terms: np.ndarray) -> np.ndarray:
        """(states, bounds) what these terms add to the costs; sizes: (states, sizes)."""
        result = np.zeros((len(sizes), len(self.offsets)))
        if not len(terms):
            return result
        values = np.broadcast_to(self.sums.constants[terms], (len(sizes), len(terms))).copy()
        for column in self.sums.factors[terms].T:
            if column.any():
                values *= sizes[:, column]
        for bound in range(len(self.offsets)):
            result[:, bound] = values[:, self.sums.bounds[terms] == bound].sum(1)
        return result

    def pressures(self, sizes: np.ndarray, totals: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """((states,) if every undecided piece is removed, (states,) if all of them are kept).

        totals: (states, bounds) costs of the terms that ended before `position`.
        """
        begun = np.flatnonzero((self.first >= 0) & (self.first <= position) & (self.last >= position))
        later = np.flatnonzero(self.first > position)
        base = self.sums.base
        kept = sum((self.adds[chain][0] for chain in self.order[position + 1 :]), np.zeros(len(base)))
        result = []
        for rest in (np.zeros(len(base)), kept):
            costs = totals + self.of_terms(sizes + rest, begun) + self.of_terms((base + rest)[None], later)
            result.append((costs / self.limits).max(1))
        return result[0], result[1]

    def keys(self, sizes: np.ndarray, totals: np.ndarray, position: int) -> np.ndarray:
        """(states, n) integers, equal if all completions cost the same."""
        done = totals + self.of_terms(sizes, np.flatnonzero(self.last == position))
        open_terms = (self.first <= position) & (self.last > position)
        live = self.used[open_terms].any(0) if open_terms.any() else np.zeros(len(self.sums.base), bool)
        return np.concatenate([np.round(done / self.limits * 1e12), sizes[:, live]], 1).astype(np.int64)


def _decision_order(depends: np.ndarray, levels: list[int]) -> tuple[int, ...]:
    """The chains; each is the one that leaves the fewest decided chains in a common term with an undecided one.

    depends: (terms, chains) whether a term depends on a chain.
    """
    meets = (depends.T.astype(np.int32) @ depends) > 0
    done = np.zeros(len(levels), bool)
    order: list[int] = []
    while not done.all():
        waiting = meets & ~done  # (chains, undecided chains)

        def open_after(chain: int, waiting: np.ndarray = waiting) -> tuple[int, int, int]:
            decided = done.copy()
            decided[chain] = True
            left = waiting.copy()
            left[:, chain] = False
            return int((decided & left.any(1)).sum()), levels[chain], chain

        nearby = np.flatnonzero(~done & meets[done].any(0)) if done.any() else np.flatnonzero(~done)
        chosen = min((nearby if len(nearby) else np.flatnonzero(~done)).tolist(), key=open_after)
        done[chosen] = True
        order.append(chosen)
    return tuple(order)
