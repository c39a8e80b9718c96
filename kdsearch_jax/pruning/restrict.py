"""The topology of a part of a network: the groups, shapes and costs that remain if only some units stay.

Nothing is traced again. Removed units take their indices with them; units inside of a removed residual branch disappear
together with its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.topology import AxisSlice, Topology

Keep = Mapping[str, np.ndarray]


def restricted(topology: Topology, keep: Keep) -> Topology:
    """The topology of the network with only the units in `keep`: groups, their members, shapes and costs."""
    masks, gone = topology.masks(keep), frozenset(topology.dropped(keep))
    shapes = {leaf: shape for leaf, shape in topology.sliced_shapes(keep).items() if _layer(leaf) not in gone}
    groups, remaining = [], []
    for group in topology.groups:
        alive = np.asarray(keep[group.name], bool)
        number = np.append(np.where(alive, np.cumsum(alive) - 1, -1), -1)
        members = tuple(_member(member, number, masks) for member in group.members if member.leaf in shapes)
        remains = alive.any() and any(member.gated or member.consumes for member in members)
        remaining.append(alive & remains)
        if remains:
            groups.append(replace(group, size=int(alive.sum()), members=members))
    flat, kept = np.concatenate(remaining), topology.flatten(keep).astype(bool)
    macs, params = (_left(cost, flat, kept) for cost in (topology.macs, topology.params))
    frozen = tuple(item for item in topology.frozen if item.leaf in shapes)
    return replace(topology, groups=tuple(groups), frozen=frozen, macs=macs, params=params, shapes=shapes)


def _member(member: AxisSlice, number: np.ndarray, masks: Mapping[tuple[str, int], np.ndarray]) -> AxisSlice:
    if member.units is None:
        return member
    units = number[member.units]
    mask = masks.get((member.leaf, member.axis))
    return replace(member, units=units if mask is None else units[mask])


def _left(cost: Cost, stays: np.ndarray, kept: np.ndarray) -> Cost:
    """The cost as a function of the units in `stays`; other kept units (inside removed branches) become constants."""
    ended = ((cost.alive >= 0) & ~np.append(kept, True)[cost.alive]).any(1)
    number = np.append(np.where(stays, np.cumsum(stays) - 1, -1), -1)
    base = cost.base + np.asarray(cost.counts[:, kept & ~stays].sum(1)).ravel()
    return Cost(
        cost.constants[~ended], cost.factors[~ended], number[cost.alive[~ended]], base, cost.counts[:, stays].tocsr()
    )


def _layer(leaf: str) -> str:
    return leaf.partition("/")[2].rpartition("/")[0]
