"""How a module is called, described once: what feeds its arguments, and which keywords switch training on and off.

    Call(("tokens", "mask=valid"), {"tokens": int32[32], "valid": bool[32]}, {"noise": True}, {"noise": False})

calls `module(batch["tokens"], mask=batch["valid"], noise=…)`. Tracing, training, evaluation, counting, proof and export
all call a module by its `CallSpec`, which is part of the network's `Architecture` and plain JSON there. Keywords that
nobody gives are guessed from the module's own signature: `train`, `training`, `is_training`, `deterministic`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters.base import Keywords
from kdsearch_jax.adapters.functional_module import FunctionalModule

# How modules call the switch between training and inference, and its value for training.
_MODES = {"train": True, "training": True, "is_training": True, "deterministic": False}
DTYPE = re.compile("bool|bfloat16|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")  # types of arrays in our files
_LEAF = re.compile(r"(\w+)\[([\d,]*)\]")
LARGEST, _DEEPEST = 1 << 28, 8  # numbers of an input; nesting of inputs: bounds what a file from elsewhere can say


@dataclass(frozen=True)
class CallSpec:
    """How a module is called.

    arguments: in order, `entry` of a batch for a positional argument or `keyword=entry`.
    inputs: {entry: pytree of `jax.ShapeDtypeStruct` of one example, without the batch axis}.
    train, eval: keywords, plain JSON, on top of those guessed from the module's signature.
    """

    arguments: tuple[str, ...]
    inputs: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    eval: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_image(shape: tuple[int, ...]) -> CallSpec:
        """One image, float32, as the only argument."""
        return CallSpec(("images",), {"images": jax.ShapeDtypeStruct(tuple(shape), jnp.float32)})

    def bind(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """The module's inputs out of a batch: positional ones, then `Keywords` if there are such."""
        named = {key: batch[entry] for key, entry in self._split() if key is not None}
        positional = tuple(batch[entry] for key, entry in self._split() if key is None)
        return (*positional, Keywords(named)) if named else positional

    def example(self, size: int | Any) -> tuple[Any, ...]:
        """Shapes of inputs with a batch axis of `size`, which may be symbolic."""
        return self.bind(jax.tree.map(lambda leaf: shaped((size, *leaf.shape), leaf.dtype), dict(self.inputs)))

    def random(self, size: int, rng: np.random.Generator) -> tuple[Any, ...]:
        """Inputs to try a module with: normal numbers, and zeros and ones where there are none of floating point."""

        def draw(leaf: Any) -> Any:
            floats = jnp.issubdtype(leaf.dtype, jnp.floating)
            return (rng.normal(size=leaf.shape) if floats else rng.integers(0, 2, leaf.shape)).astype(leaf.dtype)

        return jax.tree.map(draw, self.example(size))

    def keywords(self, module: Any, train: bool) -> dict[str, Any]:
        """The static keywords of a call in training or in inference mode."""
        return {**mode(module, train), **(self.train if train else self.eval)}

    def check(self, module: Any) -> None:
        """Raises ValueError where the module's call needs an argument that nothing describes, or has not a keyword."""
        signature = signature_of(module)
        if signature is None:
            return
        parameters = list(signature.parameters.values())
        given = {key for key, _ in self._split() if key is not None}
        known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        static = {**self.keywords(module, True), **self.keywords(module, False)}
        for name in [*given, *static]:
            if name not in known and not open_ended:
                where = "data.inputs" if name in given else "model.train_kwargs and model.eval_kwargs"
                raise ValueError(
                    f"{where}: {_name(module)} takes no {name!r}; it takes {', '.join(known) or 'nothing'}"
                )
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        count = sum(key is None for key, _ in self._split())
        if count > len(places) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise ValueError(
                f"data.inputs: {', '.join(self.arguments)} are {count} arguments, but {_name(module)} takes "
                f"{len(places)} ({', '.join(p.name for p in places)}); name those that it takes"
            )
        fed = {p.name for p in places[:count]}
        for p in parameters:
            needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if needed and p.name not in fed | given | set(static):
                raise ValueError(
                    f"{_name(module)} needs {p.name!r}, which nothing describes; feed it from the data "
                    f"(data.inputs: {p.name}=ENTRY), or give its value in model.train_kwargs and model.eval_kwargs"
                )

    def _split(self) -> list[tuple[str | None, str]]:
        """(keyword or None, entry) of every argument."""
        return [(key, entry) if entry else (None, key) for key, _, entry in (a.partition("=") for a in self.arguments)]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `CallSpec.from_json` inverts it."""
        return {
            "arguments": list(self.arguments),
            "inputs": {name: _written(spec) for name, spec in self.inputs.items()},
            "train": dict(self.train),
            "eval": dict(self.eval),
        }

    @staticmethod
    def from_json(record: Any) -> CallSpec:
        """Checks and reads what `to_json` wrote. Raises ValueError with the key and the value."""
        kinds = {"arguments": list, "inputs": dict, "train": dict, "eval": dict}
        if not isinstance(record, dict) or record.keys() != kinds.keys():
            raise ValueError(f"call: an object with {', '.join(kinds)} is expected, not {record!r:.80}")
        for key, kind in kinds.items():
            if not isinstance(record[key], kind):
                raise ValueError(f"call: {key!r} must be a {kind.__name__}, not {record[key]!r:.80}")
        if not all(isinstance(a, str) and a.rpartition("=")[2] in record["inputs"] for a in record["arguments"]):
            raise ValueError(f"call: 'arguments' must name entries of 'inputs', not {record['arguments']!r:.80}")
        inputs = {name: _parsed(spec, name, 0) for name, spec in record["inputs"].items()}
        return CallSpec(tuple(record["arguments"]), inputs, record["train"], record["eval"])


def shaped(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """An input of this shape as JAX will have it: of 64 bits only where JAX is set so."""
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))


def mode(module: Any, train: bool) -> dict[str, Any]:
    """The keyword by which a module's call is told to train, `train=…` or another; {} where it has none."""
    signature = signature_of(module)
    parameters = () if signature is None else signature.parameters
    return {name: value is train for name, value in _MODES.items() if name in parameters}


