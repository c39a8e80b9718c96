"""Surgery: cuts the gated network down to the student, and verifies that nothing has changed.

`slice_network` folds the gates into the parameters and slices every leaf to the units that stay. `verify` runs both
networks on a real batch: every entry of every output must agree within `TOLERANCE` of its own scale
(`kdsearch_jax.pruning.equality`), and the student's cost, counted again from its own code and by XLA, must be the cost
that was counted for the budget. If they differ, the error names the first layer that differs. If an output does not
respond to the input, the outputs of the layers are compared as well; if no layer responds either, the proof is refused.
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
from kdsearch_jax.pruning.network import Network, count, macs_in_order_of, shapes_of
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.masking import masked
from kdsearch_jax.tracing.topology import Topology

TOLERANCE = equality.TOLERANCE
XLA_TOLERANCE = 0.02
_SAMPLED = 1 << 16  # numbers that are compared of a layer's output


class SurgeryError(ValueError):
    """The student does not compute what the gated network does, or does not cost what was counted."""


def slice_network(
    variables: Any, gates: Mapping[str, Any], keep: Mapping[str, Any], network: Network, base: Architecture
) -> tuple[Any, Architecture]:
    """Cuts the gated network down to the units in `keep`.

    Args:
      variables: of the network.
      gates: {group: (size,)}. keep: {group: (size,) bool}.
      base: the architecture of the network itself (model, arguments, input shape).

    Returns:
      (the student's variables, sliced and with the gates folded in; the student's architecture).

    Raises:
      ValueError: `keep` does not match the topology, or removes all units of a group that is not a residual branch.
    """
    topology = network.topology
    for group in topology.groups:
        if group.kind != "branches" and not np.any(keep[group.name]):
            raise ValueError(f"keep[{group.name!r}]: at least one of its {group.size} units must stay")
    layers, dropped = network.resized(keep)
    sliced = slice_variables(gated(variables, gates, keep, network), network, keep)
    return sliced, dataclasses.replace(base, layers=layers, dropped=dropped)


def gated(variables: Any, gates: Mapping[str, Any], keep: Mapping[str, Any], network: Network) -> Any:
    """The variables with gates folded in; the gates of units that are not in `keep` are zero.

    If groups are masked, the collection `gates.KEPT` says which of their units stay; `function_of` reads it.
    """
    masks = {name: np.asarray(mask) for name, mask in keep.items()}
    folded = _jitted_fold(network.topology)(variables, dict(gates), masks)
    kept = {group.name: masks[group.name] for group in network.topology.groups if group.masked}
    return {**folded, gates_lib.KEPT: kept} if kept else folded


@memoize(2)
def _jitted_fold(topology: Topology) -> Any:
    return jax.jit(
        lambda variables, gates, keep: gates_lib.fold(variables, gates_lib.mask(gates, keep), topology, keep)
    )


def slice_variables(variables: Any, network: Network, keep: Mapping[str, Any]) -> Any:
    """Every leaf sliced to the indices that stay, in its box if it has one, without the leaves of dropped layers.

    Parameters behind numbers that follow a size, such as 1/√d, are rescaled (`Network.factors`).
    """
    factors, masks = network.factors(keep), dict[str, list[tuple[int, np.ndarray]]]()
    for (name, axis), mask in network.topology.masks(keep).items():
        masks.setdefault(name, []).append((axis, mask))

    def sliced(name: str, leaf: Any) -> Any:
        for axis, mask in masks.get(name, ()):
            leaf = np.compress(mask, np.asarray(leaf), axis=axis)
        factor = factors.get(name, 1.0)
        return jnp.asarray(leaf) if factor == 1.0 else jnp.asarray(leaf) * jnp.asarray(factor, leaf.dtype)

    dropped = network.topology.dropped(keep)
    variables = {name: leaves for name, leaves in variables.items() if name != gates_lib.KEPT}
    return keeping_boxes(lambda tree: topology_lib.map_left(sliced, gathered(tree), dropped), variables)


@off_mesh
def verify(
    network: Network, variables: Any, gates: Mapping[str, Any], keep: Mapping[str, Any], sliced: Any, *inputs: Any
) -> dict[str, float]:
    """Verifies on a real batch that the student equals the gated network, and that it costs what was counted.

    Args:
      variables: of the network, gates not folded in.
      sliced: of the student, from `slice_network`.
      inputs: a batch as the module takes it.

    Returns:
      {"difference": largest difference of an output entry over its own scale, "responding": share of these entries that
      respond to the input, "macs", "params", "xla_flops_ratio"}.

    Raises:
      SurgeryError: the networks differ, with the first layer that does; or the two counts differ; or neither an output
        nor a layer responds to the input, so equality would prove nothing.
    """
    student, variables, sliced = network.student(keep), *(gathered(unboxed(tree)) for tree in (variables, sliced))
    _check_shapes(network, student, sliced)
    whole = gated(variables, gates, keep, network)
    gated_function = function_of(network.module, network.kwargs, network.topology)
    student_function = function_of(student, network.kwargs)
    with jax.default_matmul_precision("highest"):
        rounding = equality.rounding_of(gated_function.trace(whole, *inputs).jaxpr)
        found = equality.compare(gated_function, whole, student_function, sliced, inputs, rounding)
        if found.worst or found.silent or not found.responding:
            layers = _compare_layers(network, student, whole, sliced, keep, inputs, rounding)
            _check_equal(found, layers)
    return {"difference": found.difference, "responding": found.share, **verify_cost(network, keep, student)}


def _check_equal(found: Comparison, layers: Comparison) -> None:
    """Raises SurgeryError if outputs or layers differ, or if none of them responds to the input."""
    if found.undefined:
        raise SurgeryError(f"the network returns only NaN in {', '.join(found.undefined)}; is it trained?")
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
            f"{place}, but not in the outputs: {', '.join(found.silent)} hardly respond to the input"
        )
    if not found.share and not layers.share:
        raise SurgeryError(
            "the proof is empty: neither the outputs nor any layer of the network respond to the input, so any student "
            "would be equal; train the network first, or give inputs that it responds to"
        )


def _check_shapes(network: Network, student: Any, sliced: Any) -> None:
    """Raises SurgeryError if the student's own code creates parameters of other shapes than it is given."""
    advice = "the model's code depends on its sizes; keep a unit more or fewer, or exclude the group"
    try:
        expected = shapes_of(student, *network.inputs, **network.kwargs)
    except Exception as error:  # the user's model may raise anything at sizes it does not expect
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SurgeryError(f"the student's code does not run at these sizes ({message}): {advice}") from error
    shapes = topology_lib.leaf_shapes(sliced)
    for path in sorted({*expected, *shapes}):
        if expected.get(path) != shapes.get(path):
            raise SurgeryError(
                f"the student's code creates {path} of shape {expected.get(path)}, but the sliced one has shape "
                f"{shapes.get(path)}: {advice}"
            )


