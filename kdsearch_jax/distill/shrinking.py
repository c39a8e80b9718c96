"""Physical shrinking: a search continues with the units that are left, so its updates become cheaper.

A unit whose gate is 0 contributes nothing to the output and has no gradient, and the penalty `control.HOLD` keeps its
gate at 0. Leaving it out therefore gives the same sequence of updates, up to the rounding of sums of other lengths (and
up to dropout, whose masks have other shapes). A `Subnetwork` is the network cut to the units that are left. Only
weights, statistics and the state of the weights' optimiser are cut: gates, importances, costs and history stay in units
of the whole network, so nothing changes for `GatedSearch`. It cannot cut by itself, since arrays under `jit` cannot
change their shapes.

A unit that was left out cannot return. The search recalls units after removing too many, so it shrinks only while the
remaining ones cost at least the floor of the limits in force. Units removed later are then enough to come back to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.search import GatedSearch, search_state
from kdsearch_jax.pruning.transform import GATES
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.topology import Topology, path_string
from kdsearch_jax.training.state import TrainState

Keep = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Subnetwork:
    """The part of a network that a search still computes.

    Attributes:
      search: of the whole network.
      network: the whole network cut to the units in `keep`.
      keep: {group: (size,) bool} of the whole network.
    """

    search: GatedSearch
    network: Network
    keep: Keep

    @staticmethod
    def of(search: GatedSearch, keep: Keep | None = None) -> Subnetwork:
        """The subnetwork with the units in `keep`; None: all of them."""
        whole = search.network
        if keep is None:
            return Subnetwork(search, whole, gates_lib.keep_all(whole.topology))
        return Subnetwork(search, whole.restricted(keep), keep)

    @property
    def whole(self) -> Network:
        """The network that is searched."""
        return self.search.network

    @property
    def module(self) -> Any:
        """The module that is trained."""
        return self.network.module

    def gates(self, gates: Mapping[str, Any]) -> Mapping[str, Any]:
        """The subnetwork's gates, out of those of the whole network."""
        if self.network is self.whole:
            return gates
        return {group.name: gates[group.name][self.keep[group.name]] for group in self.network.topology.groups}

    def fold(self, params: Any, model_state: Any) -> Any:
        """Variables of the gated subnetwork; params: {"params": of the subnetwork, "gates": of the whole network}."""
        variables = {"params": params["params"], **model_state}
        return gates_lib.fold(variables, self.gates(params[GATES]), self.network.topology)


# --- when to shrink, and to which units -----------------------------------------------------------------------------


def remaining_units(subnetwork: Subnetwork, state: TrainState) -> dict[str, np.ndarray]:
    """{group: (size,) bool}: units with g > 0; of a group that has none, the most important unit that is left.

    Groups whose size the code computes with, such as queries, stay whole: their weights would have to be rescaled.
    """
    topology = subnetwork.whole.topology
    sized = {(rescale.leaf, rescale.axis) for rescale in subnetwork.whole.rescales}
    whole = {g.name for g in topology.groups if sized & {(m.leaf, m.axis) for m in g.members}}
    importance = topology.unflatten(np.asarray(search_state(state.opt_state).importance))
    keep = {}
    for group in topology.groups:
        chosen = np.asarray(state.params[GATES][group.name]) > 0
        if group.name in whole:
            chosen[:] = True
        if group.kind != "branches" and not chosen.any():
            left = np.asarray(subnetwork.keep[group.name], bool)
            chosen[np.argmax(np.where(left, importance[group.name], -1.0))] = True
        keep[group.name] = chosen
    return keep


def shrinks(subnetwork: Subnetwork, share: float | None) -> Callable[[TrainState], bool]:
    """Whether to shrink at a state: the units left cost less than `share` of the MACs computed. None: never."""
    search, topology = subnetwork.search, subnetwork.whole.topology

    def ask(state: TrainState) -> bool:
        step = int(state.step)
        if not share or step >= search.steps:
            return False
        gates = {name: np.asarray(gate) for name, gate in state.params[GATES].items()}
        alive = (topology.flatten(gates) > 0).astype(float)
        limits = search.limits_at(step)
        if limits.pressure(topology, alive) < limits.floor:
            return False
        return topology.cost(remaining_units(subnetwork, state))[0] < share * topology.cost(subnetwork.keep)[0]

    return ask


# --- states ---------------------------------------------------------------------------------------------------------


def shrink(
    subnetwork: Subnetwork, state: TrainState, tx: optax.GradientTransformation
) -> tuple[Subnetwork, TrainState]:
    """The subnetwork of the units that are left, and its state; tx: the search's optimiser."""
    topology = subnetwork.whole.topology
    smaller = Subnetwork.of(subnetwork.search, remaining_units(subnetwork, state))
    masks = _masks(topology, subnetwork.keep, smaller.keep)

    def cut(name: str, leaf: Any) -> Any:
        for axis, mask in masks.get(name, ()):
            leaf = np.compress(mask, np.asarray(leaf), axis=axis)
        return jnp.asarray(leaf)

    variables = {"params": state.params["params"], **state.model_state}
    variables = topology_lib.map_left(cut, variables, topology.dropped(smaller.keep))
    params = {"params": variables.get("params", {}), GATES: state.params[GATES]}
    model_state = {name: leaves for name, leaves in variables.items() if name != "params"}
    return smaller, state.replace(
        params=params, model_state=model_state, opt_state=_cut_optimizer(state, params, cut, tx)
    )


def _masks(topology: Topology, before: Keep, after: Keep) -> dict[str, list[tuple[int, np.ndarray]]]:
    """{leaf: [(axis, which of its current indices stay)]}."""
    current, result = topology.masks(before), {}
    for (leaf, axis), mask in topology.masks(after).items():
        present = current.get((leaf, axis))
        result.setdefault(leaf, []).append((axis, mask if present is None else mask[present]))
    return result


def _cut_optimizer(
    state: TrainState, params: Any, cut: Callable[[str, Any], Any], tx: optax.GradientTransformation
) -> Any:
    """The optimiser's state in the new shapes; the path of a slot ends in the path of its parameter."""
    old = dict(jax.tree_util.tree_flatten_with_path(state.opt_state)[0])
    weights = {"params": state.params["params"]}
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]}

    def fill(path: Any, wanted: Any) -> Any:
        value = old[path]
        parameter = next((path[i:] for i in range(len(path)) if shapes.get(path[i:]) == value.shape), None)
        if parameter is not None:
            value = cut(path_string(parameter), value)
        if jnp.shape(value) != wanted.shape:
            raise ValueError(f"gates.shrink: the optimiser's {jax.tree_util.keystr(path)} cannot be cut; leave it out")
        return value

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(tx.init, params))


def expanded(subnetwork: Subnetwork, state: TrainState, reference: Any) -> Any:
    """Variables of the whole network, gates not folded in; those of `reference` for what was left out."""
    left = {
        path_string(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path({"params": state.params["params"], **state.model_state})[
            0
        ]
    }
    masks: dict[str, dict[int, np.ndarray]] = {}
    for (leaf, axis), mask in subnetwork.whole.topology.masks(subnetwork.keep).items():
        masks.setdefault(leaf, {})[axis] = mask

    def put(path: Any, leaf: Any) -> np.ndarray:
        name = path_string(path)
        if name not in left:
            return np.asarray(leaf)
        full = np.array(leaf)
        indices = [np.flatnonzero(masks.get(name, {}).get(axis, np.ones(n))) for axis, n in enumerate(full.shape)]
        full[np.ix_(*indices)] = left[name]
        return full

    return jax.tree_util.tree_map_with_path(put, reference)
