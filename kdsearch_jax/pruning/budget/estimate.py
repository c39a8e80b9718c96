"""A model of what can only be measured (time, memory): a number for any choice of units, with non-negative prices.

    y(keep) = whole − a (MACs − MACs(keep)) − b (parameters − parameters(keep)) − Σ_g w_g (size_g − live_g(keep))

live_g counts the kept units of group g, none where a residual branch that holds the whole group has gone. MACs and
parameters tell that two narrow layers in a row save less than the sum of what each alone does, the units what is not
in proportion to them. a, b, w ≥ 0, so that more units never cost less: closed loop and landing rest on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.topology import Group, Topology


@dataclass(frozen=True)
class Estimate:
    """name: what is modelled; whole: its value for the network itself; a, b as macs, params; w as units, by group.

    inside: for a branch, the groups that lie in it altogether.
    """

    name: str
    whole: float
    macs: float = 0.0
    params: float = 0.0
    units: Mapping[str, float] = field(default_factory=dict)
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _flat: dict[tuple[str, ...], _Flat] = field(default_factory=dict, repr=False, compare=False)

    def total(self, topology: Topology, keep: np.ndarray) -> float:
        """The modelled value of keeping the flat `keep`."""
        keep, flat = np.asarray(keep, float), self._on(topology)
        saved = float(flat.weights @ (1.0 - keep * flat.lives(keep)))
        if self.macs:
            saved += self.macs * (flat.macs - topology.macs.total(keep))
        if self.params:
            saved += self.params * (flat.params - topology.params.total(keep))
        return self.whole - saved

    def marginal(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(units,) what one more unit adds; for a branch, all that goes with it."""
        keep, flat = np.asarray(keep, float), self._on(topology)
        result = flat.weights * flat.lives(keep)
        for unit, units in flat.inside:
            others = keep.copy()
            others[unit] = 1.0
            result[unit] += float((flat.weights * keep * flat.lives(others))[units].sum())
        if self.macs:
            result = result + self.macs * topology.macs.marginal(keep)
        if self.params:
            result = result + self.params * topology.params.marginal(keep)
        return result

    def polynomial(self, topology: Topology) -> tuple[float, tuple[tuple[float, Cost], ...]]:
        """(offset, ((scale, cost), …)): `total` is offset + Σ scale · cost."""
        flat = self._on(topology)
        sizes = [group.size for group in topology.groups]
        starts = np.cumsum([0, *sizes])
        weights = np.array([self.units.get(group.name, 0.0) for group in topology.groups])
        inside: dict[int, list[int]] = {}
        for unit, units in flat.inside:
            for start in set(units.tolist()) & set(starts.tolist()):
                inside.setdefault(start, []).append(unit)
        alive = np.full((len(sizes), max(map(len, inside.values()), default=1)), -1)
        for number, start in enumerate(starts[:-1].tolist()):
            branches = inside.get(start, [])
            alive[number, : len(branches)] = branches
        places = np.arange(topology.units)
        counts = sparse.csr_matrix(
            (np.ones(topology.units), (1 + np.repeat(np.arange(len(sizes)), sizes), places)),
            shape=(1 + len(sizes), topology.units),
        )
        kept = Cost(weights, 1 + np.arange(len(sizes))[:, None], alive, np.eye(1, 1 + len(sizes))[0], counts)
        whole = self.macs * flat.macs + self.params * flat.params + float(flat.weights.sum())
        scaled = ((self.macs, topology.macs), (self.params, topology.params), (1.0, kept))
        return self.whole - whole, tuple((scale, cost) for scale, cost in scaled if scale)

    def _on(self, topology: Topology) -> _Flat:
        """The same for the units of this topology, which may have fewer groups."""
        names = tuple(group.name for group in topology.groups)
        if names not in self._flat:
            starts = dict(zip(names, np.cumsum([0] + [g.size for g in topology.groups]).tolist(), strict=False))
            sizes = {g.name: g.size for g in topology.groups}
            inside = [
                (starts[branch], np.concatenate([starts[g] + np.arange(sizes[g]) for g in held if g in sizes] or [[]]))
                for branch, held in self.inside.items()
                if branch in starts
            ]
            weights = np.repeat([self.units.get(name, 0.0) for name in names], list(sizes.values()))
            ones = np.ones(topology.units)
            self._flat[names] = _Flat(
                weights,
                tuple((unit, units.astype(int)) for unit, units in inside),
                topology.macs.total(ones),
                topology.params.total(ones),
            )
        return self._flat[names]


@dataclass(frozen=True)
class _Flat:
    """weights: (units,); inside: (a branch's unit, the units that lie in it); what the whole network costs."""

    weights: np.ndarray
    inside: tuple[tuple[int, np.ndarray], ...]
    macs: float
    params: float

    def lives(self, keep: np.ndarray) -> np.ndarray:
        """(units,) 1, or 0 where a branch that holds the unit's whole group has gone."""
        result = np.ones(len(keep))
        for unit, units in self.inside:
            result[units] *= keep[unit]
        return result


def within(topology: Topology) -> dict[str, tuple[str, ...]]:
    """{branch: groups that lie in it altogether}."""
    return {
        branch.name: tuple(g.name for g in topology.groups if g is not branch and _inside(g, set(branch.layers)))
        for branch in topology.groups
        if branch.kind == "branches"
    }


def _inside(group: Group, layers: set[str]) -> bool:
    if group.kind == "branches":
        return bool(group.layers) and set(group.layers) < layers
    return all(member.leaf.split("/", 1)[1].rsplit("/", 1)[0] in layers for member in group.members)
