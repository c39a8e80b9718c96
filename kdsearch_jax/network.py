"""A network: a module with what tracing it found, whichever library of layers it is written in.

`trace` runs the module abstractly, walks its operations and assembles its topology. A size that is written into the
module's code is found by trial cuts (`trials`). What a library adds is behind `kdsearch_jax.library.Library`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.nnx
import jax

from kdsearch_jax import linen, nnx, trials
from kdsearch_jax.call import shaped
from kdsearch_jax.functional import Functional
from kdsearch_jax.library import Layer, Library
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
    """

    module: Any
    topology: Topology
    layers: dict[str, Layer]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    follows: tuple[trials.Follow, ...] = ()

    @property
    def library(self) -> Library:
        """The library that the module is written in."""
        return library_of(self.module)

    def resized(self, keep: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
        """(layer sizes, dropped layers) of the student that keeps `keep`, as `Architecture` holds them."""
        layers, dropped = resized(self.layers, self.topology, keep)
        if layers:
            shapes = self.topology.sliced_shapes(keep)
            for each in self.follows:
                layers.setdefault(each.path, {})[each.name] = each.value(shapes)
        before, gone = library_of(self.module).already_cut(self.module)  # cut again: what differs from the base model
        layers = {path: {**before.get(path, {}), **layers.get(path, {})} for path in {**before, **layers}}
        return layers, tuple(sorted({*gone, *dropped}))

    def student(self, keep: Mapping[str, Any]) -> Any:
        """The module of the student that keeps `keep`."""
        return library_of(self.module).cut(self.module, *self.resized(keep))

    def select(self, kinds: Sequence[str], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Network:
        """The network with only these groups free; see `Topology.select`."""
        return replace(self, topology=self.topology.select(kinds, include, exclude).require_groups())


def library_of(module: Any) -> Library:
    """The library that a module is written in; an nnx.Module comes as a `Functional`."""
    return nnx if isinstance(module, Functional) else linen


def trace(module: Any, *inputs: Any, **kwargs: Any) -> Network:
    """Traces a call `module(*inputs, **kwargs)` abstractly: no parameter is made, nothing is computed.

    Args:
      module: any Flax module; its randomness must be off (`train=False`, `deterministic=True`). Of an nnx.Module the
        network's module is its `Functional`.
      inputs: pytrees of arrays or `jax.ShapeDtypeStruct`s with a leading batch axis.

    Raises:
      ValueError: where nothing can be pruned, with the reasons, or the inputs have no batch axis.
    """
    module = Functional.split(module)[0] if isinstance(module, flax.nnx.Module) else module
    library, shapes = library_of(module), _shapes(inputs)
    batch = topology_lib.batch_size(shapes)
    variables = library.variables(module, shapes, kwargs)
    leaves = topology_lib.leaf_shapes(variables)
    layers, jaxpr = library.layers(module, variables, shapes, kwargs)

    def droppable(path: str) -> bool:
        return path in layers and layers[path].droppable

    cut, _ = library.already_cut(module)
    layers = {path: _with_sizes(layer, cut.get(path, {})) for path, layer in layers.items()}
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


def _with_sizes(layer: Layer, sizes: Mapping[str, Any]) -> Layer:
    """A layer whose numbers are those of a student that is traced once more."""
    return replace(layer, numbers={**layer.numbers, **{k: v for k, v in sizes.items() if k in layer.numbers}})


def shapes_of(module: Any, *inputs: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the variables that the module's own code makes."""
    return topology_lib.leaf_shapes(library_of(module).variables(module, _shapes(inputs), kwargs))


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


def count(module: Any, *inputs: Any, **kwargs: Any) -> Count:
    """Counts a freshly built module from its own code and asks XLA to do the same; nothing is computed."""
    library, shapes = library_of(module), _shapes(inputs)
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
    library = library_of(network.module)
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
    return scope.removeprefix("Student/")
