"""Surgery: cuts the gated network down to the student, and proves that nothing changed.

`prune` folds the gates into the parameters and slices every leaf by the units that stay. `verify` runs both networks
on a real batch: every entry of every output agrees within `TOLERANCE` of its own scale
(`kdsearch_jax.pruning.equality`), and
the student's cost, counted again from its own code and by XLA, is what the budget was charged. Where they differ, the
first layer that does is named. Where an output does not respond to the input, the layers' outputs are compared as well;
a proof in which nothing responds is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.boxes import keeping_boxes, unboxed
from kdsearch_jax.adapters.devices import gathered, off_mesh
from kdsearch_jax.adapters.memoize import memoize
from kdsearch_jax.pruning import equality
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.equality import Comparison
from kdsearch_jax.pruning.network import Network, adapter_for, count, macs_in_order_of, shapes_of
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.topology import Topology

TOLERANCE = equality.TOLERANCE
XLA_TOLERANCE = 0.02
_SAMPLED = 1 << 16  # numbers of a layer's output that are compared


class SurgeryError(ValueError):
    """The student does not compute, or does not cost, what the gated network did."""


def prune(
    variables: Any, gates: Mapping[str, Any], keep: Mapping[str, Any], network: Network, base: Architecture
) -> tuple[Any, Architecture]:
    """The student of the gated network with only the units in `keep`.

    Args:
      variables: of the network; gates: {group: (size,) vector}; keep: {group: (size,) bool}.
      base: the architecture of the network itself (model, arguments, input shape).

    Returns:
      (variables of the student, sliced, with the gates folded in; its architecture).

    Raises:
      ValueError: where `keep` empties a group that is not a residual branch, or is not the topology's.
    """
    topology = network.topology
    for group in topology.groups:
        if group.kind != "branches" and not np.any(keep[group.name]):
            raise ValueError(f"keep[{group.name!r}]: at least one of its {group.size} units must stay")
    layers, dropped = network.resized(keep)
    sliced = slice_variables(gated(variables, gates, keep, network), network, keep)
    return sliced, dataclasses.replace(base, layers=layers, dropped=dropped)


def gated(variables: Any, gates: Mapping[str, Any], keep: Mapping[str, Any], network: Network) -> Any:
    """The variables with the gates of what stays folded in; what goes has gates of zero."""
    return _fold_of(network.topology)(variables, dict(gates), {name: np.asarray(each) for name, each in keep.items()})


@memoize(2)
def _fold_of(topology: Topology) -> Any:
    return jax.jit(lambda variables, gates, keep: gates_lib.fold(variables, gates_lib.mask(gates, keep), topology))


def slice_variables(variables: Any, network: Network, keep: Mapping[str, Any]) -> Any:
    """Every leaf cut to the indices that stay, in its box if it has one; leaves of dropped layers left out."""
    masks: dict[str, list[tuple[int, np.ndarray]]] = {}
    for (name, axis), mask in network.topology.masks(keep).items():
        masks.setdefault(name, []).append((axis, mask))

    def cut(name: str, leaf: Any) -> Any:
        for axis, mask in masks.get(name, ()):
            leaf = np.compress(mask, np.asarray(leaf), axis=axis)
        return jnp.asarray(leaf)

    dropped = network.topology.dropped(keep)
    return keeping_boxes(lambda tree: topology_lib.map_left(cut, gathered(tree), dropped), variables)


@off_mesh
def verify(
    network: Network, variables: Any, gates: Mapping[str, Any], keep: Mapping[str, Any], sliced: Any, *inputs: Any
) -> dict[str, float]:
    """Proves on a real batch that the student is the gated network, and that it costs what was counted.

    Args:
      variables: of the network, unfolded; sliced: of the student, from `prune`; inputs: a batch.

    Returns:
      {"difference": the largest difference of an entry of the outputs over its own scale, "responding": the share of
      these entries that respond to the input, "macs", "params", "xla_flops_ratio"}.

    Raises:
      SurgeryError: where either does not hold, with the first layer that differs, or the two counts; or where neither
        an output nor a layer responds to the input, so that equality would prove nothing.
    """
    student, variables, sliced = network.student(keep), *(gathered(unboxed(tree)) for tree in (variables, sliced))
    _check_shapes(network, student, sliced)
    whole = gated(variables, gates, keep, network)
    one, other = function_of(network.module, network.kwargs), function_of(student, network.kwargs)
    with jax.default_matmul_precision("highest"):
        rounding = equality.rounding_of(one.trace(whole, *inputs).jaxpr)
        found = equality.compare(one, whole, other, sliced, inputs, rounding)
        if found.worst or found.silent or not found.responding:
            layers = _compare_layers(network, student, whole, sliced, keep, inputs, rounding)
            _check_equal(found, layers)
    return {"difference": found.difference, "responding": found.share, **verify_cost(network, keep, student)}


def _check_equal(found: Comparison, layers: Comparison) -> None:
    """Raises SurgeryError where outputs or layers differ, or none of them responds to the input."""
    if found.undefined:
        raise SurgeryError(f"the network returns nothing but NaN in {', '.join(found.undefined)}; is it trained?")
    output, layer = found.worst, layers.first
    place = "no single layer" if layer is None else layer or "the whole network"
    if output is not None:
        far = found.differences[output]
        raise SurgeryError(
            f"the student differs from the gated network by {far:.2e} of its own scale in {output}, first in {place}"
        )
    if layer is not None:
        raise SurgeryError(
            f"the student differs from the gated network by {layers.differences[layer]:.2e} of its own scale, first in "
            f"{place}, though not in the outputs: {', '.join(found.silent)} hardly respond to the input"
        )
    if not found.share and not layers.share:
        raise SurgeryError(
            "the proof is empty: neither the outputs nor any layer of the network respond to its input, so any student "
            "would be equal; train the network first, or give inputs to which it responds"
        )


def _check_shapes(network: Network, student: Any, sliced: Any) -> None:
    """Raises SurgeryError where the student's own code would make other parameters than it is given."""
    advice = "the model's code decides by its sizes; keep a unit more or fewer, or exclude the group"
    try:
        own = shapes_of(student, *network.inputs, **network.kwargs)
    except Exception as error:  # whatever a stranger's model raises at sizes that it does not expect
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SurgeryError(f"the student's code does not run at these sizes ({message}): {advice}") from error
    given = topology_lib.leaf_shapes(sliced)
    for path in sorted({*own, *given}):
        if own.get(path) != given.get(path):
            raise SurgeryError(
                f"the student's code makes {path} of shape {own.get(path)}, "
                f"and {given.get(path)} is left of it: {advice}"
            )


