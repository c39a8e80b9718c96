"""What a library of layers must tell the core, so that the core need not know it: one small module each.

The core (`topology`, `gates`, `surgery`) sees pure functions and pytrees. A library (`kdsearch_jax.adapters.linen`,
`kdsearch_jax.adapters.nnx`) says how a module becomes a function, which attributes of which layers hold sizes, and
how the same
code is run at other sizes. A module that implements `Adapter` has these functions and nothing else that is public.
`inputs` are pytrees with a leading batch axis, the last of which may be `Keywords`; `kwargs` are static.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

Shapes = Mapping[str, tuple[int, ...]]
Sizes = dict[str, Any]  # {attribute: its value}
Layers = Mapping[str, Mapping[str, Any]]  # {path of a layer: its sizes}


def _no_sizes(before: Shapes, after: Shapes) -> Sizes:
    return {}


@dataclass(frozen=True)
class Layer:
    """A module met during a call.

    droppable: it can be left out, returning zeros, when its residual branch goes.
    resize: (shapes of the leaves at and below it, {"params/kernel": …}, before and after) → attributes with sizes.
    grouped: it has a `feature_group_count`.
    numbers: whole numbers that a module of the user's own holds, `numbers_in`; any of them may be a size.
    """

    droppable: bool = False
    resize: Callable[[Shapes, Shapes], Sizes] = field(default=_no_sizes)
    grouped: bool = False
    numbers: Mapping[str, int] = field(default_factory=dict)


def numbers_in(attributes: Mapping[str, Any], depth: int = 2) -> dict[str, int]:
    """Whole numbers above 1 among a module's attributes, by name: "heads", "widths.1" in a tuple, "config.heads"."""
    found: dict[str, int] = {}
    for name, value in attributes.items():
        if not isinstance(name, str) or name.startswith("_") or "." in name or "/" in name:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            found |= {name: value} if value > 1 else {}
        elif depth and (inside := _inside(value)):
            found |= {f"{name}.{key}": number for key, number in numbers_in(inside, depth - 1).items()}
    return found


def _inside(value: Any) -> dict[str, Any]:
    """What a tuple, a dictionary or a configuration holds, by name; {} of anything else."""
    if isinstance(value, (tuple, list)):
        return {str(i): each for i, each in enumerate(value)} if len(value) <= _LONGEST else {}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (jax.Array, type)) or callable(value) or not hasattr(value, "__dict__"):
        return {}
    return dict(vars(value))


_LONGEST = 64  # a longer tuple is no list of sizes


def with_number(value: Any, name: str, number: int) -> Any:
    """A copy of what an attribute holds with one of its numbers, named as by `numbers_in` ("" is itself), replaced.

    Raises:
      KeyError, IndexError, AttributeError, ValueError, TypeError: it has no such number.
    """
    if not name:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{value!r} is no whole number")
        return number
    key, _, rest = name.partition(".")
    if isinstance(value, (tuple, list)):
        items = list(value)
        items[int(key)] = with_number(items[int(key)], rest, number)
        kind: Any = type(value)
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, Mapping):
        new = {**value, key: with_number(value[key], rest, number)}
        other: Any = type(value)
        return new if other is dict else other(new)
    new = copy.copy(value)
    object.__setattr__(new, key, with_number(getattr(value, key), rest, number))
    return new


class Adapter(Protocol):
    """How modules of one library are traced and resized. Everything is abstract: no parameter is made."""

    def variables(self, module: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """{"params": …, other collections} of shapes, as the module's own code makes them."""
        ...

    def jaxpr(self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The ClosedJaxpr of the module's call; its first inputs are the leaves of `variables`."""
        ...

    def traced(self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `jax.jit(call).trace(…)` gives for the same call: to be lowered, for XLA's own count."""
        ...

    def layers(
        self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Layer], Any]:
        """(every layer met during the call by its path, the ClosedJaxpr of that call)."""
        ...

    def cut(self, module: Any, layers: Layers, dropped: Sequence[str]) -> Any:
        """The module of the student: the same code at these sizes, without the dropped layers.

        Of a module that is a student already, sizes and dropped layers are all that differs from its base.
        """
        ...

    def outputs(self, module: Any, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """{path of a layer: its output} in the order of the calls, for layers that return one array."""
        ...


@jax.tree_util.register_pytree_with_keys_class
class Keywords(dict[str, Any]):
    """Array arguments that are given by keyword: may stand as the last of a module's inputs."""

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        """Values in the order of their names."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Sequence[Any]) -> Keywords:
        """Inverts the above."""
        return cls(zip(names, values, strict=True))


def bound(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword arguments) of a call: `Keywords` at the end of `inputs` join the static `kwargs`."""
    if inputs and isinstance(inputs[-1], Keywords):
        return tuple(inputs[:-1]), {**kwargs, **inputs[-1]}
    return tuple(inputs), dict(kwargs)


def arrays(output: Any) -> list[Any]:
    """The arrays of whatever a module returned; names, settings and the like are left out."""
    return [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]
