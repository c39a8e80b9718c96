"""Physical shrinking: a search goes on with the network that is still alive, and gets cheaper as it goes.

A unit whose gate is 0 contributes nothing and has no gradient, and while its penalty is `gated.HOLD` its gate stays 0;
so the same sequence of updates results without it, up to the rounding of sums of other lengths (and but for dropout,
whose masks have other shapes). A `Part` is what is left: the network cut as a student is, with gates for its units.
All that decides (pressure, α, λ2, history, the landing) stays in the units of the whole network; what is gone has the
gate 0 there. `extra["whole"]` remembers what gates and importances were when units went: those inside of a branch that
has died are not 0, nor do they matter.

What went cannot return. A search lets dead gates return while too many have died, so it shrinks only where the living
alone cost at least the floor of the limits in force: those that die later are then enough to come back to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.pruning import budget_path
from kdsearch_jax.pruning.budget_path import Leg
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.training.state import TrainState

Keep = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """What is still computed of the network `whole`: `network` has only its units in `keep`, {group: (size,) bool}.

    present: (units of the part,) their numbers among the units of the whole.
    """

    whole: Network
    network: Network
    keep: Keep
    present: np.ndarray

    @staticmethod
    def of(whole: Network, keep: Keep | None = None) -> Part:
        """The part with the units in `keep`; all of the network where that is None."""
        topology = whole.topology
        if keep is None:
            keep = {group.name: np.ones(group.size, bool) for group in topology.groups}
            return Part(whole, whole, keep, np.arange(topology.units))
        network = whole.restricted(keep)
        names = {group.name for group in network.topology.groups}
        flat = [np.asarray(keep[g.name], bool) & (g.name in names) for g in topology.groups]
        return Part(whole, network, keep, np.flatnonzero(np.concatenate(flat)))

    def spread(self, tree: Mapping[str, Any], elsewhere: Any) -> np.ndarray:
        """(units of the whole,) float64: the part's values in `tree`, those of `elsewhere` where it has none."""
        flat = np.array(elsewhere, float)
        flat[self.present] = self.network.topology.flatten(jax.tree.map(np.asarray, dict(tree)))
        return flat

    def take(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """{group: vector} of the part, out of a (units of the whole,) vector."""
        return self.network.topology.unflatten(flat[self.present])

    def gates(self, state: TrainState) -> np.ndarray:
        """(units of the whole,) gates."""
        return self.spread(state.extra["gates"], state.extra["whole"]["gates"])

    def importance(self, state: TrainState) -> np.ndarray:
        """(units of the whole,) importances."""
        return self.spread(state.extra["importance"], state.extra["whole"]["importance"])


# --- when, and to what ----------------------------------------------------------------------------------------------


def left_alive(part: Part, state: TrainState) -> dict[str, np.ndarray]:
    """{group: bool} of the whole: units whose gates live; of a group that has died inside its best, if it has one."""
    topology = part.whole.topology
    gates, importance = part.gates(state), part.importance(state)
    alive, best = topology.unflatten(gates > 0), topology.unflatten(importance)
    keep = {}
    for group in topology.groups:
        chosen = np.array(alive[group.name], bool)
        if group.kind != "branches" and not chosen.any():
            there = np.asarray(part.keep[group.name], bool)
            chosen[np.argmax(np.where(there, best[group.name], -1.0))] = True
        keep[group.name] = chosen
    return keep


def until(part: Part, path: Sequence[Leg], share: float | None, steps: int) -> Callable[[TrainState], bool]:
    """Whether a state is to be shrunk: the living cost less than `share` of the MACs that are computed; None: never."""
    topology = part.whole.topology

    def ask(state: TrainState) -> bool:
        done = int(state.step)
        if not share or done >= steps:
            return False
        alive = (part.gates(state) > 0).astype(float)
        limits = budget_path.at(path, done).limits
        if limits.pressure(topology, alive) < limits.floor:
            return False
        return topology.cost(left_alive(part, state))[0] < share * topology.cost(part.keep)[0]

    return ask


# --- states ---------------------------------------------------------------------------------------------------------


def shrink(part: Part, state: TrainState, tx: Any) -> tuple[Part, TrainState]:
    """The part that is left alive, and the state in its shapes."""
    topology = part.whole.topology
    smaller = Part.of(part.whole, left_alive(part, state))
    cuts = _cuts(topology, part.keep, smaller.keep)
    gone = topology.dropped(smaller.keep)

    def cut(name: str, leaf: Any) -> Any:
        for axis, mask in cuts.get(name, ()):
            leaf = np.compress(mask, np.asarray(leaf), axis=axis)
        return jnp.asarray(leaf)

    variables = topology_lib.map_left(cut, {"params": state.params, **state.model_state}, gone)
    gates, importance = part.gates(state), part.importance(state)
    vectors = {
        name: {group: jnp.asarray(value, jnp.float32) for group, value in smaller.take(flat).items()}
        for name, flat in (("gates", gates), ("importance", importance))
    }
    penalty = smaller.take(part.spread(state.extra["penalty"], np.zeros(topology.units)))
    whole = {"gates": jnp.asarray(gates, jnp.float32), "importance": jnp.asarray(importance, jnp.float32)}
    extra = {**state.extra, **vectors, "whole": whole}
    extra["penalty"] = {group: jnp.asarray(value, jnp.float32) for group, value in penalty.items()}
    params = variables.get("params", {})
    model_state = {name: leaves for name, leaves in variables.items() if name != "params"}
    opt_state = _cut_optimizer(state, params, vectors["gates"], part, smaller, cut, tx)
    return smaller, state.replace(params=params, model_state=model_state, opt_state=opt_state, extra=extra)


def _cuts(topology: Topology, before: Keep, after: Keep) -> dict[str, list[tuple[int, np.ndarray]]]:
    """{leaf: [(axis, which of its indices before stay)]}."""
    had, result = topology.masks(before), {}
    for (leaf, axis), mask in topology.masks(after).items():
        there = had.get((leaf, axis))
        result.setdefault(leaf, []).append((axis, mask if there is None else mask[there]))
    return result


def _cut_optimizer(
    state: TrainState, params: Any, gates: Any, part: Part, smaller: Part, cut: Callable[[str, Any], Any], tx: Any
) -> Any:
    """The optimiser's state in the new shapes; the path of what it holds of a parameter ends in the parameter's."""
    old = dict(jax.tree_util.tree_flatten_with_path(state.opt_state)[0])
    known = {
        path: leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            {"weights": state.params, "gates": state.extra["gates"]}
        )[0]
    }
    wanted = jax.eval_shape(tx.init, {"weights": params, "gates": gates})

    def fill(path: Any, leaf: Any) -> Any:
        value = old[path]
        own = next((path[i:] for i in range(len(path)) if known.get(path[i:]) == value.shape), None)
        if own is not None and own[0].key == "weights":
            value = cut("/".join(["params", *(str(entry.key) for entry in own[1:])]), value)
        elif own is not None:
            group = own[1].key
            value = value[np.asarray(smaller.keep[group])[np.asarray(part.keep[group])]]
        if jnp.shape(value) != leaf.shape:
            raise ValueError(f"gates.shrink: the optimiser's {jax.tree_util.keystr(path)} cannot be cut; leave it out")
        return value

    return jax.tree_util.tree_map_with_path(fill, wanted)


def expanded(part: Part, state: TrainState, reference: Any) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(variables, gates, importances) of the whole network: where units went, `reference`'s, with gates of 0."""
    topology = part.whole.topology
    left = {
        topology_lib.path_string(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path({"params": state.params, **state.model_state})[0]
    }
    masks: dict[str, dict[int, np.ndarray]] = {}
    for (leaf, axis), mask in topology.masks(part.keep).items():
        masks.setdefault(leaf, {})[axis] = mask

    def put(path: Any, leaf: Any) -> np.ndarray:
        name = topology_lib.path_string(path)
        if name not in left:
            return np.asarray(leaf)
        full = np.array(leaf)
        own = [np.flatnonzero(masks.get(name, {}).get(axis, np.ones(n))) for axis, n in enumerate(full.shape)]
        full[np.ix_(*own)] = left[name]
        return full

    variables = jax.tree_util.tree_map_with_path(put, reference)
    gates, importance = part.gates(state).astype(np.float32), part.importance(state).astype(np.float32)
    return variables, topology.unflatten(gates), topology.unflatten(importance)
