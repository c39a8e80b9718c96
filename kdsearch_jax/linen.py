"""The adapter for Flax Linen: traces an unmodified module, and knows which layers hold sizes as attributes.

The core (`topology`, `gates`, `surgery`) sees pure functions and pytrees. What is Linen's own is here: how a module
becomes a function, what a layer's `features` must be for a sliced kernel, and whether a module's code can run at other
sizes at all. A size that is written into the model's code is found by running the candidate abstractly with units
removed; the groups that break it are frozen, with the error as the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from flax.core import freeze

from kdsearch_jax import sizes as sizes_lib
from kdsearch_jax import topology as topology_lib
from kdsearch_jax.program import Program, flatten
from kdsearch_jax.student import Student
from kdsearch_jax.topology import Topology
from kdsearch_jax.walk import Walk, again, walk


@dataclass(frozen=True)
class Layer:
    """A module met during a call: its class and its attributes that hold sizes."""

    kind: type[nn.Module]
    sizes: dict[str, Any]
    axis: int = -1  # of its kernel, where `features` is counted


@dataclass(frozen=True)
class Network:
    """A module with what tracing it found. inputs: shapes of the example inputs; kwargs: keywords of its call."""

    module: nn.Module
    topology: Topology
    layers: dict[str, Layer]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]

    def resized(self, keep: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
        """(layer sizes, dropped layers) of the student that keeps `keep`, as `Architecture` holds them."""
        layers, dropped = resized(self.layers, self.topology, keep)
        if isinstance(self.module, Student):  # cut again: what differs from the model that the student was cut from
            before = {path: dict(sizes) for path, sizes in self.module.layers.items()}
            layers = {path: before.get(path, {}) | layers.get(path, {}) for path in {**before, **layers}}
            dropped = tuple(sorted({*self.module.dropped, *dropped}))
        return layers, dropped

    def student(self, keep: Mapping[str, Any]) -> Student:
        """The module of the student that keeps `keep`."""
        layers, dropped = self.resized(keep)
        base = self.module.base if isinstance(self.module, Student) else self.module
        return Student(base=base, layers=freeze(layers), dropped=dropped)

    def select(self, kinds: Sequence[str], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Network:
        """The network with only these groups free; see `Topology.select`."""
        return replace(self, topology=self.topology.select(kinds, include, exclude).require_groups())


def trace(module: nn.Module, *inputs: Any, **kwargs: Any) -> Network:
    """Traces `module.apply(variables, *inputs, **kwargs)` abstractly: no parameter is made, nothing is computed.

    Args:
      module: any Linen module; its randomness must be off (`train=False`, `deterministic=True`).
      inputs: arrays or `jax.ShapeDtypeStruct`s with a leading batch axis.

    Raises:
      ValueError: where nothing can be pruned, with the reasons, or the inputs have no batch axis.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    batch = topology_lib.batch_size(shapes)
    layers: dict[str, Layer] = {}

    def record(call: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            layers["/".join(context.module.path)] = _layer(context.module)
        return call(*args, **call_kwargs)

    variables = _variables(module, shapes, kwargs)

    def droppable(path: str) -> bool:
        return path in layers and _is_flax(layers[path].kind)

    leaves = topology_lib.leaf_shapes(variables)
    with nn.intercept_methods(record):
        program = _program(module, variables, shapes, kwargs)
    found = walk(program, leaves)
    topology = topology_lib.assemble(found, leaves, batch, droppable)
    network = Network(module, topology, layers, shapes, dict(kwargs))
    return replace(network, topology=_freeze_hard_wired(network, found, variables).require_groups())


def shapes_of(module: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the variables that the module's own code makes."""
    return topology_lib.leaf_shapes(_variables(module, inputs, kwargs))


def _variables(module: nn.Module, inputs: Any, kwargs: Mapping[str, Any]) -> Any:
    """Shapes of the module's variables."""
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    with nn.intercept_methods(_without_initializers):
        return jax.eval_shape(lambda *xs: module.init(rngs, *xs, **kwargs), *inputs)


def _program(module: nn.Module, variables: Any, inputs: Any, kwargs: Mapping[str, Any]) -> Program:
    """The operations of `module.apply`."""
    with nn.intercept_methods(_without_initializers):
        return flatten(jax.make_jaxpr(lambda v, *xs: module.apply(v, *xs, **kwargs))(variables, *inputs))


def _without_initializers(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Runs a layer with zeros for initializers: Linen traces them all at every `apply`, most of its time."""
    layer = context.module
    inits = {name: getattr(layer, name) for name in type(layer).__dataclass_fields__ if name.endswith("_init")}
    if not inits or not _is_flax(type(layer)):
        return call(*args, **kwargs)
    # Others than JAX's own may wrap what they return, to say how it is sharded.
    plain = [n for n, init in inits.items() if _is_jax(init) and not hasattr(init, "__wrapped__")]
    try:
        for name in plain:
            object.__setattr__(layer, name, nn.initializers.zeros)
        return call(*args, **kwargs)
    finally:
        for name in plain:
            object.__setattr__(layer, name, inits[name])


def _is_jax(value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", "").startswith("jax.")


def _is_flax(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("flax.linen")


_SIZES = {
    nn.Conv: ("features", "feature_group_count"),
    nn.ConvTranspose: ("features",),
    nn.ConvLocal: ("features",),
    nn.Dense: ("features",),
    nn.DenseGeneral: ("features",),
    nn.Embed: ("features",),
}


def _layer(module: nn.Module) -> Layer:
    names = next((names for kind, names in _SIZES.items() if isinstance(module, kind)), ())
    flipped = isinstance(module, nn.ConvTranspose) and module.transpose_kernel
    return Layer(type(module), {name: getattr(module, name) for name in names}, -2 if flipped else -1)


def resized(
    layers: Mapping[str, Layer], topology: Topology, keep: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """(sizes by layer, dropped layers); no sizes where nothing is cut.

    Layers that keep their size are named as well: the model's code may derive it from one that changes.
    """
    shapes, dropped = topology.sliced_shapes(keep), topology.dropped(keep)
    if shapes == topology.shapes:
        return {}, dropped
    result: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        leaf = f"params/{path}/embedding" if issubclass(layer.kind, nn.Embed) else f"params/{path}/kernel"
        if layer.sizes and leaf in shapes:  # dropped ones too: their zeros have a size
            result[path] = _sizes(layer, topology.shapes[leaf], shapes[leaf])
    return result, dropped


def _sizes(layer: Layer, before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, Any]:
    """A layer's attributes for a kernel of shape `after` where `before` was its own."""
    old = layer.sizes["features"]
    if isinstance(old, (tuple, list)):
        return {"features": after[len(after) - len(old) :]}
    sizes: dict[str, Any] = {"features": after[layer.axis]}
    groups = layer.sizes.get("feature_group_count", 1)
    if groups > 1:  # whole groups go, so the outputs of each stay as many as they were
        sizes["feature_group_count"] = after[-1] * groups // before[-1]
    return sizes


def _freeze_hard_wired(network: Network, found: Walk, variables: Any) -> Topology:
    """The topology without groups at whose other sizes the module's code does not run, or computes something else."""
    topology = network.topology
    small = [g.name for g in topology.groups if g.size < _SMALL and g.kind != "branches"]
    numbers = {g.name: i for i, g in enumerate(topology.groups)} | {name: i for i, name in enumerate(small)}
    turns = 2 * max(2, (len(small) - 1).bit_length()) if small else 1

    def broken(chosen: set[str], turn: int = 0) -> str | None:
        keep = {g.name: _some_left(numbers[g.name], turn, g.size, g.name in chosen) for g in topology.groups}
        masks = topology.masks(keep)
        reason = None
        if masks:
            left = sizes_lib.labels_left(found, masks, list(topology.shapes))
            reason = _unforeseen(network, found, keep, left, _sliced(topology, variables, keep))
        if reason is None and turn + 1 < turns and not chosen.isdisjoint(small):
            return broken(chosen, turn + 1)
        return reason

    free = [group.name for group in topology.groups if group.kind != "branches"]
    reasons: dict[str, str] = {}
    while free and (reason := broken(set(free))):
        intact, wrong = 0, len(free)  # how many of the first groups may shrink, and how many may not
        while wrong - intact > 1:
            middle = (intact + wrong) // 2
            why = broken(set(free[:middle]))
            intact, wrong, reason = (intact, middle, why) if why else (middle, wrong, reason)
        name = free[wrong - 1]
        reasons[name] = reason
        # Layers that are named alike, as in block1 and block2, are not tried one by one.
        alike = [other for other in free if _pattern(other) == _pattern(name) and other != name]
        reasons |= dict.fromkeys(alike, f"as in {name}: {reason}")
        free = [other for other in free if other not in reasons]
    return topology.without(reasons)


_SMALL = 12


def _some_left(number: int, turn: int, size: int, shrinks: bool) -> np.ndarray:
    """What to keep of a group for a try.

    Each loses its first and its last unit, since places are counted from either end; more in its first half than in its
    second, and another number than the group before it, since what is lost evenly may go unnoticed. A small group has
    no room for all that: it loses one unit in turns that are the bits of its number, so that of any two groups each
    shrinks without the other at some turn.
    """
    keep = np.ones(size, bool)
    if shrinks and size < _SMALL:
        bit, value = divmod(turn, 2)
        keep[-1 if bit % 2 else 0] = (number >> bit) % 2 != value
    elif shrinks:
        more = (number + turn) % (size // 2 - 2)
        inner = np.random.default_rng(number).choice(size // 2 - 2, more, replace=False)
        keep[[0, 1, *(2 + inner), -1]] = False
    return keep


def _unforeseen(network: Network, found: Walk, keep: Any, left: np.ndarray, variables: Any) -> str | None:
    """Why the module's code does not do at these sizes what the walk foresaw; None where it does."""
    try:
        program = _program(network.student(keep), variables, network.inputs, network.kwargs)
    except Exception as error:  # whatever a stranger's model raises when a size changes
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"the model's code needs this size ({message[:120]})"
    return sizes_lib.difference(found, again(program, found.labels.kept(left), len(network.topology.shapes)), left)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _sliced(topology: Topology, variables: Any, keep: Mapping[str, Any]) -> Any:
    """Shapes of the student's variables."""
    shapes, gone = topology.sliced_shapes(keep), set(topology.dropped(keep))
    flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    return traverse_util.unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(shapes[path], leaf.dtype)
            for path, leaf in flat.items()
            if path.split("/", 1)[1].rsplit("/", 1)[0] not in gone
        },
        sep="/",
    )


@dataclass(frozen=True)
class Count:
    """What a module costs: MACs of one example, parameters, and operations of a batch as counted here and by XLA.

    uncounted: primitives whose operations are counted by XLA only.
    """

    macs: int
    params: int
    flops: float
    xla_flops: float
    uncounted: tuple[str, ...]


def count(module: nn.Module, *inputs: Any, **kwargs: Any) -> Count:
    """Counts a freshly built module from its own code and asks XLA to do the same; nothing is computed."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    variables = _variables(module, shapes, kwargs)
    with nn.intercept_methods(_without_initializers):
        traced = jax.jit(lambda v, *xs: module.apply(v, *xs, **kwargs)).trace(variables, *shapes)
    found = walk(flatten(traced.jaxpr), topology_lib.leaf_shapes(variables))
    macs = sum(term.macs() for term in found.terms) / topology_lib.batch_size(shapes)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get("params", {})))
    analysis: Any = traced.lower().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return Count(round(macs), params, found.flops, float(analysis["flops"]), tuple(sorted(found.uncounted)))
