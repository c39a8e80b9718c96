"""Outputs of layers inside of a network, taken while it runs: the network's code and its variables stay as they are.

Every layer of a Flax module is called in Python when the module is traced, so its output can be noted there:
`recorded` does, for Linen by an interceptor, for NNX as `kdsearch_jax.adapters.nnx` watches layers. What is computed
inside of
`nn.scan`, `nn.vmap` or `nn.remat` is out of reach; the module around it is not.

`find` chooses the layers. Features are (batch, …positions, channels); layers with the same positions are one stage of
the network, and the last of each stage is what goes on into the next. A layer inside of a block that changes the
positions (the first convolutions of a down-sampling block) is no end of a stage, and neither are a squeeze to one
position and what makes the logits. A vector an example is taken where it comes after all stages: it is what the
classifier sees.
"""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters import nnx
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.tracing import program as program_lib
from kdsearch_jax.tracing.interpreter import analyze
from kdsearch_jax.tracing.messages import nearest
from kdsearch_jax.tracing.topology import Topology, leaf_shapes

log = logging.getLogger(__name__)

BATCH = 7  # of the abstract run in which layers are looked at: an axis of this size is that of the batch


@contextmanager
def recorded(module: Any) -> Iterator[dict[str, Any]]:
    """While it lasts, {path of a layer: its output, at its last call}, in the order in which calls end.

    The module itself, and layers that return something else than one array, are left out.
    """
    seen: dict[str, Any] = {}

    def note(path: str, result: Any) -> Any:
        if path and isinstance(result, jax.Array):
            seen.pop(path, None)
            seen[path] = result
        return result

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        return note("/".join(context.module.path), result) if context.method_name == "__call__" else result

    if isinstance(module, FunctionalModule):
        with nnx.watched(module, lambda path, parent, call: note(path, call())):
            yield seen
    else:
        with nn.intercept_methods(intercept):
            yield seen


def taken(seen: Mapping[str, Any], paths: Sequence[str]) -> dict[str, jax.Array]:
    """The features at `paths`, in float32. Raises ValueError where a layer was not called."""
    for path in paths:
        if path not in seen:
            raise ValueError(f"distill.features: the student calls no layer {path!r}; {nearest(path, seen)}")
    return {path: jnp.asarray(seen[path], jnp.float32) for path in paths}


def shapes(module: Any, variables: Any, call: CallSpec) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """({path: shape of its output} of all layers, in the order of their calls; shape of the network's output).

    Layers inside of loops are among them. Nothing is computed. Leading axes are batches of `BATCH`.
    """
    order: list[str] = []

    def run(variables: Any, *inputs: Any) -> Any:
        with recorded(module) as seen:
            outputs = apply_eval(module, variables, inputs, call_spec=call)
        order.extend(seen)
        return seen, jax.tree.leaves(outputs)[:1]

    found, outputs = jax.eval_shape(run, variables, *call.example(BATCH))
    usable = [
        path
        for path in order
        if found[path].ndim > 1 and found[path].shape[0] == BATCH and jnp.issubdtype(found[path].dtype, jnp.floating)
    ]
    return {path: found[path].shape for path in usable}, outputs[0].shape


