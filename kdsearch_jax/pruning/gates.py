"""Gates: one factor per unit, in a pytree of their own, that multiplies the kernels that read the unit.

For a linear operation, scaling the kernel rows that read a channel is the same function as scaling the channel, and it
depends on parameters alone: `fold` costs a few thousand multiplications per step, and no layer has to be changed. A
gate of zero removes its unit exactly, whatever operations are in between. The gate of a residual branch multiplies the
parameters of the layer that ends the branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters.boxes import keeping_boxes
from kdsearch_jax.tracing.topology import Topology, path_string

Gates = dict[str, jax.Array]
KEPT = "kept"  # collection of folded variables: {group: (size,) bool} of groups that are masked


def init(topology: Topology, value: float = 1.0) -> Gates:
    """{group: (size,) float32 vector of `value`}; gates of 1 do not change the network."""
    return {group.name: jnp.full(group.size, value, jnp.float32) for group in topology.groups}


def kernel_norms(variables: Any, topology: Topology) -> Gates:
    """{group: (size,) float32}: the L2 norm of all kernel entries that read each unit, 1 on average over the group.

    A branch has the value 1, and so has a group that is read by zeros only.

    Args:
      variables: {"params": …} of the network, without boxes.
    """
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]}
    gates = init(topology)
    for group in topology.groups:
        squares = np.zeros(group.size + 1)  # the last one collects entries of no unit
        for member in group.members:
            if member.gated and member.units is not None:
                leaf = np.moveaxis(np.asarray(leaves[member.leaf], float), member.axis, 0)
                np.add.at(squares, member.units, np.square(leaf).reshape(len(leaf), -1).sum(1))
        norms = np.sqrt(squares[:-1])
        if group.kind != "branches" and norms.any():
            gates[group.name] = jnp.asarray(norms / norms.mean(), jnp.float32)
    return gates


def inverse(gates: Mapping[str, Any]) -> Gates:
    """{group: (size,)}: 1/g, and 1 where g is 0."""
    return {name: 1.0 / jnp.where(gate > 0, gate, 1.0) for name, gate in gates.items()}


def multiplied(topology: Topology) -> frozenset[str]:
    """The arrays that `fold` changes."""
    members = (member for group in topology.groups for member in group.members)
    return frozenset(member.leaf for member in members if member.gated or member.consumes)


def kept(gates: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """{group: (size,) bool} of the groups that are masked: the units whose gate is above 0."""
    return {group.name: jnp.asarray(gates[group.name]) > 0 for group in topology.groups if group.masked}


def fold(variables: Any, gates: Mapping[str, Any], topology: Topology, keep: Mapping[str, Any] | None = None) -> Any:
    """The variables of the gated network: each kernel that reads a unit, times the gate of the unit.

    Of a masked group, what produces the unit is multiplied by its gate, and what reads the unit by 1 or 0. The gated
    network is then that of `kdsearch_jax.tracing.masking.masked`, not of the module alone.

    Args:
      variables: {"params": …, other collections}, or any part of them with the same paths.
      gates: {group: (size,) vector}.
      keep: {group: (size,) bool} of masked groups at least; by default the units whose gate is above 0.

    Returns:
      Variables of the same structure, shapes and dtypes, boxes included.

    Raises:
      ValueError: the gates do not match the topology.
    """
    if set(gates) != {group.name for group in topology.groups}:
        different = sorted(set(gates) ^ {group.name for group in topology.groups})
        raise ValueError(f"gates: the groups differ from the topology's in {', '.join(different[:5])}")
    factors: dict[str, list[Any]] = {}
    alive = kept(gates, topology) if keep is None else keep
    for group in topology.groups:
        gate = jnp.asarray(gates[group.name])
        if gate.shape != (group.size,):
            raise ValueError(f"gates[{group.name!r}]: shape {gate.shape}, expected {(group.size,)}")
        for member in group.members:
            if not member.gated and not member.consumes:
                continue
            if member.units is None:
                factors.setdefault(member.leaf, []).append(gate[0])
                continue
            factor = gate if member.gated else jnp.asarray(alive[group.name]).astype(gate.dtype)
            along_axis = jnp.append(factor, 1.0)[np.where(member.units < 0, group.size, member.units)]
            shape = [1] * len(topology.shapes[member.leaf])
            shape[member.axis] = -1
            factors.setdefault(member.leaf, []).append(along_axis.reshape(shape))

    def scale(path: Any, leaf: Any) -> Any:
        for factor in factors.get(path_string(path), ()):
            leaf = leaf * factor.astype(leaf.dtype)
        return leaf

    return keeping_boxes(lambda tree: jax.tree_util.tree_map_with_path(scale, tree), variables)


def mask(gates: Mapping[str, Any], keep: Mapping[str, Any]) -> Gates:
    """The gates, with zeros for units that are not in `keep`."""
    return {name: jnp.where(jnp.asarray(keep[name]), gate, 0.0) for name, gate in gates.items()}


def keep_all(topology: Topology) -> dict[str, np.ndarray]:
    """{group: (size,) all True}, which keeps the whole network."""
    return {group.name: np.ones(group.size, bool) for group in topology.groups}
