"""`Student`, the result of pruning: a network of its own, ready to use; how it is cut and verified."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.base import Keywords
from kdsearch_jax.adapters.boxes import unboxed
from kdsearch_jax.adapters.call_spec import CallSpec, mode_keywords, signature_of
from kdsearch_jax.adapters.devices import gathered
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.tracing.topology import leaf_shapes


@dataclass(frozen=True, eq=False)
class Student:
    """A pruned network: `module, variables = student`.

    Attributes:
      module: for a Linen network a Linen module, called by `module.apply(variables, …)`; for an NNX network an
        nnx.Module of the user's own class at smaller sizes, which holds its arrays.
      variables: {"params": …, other collections: …}, in boxes (`nn.Partitioned`) if the pruned network's were.
      architecture: description of the network as plain JSON (`architecture.to_json()`).
      keep: {group: (size,) bool}, the units of the pruned network that stayed; {} for a student that was loaded.
      gates: {group: (size,)}, folded into the weights; {} for a student that was loaded.
      macs, params: exact costs, counted when it was cut; 0 for a student that was loaded.
      difference: largest difference to the outputs of the gated network over their scale, as verified; NaN for a
        student that was loaded.
    """

    module: Any
    variables: Any
    architecture: Architecture
    keep: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    gates: Mapping[str, Any] = field(default_factory=dict, repr=False)
    macs: int = 0
    params: int = 0
    difference: float = math.nan

    def __iter__(self) -> Iterator[Any]:
        """(module, variables)."""
        return iter((self.module, self.variables))


def cut_student(
    network: Network, variables: Any, gates: Mapping[str, Any], keep: Mapping[str, Any], inputs: Any
) -> Student:
    """Cuts the gated network down to the units in `keep`, and verifies the student.

    Args:
      variables: of the network, gates not folded in.
      inputs: a batch; () for random numbers.

    Raises:
      SurgeryError: the student does not compute, or cost, what the gated network does.
    """
    inputs = inputs or random_inputs(network)
    base = architecture_of(network)
    sliced, architecture = surgery.slice_network(variables, gates, keep, network, base)
    proof = surgery.verify(network, variables, gates, keep, sliced, *inputs)
    module = network.student(keep)
    if isinstance(module, FunctionalModule):
        module = module.bind(sliced)
    gates = {name: np.asarray(gate) for name, gate in gates.items()}
    macs, params = network.topology.cost(keep)
    return Student(module, sliced, architecture, dict(keep), gates, macs, params, float(proof["difference"]))


def verify(network: Network, variables: Any, student: Student, *inputs: Any) -> float:
    """Verifies on a batch that a student equals the gated network that it was cut from, within 1e-5 in float32.

    Args:
      network: the network that was pruned.
      variables: of that network, gates not folded in; or the nnx.Module.
      student: as it was cut.
      inputs: a batch as the module takes it; random numbers if none is given.

    Returns:
      The largest difference of an output over its scale.

    Raises:
      SurgeryError: they differ, with the first layer that does.
      ValueError: the student was loaded, so the units that it kept are not known.
    """
    if not student.keep:
        raise ValueError(
            "verify: this student was loaded and does not know which units it kept; verify it when it is cut"
        )
    variables = variables_of(network, variables)
    sliced = student.variables
    if isinstance(student.module, flax.nnx.Module):  # its arrays may have changed since
        sliced = FunctionalModule.split(student.module)[1]
    inputs = inputs or random_inputs(network)
    return float(surgery.verify(network, variables, student.gates, student.keep, sliced, *inputs)["difference"])


def fold(variables: Any, gates: Mapping[str, Any], network: Network) -> Any:
    """The variables of the gated network: each kernel that reads a unit, times the gate of the unit.

    Args:
      variables: Linen variables, {"params": …} and other collections, or a part of them.
      gates: {group: (size,)}.

    Raises:
      ValueError: the gates do not match the network; or a unit that has to be masked has a gate of 0, so that
        `module.apply` is not the gated network.
    """
    for group in network.topology.groups:
        if group.masked and not (np.asarray(gates.get(group.name, 1)) > 0).all():
            raise ValueError(
                f"fold: units of {group.name} with a gate of 0 must be masked where the model averages over them, "
                "which module.apply does not do; use GatedSearch.apply"
            )
    return gates_lib.fold(variables, gates, network.topology)


def variables_of(network: Network, variables: Any) -> Any:
    """{"params": …, other collections} as plain dictionaries without boxes, from Linen variables or an nnx.Module.

    Raises:
      ValueError: the variables do not match the network, with the first leaf that differs.
    """
    if isinstance(variables, flax.nnx.Module):
        variables = FunctionalModule.split(variables)[1]
    if isinstance(variables, (dict, FrozenDict)):
        variables = gathered(unboxed(unfreeze(variables)))
    _check_variables(network, variables)
    return variables


def _check_variables(network: Network, variables: Any) -> None:
    if not isinstance(variables, Mapping) or "params" not in variables:
        kind = type(variables).__name__
        raise ValueError(f"variables: expected {{'params': …}} as returned by the module's init, not {kind}")
    expected, shapes = network.topology.shapes, leaf_shapes(variables)
    for path in [*expected, *shapes]:
        if path.startswith("params/") and expected.get(path) != shapes.get(path):
            wanted = f"expected {expected[path]}" if path in expected else "which the network does not have"
            actual = f"of shape {shapes[path]}" if path in shapes else "missing"
            raise ValueError(f"variables: {path} is {actual}, {wanted}; give those of the network that was traced")


def random_inputs(network: Network) -> tuple[Any, ...]:
    """A batch for the network: normal numbers for floating point inputs, zeros and ones for all others."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = rng.normal(size=leaf.shape) if floats else rng.integers(0, 2, leaf.shape)
        return jnp.asarray(values).astype(leaf.dtype)

    return jax.tree.map(draw, network.inputs)


def architecture_of(network: Network) -> Architecture:
    """The architecture of the network itself: the name of its model, if it has one, and how it is called."""
    return Architecture.of(network.module, (), _call_spec(network))


def _call_spec(network: Network) -> CallSpec:
    """How the network was called when it was traced; the leading axis of every input is the batch axis."""
    inputs, keywords = network.inputs, {}
    if inputs and isinstance(inputs[-1], Keywords):
        inputs, keywords = inputs[:-1], dict(inputs[-1])
    signature = signature_of(network.module)
    places = [] if signature is None else list(signature.parameters)
    names = [places[i] if i < len(places) else f"input{i}" for i in range(len(inputs))]
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
        {**dict(zip(names, inputs, strict=True)), **keywords},
    )
    guessed = mode_keywords(network.module, False)
    static = {name: value for name, value in network.kwargs.items() if guessed.get(name) != value}
    if isinstance(network.module, nn.Module) and len(inputs) == 1 and not keywords and not static:
        (spec,) = jax.tree.leaves(one) if len(jax.tree.leaves(one)) == 1 else (None,)
        if (
            spec is not None
            and spec.dtype == jnp.float32
            and math.prod(spec.shape)
            and isinstance(inputs[0], jax.ShapeDtypeStruct)
        ):
            return CallSpec.of_image(spec.shape)
    arguments = (*names, *(f"{name}={name}" for name in keywords))
    return CallSpec(arguments, one, {}, static)
