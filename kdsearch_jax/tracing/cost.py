"""Exact costs as polynomials in the numbers of kept units.

Let x ∈ {0, 1}ᵘ say which of the u units are kept. The size of every axis is affine in x,

    sᵢ(x) = baseᵢ + Σⱼ countsᵢⱼ xⱼ,

and each convolution or dot product costs (constant) × (its axis sizes), unless it is part of a removed residual branch.
So multiply-accumulates and parameters are

    cost(x) = Σₜ cₜ · ∏_{i ∈ factors(t)} sᵢ(x) · ∏_{b ∈ branches(t)} x_b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Cost:
    """A cost polynomial over `units` units, see the module's docstring.

    Attributes:
      constants: (terms,) the cₜ.
      factors: (terms, k) rows of `counts`; padded with row 0, whose size is always 1.
      alive: (terms, b) the units of branches that a term is part of; padded with -1.
      base: (sizes,) numbers of indices that always stay.
      counts: sparse (sizes, units).
    """

    constants: np.ndarray
    factors: np.ndarray
    alive: np.ndarray
    base: np.ndarray
    counts: sparse.csr_matrix

    def _factors(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.base + self.counts @ keep
        alive = np.where(self.alive < 0, 1.0, np.append(keep, 1.0)[self.alive]).prod(1)
        return sizes[self.factors], alive

    def total(self, keep: np.ndarray) -> float:
        """The cost of keeping `keep`, a (units,) vector of 0 and 1 in the order of `Topology.flatten`."""
        sizes, alive = self._factors(np.asarray(keep, float))
        return float((self.constants * sizes.prod(1) * alive).sum())

    def marginal(self, keep: np.ndarray) -> np.ndarray:
        """(units,) gradient of `total`: the cost of one more unit of a group; for a branch, all that it costs."""
        keep = np.asarray(keep, float)
        sizes, alive = self._factors(keep)
        slope = np.zeros(len(self.base))
        for k in range(sizes.shape[1]):
            others = np.delete(sizes, k, 1).prod(1)
            np.add.at(slope, self.factors[:, k], self.constants * others * alive)
        slope[0] = 0.0
        result = self.counts.T @ slope
        for b in range(self.alive.shape[1]):
            first = (self.alive[:, :b] != self.alive[:, b : b + 1]).all(1)  # a term may hold a branch more than once
            used = (self.alive[:, b] >= 0) & first
            units = self.alive[used, b]
            rest = np.where(self.alive[used] == units[:, None], -1, self.alive[used])
            others = np.where(rest < 0, 1.0, np.append(keep, 1.0)[rest]).prod(1)
            np.add.at(result, units, self.constants[used] * sizes[used].prod(1) * others)
        return result

    def restrict(self, free: np.ndarray) -> Cost:
        """The cost as a polynomial in the units in `free`, (units,) bool; the others are always kept."""
        number = np.where(free, np.cumsum(free) - 1, -1)
        base = self.base + np.asarray(self.counts[:, ~free].sum(1)).ravel()
        alive = np.where(self.alive >= 0, number[self.alive], -1) if self.alive.size else self.alive
        return Cost(self.constants, self.factors, alive, base, self.counts[:, free].tocsr())


class CostBuilder:
    """Collects axis sizes as counts of kept units; equal axes share a row. Row 0 is the constant 1.

    Args:
      unit_of: (labels,) the unit of each label, or -1.
      units: the number of units.
    """

    def __init__(self, unit_of: np.ndarray, units: int):
        self.unit_of, self.units = unit_of, units
        self.rows: dict[bytes, int] = {b"": 0}
        self.base: list[float] = [1.0]
        self.entries: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, int), np.zeros(0))]

    def row(self, axis: np.ndarray | int) -> int:
        """The row of an axis, given by its labels or, where it has none, by its size."""
        numbers = np.full(axis, -1) if isinstance(axis, int) else self.unit_of[axis]
        key = numbers.tobytes()
        if key not in self.rows:
            self.rows[key] = len(self.base)
            self.base.append(float((numbers < 0).sum()))
            units = numbers[numbers >= 0]
            ascending = (np.diff(units) > 0).all()  # the usual case, in which every unit occurs once
            self.entries.append((units, np.ones(len(units))) if ascending else np.unique(units, return_counts=True))
        return self.rows[key]

    def cost(self, terms: Sequence[tuple[float, list[int], tuple[int, ...]]]) -> Cost:
        """The sum of `terms`, each a (constant, rows of its axes, units of the branches it is part of)."""
        width = max([len(rows) for _, rows, _ in terms] + [1])
        depth = max([len(alive) for _, _, alive in terms] + [1])
        factors = np.array([rows + [0] * (width - len(rows)) for _, rows, _ in terms], int).reshape(-1, width)
        alive = np.array([list(a) + [-1] * (depth - len(a)) for *_, a in terms], int).reshape(-1, depth)
        indptr = np.cumsum([0] + [len(u) for u, _ in self.entries])
        columns = np.concatenate([u for u, _ in self.entries]).astype(int)
        values = np.concatenate([n for _, n in self.entries]).astype(float)
        counts = sparse.csr_matrix((values, columns, indptr), shape=(len(self.base), self.units))
        return Cost(np.array([c for c, *_ in terms], float), factors, alive, np.array(self.base), counts)
