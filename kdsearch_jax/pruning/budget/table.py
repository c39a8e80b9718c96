"""Bounded costs by chains of pieces: what `exact` goes through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from kdsearch_jax.pruning.budget.limits import Limits
from kdsearch_jax.pruning.budget.pieces import Pieces
from kdsearch_jax.tracing.topology import Topology


@dataclass(frozen=True)
class _Sums:
    """Costs as sums of products of sizes, each size a constant plus what the pieces that stay give to it.

    constants: (terms,); bounds: (terms,) which bound a term adds to; factors: (terms, k) numbers of sizes, padded with
    that of a size that is always 1; base: (sizes,) with every piece gone; gives: (sizes, pieces).
    """

    constants: np.ndarray
    bounds: np.ndarray
    factors: np.ndarray
    base: np.ndarray
    gives: np.ndarray

    @staticmethod
    def of(topology: Topology, limits: Limits, pieces: Pieces) -> _Sums:
        """The costs that the limits bound; whether a branch is alive is a size as well."""
        always = np.ones(topology.units)
        always[pieces.units] = 0.0
        owner = np.repeat(np.arange(len(pieces)), np.diff(pieces.starts))
        member = sparse.csr_array((np.ones(len(owner)), (pieces.units, owner)), shape=(topology.units, len(pieces)))
        constants, bounds, factors = [], [], []
        base, gives, count = [np.ones(1)], [np.zeros((1, len(pieces)))], 1
        for number, polynomial in enumerate(limits.polynomials(topology)):
            for scale, cost in polynomial.costs:
                branches = np.unique(cost.alive[cost.alive >= 0])
                alive = np.where(cost.alive >= 0, np.searchsorted(branches, cost.alive) + count + len(cost.base), 0)
                factors.append(np.concatenate([cost.factors + count, alive], 1))
                constants.append(scale * cost.constants)
                bounds.append(np.full(len(cost.constants), number))
                base += [cost.base + cost.counts @ always, always[branches]]
                gives += [
                    sparse.csr_array(cost.counts @ member).toarray(),
                    sparse.csr_array(member[branches]).toarray(),
                ]
                count += len(cost.base) + len(branches)
        width = max(each.shape[1] for each in factors)
        factors = [np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in factors]
        return _Sums(*map(np.concatenate, (constants, bounds, factors, base, gives)))

    def simplified(self) -> _Sums:
        """The same with sizes that are equal whatever goes made one, and terms of the same sizes added up.

        Size 0 is 1; sizes that nothing changes are in the constants.
        """
        rows = np.concatenate([self.base[:, None], self.gives], 1)
        rows, number = np.unique(rows, axis=0, return_inverse=True)
        varies = (rows[:, 1:] != 0).any(1)
        number = number.ravel()[self.factors]
        constants = self.constants * np.where(varies, 1.0, rows[:, 0])[number].prod(1)
        factors = np.sort(np.where(varies, np.cumsum(varies), 0)[number], 1)
        terms, where = np.unique(np.concatenate([self.bounds[:, None], factors], 1), axis=0, return_inverse=True)
        constants = np.bincount(where.ravel(), constants, len(terms))
        one = np.zeros((1, self.gives.shape[1]))
        gives = np.concatenate([one, rows[varies, 1:]])
        return _Sums(constants, terms[:, 0], terms[:, 1:], np.append(1.0, rows[varies, 0]), gives)


@dataclass(frozen=True)
class Table:
    """Costs by what is decided of each chain.

    order: the chains as they are decided; limits, offsets: (bounds,) of costs; sums: the costs; gives: of each chain
    (levels, sizes), what it adds to the sizes by how many of its pieces are gone; used: (terms, sizes) whether a size
    is a factor of a term; first, last: (terms,) the place in `order` of the first and last chain that a term depends
    on, −1 for none.
    """

    order: tuple[int, ...]
    limits: np.ndarray
    offsets: np.ndarray
    sums: _Sums
    gives: tuple[np.ndarray, ...]
    used: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @staticmethod
    def of(topology: Topology, limits: Limits, pieces: Pieces) -> Table:
        """The costs that the limits bound; there must be a piece."""
        sums = _Sums.of(topology, limits, pieces).simplified()
        none = np.zeros((1, len(sums.base)))
        each = [sums.gives[:, list(chain)].T[::-1].cumsum(0)[::-1] for chain in pieces.chains]
        gives = tuple(np.concatenate([levels, none]) for levels in each)
        used = np.zeros((len(sums.constants), len(sums.base)), bool)
        used[np.arange(len(used))[:, None], sums.factors] = True
        used[:, 0] = False
        depends = used @ np.stack([levels[0] != 0 for levels in gives]).T  # (terms, chains)
        order = _order(depends, [len(levels) for levels in gives])
        placed = depends[:, list(order)]
        first = np.where(placed.any(1), placed.argmax(1), -1)
        last = np.where(placed.any(1), len(order) - 1 - placed[:, ::-1].argmax(1), -1)
        polynomials = limits.polynomials(topology)
        ends = np.array([each.limit for each in polynomials]), np.array([each.offset for each in polynomials])
        return Table(order, *ends, sums, gives, used, first, last)

    @property
    def base(self) -> np.ndarray:
        """(sizes,) with every piece gone."""
        return self.sums.base

    def costs(self, sizes: np.ndarray, terms: np.ndarray) -> np.ndarray:
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

    def rest(self, position: int) -> np.ndarray:
        """(sizes,) what the chains after a place in the order give at most."""
        return sum((self.gives[chain][0] for chain in self.order[position + 1 :]), np.zeros(len(self.base)))

    def pressures(self, sizes: np.ndarray, totals: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """(states,) of the completion in which every piece to come is gone, and of that in which all stay.

        totals: (states, bounds) costs of the terms that ended before `position`.
        """
        begun = np.flatnonzero((self.first >= 0) & (self.first <= position) & (self.last >= position))
        later = np.flatnonzero(self.first > position)
        found = []
        for rest in (np.zeros(len(self.base)), self.rest(position)):
            alike = self.costs((self.base + rest)[None], later)
            costs = totals + self.costs(sizes + rest, begun) + alike
            found.append((costs / self.limits).max(1))
        return found[0], found[1]

    def keys(self, sizes: np.ndarray, totals: np.ndarray, position: int) -> np.ndarray:
        """(states, n) integers: equal where all completions cost the same."""
        done = totals + self.costs(sizes, np.flatnonzero(self.last == position))
        open_terms = (self.first <= position) & (self.last > position)
        live = self.used[open_terms].any(0) if open_terms.any() else np.zeros(len(self.base), bool)
        return np.concatenate([np.round(done / self.limits * 1e12), sizes[:, live]], 1).astype(np.int64)


def _order(by_term: np.ndarray, levels: list[int]) -> tuple[int, ...]:
    """The chains, each the one after which fewest of those decided still meet one that is not, in the same term.

    by_term: (terms, chains) whether a term depends on a chain.
    """
    meets = (by_term.T.astype(np.int32) @ by_term) > 0
    done = np.zeros(len(levels), bool)
    order: list[int] = []
    while not done.all():
        waiting = meets & ~done  # (chains, those not decided)

        def open_after(chain: int, waiting: np.ndarray = waiting) -> tuple[int, int, int]:
            there = done.copy()
            there[chain] = True
            left = waiting.copy()
            left[:, chain] = False
            return int((there & left.any(1)).sum()), levels[chain], chain

        nearby = np.flatnonzero(~done & meets[done].any(0)) if done.any() else np.flatnonzero(~done)
        chosen = min((nearby if len(nearby) else np.flatnonzero(~done)).tolist(), key=open_after)
        done[chosen] = True
        order.append(chosen)
    return tuple(order)