def function_of(module: Any, kwargs: Mapping[str, Any]) -> Any:
    """The jitted function (variables, *inputs) → {path in the module's outputs: array}, without what is no array.

    The same for equal modules, so that a network which is cut at several budgets is compiled once.
    """
    try:
        return _function_of(module, tuple(sorted(kwargs.items())))
    except TypeError:  # an attribute or a keyword that has no hash
        return _function_of.__wrapped__(module, tuple(kwargs.items()))


@lru_cache(maxsize=8)
def _function_of(module: Any, kwargs: tuple[tuple[str, Any], ...]) -> Any:
    def call(variables: Any, *inputs: Any) -> dict[str, Any]:
        args, keywords = call_arguments(inputs, dict(kwargs))
        outputs = jax.tree_util.tree_leaves_with_path(module.apply(variables, *args, **keywords))
        named = ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in outputs)
        return {name or "the output": leaf for name, leaf in named if isinstance(leaf, jax.Array)}

    return jax.jit(call)


def verify_cost(network: Network, keep: Mapping[str, Any], student: Any) -> dict[str, float]:
    """Counts the student again from its own code, and has XLA count it.

    Raises:
      SurgeryError: where the counts differ.
    """
    macs, params = network.topology.cost(keep)
    fresh = count(student, *network.inputs, **network.kwargs)
    ordered = macs_in_order_of(network, fresh) if fresh.macs != macs and fresh.orders else fresh.macs
    if (ordered, fresh.params) != (macs, params):
        raise SurgeryError(
            f"the student costs {fresh.macs:,} MACs and {fresh.params:,} parameters, "
            f"but {macs:,} and {params:,} were counted"
        )
    counted = min(max(fresh.xla_flops, fresh.flops), fresh.flops + fresh.foldable)  # the nearest to XLA's
    ratio = fresh.xla_flops / counted if counted else 1.0 + fresh.xla_flops  # nothing is left to compute: 1
    if abs(ratio - 1) > XLA_TOLERANCE and not fresh.uncounted:
        raise SurgeryError(f"XLA counts {fresh.xla_flops:,.0f} operations for a batch, {fresh.flops:,.0f} were counted")
    return {"macs": fresh.macs, "params": params, "xla_flops_ratio": ratio}