def function_of(module: Any, kwargs: Mapping[str, Any], topology: Topology | None = None) -> Any:
    """The jitted function (variables, *inputs) → {path in the module's outputs: array}; other outputs are left out.

    It is the same for equal modules, so a network that is cut at several budgets is compiled once.

    Args:
      topology: of a gated network, whose variables are those of `gated`.
    """
    if topology is not None and not any(group.masked for group in topology.groups):
        topology = None
    hidden = None if topology is None else _ById(topology)
    try:
        return _function_of(module, tuple(sorted(kwargs.items())), hidden)
    except TypeError:  # an attribute or a keyword is not hashable
        return _function_of.__wrapped__(module, tuple(kwargs.items()), hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class _ById:
    topology: Topology

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.topology is self.topology

    def __hash__(self) -> int:
        return id(self.topology)


@lru_cache(maxsize=8)
def _function_of(module: Any, kwargs: tuple[tuple[str, Any], ...], hidden: _ById | None) -> Any:
    def plain(variables: Any, *inputs: Any) -> dict[str, Any]:
        args, keywords = call_arguments(inputs, dict(kwargs))
        outputs = jax.tree_util.tree_leaves_with_path(module.apply(variables, *args, **keywords))
        named = ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in outputs)
        return {name or "the output": leaf for name, leaf in named if isinstance(leaf, jax.Array)}

    def corrected(variables: Any, *inputs: Any) -> dict[str, Any]:
        assert hidden is not None
        rest = {name: leaves for name, leaves in variables.items() if name != gates_lib.KEPT}
        return masked(plain, hidden.topology, variables[gates_lib.KEPT])(rest, *inputs)

    return jax.jit(plain if hidden is None else corrected)


