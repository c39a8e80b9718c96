"""The arrays of an NNX module: their paths, names and collections, and the state of random streams."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

STUDENT = "_kdsearch_student"  # attribute of modules that `FunctionalModule.bind` returns: the student's function


@dataclass(frozen=True)
class Leaf:
    """An array of a module.

    Attributes:
      path: in the module's graph, as NNX writes it.
      name: "params/conv/kernel", or the tag of a random stream.
      random: whether it is the state of a random stream.
    """

    path: tuple[Any, ...]
    name: str
    shape: tuple[int, ...]
    dtype: Any
    random: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """(path of the object that holds it, its name there)."""
        path, _, attribute = self.name.partition("/")[2].rpartition("/")
        return path, attribute


def split_module(module: nnx.Module) -> tuple[Any, tuple[Leaf, ...], list[Any]]:
    """(graph, leaves, their values) of a module, without intermediates that earlier calls stored."""
    _mark_arrays(module)
    student = vars(module).pop(STUDENT, None)
    try:
        graph, state = nnx.split(module, graph=True)
    finally:
        if student is not None:
            object.__setattr__(module, STUDENT, student)
    flat = list(nnx.to_flat_state(state))
    if any(isinstance(value, nnx.Intermediate) for _, value in flat):
        module = nnx.merge(graph, state)
        nnx.pop(module, nnx.Intermediate)
        graph, state = nnx.split(module, graph=True)
        flat = list(nnx.to_flat_state(state))
    leaves, values = [], []
    for path, value in flat:
        array, random = variable_array(value, path), isinstance(value, nnx.RngState)
        name = value.tag if random else f"{_collection(value)}/{path_name(path)}"
        leaves.append(Leaf(tuple(path), name, tuple(array.shape), array.dtype, random))
        values.append(array)
    names = [leaf.name for leaf in leaves if not leaf.random]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the module has two arrays with the name {min(twice)!r}; rename one")
    return graph, tuple(leaves), values


def variable_array(value: Any, path: tuple[Any, ...]) -> Any:
    """The array in a Variable, or the array itself.

    Raises:
      ValueError: the Variable does not hold one array.
    """
    inner = value.get_value() if isinstance(value, nnx.Variable) else value
    if isinstance(inner, (bool, int, float, complex)):
        return jnp.asarray(inner)
    if not hasattr(inner, "shape") or not hasattr(inner, "dtype"):
        raise ValueError(
            f"{path_name(path)}: a {type(value).__name__} that holds a {type(inner).__name__} is not "
            "supported; store one array in it"
        )
    return inner


def _mark_arrays(module: nnx.Module) -> None:
    """Declares attributes that are arrays during tracing as data, which NNX does only outside of a trace."""
    for _, node in list(nnx.iter_graph(module, graph=True)):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if isinstance(value, jax.Array):
                    setattr(node, name, nnx.data(value))


def _collection(value: Any) -> str:
    if isinstance(value, nnx.Param):
        return "params"
    if isinstance(value, nnx.BatchStat):
        return "batch_stats"
    if not isinstance(value, nnx.Variable):
        return "arrays"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(value).__name__).lower()


def path_name(path: Sequence[Any]) -> str:
    """A path in a module's graph as "blocks/0/conv"."""
    parts = (".".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in path)
    return "/".join(part.replace("/", ".") for part in parts)


def nest(leaves: Sequence[Leaf], values: Sequence[Any]) -> dict[str, Any]:
    """{collection: nested dictionary} of the values of leaves; random streams are left out."""
    flat = {x.name: value for x, value in zip(leaves, values, strict=True) if not x.random}
    return traverse_util.unflatten_dict(flat, sep="/")


class _Silent(nnx.RngStream):
    """A random stream without a key."""

    def __call__(self) -> jax.Array:
        raise ValueError(
            f"rngs: the module draws random numbers from the stream {self.tag!r} in training; pass "
            f"rngs={{{self.tag!r}: key}}"
        )


def require_keys(module: nnx.Module, keys: Mapping[str, Any]) -> None:
    """Makes streams without a key raise when they are drawn from, except "carry", which `nnx.RNN` uses for zeros."""
    for _, node in nnx.iter_graph(module, graph=True):
        if type(node) is nnx.RngStream and node.tag != "carry" and _key(node.tag, keys) is None:
            object.__setattr__(node, "__class__", _Silent)


def stream_keys(rngs: Any) -> dict[str, Any]:
    """{stream: key} from a seed, a key or {stream: key}."""
    if rngs is None:
        return {}
    if isinstance(rngs, Mapping):
        return dict(rngs)
    return {"default": jax.random.key(rngs) if isinstance(rngs, int) else rngs}


def _key(tag: str, keys: Mapping[str, Any]) -> Any:
    return next((keys[name] for name in (tag, "default", "params", "dropout") if name in keys), None)


def initial_state(leaf: Leaf, number: int, keys: Mapping[str, Any]) -> Any:
    """The initial state of a random stream: its key or its count.

    Args:
      number: of the leaf; streams with different numbers get different keys.
    """
    if not is_key(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)
    key = _key(leaf.name, keys)
    if key is None:  # a constant, so that no operation appears in a trace
        with jax.ensure_compile_time_eval():
            return jax.random.split(jax.random.key(number), leaf.shape) if leaf.shape else jax.random.key(number)
    key = jax.random.fold_in(key, number)
    return jax.random.split(key, leaf.shape) if leaf.shape else key


def is_key(leaf: Leaf) -> bool:
    """Whether a leaf is a random key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
