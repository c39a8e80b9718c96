"""The user's nnx.Module with gates, trained like any other module: by `nnx.Optimizer`, or after `nnx.split`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx, traverse_util

from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.network import Network


class Gate(nnx.Param):
    """(size,) factors on the units of a group."""


class Gated(nnx.Module):
    """Calls `model` with its kernels multiplied by `gates`; arguments and outputs are those of `model`.

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
        folded: Any = self.folded()
        return folded(*args, **kwargs)

    def folded(self) -> nnx.Module:
        """A module of the user's class with the gates folded in, to call any of its methods.

        It shares all Variables that no gate multiplies, so a call changes the statistics and random streams of `model`.
        """
        graph, state = nnx.split(self.model, graph=True)
        flat, names, scaled = dict(nnx.to_flat_state(state)), self._names(), self._scaled()
        arrays = {name: _array(flat[path]) for path, name in names.items()}
        gates = {name: gate.get_value() for name, gate in self.gates.items()}
        nested = gates_lib.fold(traverse_util.unflatten_dict(arrays, sep="/"), gates, self._topology.network.topology)
        folded = traverse_util.flatten_dict(nested, sep="/")
        for path, name in names.items():
            if name in scaled:
                value = flat[path]
                flat[path] = value.replace(folded[name]) if isinstance(value, nnx.Variable) else folded[name]
        return nnx.merge(graph, nnx.from_flat_state(flat.items()))

    def _names(self) -> dict[tuple[Any, ...], str]:
        """{NNX path: name in the topology} of arrays."""
        module: FunctionalModule = self._topology.network.module
        return {leaf.path: leaf.name for leaf in module.leaves if not leaf.random}

    def _scaled(self) -> frozenset[str]:
        """Names of arrays that gates multiply."""
        return gates_lib.multiplied(self._topology.network.topology)


class _Hidden:
    """A network as a static attribute, equal to any with the same groups, so that nothing is compiled twice."""

    def __init__(self, network: Network):
        self.network = network
        self.key = tuple((group.name, group.size) for group in network.topology.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _array(value: Any) -> Any:
    return value.get_value() if isinstance(value, nnx.Variable) else value
