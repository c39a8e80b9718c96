"""Measured costs as tables: what each part of a network takes at a few widths, interpolated linearly between them.

    cost(keep) = constant + Σ_p value_p(kept units of its one or two groups) · (whether its residual branch is kept)

Any source will do: a clock, a compiler's estimate, a data sheet. Between knots values are interpolated (bilinear for
two groups), beyond the last knot extended. Prices are the slopes of the cell on the left, at least 0. Where cost is a
staircase, such as multiples of 128 on a TPU, put knots at its steps and set `round_to` to the same multiple.
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

from kdsearch_jax.tracing.topology import Topology

if TYPE_CHECKING:
    from kdsearch_jax.pruning.counting import Classes


@dataclass(frozen=True)
class Part:
    """groups: one or two names; widths: ascending widths of each, two or more; values: cost at each of them.

    branch: name of the residual branch without which the part costs nothing.
    """

    groups: tuple[str, ...]
    widths: tuple[tuple[float, ...], ...]
    values: Any
    branch: str | None = None

    def __post_init__(self) -> None:
        shape = tuple(len(each) for each in self.widths)
        if len(self.groups) not in (1, 2) or len(shape) != len(self.groups) or np.shape(self.values) != shape:
            raise ValueError(
                f"Part: values of shape {np.shape(self.values)} for groups {self.groups} and {shape} widths; give one "
                "or two groups, and a value for each of their widths"
            )
        if any(len(each) < 2 or (np.diff(each) <= 0).any() for each in self.widths):
            raise ValueError(f"Part: widths of {self.groups} must be two or more, ascending")

    def value(self, widths: Any, xp: Any = np) -> tuple[Any, list[Any]]:
        """(interpolated value, slope along each axis) at kept widths, one scalar each; `xp` is numpy or jax.numpy."""
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

    def steps(self, widths: Any) -> list[float]:
        """Widths of the cells that `value` used, by which its slopes are divided."""
        found = []
        for knots, width in zip(self.widths, widths, strict=True):
            cell = int(np.clip(np.searchsorted(knots, width, side="left") - 1, 0, len(knots) - 2))
            found.append(knots[cell + 1] - knots[cell])
        return found


@dataclass(frozen=True)
class Table:
    """A measured cost. name: such as "latency"; parts: see above; constant: what is always paid, in the same unit.

    whole, sizes: cost and widths of the whole network, filled in by `on`.
    """

    name: str
    parts: tuple[Part, ...]
    constant: float = 0.0
    whole: float = 0.0
    sizes: Mapping[str, int] = field(default_factory=dict)

    def on(self, topology: Topology) -> Table:
        """The table of a network; with a topology of fewer groups, the others stay whole.

        Raises:
          ValueError: a part names a group that the topology has not.
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
            float(part.value([widths[g] for g in part.groups])[0]) * _lives(part, widths) for part in self.parts
        )

    def marginal(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(units,) what one more unit adds, at least 0; for a branch, all that goes with it."""
        widths = self._widths(topology, keep)
        slopes = dict.fromkeys(widths, 0.0)
        for part in self.parts:
            at = [widths[g] for g in part.groups]
            value, rises = part.value(at)
            for group, rise, step in zip(part.groups, rises, part.steps(at), strict=True):
                slopes[group] += float(rise) / step * _lives(part, widths)
            if part.branch is not None:
                slopes[part.branch] += float(value)
        return np.concatenate([np.full(g.size, max(slopes[g.name], 0.0)) for g in topology.groups])

    def share(self, topology: Topology, classes: Classes) -> Callable[[Array], Array]:
        """() float32 of (classes,) counts: the cost as a share of the whole network's."""
        starts = np.cumsum([0] + [group.size for group in topology.groups])
        of_group = {
            group.name: np.unique(classes.of_unit[a:b])
            for group, (a, b) in zip(topology.groups, pairwise(starts), strict=True)
        }

        def share(counts: Array) -> Array:
            def width(name: str) -> Array:
                return counts[of_group[name]].sum() if name in of_group else jnp.float32(self.sizes[name])

            value = jnp.float32(self.constant)
            for part in self.parts:
                cost, _ = part.value([width(name) for name in part.groups], jnp)
                value = value + (cost if part.branch is None else cost * width(part.branch))
            return value / np.float32(self.whole)

        return share

    def _widths(self, topology: Topology, keep: np.ndarray) -> dict[str, float]:
        kept = topology.unflatten(np.asarray(keep, float))
        return {**self.sizes, **{name: float(np.sum(vector)) for name, vector in kept.items()}}


def _lives(part: Part, widths: dict[str, float]) -> float:
    return 1.0 if part.branch is None else widths[part.branch]
