"""Measured costs: numbers such as latency or memory for any selection of units, from a table or a fitted model.

`Table` interpolates what the parts of a network take at a few widths:

    cost(keep) = constant + Σ_p value_p(kept units of its one or two groups) · (whether its residual branch is kept)

`Estimate` is a model with non-negative prices, fitted to measurements of a few students:

    cost(keep) = whole − a (MACs − MACs(keep)) − b (parameters − parameters(keep)) − Σ_g w_g (size_g − kept_g(keep))

where kept_g counts the kept units of group g, none if a residual branch that contains the group is removed. The MACs
and parameters account for two narrow layers in a row that save less than the sum of what each alone saves; the units
account for costs that are not proportional to them. Prices are never negative, so more units never cost less, which
the search and the selection rely on.

The tables can come from any source: a clock, a compiler's estimate, a data sheet. If the cost is a staircase, such as
multiples of 128 on a TPU, put knots at its steps and set `Budget.round_to` to the same multiple.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import sparse

from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.topology import Group, Topology

if TYPE_CHECKING:
    from kdsearch_jax.pruning.counting import Classes


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The cost of one part of a network by the widths of the groups it depends on.

    Between knots the cost is interpolated (bilinearly for two groups), beyond the last knot it is extrapolated. The
    price of a unit is the slope of the cell to its left, at least 0.

    Attributes:
      groups: one or two names of groups.
      widths: for each group two or more ascending widths, the knots.
      values: the cost at the knots, of shape (widths,) or (widths, widths).
      branch: name of the residual branch without which the part costs nothing.

    Raises:
      ValueError: the shapes do not match, or the widths are not ascending.
    """

    groups: tuple[str, ...]
    widths: tuple[tuple[float, ...], ...]
    values: Any
    branch: str | None = None

    def __post_init__(self) -> None:
        shape = tuple(len(knots) for knots in self.widths)
        if len(self.groups) not in (1, 2) or len(shape) != len(self.groups) or np.shape(self.values) != shape:
            raise ValueError(
                f"Part: values of shape {np.shape(self.values)} for groups {self.groups} and {shape} widths; give one "
                "or two groups, and a value for each of their widths"
            )
        if any(len(knots) < 2 or (np.diff(knots) <= 0).any() for knots in self.widths):
            raise ValueError(f"Part: widths of {self.groups} must be two or more, in ascending order")

    def value(self, widths: Any, xp: Any = np) -> tuple[Any, list[Any]]:
        """(interpolated cost, its rise over the cell along each axis) at a scalar width of each group.

        Args:
          xp: numpy or jax.numpy.
        """
        cells, places = [], []
        for knots, width in zip(self.widths, widths, strict=True):
            grid = xp.asarray(knots, xp.float32 if xp is jnp else float)
            cell = xp.clip(xp.searchsorted(grid, width, side="left") - 1, 0, len(knots) - 2)
            cells.append(cell)
            places.append((width - grid[cell]) / (grid[cell + 1] - grid[cell]))
        table = xp.asarray(self.values, xp.float32 if xp is jnp else float)
        if len(cells) == 1:
            low, high = table[cells[0]], table[cells[0] + 1]
            return low + places[0] * (high - low), [high - low]
        (i, j), (s, t) = cells, places
        a, b, c, d = table[i, j], table[i, j + 1], table[i + 1, j], table[i + 1, j + 1]
        top, bottom = a + t * (b - a), c + t * (d - c)
        return top + s * (bottom - top), [bottom - top, (b - a) + s * ((d - c) - (b - a))]

    def cell_widths(self, widths: Any) -> list[float]:
        """Widths of the cells that `value` reads, to turn its rises into slopes."""
        result = []
        for knots, width in zip(self.widths, widths, strict=True):
            cell = int(np.clip(np.searchsorted(knots, width, side="left") - 1, 0, len(knots) - 2))
            result.append(knots[cell + 1] - knots[cell])
        return result


