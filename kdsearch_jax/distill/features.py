"""Features: outputs of layers inside a network, recorded while it runs, without changing its code or variables.

Every layer of a Flax module is called in Python while the module is traced, so `record_features` can note its output:
for Linen by an interceptor, for NNX by watching layers (`kdsearch_jax.adapters.nnx`). Values computed inside `nn.scan`,
`nn.vmap` or `nn.remat` are out of reach; the output of the module around them is not.

`find_layers` chooses layers. Features are (batch, …positions, channels). Layers with the same positions form a stage,
and the last layer of each stage is chosen. Layers inside a block that changes the positions (the first convolutions of
a down-sampling block) do not end a stage, nor do a squeeze to one position and the layers that make the logits. A
vector per example is chosen if it comes after all stages: it is the classifier's input.
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

BATCH = 7  # batch size of the abstract run that inspects layers


@contextmanager
def record_features(module: Any) -> Iterator[dict[str, Any]]:
    """A context in which {path of a layer: its output at its last call} is recorded, in the order in which calls end.

    The module itself and layers that do not return a single array are left out.
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


def select_features(seen: Mapping[str, Any], paths: Sequence[str]) -> dict[str, jax.Array]:
    """The features at `paths`, in float32. Raises ValueError if a layer was not called."""
    for path in paths:
        if path not in seen:
            raise ValueError(f"distill.features: the student calls no layer {path!r}; {nearest(path, seen)}")
    return {path: jnp.asarray(seen[path], jnp.float32) for path in paths}


def layer_shapes(module: Any, variables: Any, call: CallSpec) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """({path: output shape} of all layers, in the order of their calls; shape of the network's output).

    Includes layers inside loops. Nothing is computed. Leading axes are batches of `BATCH`.
    """
    order: list[str] = []

    def run(variables: Any, *inputs: Any) -> Any:
        with record_features(module) as seen:
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


def find_layers(
    module: Any, variables: Any, call: CallSpec, patterns: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the layers that feature losses compare, in the order in which they are computed.

    Args:
      variables: arrays or shapes.
      patterns: paths, or patterns (fnmatch) of them; none: the last layer of each stage.

    Raises:
      ValueError: a pattern fits no layer, or there is none to choose.
    """
    every, output = layer_shapes(module, variables, call)

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


def channel_units(
    module: Any, variables: Any, call: CallSpec, paths: Sequence[str], topology: Topology
) -> dict[str, Units]:
    """The units that channels of features belong to: {path: {group: (channels,) unit of each, −1 for none}}.

    Gates are folded into the kernels that read a channel, so the channel itself does not show them; see
    `mask_channels`.
    """
    variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    inputs, keywords = call.example(BATCH), call.keywords(module, train=False)

    def run(variables: Any, *inputs: Any) -> list[Any]:
        args, named = call_arguments(inputs, keywords)
        with record_features(module) as seen:
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


def mask_channels(
    features: dict[str, jax.Array], found: Mapping[str, Units], gates: Mapping[str, Any], scaled: Sequence[str] = ()
) -> dict[str, jax.Array]:
    """The features of the student cut at these gates, with zeros for the channels that it lacks.

    The value of a gate g > 0 is in the kernels behind the channel, so the factor here is 1, and 0 for a gate at 0. Its
    derivative is that of g/g₀ at g₀ = g, so that the loss sees the importance of the channel. Gates of the groups in
    `scaled` multiply what produces the channel, so the loss sees them there.
    """

    def through(path: str, value: jax.Array) -> jax.Array:
        for group, units in found.get(path, {}).items():
            gate = gates[group]
            alive = gate > 0
            gate = jax.lax.stop_gradient(gate) if group in scaled else gate
            factor = jnp.where(alive, gate / jax.lax.stop_gradient(jnp.where(alive, gate, 1.0)), 0.0)
            factor = jnp.append(factor, 1.0)[np.where(units < 0, len(gate), units)]
            value = value * factor.reshape((1,) * (value.ndim - 1) + (-1,))
        return value

    return {path: through(path, value) for path, value in features.items()}


def _ends(every: Mapping[str, tuple[int, ...]], output: tuple[int, ...]) -> list[str]:
    """The last layer of each stage, and the vector after all stages."""
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
        """Whether it is in a block that leads from these positions to others, or back from them."""
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
    """The paths of the modules around a layer."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _out_of_reach(module: Any, variables: Any, call: CallSpec, paths: Sequence[str]) -> list[str]:
    """Those of `paths` that are computed inside a loop, outside of which their values do not exist."""

    def run(variables: Any, *inputs: Any) -> Any:
        with record_features(module) as seen:
            apply_eval(module, variables, inputs, call_spec=call)
        return [seen[path] for path in paths]

    try:
        jaxpr = jax.make_jaxpr(run)(variables, *call.example(BATCH)).jaxpr
    except jax.errors.UnexpectedTracerError:
        alone = len(paths) == 1
        return list(paths) if alone else [p for p in paths if _out_of_reach(module, variables, call, [p])]
    made = {*map(id, jaxpr.invars), *(id(value) for equation in jaxpr.eqns for value in equation.outvars)}
    return [path for path, value in zip(paths, jaxpr.outvars, strict=True) if id(value) not in made]
