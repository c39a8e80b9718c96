"""Describes how a module is called: the data that its arguments take, and the keywords for training and inference.

    CallSpec(("tokens", "mask=valid"), {"tokens": int32[32], "valid": bool[32]}, {"noise": True}, {"noise": False})

calls `module(batch["tokens"], mask=batch["valid"], noise=…)`. Everything that calls a module does so by its `CallSpec`,
which is stored as JSON in the network's `Architecture`. The keyword that switches between training and inference is
recognized in the module's signature: `train`, `training`, `is_training` or `deterministic`.
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

# Usual names of the keyword that switches between training and inference, with its value for training.
_MODES = {"train": True, "training": True, "is_training": True, "deterministic": False}
DTYPE = re.compile("bool|bfloat16|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")  # dtypes allowed in our files
_LEAF = re.compile(r"(\w+)\[([\d,]*)\]")
LARGEST, _DEEPEST = 1 << 28, 8  # elements of an input, nesting depth: bounds on what a file from elsewhere can ask for


@dataclass(frozen=True)
class CallSpec:
    """How a module is called.

    Attributes:
      arguments: in order, the batch's `entry` for a positional argument, or `keyword=entry`.
      inputs: {entry: pytree of `jax.ShapeDtypeStruct` of one example, without the batch axis}.
      train, eval: keyword arguments in training and inference mode, JSON values, in addition to the recognized switch.
    """

    arguments: tuple[str, ...]
    inputs: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    eval: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_image(shape: tuple[int, ...]) -> CallSpec:
        """The specification of a module that takes one float32 image of this shape."""
        return CallSpec(("images",), {"images": jax.ShapeDtypeStruct(tuple(shape), jnp.float32)})

    def bind(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """The module's inputs from a batch: the positional ones, followed by `Keywords` if there are any."""
        named = {key: batch[entry] for key, entry in self._split() if key is not None}
        positional = tuple(batch[entry] for key, entry in self._split() if key is None)
        return (*positional, Keywords(named)) if named else positional

    def example(self, size: int | Any) -> tuple[Any, ...]:
        """Abstract inputs with a batch axis of `size`, which may be symbolic."""
        return self.bind(jax.tree.map(lambda leaf: input_spec((size, *leaf.shape), leaf.dtype), dict(self.inputs)))

    def random(self, size: int, rng: np.random.Generator) -> tuple[Any, ...]:
        """Random inputs: normal numbers for floating-point arrays, zeros and ones for all others."""

        def draw(leaf: Any) -> Any:
            floats = jnp.issubdtype(leaf.dtype, jnp.floating)
            return (rng.normal(size=leaf.shape) if floats else rng.integers(0, 2, leaf.shape)).astype(leaf.dtype)

        return jax.tree.map(draw, self.example(size))

    def keywords(self, module: Any, train: bool) -> dict[str, Any]:
        """The static keyword arguments in training or inference mode."""
        return {**mode_keywords(module, train), **(self.train if train else self.eval)}

    def check(self, module: Any) -> None:
        """Raises ValueError if the module's call needs another argument, or does not take one that is given here."""
        signature = signature_of(module)
        if signature is None:
            return
        parameters = list(signature.parameters.values())
        keywords = {key for key, _ in self._split() if key is not None}
        known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        static = {**self.keywords(module, True), **self.keywords(module, False)}
        for name in [*keywords, *static]:
            if name not in known and not open_ended:
                where = "data.inputs" if name in keywords else "model.train_kwargs and model.eval_kwargs"
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
        positional = {p.name for p in places[:count]}
        for p in parameters:
            needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if needed and p.name not in positional | keywords | set(static):
                raise ValueError(
                    f"{_name(module)} needs {p.name!r}, which has no value; take it from the data "
                    f"(data.inputs: {p.name}=ENTRY), or set it in model.train_kwargs and model.eval_kwargs"
                )

    def _split(self) -> list[tuple[str | None, str]]:
        """(keyword or None, entry) of every argument."""
        return [(key, entry) if entry else (None, key) for key, _, entry in (a.partition("=") for a in self.arguments)]

    def to_json(self) -> dict[str, Any]:
        """JSON values; the inverse is `CallSpec.from_json`."""
        return {
            "arguments": list(self.arguments),
            "inputs": {name: _spec_to_json(spec) for name, spec in self.inputs.items()},
            "train": dict(self.train),
            "eval": dict(self.eval),
        }

    @staticmethod
    def from_json(record: Any) -> CallSpec:
        """The inverse of `to_json`. Raises ValueError with the key and the value if the record is invalid."""
        kinds = {"arguments": list, "inputs": dict, "train": dict, "eval": dict}
        if not isinstance(record, dict) or record.keys() != kinds.keys():
            raise ValueError(f"call: an object with {', '.join(kinds)} is expected, not {record!r:.80}")
        for key, kind in kinds.items():
            if not isinstance(record[key], kind):
                raise ValueError(f"call: {key!r} must be a {kind.__name__}, not {record[key]!r:.80}")
        if not all(isinstance(a, str) and a.rpartition("=")[2] in record["inputs"] for a in record["arguments"]):
            raise ValueError(f"call: 'arguments' must name entries of 'inputs', not {record['arguments']!r:.80}")
        inputs = {name: _spec_from_json(spec, name, 0) for name, spec in record["inputs"].items()}
        return CallSpec(tuple(record["arguments"]), inputs, record["train"], record["eval"])


