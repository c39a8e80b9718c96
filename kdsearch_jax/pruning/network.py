"""A network: a Flax module together with the result of tracing it, for Linen and NNX alike.

`trace` runs the module abstractly, walks its operations and assembles its topology. Sizes that are written into the
module's code are found by trial cuts (`trials`). What differs between Linen and NNX is behind
`kdsearch_jax.adapters.base.Adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.nnx
import jax
import numpy as np

from kdsearch_jax.adapters import linen, nnx
from kdsearch_jax.adapters.architecture import StudentModule, pruned_sizes
from kdsearch_jax.adapters.base import Adapter, LayerInfo
from kdsearch_jax.adapters.call_spec import input_spec
from kdsearch_jax.adapters.devices import off_mesh
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.adapters.memoize import memoize
from kdsearch_jax.pruning import trials
from kdsearch_jax.pruning.gates import keep_all
from kdsearch_jax.pruning.restrict import restricted
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.analysis import Contraction, Product
from kdsearch_jax.tracing.grouping import build_topology
from kdsearch_jax.tracing.interpreter import analyze
from kdsearch_jax.tracing.program import flatten_jaxpr
from kdsearch_jax.tracing.rescaling import Rescale
from kdsearch_jax.tracing.topology import Topology


@dataclass(frozen=True)
class Network:
    """A traced module.

    Attributes:
      module: the Linen module, or the `FunctionalModule` of an nnx.Module.
      topology: the units that can be removed, and their costs.
      layers: {path: layer} of the module's layers.
      inputs: shapes of the example inputs. kwargs: keywords of the call.
      size_attributes: numbers in the user's code that are sizes of groups.
      rescales: numbers in the user's code that are powers of sizes, and the parameters that undo their change.
      whole, kept: the network that this one is a part of, and {group: (size,) bool} which of its units are left.
    """

    module: Any
    topology: Topology
    layers: dict[str, LayerInfo]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    size_attributes: tuple[trials.SizeAttribute, ...] = ()
    rescales: tuple[Rescale, ...] = ()
    whole: Network | None = None
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The adapter for the module's library, Linen or NNX."""
        return adapter_for(self.module)

    def resized(self, keep: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
        """(layer sizes, dropped layers) of the student that keeps `keep`, as `Architecture` stores them.

        Both are relative to the base model, also if the network's module is a student already.
        """
        if self.whole is not None:
            return self.whole.resized(self._in_whole(keep))
        layers, dropped = _resized(self.layers, self.topology, keep)
        if layers:
            shapes = self.topology.sliced_shapes(keep)
            for attribute in self.size_attributes:
                layers.setdefault(attribute.path, {})[attribute.name] = attribute.value(shapes)
        layers_before, dropped_before = pruned_sizes(self.module)
        paths = {**layers_before, **layers}
        layers = {path: {**layers_before.get(path, {}), **layers.get(path, {})} for path in paths}
        return layers, tuple(sorted({*dropped_before, *dropped}))

    def _in_whole(self, keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`keep` of this part in units of the whole network."""
        result = {name: np.array(mask, bool) for name, mask in self.kept.items()}
        for name, mask in keep.items():
            result[name][result[name]] = mask
        return result

    def restricted(self, keep: Mapping[str, np.ndarray]) -> Network:
        """The network with only the units in `keep`: the student's module, with a topology of its own."""
        topology = restricted(self.topology, keep)
        return replace(self, module=self.student(keep), topology=topology, whole=self, kept=keep)

    def factors(self, keep: Mapping[str, Any]) -> dict[str, float]:
        """{parameter: factor} that undo the change of numbers which the student's code computes from its sizes."""
        before, after = self.topology.shapes, self.topology.sliced_shapes(keep)
        result: dict[str, float] = {}
        for rescale in self.rescales:
            for leaf in rescale.scaled if rescale.leaf in before else ():
                sizes = (shapes[rescale.leaf][rescale.axis] for shapes in (before, after))
                result[leaf] = result.get(leaf, 1.0) * rescale.factor(*sizes)
        return result

    def student(self, keep: Mapping[str, Any]) -> Any:
        """The module of the student that keeps `keep`."""
        return self.adapter.resized(self.module, *self.resized(keep))

    def select(self, kinds: Sequence[str], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Network:
        """The network in which only these groups may be pruned; see `Topology.select`."""
        return replace(self, topology=self.topology.select(kinds, include, exclude).require_groups())


def adapter_for(module: Any) -> Adapter:
    """The adapter for a module's library; an nnx.Module is given as a `FunctionalModule`."""
    return nnx if isinstance(module, FunctionalModule) else linen


@off_mesh
def trace(module: Any, *inputs: Any, **kwargs: Any) -> Network:
    """Traces the call `module(*inputs, **kwargs)` abstractly: no parameter is created, nothing is computed.

    Args:
      module: any Flax module, with its randomness turned off (`train=False`, `deterministic=True`). For an nnx.Module,
        the network's module is its `FunctionalModule`.
      inputs: pytrees of arrays or `jax.ShapeDtypeStruct`s with a leading batch axis.
      kwargs: keywords of the call.

    Raises:
      ValueError: nothing can be pruned, with the reasons, or the inputs have no batch axis.
    """
    module = FunctionalModule.split(module)[0] if isinstance(module, flax.nnx.Module) else module
    if (network := _without_branches(module, inputs, kwargs)) is not None:
        return network
    adapter, shapes = adapter_for(module), _shapes(inputs)
    batch = topology_lib.batch_size(shapes)
    variables = adapter.abstract_variables(module, shapes, kwargs)
    leaves = topology_lib.leaf_shapes(variables)
    layers, jaxpr = adapter.trace_layers(module, variables, shapes, kwargs)

    def droppable(path: str) -> bool:
        return path in layers and layers[path].droppable

    program = flatten_jaxpr(jaxpr)
    paired = released = frozenset[trials.Pairing]()
    while True:
        found = analyze(program, leaves, paired)
        topology = build_topology(found, leaves, batch, droppable)
        idle = trials.idle(found, topology) - released
        kept_groups = trials.kept_groups(found, list(leaves), layers)
        network = Network(module, topology, layers, shapes, dict(kwargs), kept_groups)
        verdict = trials.Verdict(pair=idle) if idle else trials.judge(network, found, variables, released)
        if not verdict.pair and not verdict.release:
            break
        paired, released = (paired | verdict.pair) - verdict.release, released | verdict.release
    topology = topology.without(verdict.frozen).require_groups()
    attributes = (*kept_groups, *verdict.size_attributes)
    return replace(network, topology=topology, size_attributes=attributes, rescales=verdict.rescales)


def _without_branches(module: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Network | None:
    """The network of a student without some residual branches, as a part of the network that still has them.

    Dropped layers return zeros and have no parameters by which sizes could be tracked. None if no layer is dropped, or
    if the branches that the dropped layers ended are not found.
    """
    layers, dropped = pruned_sizes(module)
    if not dropped:
        return None
    try:
        whole = trace(adapter_for(module).resized(module, layers, ()), *inputs, **kwargs)
    except ValueError:
        return None
    keep = keep_all(whole.topology)
    for group in whole.topology.groups:
        if group.kind == "branches" and set(group.layers) <= set(dropped):
            keep[group.name] = np.zeros(1, bool)
    if set(whole.topology.dropped(keep)) != set(dropped):
        return None
    part = whole.restricted(keep)
    return replace(part, module=module) if part.topology.groups else None


@off_mesh
def shapes_of(module: Any, *inputs: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the variables that the module's own code creates."""
    return topology_lib.leaf_shapes(adapter_for(module).abstract_variables(module, _shapes(inputs), kwargs))


def _shapes(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: input_spec(x.shape, x.dtype), inputs)


def _resized(
    layers: Mapping[str, LayerInfo], topology: Topology, keep: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """(sizes by layer, dropped layers); no sizes if nothing is removed.

    Layers that keep their size are included as well: the model's code may derive it from a size that changes.
    """
    shapes, dropped = topology.sliced_shapes(keep), topology.dropped(keep)
    if shapes == topology.shapes:
        return {}, dropped
    leaves_of: dict[str, dict[str, str]] = {}
    for leaf in shapes:  # "params/block/conv/kernel" is "params/kernel" of block/conv and "params/conv/kernel" of block
        collection, *parts = leaf.split("/")
        for i in range(len(parts)):
            leaves_of.setdefault("/".join(parts[:i]), {})["/".join([collection, *parts[i:]])] = leaf
    result: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():  # dropped layers too: their zeros have a size
        leaves = leaves_of.get(path, {})
        before = {name: topology.shapes[leaf] for name, leaf in leaves.items()}
        after = {name: shapes[leaf] for name, leaf in leaves.items()}
        if leaves and (sizes := layer.resize(before, after)):
            result[path] = sizes
    return result, dropped


@dataclass(frozen=True)
class Count:
    """The cost of a module.

    Attributes:
      macs: multiply-accumulates of one example. params: parameters.
      flops, xla_flops: operations of a batch as counted here, and by XLA.
      uncounted: primitives whose operations only XLA counts.
      foldable: operations on constants, which XLA may or may not count; not part of `flops`.
      batch_macs: multiply-accumulates of a batch.
      orders: contraction orders of einsums of three or more operands.
      products: matrix products and convolutions.
    """

    macs: int
    params: int
    flops: float
    xla_flops: float
    uncounted: tuple[str, ...]
    foldable: float = 0.0
    batch_macs: float = 0.0
    orders: tuple[Contraction, ...] = ()
    products: tuple[Product, ...] = ()

    def miscounted(self) -> str | None:
        """The first product for which XLA counts other FLOPs when it is compiled alone; None if there is none."""
        for op, operands, flops in self.products:
            found = _flops(jax.jit(partial(_PRODUCTS[op.name].bind, **op.params)).lower(*operands))
            if found != flops:
                return f"XLA counts {found:,.0f} operations for {op.name} {op.scope}, {flops:,.0f} were counted"
        return None


_PRODUCTS = {"dot_general": jax.lax.dot_general_p, "conv_general_dilated": jax.lax.conv_general_dilated_p}


def _flops(lowered: Any) -> float:
    """The operations of a lowered program, counted by XLA."""
    analysis = lowered.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis).get("flops", 0.0))


@off_mesh
def count(module: Any, *inputs: Any, **kwargs: Any) -> Count:
    """Counts the operations of a module from its own code, and by XLA; nothing is computed."""
    leaves, structure = jax.tree.flatten(_shapes(inputs))
    return _counted(module, structure, tuple(leaves), tuple(sorted(kwargs.items())))


@memoize(8)
def _counted(module: Any, structure: Any, leaves: tuple[Any, ...], keywords: tuple[tuple[str, Any], ...]) -> Count:
    kwargs, shapes = dict(keywords), jax.tree.unflatten(structure, leaves)
    adapter = adapter_for(module)
    variables = adapter.abstract_variables(module, shapes, kwargs)
    traced = adapter.traced(module, variables, shapes, kwargs)
    found = analyze(flatten_jaxpr(traced.jaxpr), topology_lib.leaf_shapes(variables))
    macs = sum(term.macs() for term in found.terms)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get("params", {})))
    xla, uncounted = _flops(traced.lower()), tuple(sorted(found.uncounted))
    batch, orders, products = topology_lib.batch_size(shapes), tuple(found.contractions), tuple(found.products)
    return Count(round(macs / batch), params, found.flops, xla, uncounted, found.foldable_flops, macs, orders, products)


def macs_in_order_of(network: Network, student: Count) -> int:
    """MACs of one example if the student contracted its einsums in the order of the network.

    JAX contracts the operands of an einsum in the order that is cheapest at their sizes. Costs of candidates assume the
    network's order, so a student for which JAX finds a better order costs less than was counted.
    """
    adapter = network.adapter
    variables = adapter.abstract_variables(network.module, network.inputs, network.kwargs)
    jaxpr = adapter.jaxpr(network.module, variables, network.inputs, network.kwargs)
    products: dict[str, list[Any]] = {}
    for order, _, scope in analyze(flatten_jaxpr(jaxpr), topology_lib.leaf_shapes(variables)).contractions:
        products.setdefault(_scope_in_base(scope), []).append(order.products)
    macs = student.batch_macs
    for order, times, scope in student.orders:
        same = products.get(_scope_in_base(scope))
        macs += times * (order.macs(same.pop(0)) - order.macs()) if same else 0
    return round(macs / topology_lib.batch_size(network.inputs))


def _scope_in_base(scope: str) -> str:
    """The scope of an operation within the base module of a student."""
    return scope.removeprefix(f"{StudentModule.__name__}/")
