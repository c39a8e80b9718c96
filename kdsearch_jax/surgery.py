"""Surgery: cuts the gated network down to the student, and proves that nothing changed.

`prune` folds the gates into the parameters and slices every leaf by the units that stay. `verify` runs both networks
on a real batch: the logits agree within `TOLERANCE` of their scale, in float32, and the student's cost, counted again
from its own code and by XLA, is what the budget was told. Where they differ, the first layer that does is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax import gates as gates_lib
from kdsearch_jax.boxes import keeping_boxes, unboxed
from kdsearch_jax.devices import gathered, off_mesh
from kdsearch_jax.library import arrays, bound
from kdsearch_jax.network import Network, count, library_of, shapes_of
from kdsearch_jax.student import Architecture
from kdsearch_jax.tracing import topology as topology_lib

TOLERANCE = 1e-5
XLA_TOLERANCE = 0.02


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
    fold = jax.jit(lambda variables, gates: gates_lib.fold(variables, gates_lib.mask(gates, keep), network.topology))
    return fold(variables, dict(gates))


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
      {"difference": largest difference of the outputs over their scale, "macs", "params", "xla_flops_ratio"}.

    Raises:
      SurgeryError: where either does not hold; names the first layer that differs, or the two counts.
    """
    student, variables, sliced = network.student(keep), *(gathered(unboxed(tree)) for tree in (variables, sliced))
    _check_shapes(network, student, sliced)
    whole = gated(variables, gates, keep, network)
    with jax.default_matmul_precision("highest"):
        expected = run(network.module, whole, inputs, network.kwargs)
        got = run(student, sliced, inputs, network.kwargs)
    worst = difference(expected, got)
    if not worst <= TOLERANCE:  # NaN too
        where = _first_difference(network, student, whole, sliced, keep, inputs)
        raise SurgeryError(
            f"the student differs from the gated network by {worst:.2e} of the logits' scale, first in {where}"
        )
    return {"difference": worst, **verify_cost(network, keep, student)}


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


def run(module: Any, variables: Any, inputs: Any, kwargs: Any) -> list[Any]:
    """The arrays that the module returns, compiled."""

    def call(variables: Any, *inputs: Any) -> list[Any]:
        args, keywords = bound(inputs, kwargs)
        return arrays(module.apply(variables, *args, **keywords))

    return jax.jit(call)(variables, *inputs)


def difference(expected: Any, got: Any) -> float:
    """The largest absolute difference between two pytrees of equal structure, over the scale of the first."""
    pairs = [
        (np.asarray(a, np.float32), np.asarray(b, np.float32))
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
        if a.size
    ]
    scale = max([float(np.abs(a).max()) for a, _ in pairs] + [1e-30])
    return float(np.max([np.abs(a - b).max() for a, b in pairs] + [0.0])) / scale


def verify_cost(network: Network, keep: Mapping[str, Any], student: Any) -> dict[str, float]:
    """Counts the student again from its own code, and has XLA count it.

    Raises:
      SurgeryError: where the counts differ.
    """
    macs, params = network.topology.cost(keep)
    fresh = count(student, *network.inputs, **network.kwargs)
    if (fresh.macs, fresh.params) != (macs, params):
        raise SurgeryError(
            f"the student costs {fresh.macs:,} MACs and {fresh.params:,} parameters, "
            f"but {macs:,} and {params:,} were counted"
        )
    counted = min(max(fresh.xla_flops, fresh.flops), fresh.flops + fresh.foldable)  # the nearest to XLA's
    ratio = fresh.xla_flops / counted if counted else 1.0 + fresh.xla_flops  # nothing is left to compute: 1
    if abs(ratio - 1) > XLA_TOLERANCE and not fresh.uncounted:
        raise SurgeryError(f"XLA counts {fresh.xla_flops:,.0f} operations for a batch, {fresh.flops:,.0f} were counted")
    return {"macs": macs, "params": params, "xla_flops_ratio": ratio}


def _first_difference(network: Network, student: Any, whole: Any, sliced: Any, keep: Any, inputs: Any) -> str:
    """The first layer whose output, at the units that stay, is not the gated network's.

    Layers of dropped branches return zeros, where the gated network's are only multiplied by zero later: not compared.
    """
    masks = network.topology.masks(keep)
    dropped = [f"{path}/" for path in network.topology.dropped(keep)]
    library = library_of(network.module)
    expected = library.outputs(network.module, whole, inputs, network.kwargs)
    got = library.outputs(student, sliced, inputs, network.kwargs)
    for path, value in expected.items():
        mask = next((m for (leaf, axis), m in masks.items() if _makes_last_axis(network, leaf, axis, path)), None)
        value = value if mask is None or value.shape[-1] != len(mask) else value[..., mask]
        if any(layer.startswith(f"{path}/") for layer in dropped) or path not in got:
            continue
        if got[path].shape == value.shape and not difference(value, got[path]) <= TOLERANCE:
            return path or "the whole network"
    return "no single layer"


def _makes_last_axis(network: Network, leaf: str, axis: int, path: str) -> bool:
    return leaf.split("/", 1)[1].rsplit("/", 1)[0] == path and axis == len(network.topology.shapes[leaf]) - 1