def verify_cost(network: Network, keep: Mapping[str, Any], student: Any) -> dict[str, float]:
    """Counts the cost of the student again, from its own code and by XLA.

    Returns:
      {"macs", "params", "xla_flops_ratio"}.

    Raises:
      SurgeryError: the counts differ.
    """
    macs, params = network.topology.cost(keep)
    fresh = count(student, *network.inputs, **network.kwargs)
    ordered = macs_in_order_of(network, fresh) if fresh.macs != macs and fresh.orders else fresh.macs
    if (ordered, fresh.params) != (macs, params):
        raise SurgeryError(
            f"the student costs {fresh.macs:,} MACs and {fresh.params:,} parameters, "
            f"but {macs:,} and {params:,} were counted"
        )
    counted = min(max(fresh.xla_flops, fresh.flops), fresh.flops + fresh.foldable)  # the closest to XLA's
    ratio = fresh.xla_flops / counted if counted else 1.0 + fresh.xla_flops  # 1 if nothing is left to compute
    if abs(ratio - 1) > XLA_TOLERANCE and not fresh.uncounted:
        # XLA does not count what no output depends on, such as a part of a concatenation that a slice leaves out.
        # Products are therefore compared one at a time.
        wrong = fresh.miscounted() if ratio < 1 else "XLA computes more"
        if wrong is not None:
            raise SurgeryError(
                f"XLA counts {fresh.xla_flops:,.0f} operations for a batch, {fresh.flops:,.0f} were counted: {wrong}"
            )
    return {"macs": fresh.macs, "params": params, "xla_flops_ratio": ratio}


def _compare_layers(
    network: Network, student: Any, whole: Any, sliced: Any, keep: Any, inputs: Any, rounding: float
) -> Comparison:
    """Compares the outputs of the layers, at the units that stay, in the order of the calls.

    In the gated network the layers of removed branches return values that are multiplied by zero later. Here they
    return zeros as in the student, so that the layers between them are comparable. Layers whose output units are
    ambiguous are not compared.
    """
    stays = _units_of_layers(network, keep)
    branches = {
        group.name: keep[group.name] if group.kind == "branches" else np.ones(group.size, bool)
        for group in network.topology.groups
    }
    without_branches, topology = network.student(branches), network.topology

    def outputs(module: Any, variables: Any, inputs: Any) -> dict[str, Any]:
        values = network.adapter.layer_outputs(module, variables, inputs, network.kwargs)
        return {path: value for path, value in values.items() if not isinstance(value, jax.core.Tracer)}

    def of_network(variables: Any, *inputs: Any) -> dict[str, Any]:
        values = outputs(without_branches, variables, inputs)
        if gates_lib.KEPT in whole:
            known = list(values)  # not those inside of loops, whose values end with them

            def traced(variables: Any, *inputs: Any) -> dict[str, Any]:
                made = network.adapter.layer_outputs(without_branches, variables, inputs, network.kwargs)
                return {path: made[path] for path in known}

            found = masked(traced, topology, whole[gates_lib.KEPT], topology.dropped(keep))(variables, *inputs)
            values = {path: found[path] for path in known}  # in the order of the calls
        result = {}
        for path, value in values.items():
            masks = stays.get((path, value.shape[-1]), []) if value.ndim else []
            if len(masks) < 2:
                result[path] = _sampled(value[..., masks[0]] if masks else value)
        return result

    def of_student(variables: Any, *inputs: Any) -> dict[str, Any]:
        return {path: _sampled(value) for path, value in outputs(student, variables, inputs).items()}

    reference, factors = slice_variables(whole, network, branches), network.factors(keep)
    found = equality.compare(of_network, reference, of_student, sliced, inputs, rounding, common=True)
    if found.first is not None and factors:
        # Between a parameter that was rescaled and the number that this undoes, the student's values are rescaled.
        scaled = topology_lib.map_left(
            lambda name, leaf: leaf * factors[name] if name in factors else leaf, reference, ()
        )
        other = equality.compare(of_network, scaled, of_student, sliced, inputs, rounding, common=True)
        for name, far in other.differences.items():
            found.differences[name] = min(far, found.differences.get(name, far))
    return found


def _units_of_layers(network: Network, keep: Any) -> dict[tuple[str, int], list[np.ndarray]]:
    """{(path of a layer, size of its output's last axis): masks of the units that stay}, derived from its leaves.

    There are several masks if the leaves disagree.
    """
    masks, result = network.topology.masks(keep), {}
    for leaf, shape in network.topology.shapes.items():
        if shape:
            path = leaf.partition("/")[2].rpartition("/")[0]
            mask = masks.get((leaf, len(shape) - 1), np.ones(shape[-1], bool))
            known = result.setdefault((path, shape[-1]), [])
            if not any(np.array_equal(mask, other) for other in known):
                known.append(mask)
    return result


def _sampled(value: Any) -> Any:
    """(examples, places, channels): all channels at evenly spread places, `_SAMPLED` numbers in total."""
    if value.ndim < 3 or value.size <= _SAMPLED:
        return value
    value = value.reshape(value.shape[0], -1, value.shape[-1])
    places = max(1, _SAMPLED // (value.shape[0] * value.shape[-1]))
    return value[:, np.linspace(0, value.shape[1] - 1, min(places, value.shape[1])).astype(int)]
