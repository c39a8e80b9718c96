"""The interface to a layer library, so that tracing and pruning need to know neither Linen nor NNX.

Tracing and pruning see pure functions and pytrees. An adapter (`kdsearch_jax.adapters.linen`,
`kdsearch_jax.adapters.nnx`) says how a module becomes a function, which attributes of which layers hold sizes, and how
the same code runs at other sizes. `inputs` are pytrees with a leading batch axis, the last of which may be `Keywords`;
`kwargs` are static.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

Shapes = Mapping[str, tuple[int, ...]]
Sizes = dict[str, Any]  # {attribute of a layer: value}
LayerSizes = Mapping[str, Mapping[str, Any]]  # {path of a layer: {attribute: value}}


def _no_sizes(before: Shapes, after: Shapes) -> Sizes:
    return {}


@dataclass(frozen=True)
class LayerInfo:
    """A module that was called while the network was traced.

    Attributes:
      droppable: it can be left out, returning zeros, when its residual branch is removed.
      resize: (shapes before, shapes after) → the attributes that must change; shapes are those of the leaves at and
        below the layer, {"params/kernel": (3, 3, 8, 16)}.
      grouped: it has a `feature_group_count`.
      integers: integers that a module of the user's own holds, see `integer_attributes`; any of them may be a size.
    """

    droppable: bool = False
    resize: Callable[[Shapes, Shapes], Sizes] = field(default=_no_sizes)
    grouped: bool = False
    integers: Mapping[str, int] = field(default_factory=dict)


def integer_attributes(attributes: Mapping[str, Any], depth: int = 2) -> dict[str, int]:
    """Integers above 1 among a module's attributes, by name: "heads", "widths.1" in a tuple, "config.heads"."""
    integers: dict[str, int] = {}
    for name, value in attributes.items():
        if not isinstance(name, str) or name.startswith("_") or "." in name or "/" in name:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            integers |= {name: value} if value > 1 else {}
        elif depth and (inside := _items(value)):
            integers |= {f"{name}.{key}": number for key, number in integer_attributes(inside, depth - 1).items()}
    return integers


def _items(value: Any) -> dict[str, Any]:
    """The items of a tuple, dictionary or configuration object by name; {} for anything else."""
    if isinstance(value, (tuple, list)):
        return {str(i): item for i, item in enumerate(value)} if len(value) <= _LONGEST else {}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (jax.Array, type)) or callable(value) or not hasattr(value, "__dict__"):
        return {}
    return dict(vars(value))


_LONGEST = 64  # a longer tuple is unlikely to list sizes


def replace_integer(value: Any, name: str, number: int) -> Any:
    """A copy of an attribute's value with one integer replaced.

    Args:
      name: as in `integer_attributes`, without the attribute's own name; "" if the value is the integer.

    Raises:
      KeyError, IndexError, AttributeError, ValueError, TypeError: there is no such integer.
    """
    if not name:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{value!r} is not an integer")
        return number
    key, _, rest = name.partition(".")
    if isinstance(value, (tuple, list)):
        items = list(value)
        items[int(key)] = replace_integer(items[int(key)], rest, number)
        kind: Any = type(value)
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, Mapping):
        new = {**value, key: replace_integer(value[key], rest, number)}
        other: Any = type(value)
        return new if other is dict else other(new)
    new = copy.copy(value)
    object.__setattr__(new, key, replace_integer(getattr(value, key), rest, number))
    return new


class Adapter(Protocol):
    """How modules of one library are traced and resized. Everything is abstract: no parameter is allocated."""

    def abstract_variables(self, module: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """{"params": …, other collections} of shapes, as the module's own code creates them."""
        ...

    def jaxpr(self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The ClosedJaxpr of the module's call; its first inputs are the leaves of `variables`."""
        ...

    def traced(self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of `jax.jit(call).trace(…)` for the same call, to be lowered for XLA's own cost analysis."""
        ...

    def trace_layers(
        self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, LayerInfo], Any]:
        """({path: layer} of every layer called, the ClosedJaxpr of the call)."""
        ...

    def resized(self, module: Any, layers: LayerSizes, dropped: Sequence[str]) -> Any:
        """The student's module: the same code at these sizes, without the dropped layers.

        For a module that is a student already, sizes and dropped layers are relative to its base.
        """
        ...

    def layer_outputs(
        self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """{path: output} of layers that return one array, in the order of their calls."""
        ...


@jax.tree_util.register_pytree_with_keys_class
class Keywords(dict[str, Any]):
    """Array arguments that are passed by keyword; may be the last of a module's inputs."""

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        """(values with their keys in the order of the names, the names)."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Sequence[Any]) -> Keywords:
        """The inverse of `tree_flatten_with_keys`."""
        return cls(zip(names, values, strict=True))


def call_arguments(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword arguments) of a call: `Keywords` at the end of `inputs` are merged with `kwargs`."""
    if inputs and isinstance(inputs[-1], Keywords):
        return tuple(inputs[:-1]), {**kwargs, **inputs[-1]}
    return tuple(inputs), dict(kwargs)


def apply_function(module: Any, kwargs: Mapping[str, Any]) -> Callable[..., list[Any]]:
    """(variables, *inputs) → the arrays in the output of `module.apply`; strings and other leaves are left out."""

    def apply(variables: Any, *inputs: Any) -> list[Any]:
        args, keywords = call_arguments(inputs, kwargs)
        output = module.apply(variables, *args, **keywords)
        return [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]

    return apply
