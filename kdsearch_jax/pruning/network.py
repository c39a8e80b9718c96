"""A network: a module with what tracing it found, whichever library of layers it is written in.

`trace` runs the module abstractly, walks its operations and assembles its topology. A size that is written into the
module's code is found by trial cuts (`trials`). What a library adds is behind `kdsearch_jax.adapters.base.Adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flax.nnx
import jax
import numpy as np

from kdsearch_jax.adapters import linen, nnx
from kdsearch_jax.adapters.architecture import StudentModule, cuts_of
from kdsearch_jax.adapters.base import Adapter, Layer
from kdsearch_jax.adapters.call_spec import shaped
from kdsearch_jax.adapters.devices import off_mesh
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.adapters.memoize import remembered
from kdsearch_jax.pruning import trials
from kdsearch_jax.pruning.gates import everything
from kdsearch_jax.pruning.restrict import restricted
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.findings import Ordered
from kdsearch_jax.tracing.program import flatten
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.tracing.walk import walk


@dataclass(frozen=True)
class Network:
    """A module with what tracing it found.

    inputs: shapes of the example inputs; kwargs: keywords of its call; follows: numbers in the model's own code that
    are sizes of its groups.
    whole, kept: the network that this one is a part of, and which of its units are left, {group: (size,) bool}.
    """

    module: Any
    topology: Topology
    layers: dict[str, Layer]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    follows: tuple[trials.Follow, ...] = ()
    whole: Network | None = None
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def library(self) -> Adapter:
        """The library that the module is written in."""
        return adapter_for(self.module)

    def resized(self, keep: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
        """(layer sizes, dropped layers) of the student that keeps `keep`, as `Architecture` holds them.

        Both say all that differs from the base model, also where the network's module is a student already.
        """
        if self.whole is not None:
            return self.whole.resized(self._in_whole(keep))
        layers, dropped = resized(self.layers, self.topology, keep)
        if layers:
            shapes = self.topology.sliced_shapes(keep)
            for each in self.follows:
                layers.setdefault(each.path, {})[each.name] = each.value(shapes)
        before, gone = cuts_of(self.module)
        layers = {path: {**before.get(path, {}), **layers.get(path, {})} for path in {**before, **layers}}
        return layers, tuple(sorted({*gone, *dropped}))

    def _in_whole(self, keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`keep` of this part in units of the whole."""
        result = {name: np.array(mask, bool) for name, mask in self.kept.items()}
        for name, mask in keep.items():
            result[name][result[name]] = mask
        return result

    def part(self, keep: Mapping[str, np.ndarray]) -> Network:
        """What is left of the network with only the units in `keep`: its student, with a topology of its own."""
        left = restricted(self.topology, keep)
        return replace(self, module=self.student(keep), topology=left, whole=self, kept=keep)

    def student(self, keep: Mapping[str, Any]) -> Any:
        """The module of the student that keeps `keep`."""
        return adapter_for(self.module).cut(self.module, *self.resized(keep))

    def select(self, kinds: Sequence[str], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Network:
        """The network with only these groups free; see `Topology.select`."""
        return replace(self, topology=self.topology.select(kinds, include, exclude).require_groups())


def adapter_for(module: Any) -> Adapter:
    """The library that a module is written in; an nnx.Module comes as a `FunctionalModule`."""
    return nnx if isinstance(module, FunctionalModule) else linen


@off_mesh
def trace(module: Any, *inputs: Any, **kwargs: Any) -> Network:
    """Traces a call `module(*inputs, **kwargs)` abstractly: no parameter is made, nothing is computed.

    Args:
      module: any Flax module; its randomness must be off (`train=False`, `deterministic=True`). Of an nnx.Module the
        network's module is its `FunctionalModule`.
      inputs: pytrees of arrays or `jax.ShapeDtypeStruct`s with a leading batch axis.

    Raises:
      ValueError: where nothing can be pruned, with the reasons, or the inputs have no batch axis.
    """
    module = FunctionalModule.split(module)[0] if isinstance(module, flax.nnx.Module) else module
    if (found := _without_branches(module, inputs, kwargs)) is not None:
        return found
    library, shapes = adapter_for(module), _shapes(inputs)
    batch = topology_lib.batch_size(shapes)
    variables = library.variables(module, shapes, kwargs)
    leaves = topology_lib.leaf_shapes(variables)
    layers, jaxpr = library.layers(module, variables, shapes, kwargs)

    def droppable(path: str) -> bool:
        return path in layers and layers[path].droppable

    program = flatten(jaxpr)
    paired = released = frozenset[trials.Pairing]()
    while True:
        found = walk(program, leaves, paired)
        topology = topology_lib.assemble(found, leaves, batch, droppable)
        more = trials.idle(found, topology) - released
        follows = trials.kept_groups(found, list(leaves), layers)
        network = Network(module, topology, layers, shapes, dict(kwargs), follows)
        verdict = trials.Verdict(pair=more) if more else trials.judge(network, found, variables, released)
        if not verdict.pair and not verdict.release:
            break
        paired, released = (paired | verdict.pair) - verdict.release, released | verdict.release
    topology = topology.without(verdict.frozen).require_groups()
    return replace(network, topology=topology, follows=(*network.follows, *verdict.follows))


def _without_branches(module: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Network | None:
    """The network of a student that has lost residual branches, as a part of the one that still has them.

    Layers that return zeros have no parameters by which their sizes could be followed. None where there are no such
    layers, or where the branches that they ended are not found.
    """
    layers, dropped = cuts_of(module)
    if not dropped:
        return None
    try:
        whole = trace(adapter_for(module).cut(module, layers, ()), *inputs, **kwargs)
    except ValueError:
        return None
    keep = everything(whole.topology)
    for group in whole.topology.groups:
        if group.kind == "branches" and set(group.layers) <= set(dropped):
            keep[group.name] = np.zeros(1, bool)
    if set(whole.topology.dropped(keep)) != set(dropped):
        return None
    part = whole.part(keep)
    return replace(part, module=module) if part.topology.groups else None


@off_mesh
def shapes_of(module: Any, *inputs: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the variables that the module's own code makes."""
    return topology_lib.leaf_shapes(adapter_for(module).variables(module, _shapes(inputs), kwargs))


def _shapes(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: shaped(x.shape, x.dtype), inputs)


def resized(
    layers: Mapping[str, Layer], topology: Topology, keep: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """(sizes by layer, dropped layers); no sizes where nothing is cut.

    Layers that keep their size are named as well: the model's code may derive it from one that changes.
    """
    shapes, dropped = topology.sliced_shapes(keep), topology.dropped(keep)
    if shapes == topology.shapes:
        return {}, dropped
    own: dict[str, dict[str, str]] = {}
    for leaf in shapes:  # "params/block/conv/kernel" is "params/kernel" of block/conv and "params/conv/kernel" of block
        collection, *parts = leaf.split("/")
        for i in range(len(parts)):
            own.setdefault("/".join(parts[:i]), {})["/".join([collection, *parts[i:]])] = leaf
    result: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():  # dropped ones too: their zeros have a size
        leaves = own.get(path, {})
        before = {name: topology.shapes[leaf] for name, leaf in leaves.items()}
        after = {name: shapes[leaf] for name, leaf in leaves.items()}
        if leaves and (sizes := layer.resize(before, after)):
            result[path] = sizes
    return result, dropped


@dataclass(frozen=True)
class Count:
    """What a module costs: MACs of one example, parameters, and operations of a batch as counted here and by XLA.

    uncounted: primitives whose operations are counted by XLA only; foldable: operations on constants, which XLA counts
    or does not, and which are not among `flops`; batch_macs: multiply-accumulates of a batch; orders: those in which
    einsums of three or more operands are contracted.
    """

    macs: int
    params: int
    flops: float
    xla_flops: float
    uncounted: tuple[str, ...]
    foldable: float = 0.0
    batch_macs: float = 0.0
    orders: tuple[Ordered, ...] = ()


@off_mesh
def count(module: Any, *inputs: Any, **kwargs: Any) -> Count:
    """Counts a freshly built module from its own code and asks XLA to do the same; nothing is computed."""
    leaves, structure = jax.tree.flatten(_shapes(inputs))
    return _counted(module, structure, tuple(leaves), tuple(sorted(kwargs.items())))


@remembered(8)
def _counted(module: Any, structure: Any, leaves: tuple[Any, ...], keywords: tuple[tuple[str, Any], ...]) -> Count:
    kwargs, shapes = dict(keywords), jax.tree.unflatten(structure, leaves)
    library = adapter_for(module)
    variables = library.variables(module, shapes, kwargs)
    traced = library.traced(module, variables, shapes, kwargs)
    found = walk(flatten(traced.jaxpr), topology_lib.leaf_shapes(variables))
    macs = sum(term.macs() for term in found.terms)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get("params", {})))
    analysis: Any = traced.lower().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    xla, uncounted = float(analysis.get("flops", 0.0)), tuple(sorted(found.uncounted))
    batch, orders = topology_lib.batch_size(shapes), tuple(found.orders)
    return Count(round(macs / batch), params, found.flops, xla, uncounted, found.foldable, macs, orders)


def macs_in_order_of(network: Network, student: Count) -> int:
    """The MACs of one example if the student contracted its einsums in the order of the network.

    JAX contracts the operands of an einsum in the order that is cheapest at their sizes. Candidates are costed in the
    network's order, so a student for which JAX finds a better one costs less than its candidate did.
    """
    library = adapter_for(network.module)
    variables = library.variables(network.module, network.inputs, network.kwargs)
    jaxpr = library.jaxpr(network.module, variables, network.inputs, network.kwargs)
    products: dict[str, list[Any]] = {}
    for order, _, scope in walk(flatten(jaxpr), topology_lib.leaf_shapes(variables)).orders:
        products.setdefault(_inside(scope), []).append(order.products)
    macs = student.batch_macs
    for order, times, scope in student.orders:
        same = products.get(_inside(scope))
        macs += times * (order.macs(same.pop(0)) - order.macs()) if same else 0
    return round(macs / topology_lib.batch_size(network.inputs))


def _inside(scope: str) -> str:
    """The scope of an operation in the module that a student runs."""
    return scope.removeprefix(f"{StudentModule.__name__}/")