def find(module: Any, variables: Any, call: CallSpec, patterns: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the layers that feature losses compare, in the order in which they are computed.

    Args:
      variables: arrays or shapes.
      patterns: paths, or patterns (fnmatch) of them; none: the last layer of each stage.

    Raises:
      ValueError: a pattern fits no layer, or there is none to choose.
    """
    every, output = shapes(module, variables, call)

    def choose() -> list[str]:
        for pattern in patterns:
            if not fnmatch.filter(every, pattern):
                raise ValueError(
                    f"distill.features: {pattern!r} is no layer whose output is one array with the batch in front, "
                    f"outside of loops; {nearest(pattern, every)}"
                )
        return (
            [p for p in every if any(fnmatch.fnmatchcase(p, x) for x in patterns)] if patterns else _ends(every, output)
        )

    chosen = choose()
    while chosen and (lost := _out_of_reach(module, variables, call, chosen)):
        every = {path: shape for path, shape in every.items() if path not in lost}
        chosen = choose()
    if not chosen:
        raise ValueError("distill.features: no layer ends a stage of this network; name layers, as in 'block*'")
    told = ", ".join(f"{path} {every[path][1:]}" for path in chosen)
    log.info("features are taken from %s", told)
    return {path: every[path] for path in chosen}


Units = dict[str, np.ndarray]  # {group: (channels,) the group's unit that each channel is, -1 for none}


def units(module: Any, variables: Any, call: CallSpec, paths: Sequence[str], topology: Topology) -> dict[str, Units]:
    """Which gates the channels of features have: {path: {group: unit of each channel}}.

    A gate stands in the kernels that read a channel, so the channel itself does not show it; see `gated`.
    """
    variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    inputs, keywords = call.example(BATCH), call.keywords(module, train=False)

    def run(variables: Any, *inputs: Any) -> list[Any]:
        args, named = call_arguments(inputs, keywords)
        with recorded(module) as seen:
            module.apply(variables, *args, **named)
        return [seen[path] for path in paths]

    names = leaf_shapes(variables)
    program = program_lib.flatten_jaxpr(jax.make_jaxpr(run)(variables, *inputs))
    found = analyze(program, names)
    made = {
        number: value
        for step in found.ops
        if step.program is program
        for number, value in zip(step.op.outputs, step.outs, strict=True)
    }
    leaves, result = list(names), {}
    for path, output in zip(paths, program.outputs, strict=True):
        labels = made[output].axes[-1] if output in made else None
        result[path] = {}
        if not isinstance(labels, np.ndarray):
            continue
        places = [(leaves[found.labels.leaf[i]], int(found.labels.axis[i])) if i > 0 else None for i in labels]
        for group in topology.groups:
            members = {(m.leaf, m.axis): m.units for m in group.members if m.units is not None}
            own = [
                members[p][found.labels.index[i]] if p in members else -1 for p, i in zip(places, labels, strict=True)
            ]
            if max(own) >= 0:
                result[path][group.name] = np.array(own)
    return result


def gated(features: dict[str, jax.Array], found: Mapping[str, Units], gates: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The features that the student cut at these gates has, with zeros for the channels that it has not.

    A living gate's value is in the kernels behind the channel and stays there: the factor is 1, or 0 of a dead gate;
    its slope is that of g/g₀ at g₀ = g, by which the loss tells what the channel is worth.
    """

    def through(path: str, value: jax.Array) -> jax.Array:
        for group, units in found.get(path, {}).items():
            gate = gates[group]
            alive = gate > 0
            factor = jnp.where(alive, gate / jax.lax.stop_gradient(jnp.where(alive, gate, 1.0)), 0.0)
            factor = jnp.append(factor, 1.0)[np.where(units < 0, len(gate), units)]
            value = value * factor.reshape((1,) * (value.ndim - 1) + (-1,))
        return value

    return {path: through(path, value) for path, value in features.items()}


def _ends(every: Mapping[str, tuple[int, ...]], output: tuple[int, ...]) -> list[str]:
    """The last layer of each stage, and the vector after them."""
    layers = list(every)
    while layers and every[layers[-1]] == output:  # what makes the logits
        layers.pop()
    spatial = {path: every[path][1:-1] for path in layers if math.prod(every[path][1:-1]) > 1}
    seen = list(spatial.values())
    inside: dict[str, set[tuple[int, ...]]] = {}
    for path, positions in spatial.items():
        for owner in _owners(path):
            inside.setdefault(owner, {positions}).add(positions)

    def passing(number: int, path: str) -> bool:
        """Whether it lies in a block that leads from these positions to others, or comes back from them."""
        others = [owner for owner in _owners(path) if owner in spatial and spatial[owner] != spatial[path]]
        return any(len(inside[owner] | {spatial[owner]}) <= 2 or spatial[owner] in seen[:number] for owner in others)

    last = {
        positions: path
        for number, (path, positions) in enumerate(spatial.items())
        if seen.count(positions) > 1 and not passing(number, path)  # one layer alone (cutting into patches) is no stage
    }
    chosen = [path for path in layers if path in last.values()]
    after = layers[layers.index(chosen[-1]) + 1 :] if chosen else layers
    return chosen + [path for path in after if math.prod(every[path][1:-1]) == 1][-1:]


def _owners(path: str) -> list[str]:
    """The paths of the modules that a layer is in."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _out_of_reach(module: Any, variables: Any, call: CallSpec, paths: Sequence[str]) -> list[str]:
    """Those of `paths` that are computed inside of a loop, whose values end with it."""

    def run(variables: Any, *inputs: Any) -> Any:
        with recorded(module) as seen:
            apply_eval(module, variables, inputs, call_spec=call)
        return [seen[path] for path in paths]

    try:
        jaxpr = jax.make_jaxpr(run)(variables, *call.example(BATCH)).jaxpr
    except jax.errors.UnexpectedTracerError:
        alone = len(paths) == 1
        return list(paths) if alone else [p for p in paths if _out_of_reach(module, variables, call, [p])]
    made = {*map(id, jaxpr.invars), *(id(value) for equation in jaxpr.eqns for value in equation.outvars)}
    return [path for path, value in zip(paths, jaxpr.outvars, strict=True) if id(value) not in made]