@dataclass(frozen=True)
class Table:
    """A measured cost as the sum of its parts.

    Attributes:
      name: such as "latency".
      parts: costs that depend on widths.
      constant: cost that no unit changes, in the same unit.
      whole, sizes: cost of the whole network and the sizes of its groups, filled in by `on`.
    """

    name: str
    parts: tuple[Part, ...]
    constant: float = 0.0
    whole: float = 0.0
    sizes: Mapping[str, int] = field(default_factory=dict)

    def on(self, topology: Topology) -> Table:
        """The table for a network. Later topologies with fewer groups count the other groups as whole.

        Raises:
          ValueError: a part names a group that the network does not have, or the whole network costs nothing.
        """
        sizes = {group.name: group.size for group in topology.groups}
        for part in self.parts:
            for name in (*part.groups, *filter(None, [part.branch])):
                if name not in sizes:
                    near = difflib.get_close_matches(name, sizes, 1, 0.0)
                    raise ValueError(
                        f"table {self.name!r}: the network has no group {name!r}; the nearest is {near[0]!r}"
                    )
        whole = self.total(topology, np.ones(topology.units))
        if not whole > 0:
            raise ValueError(f"table {self.name!r}: the whole network costs {whole}, which must be above 0")
        return replace(self, whole=whole, sizes=sizes)

    def total(self, topology: Topology, keep: np.ndarray) -> float:
        """The cost of the flat `keep`, (units,) of 0 and 1."""
        widths = self._widths(topology, keep)
        return self.constant + sum(
            float(part.value([widths[g] for g in part.groups])[0]) * _is_kept(part, widths) for part in self.parts
        )

    def marginal(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(units,) cost of one more unit, at least 0; for a branch, of everything inside of it."""
        widths = self._widths(topology, keep)
        slopes = dict.fromkeys(widths, 0.0)
        for part in self.parts:
            at = [widths[g] for g in part.groups]
            value, rises = part.value(at)
            for group, rise, cell_width in zip(part.groups, rises, part.cell_widths(at), strict=True):
                slopes[group] += float(rise) / cell_width * _is_kept(part, widths)
            if part.branch is not None:
                slopes[part.branch] += float(value)
        return np.concatenate([np.full(g.size, max(slopes[g.name], 0.0)) for g in topology.groups])

    def share(self, topology: Topology, classes: Classes) -> Callable[[Array], Array]:
        """A function from (classes,) counts to the cost as a share of the whole network's, () float32."""
        starts = np.cumsum([0] + [group.size for group in topology.groups])
        classes_of_group = {
            group.name: np.unique(classes.of_unit[a:b])
            for group, (a, b) in zip(topology.groups, pairwise(starts), strict=True)
        }

        def share(counts: Array) -> Array:
            def width(name: str) -> Array:
                if name in classes_of_group:
                    return counts[classes_of_group[name]].sum()
                return jnp.float32(self.sizes[name])

            value = jnp.float32(self.constant)
            for part in self.parts:
                cost, _ = part.value([width(name) for name in part.groups], jnp)
                value = value + (cost if part.branch is None else cost * width(part.branch))
            return value / np.float32(self.whole)

        return share

    def _widths(self, topology: Topology, keep: np.ndarray) -> dict[str, float]:
        kept = topology.unflatten(np.asarray(keep, float))
        return {**self.sizes, **{name: float(np.sum(vector)) for name, vector in kept.items()}}


def _is_kept(part: Part, widths: dict[str, float]) -> float:
    return 1.0 if part.branch is None else widths[part.branch]


# --- fitted models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A model of a measured cost, see the module's docstring.

    Attributes:
      name: what is modelled. whole: the cost of the whole network.
      macs, params, units: the prices a, b and {group: w}, all at least 0.
      inside: {residual branch: groups that it contains}, see `groups_inside_branches`.
    """

    name: str
    whole: float
    macs: float = 0.0
    params: float = 0.0
    units: Mapping[str, float] = field(default_factory=dict)
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _flat: dict[tuple[str, ...], _FlatPrices] = field(default_factory=dict, repr=False, compare=False)

    def total(self, topology: Topology, keep: np.ndarray) -> float:
        """The cost of the flat `keep`, (units,) of 0 and 1."""
        keep, flat = np.asarray(keep, float), self._on(topology)
        saved = float(flat.units @ (1.0 - keep * flat.reachable(keep)))
        if self.macs:
            saved += self.macs * (flat.macs - topology.macs.total(keep))
        if self.params:
            saved += self.params * (flat.params - topology.params.total(keep))
        return self.whole - saved

    def marginal(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(units,) cost of one more unit; for a branch, of everything inside of it."""
        keep, flat = np.asarray(keep, float), self._on(topology)
        result = flat.units * flat.reachable(keep)
        for branch, units in flat.inside:
            with_branch = keep.copy()
            with_branch[branch] = 1.0
            result[branch] += float((flat.units * keep * flat.reachable(with_branch))[units].sum())
        if self.macs:
            result = result + self.macs * topology.macs.marginal(keep)
        if self.params:
            result = result + self.params * topology.params.marginal(keep)
        return result

    def polynomial(self, topology: Topology) -> tuple[float, tuple[tuple[float, Cost], ...]]:
        """(offset, ((scale, cost), …)) such that `total` is offset + Σ scale · cost."""
        flat = self._on(topology)
        sizes = [group.size for group in topology.groups]
        starts = np.cumsum([0, *sizes])
        prices = np.array([self.units.get(group.name, 0.0) for group in topology.groups])
        branches_of: dict[int, list[int]] = {}  # by the first unit of a group
        for branch, units in flat.inside:
            for start in set(units.tolist()) & set(starts.tolist()):
                branches_of.setdefault(start, []).append(branch)
        alive = np.full((len(sizes), max(map(len, branches_of.values()), default=1)), -1)
        for number, start in enumerate(starts[:-1].tolist()):
            branches = branches_of.get(start, [])
            alive[number, : len(branches)] = branches
        rows = 1 + np.repeat(np.arange(len(sizes)), sizes)
        counts = sparse.csr_matrix(
            (np.ones(topology.units), (rows, np.arange(topology.units))), shape=(1 + len(sizes), topology.units)
        )
        kept = Cost(prices, 1 + np.arange(len(sizes))[:, None], alive, np.eye(1, 1 + len(sizes))[0], counts)
        whole = self.macs * flat.macs + self.params * flat.params + float(flat.units.sum())
        scaled = ((self.macs, topology.macs), (self.params, topology.params), (1.0, kept))
        return self.whole - whole, tuple((scale, cost) for scale, cost in scaled if scale)

    def _on(self, topology: Topology) -> _FlatPrices:
        """The prices of the units of this topology, which may have fewer groups."""
        names = tuple(group.name for group in topology.groups)
        if names not in self._flat:
            sizes = {group.name: group.size for group in topology.groups}
            numbers = topology.unflatten(np.arange(topology.units))
            inside = tuple(
                (
                    int(numbers[branch][0]),
                    np.concatenate([np.zeros(0, int), *(numbers[g] for g in groups if g in sizes)]),
                )
                for branch, groups in self.inside.items()
                if branch in sizes
            )
            prices = np.repeat([self.units.get(name, 0.0) for name in names], list(sizes.values()))
            ones = np.ones(topology.units)
            self._flat[names] = _FlatPrices(prices, inside, topology.macs.total(ones), topology.params.total(ones))
        return self._flat[names]


@dataclass(frozen=True)
class _FlatPrices:
    """units: (units,) prices; inside: (unit of a branch, numbers of the units that it contains); costs of the whole
    network.
    """

    units: np.ndarray
    inside: tuple[tuple[int, np.ndarray], ...]
    macs: float
    params: float

    def reachable(self, keep: np.ndarray) -> np.ndarray:
        """(units,) 1, or 0 if a branch that contains the group of the unit is removed."""
        result = np.ones(len(keep))
        for branch, units in self.inside:
            result[units] *= keep[branch]
        return result


def groups_inside_branches(topology: Topology) -> dict[str, tuple[str, ...]]:
    """{residual branch: names of the groups that it contains entirely}."""
    return {
        branch.name: tuple(g.name for g in topology.groups if g is not branch and _is_inside(g, set(branch.layers)))
        for branch in topology.groups
        if branch.kind == "branches"
    }


def _is_inside(group: Group, layers: set[str]) -> bool:
    if group.kind == "branches":
        return bool(group.layers) and set(group.layers) < layers
    return all(member.leaf.split("/", 1)[1].rsplit("/", 1)[0] in layers for member in group.members)