def _compare_layers(
    network: Network, student: Any, whole: Any, sliced: Any, keep: Any, inputs: Any, rounding: float
) -> Comparison:
    """What the layers return, at the units that stay, compared in the order of the calls.

    In the gated network the layers of dropped branches return what is multiplied by zero later. Here they return zeros,
    as in the student, so that the layers between them are alike. Not compared are layers in which it is not plain which
    units their output has.
    """
    stays, library = _units_of_layers(network, keep), adapter_for(network.module)
    branches = {
        group.name: keep[group.name] if group.kind == "branches" else np.ones(group.size, bool)
        for group in network.topology.groups
    }

    def outputs(module: Any, variables: Any, inputs: Any) -> dict[str, Any]:
        made = library.layer_outputs(module, variables, inputs, network.kwargs)
        return {path: value for path, value in made.items() if not isinstance(value, jax.core.Tracer)}

    def one(variables: Any, *inputs: Any) -> dict[str, Any]:
        found = {}
        for path, value in outputs(network.student(branches), variables, inputs).items():
            masks = stays.get((path, value.shape[-1]), []) if value.ndim else []
            if len(masks) < 2:
                found[path] = _sampled(value[..., masks[0]] if masks else value)
        return found

    def other(variables: Any, *inputs: Any) -> dict[str, Any]:
        return {path: _sampled(value) for path, value in outputs(student, variables, inputs).items()}

    gated = slice_variables(whole, network, branches)
    return equality.compare(one, gated, other, sliced, inputs, rounding, common=True)


def _units_of_layers(network: Network, keep: Any) -> dict[tuple[str, int], list[np.ndarray]]:
    """{(path of a layer, size of its output's last axis): which of these units stay}, as its own leaves say.

    Several where they do not agree.
    """
    masks, found = network.topology.masks(keep), {}
    for leaf, shape in network.topology.shapes.items():
        if shape:
            path = leaf.partition("/")[2].rpartition("/")[0]
            mask = masks.get((leaf, len(shape) - 1), np.ones(shape[-1], bool))
            known = found.setdefault((path, shape[-1]), [])
            if not any(np.array_equal(mask, other) for other in known):
                known.append(mask)
    return found


def _sampled(value: Any) -> Any:
    """(examples, places, channels): all channels of as many places, evenly spread, as make up `_SAMPLED` numbers."""
    if value.ndim < 3 or value.size <= _SAMPLED:
        return value
    value = value.reshape(value.shape[0], -1, value.shape[-1])
    places = max(1, _SAMPLED // (value.shape[0] * value.shape[-1]))
    return value[:, np.linspace(0, value.shape[1] - 1, min(places, value.shape[1])).astype(int)]
