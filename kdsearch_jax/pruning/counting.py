"""Costs on the device: `Cost` and measured bounds as functions of a few counts, in `jax.numpy`.

Units with equal columns in every cost are interchangeable, so a cost depends only on how many units of each such
*class* are kept. A class is usually a whole group; each residual branch is one. With n the (classes,) counts,

    share(n) = Σ_t w_t Π_k r_tk(n) Π_b n_tb,      r = (base + C n) / (base + C n of the whole network)

Each cost is a share of the whole network's, in float32: a count of 10¹² MACs fits neither float32 nor int32, but sizes
are integers below 2²⁴ and therefore exact, and no term is negative, so nothing cancels. The relative error is at most
(factors + log₂ terms) · 2⁻²⁴, about 10⁻⁶. This steers a search; the final choice of units is made on the host with
exact integers (`kdsearch_jax.pruning.landing`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdsearch_jax.pruning.costs import Estimate, Table
from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.topology import Topology

_DENSE = 1 << 22  # a matrix of class counts with up to so many entries is dense
_ONE_HOT = 1 << 18  # units are counted by a one-hot matrix with up to so many entries
_EXACT = 1 << 24  # integers up to here are exact in float32


@dataclass(frozen=True, eq=False)
class Classes:
    """of_unit: (units,) class of each unit; count: number of classes."""

    of_unit: np.ndarray
    count: int

    def counts(self, keep: Array) -> Array:
        """(classes,) float32 numbers of kept units; keep: (units,) of 0 and 1, or bool."""
        keep = keep.astype(jnp.float32)
        if keep.size * self.count <= _ONE_HOT:
            one_hot = self.of_unit[:, None] == np.arange(self.count)
            return jnp.dot(keep, one_hot.astype(np.float32), precision="highest")
        ordered = bool((np.diff(self.of_unit) >= 0).all())
        return jax.ops.segment_sum(keep, self.of_unit, self.count, indices_are_sorted=ordered)

    def spread(self, values: Array) -> Array:
        """(…, units) of (…, classes)."""
        return values[..., self.of_unit]


def classes_of(topology: Topology) -> Classes:
    """Finds the classes of interchangeable units."""
    random = np.random.default_rng(0)
    sums = np.zeros((topology.units, 2))
    for cost in (topology.macs, topology.params):  # equal columns have equal sums of random multiples
        sums += cost.counts.T @ random.uniform(1.0, 2.0, (len(cost.base), 2))
    group = np.repeat(np.arange(len(topology.groups)), [g.size for g in topology.groups])
    alone = np.zeros(topology.units, int)
    used = np.unique(np.concatenate([topology.macs.alive.ravel(), topology.params.alive.ravel()]))
    used = used[used >= 0].astype(int)
    alone[used] = 1 + np.arange(len(used))
    keys = np.column_stack([group, alone, np.round(sums, 6)])
    _, first, of_unit = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # numbered in order of appearance, so that units of a class are contiguous
    return Classes(rank[of_unit.ravel()].astype(np.int32), len(first))


@dataclass(frozen=True, eq=False)
class Polynomial:
    """constant + Σ_t weights_t Π_k r_tk Π_b n_tb, as in the module's docstring.

    Attributes:
      weights: (terms,).
      rows: (terms, k) indices of sizes.
      alive: (terms, b) indices of the branches' classes; the number of classes stands for none.
      base, whole: (sizes,).
      matrix: (sizes, classes).
    """

    weights: np.ndarray
    rows: np.ndarray
    alive: np.ndarray
    base: np.ndarray
    whole: np.ndarray
    matrix: np.ndarray
    constant: float = 0.0

    def __call__(self, counts: Array) -> Array:
        """() float32 share of counts (classes,)."""
        sizes = self.base.astype(np.float32) + self._product(counts)
        ratios = sizes / self.whole.astype(np.float32)
        kept_branches = jnp.append(counts, np.float32(1.0))
        # One factor after the other, so that the derivative of the product is exact at zeros.
        value = jnp.asarray(self.weights.astype(np.float32))
        for column in self.rows.T:
            value = value * ratios[column]
        for column in self.alive.T:
            value = value * kept_branches[column]
        return value.sum() + np.float32(self.constant)

    def _product(self, counts: Array) -> Array:
        if self.matrix.size <= _DENSE:
            return jnp.dot(self.matrix.astype(np.float32), counts, precision="highest")
        row, column = np.nonzero(self.matrix)
        values = self.matrix[row, column].astype(np.float32)
        return jax.ops.segment_sum(values * counts[column], row, len(self.base), indices_are_sorted=True)


def polynomial(cost: Cost, classes: Classes) -> tuple[Polynomial, float]:
    """(the cost as a share of the whole network's, that of the whole network)."""
    order = np.argsort(classes.of_unit, kind="stable")
    first = order[np.searchsorted(classes.of_unit[order], np.arange(classes.count))]
    matrix = np.asarray(cost.counts[:, first].todense(), float)
    number = np.bincount(classes.of_unit, minlength=classes.count).astype(float)
    whole = cost.base + matrix @ number
    assert whole.max(initial=0) < _EXACT
    alive = np.append(classes.of_unit, classes.count)[np.where(cost.alive < 0, len(classes.of_unit), cost.alive)]
    alive = np.sort(alive, axis=1)
    for b in range(1, alive.shape[1]):  # a branch ends a term once
        alive[alive[:, b] == alive[:, b - 1], b - 1] = classes.count
    constants = cost.constants * whole[cost.factors].prod(1)
    rows, alive, constants = _merged(np.sort(cost.factors, axis=1), np.sort(alive, axis=1), constants, classes.count)
    total = float(constants.sum())
    safe = np.where(whole > 0, whole, 1.0)
    return Polynomial(constants / max(total, 1e-300), rows, alive, cost.base, safe, matrix), total


def _merged(
    rows: np.ndarray, alive: np.ndarray, constants: np.ndarray, none: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Adds up terms with the same factors, and removes columns without effect."""
    keys, inverse = np.unique(np.hstack([rows, alive]), axis=0, return_inverse=True)
    constants = np.bincount(inverse.ravel(), constants, minlength=len(keys))
    rows, alive = keys[:, : rows.shape[1]], keys[:, rows.shape[1] :]
    return rows[:, (rows != 0).any(0)], alive[:, (alive != none).any(0)], constants


def modelled(estimate: Estimate, topology: Topology, classes: Classes) -> Callable[[Array], Array]:
    """An `Estimate` as a share of that of the whole network."""
    macs, all_macs = polynomial(topology.macs, classes)
    params, all_params = polynomial(topology.params, classes)
    a, b = estimate.macs * all_macs / estimate.whole, estimate.params * all_params / estimate.whole
    names = [group.name for group in topology.groups]
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    sizes = np.diff(starts)
    weights = np.array([estimate.units.get(name, 0.0) for name in names]) / estimate.whole
    matrix = np.zeros((len(names), classes.count))
    for i in range(len(names)):
        matrix[i, np.unique(classes.of_unit[starts[i] : starts[i + 1]])] = 1.0
    holders = [
        [branch for branch, held in estimate.inside.items() if name in held and branch in names] for name in names
    ]
    depth = max([len(each) for each in holders] + [0])
    alive = np.full((len(names), depth), classes.count)
    for i, branches in enumerate(holders):
        for j, branch in enumerate(branches):
            alive[i, j] = classes.of_unit[starts[names.index(branch)]]
    rows = np.arange(len(names))[:, None]
    ones, zeros = np.ones(len(names)), np.zeros(len(names))
    units = Polynomial(weights, rows, alive, zeros, ones, matrix, 1.0 - a - b - float(weights @ sizes))
    return lambda counts: units(counts) + np.float32(a) * macs(counts) + np.float32(b) * params(counts)


@dataclass(frozen=True, eq=False)
class Costs:
    """All costs of a network, on the device.

    Attributes:
      names: "macs", "params", then measured costs.
      shares: functions of (classes,) counts.
      whole: (costs,) of the whole network.
    """

    classes: Classes
    names: tuple[str, ...]
    shares: tuple[Callable[[Array], Array], ...]
    whole: np.ndarray

    @staticmethod
    def of(topology: Topology, measured: Sequence[Estimate | Table] = ()) -> Costs:
        """The costs of a topology, and measured ones."""
        classes = classes_of(topology)
        counted = [polynomial(cost, classes) for cost in (topology.macs, topology.params)]
        shares: list[Any] = [share for share, _ in counted]
        for each in measured:
            table = isinstance(each, Table)
            shares.append(each.share(topology, classes) if table else modelled(each, topology, classes))  # type: ignore
        whole = np.array([total for _, total in counted] + [each.whole for each in measured])
        return Costs(classes, ("macs", "params", *(each.name for each in measured)), tuple(shares), whole)

    def total(self, keep: Array) -> Array:
        """(costs,) float32 shares of the whole network; keep: (units,)."""
        return self.of_counts(self.classes.counts(keep))

    def of_counts(self, counts: Array) -> Array:
        """(costs,) float32 shares of the whole network; counts: (classes,)."""
        return jnp.stack([share(counts) for share in self.shares])

    def marginal(self, keep: Array, numbers: Sequence[int] | None = None) -> Array:
        """(costs, units) derivatives of `total`: the share that one more unit adds; numbers: of some costs only."""
        counts = self.classes.counts(keep)
        shares = self.shares if numbers is None else [self.shares[number] for number in numbers]
        return self.classes.spread(jnp.stack([jnp.maximum(jax.grad(share)(counts), 0.0) for share in shares]))
