"""The user's nnx.Module with gates, trained like any other module: by `nnx.Optimizer`, or after `nnx.split`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx, traverse_util

from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.tracing.masking import masked


class Gate(nnx.Param):
    """(size,) factors on the units of a group."""


class Gated(nnx.Module):
    """Calls `model` with its kernels multiplied by `gates`; arguments and outputs are those of `model`.

    Units of masked groups (`kdsearch_jax.tracing.topology.Group`) whose gate is 0 are left out of the operations that
    mix them.

    Inside `jax.grad`, copy it with `flax.nnx.merge(…, copy=True)`, like any module whose statistics change there.

    Attributes:
      model: the user's module, with the weights; statistics and random streams change in place as in any call.
      gates: {group: Gate}.
    """

    def __init__(self, model: nnx.Module, gates: Mapping[str, Any], network: Network):
        self.model = model
        self.gates = nnx.data({name: Gate(gate) for name, gate in gates.items()})
        self._topology = nnx.static(_Hidden(network))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The gated network's output."""
        folded: Any = self._fold()
        return self._masked(folded, args, kwargs) if self._masks() else folded(*args, **kwargs)

    def folded(self) -> nnx.Module:
        """A module of the user's class with the gates folded in, to call any of its methods.

        It shares all Variables that no gate multiplies, so a call changes the statistics and random streams of `model`.

        Raises:
          ValueError: groups are masked, such as channels that a norm averages over; only a call of this module is
            then the gated network.
        """
        if masks := self._masks():
            raise ValueError(
                f"folded: units of {masks[0]} are masked where the model averages over them; call this module itself"
            )
        return self._fold()

    def _masks(self) -> list[str]:
        return [group.name for group in self._topology.network.topology.groups if group.masked]

    def _masked(self, folded: nnx.Module, args: Any, kwargs: Any) -> Any:
        """The output of the folded module with removed units masked; changes its Variables like a call."""
        graph, state = nnx.split(folded, graph=True)
        flat, names = dict(nnx.to_flat_state(state)), self._names()
        keys = {path: names.get(path, f"other/{number}") for number, path in enumerate(flat)}

        def run(arrays: Any, args: Any, kwargs: Any) -> Any:
            filled = {path: _with_array(value, arrays[keys[path]]) for path, value in flat.items()}
            module: Any = nnx.merge(graph, nnx.from_flat_state(filled.items()))
            output = module(*args, **kwargs)
            after = dict(nnx.to_flat_state(nnx.split(module, graph=True)[1]))
            return output, {keys[path]: _array(after[path]) for path in flat}

        topology = self._topology.network.topology
        gates = {name: gate.get_value() for name, gate in self.gates.items()}
        evaluate = masked(run, topology, gates_lib.kept(gates, topology))
        output, after = evaluate({keys[path]: _array(value) for path, value in flat.items()}, args, kwargs)
        nnx.update(folded, nnx.from_flat_state((p, _with_array(v, after[keys[p]])) for p, v in flat.items()))
        return output

    def _fold(self) -> nnx.Module:
        gates = {name: gate.get_value() for name, gate in self.gates.items()}
        return fold_module(self.model, gates, self._topology.network)

    def _names(self) -> dict[tuple[Any, ...], str]:
        return _names(self._topology.network)


def fold_module(model: nnx.Module, gates: Mapping[str, Any], network: Network) -> nnx.Module:
    """The module with the gates folded in; it shares all Variables that no gate multiplies."""
    graph, state = nnx.split(model, graph=True)
    flat, names, scaled = dict(nnx.to_flat_state(state)), _names(network), gates_lib.multiplied(network.topology)
    arrays = {name: _array(flat[path]) for path, name in names.items()}
    nested = gates_lib.fold(traverse_util.unflatten_dict(arrays, sep="/"), gates, network.topology)
    folded = traverse_util.flatten_dict(nested, sep="/")
    for path, name in names.items():
        if name in scaled:
            flat[path] = _with_array(flat[path], folded[name])
    return nnx.merge(graph, nnx.from_flat_state(flat.items()))


def _names(network: Network) -> dict[tuple[Any, ...], str]:
    """{NNX path: name in the topology} of arrays."""
    module: FunctionalModule = network.module
    return {leaf.path: leaf.name for leaf in module.leaves if not leaf.random}


class _Hidden:
    """A network as a static attribute, equal to any with the same groups, so that nothing is compiled twice."""

    def __init__(self, network: Network):
        self.network = network
        self.key = tuple((group.name, group.size) for group in network.topology.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _with_array(value: Any, array: Any) -> Any:
    return value.replace(array) if isinstance(value, nnx.Variable) else array


def _array(value: Any) -> Any:
    return value.get_value() if isinstance(value, nnx.Variable) else value