def signature_of(module: Any) -> inspect.Signature | None:
    """The signature of a module's call without `self`; of the module that runs inside, for one that wraps another."""
    if isinstance(module, FunctionalModule):
        return module.signature
    try:
        signature = inspect.signature(class_of(module).__call__)
    except (TypeError, ValueError):
        return None
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def class_of(module: Any) -> type:
    """The class that the user wrote: of the module that runs inside, for one that wraps another."""
    wrapped = getattr(type(module), "wraps", None)
    inner = getattr(module, wrapped) if isinstance(wrapped, str) else module
    return inner.kind if isinstance(inner, FunctionalModule) else type(inner)


def _name(module: Any) -> str:
    return f"{class_of(module).__name__}.__call__"


def _written(spec: Any) -> Any:
    if isinstance(spec, Mapping):
        return {str(key): _written(value) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [_written(value) for value in spec]
    return f"{jnp.dtype(spec.dtype).name}[{','.join(map(str, spec.shape))}]"


def _parsed(value: Any, name: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"call: input {name!r} is nested more than {_DEEPEST} times")
    if isinstance(value, dict):
        return {key: _parsed(item, name, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_parsed(item, name, depth + 1) for item in value]
    found = _LEAF.fullmatch(value) if isinstance(value, str) else None
    if found is None or len(found[2]) > 100:
        raise ValueError(f"call: input {name!r:.80} must read like 'float32[28,28,1]', not {value!r:.80}")
    sizes = [int(n) for n in found[2].split(",") if n]
    if math.prod(sizes) > LARGEST:
        raise ValueError(f"call: input {name!r:.80} has more than {LARGEST} numbers: {value!r:.80}")
    if not DTYPE.fullmatch(found[1]):
        raise ValueError(f"call: input {name!r:.80} has the unknown dtype {found[1]!r:.80}")
    return jax.ShapeDtypeStruct(tuple(sizes), jnp.dtype(found[1]))