def input_spec(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """An abstract input with the dtype that JAX will give it: 64 bits only if that is enabled."""
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))


def mode_keywords(module: Any, train: bool) -> dict[str, Any]:
    """The keyword that puts a module's call in training or inference mode, {"train": …}; {} if it has none."""
    signature = signature_of(module)
    parameters = () if signature is None else signature.parameters
    return {name: value is train for name, value in _MODES.items() if name in parameters}


def signature_of(module: Any) -> inspect.Signature | None:
    """The signature of a module's call without `self`; for a wrapper, that of the wrapped module."""
    if isinstance(module, FunctionalModule):
        return module.signature
    try:
        signature = inspect.signature(class_of(module).__call__)
    except (TypeError, ValueError):
        return None
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def class_of(module: Any) -> type:
    """The class that the user wrote; for a wrapper, that of the wrapped module."""
    wrapped = getattr(type(module), "wraps", None)
    inner = getattr(module, wrapped) if isinstance(wrapped, str) else module
    return inner.kind if isinstance(inner, FunctionalModule) else type(inner)


def _name(module: Any) -> str:
    return f"{class_of(module).__name__}.__call__"


def _spec_to_json(spec: Any) -> Any:
    if isinstance(spec, Mapping):
        return {str(key): _spec_to_json(value) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [_spec_to_json(value) for value in spec]
    return f"{jnp.dtype(spec.dtype).name}[{','.join(map(str, spec.shape))}]"


def _spec_from_json(value: Any, name: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"call: input {name!r} is nested more than {_DEEPEST} times")
    if isinstance(value, dict):
        return {key: _spec_from_json(item, name, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_spec_from_json(item, name, depth + 1) for item in value]
    match = _LEAF.fullmatch(value) if isinstance(value, str) else None
    if match is None or len(match[2]) > 100:
        raise ValueError(f"call: input {name!r:.80} must read like 'float32[28,28,1]', not {value!r:.80}")
    sizes = [int(n) for n in match[2].split(",") if n]
    if math.prod(sizes) > LARGEST:
        raise ValueError(f"call: input {name!r:.80} has more than {LARGEST} numbers: {value!r:.80}")
    if not DTYPE.fullmatch(match[1]):
        raise ValueError(f"call: input {name!r:.80} has the unknown dtype {match[1]!r:.80}")
    return jax.ShapeDtypeStruct(tuple(sizes), jnp.dtype(match[1]))
