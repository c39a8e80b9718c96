"""The adapter for Flax Linen: traces an unmodified module, and knows which layers hold sizes as attributes.

The core (`topology`, `gates`, `surgery`) sees pure functions and pytrees. What is Linen's own is here: how a module
becomes a function, what a layer's `features` must be for a sliced kernel, and whether a module's code can run at other
sizes at all. A size that is written into the model's code is found by running the candidate abstractly with units
removed; the groups that break it are frozen, with the error as the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from flax.core import freeze

from kdsearch_jax import program as program_lib
from kdsearch_jax import topology as topology_lib
from kdsearch_jax.student import Student
from kdsearch_jax.topology import Topology


@dataclass(frozen=True)
class Layer:
    """A module met during a call: its class and its attributes that hold sizes."""

    kind: type[nn.Module]
    sizes: dict[str, Any]


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
        return resized(self.layers, self.topology, keep)

    def student(self, keep: Mapping[str, Any]) -> Student:
        """The module of the student that keeps `keep`."""
        layers, dropped = self.resized(keep)
        return Student(base=self.module, layers=freeze(layers), dropped=dropped)

    def select(self, kinds: Sequence[str], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Network:
        """The network with only these groups free; see `Topology.select`."""
        return replace(self, topology=self.topology.select(kinds, include, exclude).require_groups())


def trace(module: nn.Module, *inputs: Any, **kwargs: Any) -> Network:
    """Traces `module.apply(variables, *inputs, **kwargs)` abstractly: no parameter is made, nothing is computed.

    Args:
      module: any Linen module; its randomness must be off (`train=False`, `deterministic=True`).
      inputs: arrays or `jax.ShapeDtypeStruct`s with a leading batch axis.

    Raises:
      ValueError: where nothing can be pruned, with the reasons.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    layers: dict[str, Layer] = {}

    def record(call: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            layers["/".join(context.module.path)] = _layer(context.module)
        return call(*args, **call_kwargs)

    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda *xs: module.init(rngs, *xs, **kwargs), *shapes)

    def droppable(path: str) -> bool:
        return path in layers and layers[path].kind.__module__.startswith("flax.linen")

    def function(variables: Any, *xs: Any) -> Any:
        return module.apply(variables, *xs, **kwargs)

    found = topology_lib.trace(function, variables, *shapes, droppable=droppable)
    network = Network(module, found, layers, shapes, dict(kwargs))
    return replace(network, topology=_freeze_hard_wired(network, variables).require_groups())


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
    return Layer(type(module), {name: getattr(module, name) for name in names})


def resized(
    layers: Mapping[str, Layer], topology: Topology, keep: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """(sizes that differ from the base model's by layer, dropped layers)."""
    shapes = topology.sliced_shapes(keep)
    result: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        leaf = f"params/{path}/embedding" if issubclass(layer.kind, nn.Embed) else f"params/{path}/kernel"
        if not layer.sizes or leaf not in shapes or shapes[leaf] == topology.shapes[leaf]:
            continue
        sizes = _sizes(layer, topology.shapes[leaf], shapes[leaf])
        changed = {name: value for name, value in sizes.items() if value != layer.sizes[name]}
        if changed:
            result[path] = changed
    return result, topology.dropped(keep)


def _sizes(layer: Layer, before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, Any]:
    """A layer's attributes for a kernel of shape `after` where `before` was its own."""
    old = layer.sizes["features"]
    if isinstance(old, (tuple, list)):
        return {"features": after[len(after) - len(old) :]}
    sizes: dict[str, Any] = {"features": after[-1]}
    groups = layer.sizes.get("feature_group_count", 1)
    if groups > 1:  # whole groups go, so the outputs of each stay as many as they were
        sizes["feature_group_count"] = after[-1] * groups // before[-1]
    return sizes


def _freeze_hard_wired(network: Network, variables: Any) -> Topology:
    """The topology without groups at whose other sizes the module's code does not run, or computes something else."""
    found = network.topology
    names = [group.name for group in found.groups if group.kind != "branches"]
    expected = _signature(network.module, variables, network)

    def broken(chosen: Sequence[str]) -> str | None:
        keep = {g.name: np.ones(g.size, bool) for g in found.groups}
        for number, name in enumerate(chosen):
            keep[name][: 1 + (number % 2) * (len(keep[name]) > 3)] = False
        try:
            got = _signature(network.student(keep), _sliced(found, variables, keep), network)
        except Exception as error:  # whatever a stranger's model raises when a size changes
            return f"the model's code needs this size ({str(error).strip().splitlines()[0][:120]})"
        return None if got == expected else "its size enters the computation as a number"

    def search(chosen: Sequence[str]) -> dict[str, str]:
        reason = broken(chosen) if chosen else None
        if reason is None or len(chosen) == 1:
            return {chosen[0]: reason} if reason else {}
        half = len(chosen) // 2
        return {**search(chosen[:half]), **search(chosen[half:])} or dict.fromkeys(chosen, reason)

    return found.without(search(names))


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


def _signature(module: nn.Module, variables: Any, network: Network) -> tuple[Any, ...]:
    """The outputs' shapes, and each operation with the numbers written into it: alike at all sizes of a sound model."""

    def function(variables: Any, *xs: Any) -> Any:
        return module.apply(variables, *xs, **network.kwargs)

    program = program_lib.flatten(jax.make_jaxpr(function)(variables, *network.inputs))

    def numbers(op: program_lib.Op) -> tuple[float, ...]:
        known = (program.constants.get(v) for v in op.inputs)
        return tuple(
            float(c)
            for c in known
            if c is not None and np.ndim(c) == 0 and np.issubdtype(np.asarray(c).dtype, np.floating)
        )

    ops = tuple((op.name, numbers(op)) for op in program.ops)
    return tuple(program.shape(v) for v in program.outputs), ops


@dataclass(frozen=True)
class Count:
    """What a module costs: MACs of one example, parameters, and operations of a batch as counted here and by XLA."""

    macs: int
    params: int
    flops: float
    xla_flops: float


def count(module: nn.Module, *inputs: Any, **kwargs: Any) -> Count:
    """Counts a freshly built module from its own code and asks XLA to do the same; nothing is computed."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = jax.eval_shape(lambda *xs: module.init(rngs, *xs, **kwargs), *shapes)

    def function(variables: Any, *xs: Any) -> Any:
        return module.apply(variables, *xs, **kwargs)

    found = topology_lib.trace(function, variables, *shapes, droppable=lambda path: False)
    analysis: Any = jax.jit(function).lower(variables, *shapes).cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return Count(*found.total(), found.flops, float(analysis["flops"]))
