"""A network: a module with what tracing it found, whichever library of layers it is written in.

`trace` runs the module abstractly, walks its operations and assembles its topology. A size that is written into the
module's code is found by running the candidate abstractly with units removed; the groups that break it are frozen,
with the error as the reason. What a library adds is behind `kdsearch_jax.library.Library`.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flax.nnx
import jax
import numpy as np

from kdsearch_jax import linen, nnx
from kdsearch_jax.call import shaped
from kdsearch_jax.devices import off_mesh
from kdsearch_jax.functional import Functional
from kdsearch_jax.gates import everything
from kdsearch_jax.library import Layer, Library
from kdsearch_jax.parts import restricted
from kdsearch_jax.student import cuts_of
from kdsearch_jax.tracing import sizes as sizes_lib
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.findings import Walk
from kdsearch_jax.tracing.program import flatten, line_of
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.tracing.walk import again, walk


@dataclass(frozen=True)
class Network:
    """A module with what tracing it found. inputs: shapes of the example inputs; kwargs: keywords of its call.

    whole, kept: the network that this one is a part of, and which of its units are left, {group: (size,) bool}.
    """

    module: Any
    topology: Topology
    layers: dict[str, Layer]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    whole: Network | None = None
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)

    def resized(self, keep: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
        """(layer sizes, dropped layers) of the student that keeps `keep`, as `Architecture` holds them.

        Both say all that differs from the base model, also where the network's module is a student already.
        """
        if self.whole is not None:
            return self.whole.resized(self._in_whole(keep))
        layers, dropped = resized(self.layers, self.topology, keep)
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
        return library_of(self.module).cut(self.module, *self.resized(keep))

    def select(self, kinds: Sequence[str], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Network:
        """The network with only these groups free; see `Topology.select`."""
        return replace(self, topology=self.topology.select(kinds, include, exclude).require_groups())


def library_of(module: Any) -> Library:
    """The library that a module is written in; an nnx.Module comes as a `Functional`."""
    return nnx if isinstance(module, Functional) else linen


@off_mesh
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
    if (found := _without_branches(module, inputs, kwargs)) is not None:
        return found
    library, shapes = library_of(module), _shapes(inputs)
    batch = topology_lib.batch_size(shapes)
    variables = library.variables(module, shapes, kwargs)
    leaves = topology_lib.leaf_shapes(variables)
    layers, jaxpr = library.layers(module, variables, shapes, kwargs)

    def droppable(path: str) -> bool:
        return path in layers and layers[path].droppable

    found = walk(flatten(jaxpr), leaves)
    topology = topology_lib.assemble(found, leaves, batch, droppable)
    network = Network(module, topology, layers, shapes, dict(kwargs))
    return replace(network, topology=_freeze_hard_wired(network, found, variables).require_groups())


def _without_branches(module: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Network | None:
    """The network of a student that has lost residual branches, as a part of the one that still has them.

    Layers that return zeros have no parameters by which their sizes could be followed. None where there are no such
    layers, or where the branches that they ended are not found.
    """
    layers, dropped = cuts_of(module)
    if not dropped:
        return None
    try:
        whole = trace(library_of(module).cut(module, layers, ()), *inputs, **kwargs)
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
    no room for all that: it loses its first unit, or most of its last (7 // 2 is 6 // 2: one unit may go unnoticed), in
    turns that are the bits of its number, so that of any two groups each shrinks without the other at some turn.
    """
    keep = np.ones(size, bool)
    if shrinks and size < _SMALL:
        bit, value = divmod(turn, 2)
        keep[slice(max(2, size // 3) if size > 2 else 1, None) if bit % 2 else 0] = (number >> bit) % 2 != value
    elif shrinks:
        more = size // 4 - 1 + (number + turn) % (size // 4 - 1)
        inner = np.random.default_rng(number).choice(size // 2 - 2, more, replace=False)
        keep[[0, 1, *(2 + inner), -1]] = False
    return keep


def _unforeseen(network: Network, found: Walk, keep: Any, left: np.ndarray, variables: Any) -> str | None:
    """Why the module's code does not do at these sizes what the walk foresaw; None where it does."""
    try:
        student = network.student(keep)
        jaxpr = library_of(student).jaxpr(student, variables, network.inputs, network.kwargs)
    except Exception as error:  # whatever a stranger's model raises when a size changes
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
        line = line_of(frames[::-1])
        return f"the model's code needs this size{f', at {line}' if line else ''} ({message[:120]})"
    return sizes_lib.difference(
        found, again(flatten(jaxpr), found.labels.kept(left), len(network.topology.shapes)), left
    )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _sliced(topology: Topology, variables: Any, keep: Mapping[str, Any]) -> Any:
    """Shapes of the student's variables."""
    shapes = topology.sliced_shapes(keep)
    return topology_lib.map_left(
        lambda path, leaf: jax.ShapeDtypeStruct(shapes[path], leaf.dtype), variables, topology.dropped(keep)
    )


@dataclass(frozen=True)
class Count:
    """What a module costs: MACs of one example, parameters, and operations of a batch as counted here and by XLA.

    uncounted: primitives whose operations are counted by XLA only; foldable: operations on constants, which XLA counts
    or does not, and which are not among `flops`.
    """

    macs: int
    params: int
    flops: float
    xla_flops: float
    uncounted: tuple[str, ...]
    foldable: float = 0.0


@off_mesh
def count(module: Any, *inputs: Any, **kwargs: Any) -> Count:
    """Counts a freshly built module from its own code and asks XLA to do the same; nothing is computed."""
    library, shapes = library_of(module), _shapes(inputs)
    variables = library.variables(module, shapes, kwargs)
    traced = library.traced(module, variables, shapes, kwargs)
    found = walk(flatten(traced.jaxpr), topology_lib.leaf_shapes(variables))
    macs = sum(term.macs() for term in found.terms) / topology_lib.batch_size(shapes)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get("params", {})))
    analysis: Any = traced.lower().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    xla, uncounted = float(analysis.get("flops", 0.0)), tuple(sorted(found.uncounted))
    return Count(round(macs), params, found.flops, xla, uncounted, found.foldable)
