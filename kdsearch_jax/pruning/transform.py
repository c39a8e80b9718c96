"""The search as an optax transformation: the user's optimiser for weights, proximal L1 for gates.

    min over w, g ≥ 0 of   E loss(w, g)  +  λ2 Σ_j α_j |g_j|

Importances, penalties, λ2, its controller's memory and the history are arrays in the optimiser's state. The update is a
pure function of gradients, state and parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from kdsearch_jax.pruning.control import Controller, Decision
from kdsearch_jax.pruning.prox import ProximalState, accelerated_proximal_l1
from kdsearch_jax.tracing.topology import Topology

GATES = "gates"  # name of the node of gates among the parameters


class History(NamedTuple):
    """Snapshots of the search, NaN in rows that are not written yet.

    Attributes:
      rows: (snapshots, 4) updates done, share of MACs, share of parameters, λ2.
      gates: (snapshots, units).
    """

    rows: Array
    gates: Array


class SearchState(NamedTuple):
    """State of the search; units are in the order of `Topology.flatten`.

    Attributes:
      weights: state of the user's optimiser.
      gates: state of the proximal step, (units,).
      importance: (units,) running mean of (g ∂loss/∂g)².
      penalty: (units,) γ of each gate.
      gain: () factor on λ2, see `Controller`.
      lambda2: () λ2.
      pressure: () largest cost over its limit at the last call of the controller.
      history: snapshots.
    """

    weights: Any
    gates: ProximalState
    importance: Array
    penalty: Array
    gain: Array
    lambda2: Array
    pressure: Array
    history: History

    @property
    def count(self) -> Array:
        """() int32, updates done."""
        return self.gates.count


def gated_optimizer(
    weights: optax.GradientTransformation,
    controller: Controller,
    *,
    learning_rate: float,
    momentum: float,
    importance_decay: float,
    spacing: int,
    snapshots: int,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of the module's docstring, over parameters with a node "gates": {group: (size,)}.

    Args:
      weights: updates everything else; it sees the parameters without the gates.
      learning_rate, momentum: of the proximal step on gates.
      importance_decay: of the running mean of importances.
      spacing: updates between two snapshots.
      snapshots: rows of the history.
    """
    topology = controller.topology
    inner = optax.with_extra_args_support(weights)
    proximal: Any = accelerated_proximal_l1(learning_rate, momentum)

    def init(params: Any) -> SearchState:
        rest, gates = split(params, topology, "init")
        flat = flatten(gates, topology)
        units = topology.units
        history = History(*(jnp.full((snapshots, width), jnp.nan, jnp.float32) for width in (4, units)))
        return SearchState(
            inner.init(rest),
            proximal.init(jnp.zeros_like(flat)),
            jnp.zeros(units, jnp.float32),
            jnp.zeros(units, jnp.float32),
            jnp.ones((), jnp.float32),
            jnp.zeros((), jnp.float32),
            jnp.asarray(controller.path.start[0], jnp.float32),
            history,
        )

    def update(gradients: Any, state: SearchState, params: Any = None, **extra: Any) -> tuple[Any, SearchState]:
        if params is None:
            raise ValueError(
                "GatedSearch: update needs params for its proximal step: tx.update(gradients, state, params)"
            )
        rest, gates = split(params, topology, "params")
        rest_gradients, slopes = split(gradients, topology, "gradients")
        flat, slope = flatten(gates, topology), flatten(slopes, topology)
        step = state.gates.count
        due = (step > 0) & (step % controller.every == 0)

        def decide() -> Decision:
            return controller(step, flat, state.importance, state.gain)

        def stay() -> Decision:
            shares = jnp.zeros(len(controller.costs.shares), jnp.float32)
            return Decision(state.penalty, state.gain, state.lambda2, state.pressure, shares)

        decision = lax.cond(due, decide, stay)
        history = _recorded(state.history, due, step // spacing, step, flat, decision)
        rate = jnp.minimum(np.float32(importance_decay), step / (step + 1.0)).astype(jnp.float32)
        importance = rate * state.importance + (1 - rate) * jnp.square(flat * slope)
        moved, proximal_state = proximal.update(slope, state.gates, flat, penalty=decision.penalty)
        updates, weights_state = inner.update(rest_gradients, state.weights, rest, **extra)
        new = SearchState(
            weights_state,
            proximal_state,
            importance,
            decision.penalty,
            decision.gain,
            decision.lambda2,
            decision.pressure,
            history,
        )
        return joined(gradients, updates, unflatten(moved, slopes, topology)), new

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _recorded(history: History, due: Array, row: Array, step: Array, gates: Array, decision: Decision) -> History:
    """The history with one more row, if due. Outside of `lax.cond`, so that it is updated in place."""
    row = jnp.minimum(row, len(history.rows) - 1)
    counts = jnp.stack([step.astype(jnp.float32), decision.shares[0], decision.shares[1], decision.lambda2])
    return History(
        history.rows.at[row].set(jnp.where(due, counts, history.rows[row])),
        history.gates.at[row].set(jnp.where(due, gates, history.gates[row])),
    )


# --- the gates among the parameters ---------------------------------------------------------------------------------


def split(tree: Any, topology: Topology, what: str = "params") -> tuple[Any, Mapping[str, Any]]:
    """(the tree without its gates, the gates).

    Raises:
      ValueError: the tree has no gates, or those of another network.
    """
    places = list(_places(tree, ()))
    names = {group.name for group in topology.groups}
    fitting = [place for place, gates in places if set(gates) == names]
    if len(fitting) != 1:
        raise ValueError(_explained(places, fitting, names, what))
    (place,) = fitting
    gates = next(gates for other, gates in places if other == place)
    return _replaced(tree, place, None), gates


def joined(like: Any, rest: Any, gates: Mapping[str, Any]) -> Any:
    """The inverse of `split`, for a tree like the one that was split."""
    place = next(place for place, found in _places(like, ()) if set(found) == set(gates))
    return _replaced(rest, place, gates)


def flatten(gates: Mapping[str, Any], topology: Topology) -> Array:
    """(units,) float32 of {group: (size,)}.

    Raises:
      ValueError: a group has another size.
    """
    for group in topology.groups:
        shape = tuple(_array(gates[group.name]).shape)
        if shape != (group.size,):
            raise ValueError(
                f"gates[{group.name!r}]: shape {shape}, not {(group.size,)}; they belong to another network: take "
                "those of this search's init"
            )
    return jnp.concatenate([jnp.asarray(_array(gates[group.name]), jnp.float32) for group in topology.groups])


def unflatten(flat: Array, like: Mapping[str, Any], topology: Topology) -> Mapping[str, Any]:
    """The inverse of `flatten`, with the containers and dtypes of `like`."""
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    parts = {group.name: flat[a:b] for group, a, b in zip(topology.groups, starts, starts[1:], strict=False)}

    def filled(leaf: Any, part: Array) -> Any:
        return jax.tree.unflatten(jax.tree.structure(leaf), [part.astype(_array(leaf).dtype)])

    return type(like)({name: filled(leaf, parts[name]) for name, leaf in like.items()})  # type: ignore[call-arg]


def _array(leaf: Any) -> Any:
    """The array of a leaf, which may be an nnx.Variable."""
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf


def _places(tree: Any, path: tuple[str, ...]) -> Any:
    """(path, node) of every mapping with the key "gates"."""
    if not isinstance(tree, Mapping):
        return
    for key, node in _inside(tree).items():
        if key == GATES and isinstance(node, Mapping):
            yield (*path, key), node
        else:
            yield from _places(node, (*path, key))


def _replaced(tree: Any, place: tuple[str, ...], gates: Mapping[str, Any] | None) -> Any:
    """The tree with the gates at a path replaced, or removed for None."""
    key, rest = place[0], place[1:]
    items = dict(_inside(tree))
    if rest:
        items[key] = _replaced(items[key], rest, gates)
    elif gates is None:
        del items[key]
    else:
        items[key] = gates
    return type(tree)(items)


def _inside(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of a mapping, unchanged; nnx.State's own access turns dictionaries into States."""
    return getattr(tree, "raw_mapping", tree)


def _explained(places: Any, fitting: Any, names: set[str], what: str) -> str:
    if not places:
        return (
            f"{what}: has no gates; begin with params = search.init(variables), and differentiate with respect to all "
            "of params"
        )
    if fitting:
        return f"{what}: has gates in {len(fitting)} places, {', '.join('/'.join(p) for p in fitting)}; give one"
    odd = sorted(set(places[0][1]) ^ names)
    return (
        f"{what}: the gates belong to another network; they differ in {', '.join(odd[:5])}; begin with params = "
        "search.init(variables) of this search"
    )
