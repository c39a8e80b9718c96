"""The student: an unmodified Flax module run at the sizes of an `Architecture`.

A Linen module fixes the size of a layer when the layer is called (`features=64`), so a sliced kernel does not fit it.
The student does not rewrite the module: it runs the module's own code and intercepts its layers. A layer named in
`Architecture.layers` gets the sizes given there for the length of the call; a layer named in `Architecture.dropped`
returns zeros without computing them, so that all that fed it is dead code. A normalisation layer reads its size from
its input and needs nothing.

`Architecture` is plain JSON and, with the model's own code, all that is needed to build the student again. This file
knows nothing about search, gates or slicing.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from kdsearch_jax import models

FORMAT = 1
_FIELDS = {"model": str, "arguments": dict, "layers": dict, "dropped": list, "input_shape": list}
_MAX_SIZE = 1 << 24  # no layer is wider; bounds what a file from elsewhere can ask for


@dataclass(frozen=True)
class Architecture:
    """A network as plain JSON.

    Args:
      model: name in `kdsearch_jax.models`, or `package.module:factory`.
      arguments: the factory's keyword arguments, JSON values, number of classes included.
      layers: {module path, joined by "/": {attribute: size}}, for all layers that hold sizes where any differs.
      dropped: paths of layers that return zeros, since their residual branch is gone.
      input_shape: shape of one example, without the batch axis.
    """

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; `Architecture.from_json` inverts it."""
        return {
            "format": FORMAT,
            "model": self.model,
            "arguments": dict(self.arguments),
            "layers": {path: dict(sizes) for path, sizes in self.layers.items()},
            "dropped": list(self.dropped),
            "input_shape": list(self.input_shape),
        }

    @staticmethod
    def from_json(record: Any) -> Architecture:
        """Checks and reads what `to_json` wrote.

        Raises:
          ValueError: where the record is not an architecture: names the key, the value and what is expected.
        """
        if not isinstance(record, dict):
            raise ValueError(f"architecture: a JSON object is expected, not {type(record).__name__}")
        if record.get("format") != FORMAT:
            raise ValueError(
                f"architecture: format {record.get('format')!r} is not known here; this version reads {FORMAT}"
            )
        for key in record:
            if key != "format" and key not in _FIELDS:
                near = difflib.get_close_matches(str(key), _FIELDS, 1)
                raise ValueError(
                    f"architecture: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        for key, kind in _FIELDS.items():
            if not isinstance(record.get(key), kind):
                raise ValueError(f"architecture: {key!r} must be a {kind.__name__}, not {record.get(key)!r:.80}")
        for path, sizes in record["layers"].items():
            if not isinstance(sizes, dict) or not sizes or not all(map(_is_size, sizes.values())):
                raise ValueError(f"architecture: layers[{path!r}] must map attributes to sizes, not {sizes!r:.80}")
        if not all(isinstance(path, str) for path in record["dropped"]):
            raise ValueError(f"architecture: 'dropped' must list layer paths, not {record['dropped']!r:.80}")
        if not all(map(_is_int, record["input_shape"])):
            raise ValueError(f"architecture: 'input_shape' must list sizes, not {record['input_shape']!r:.80}")
        sized = {path: {k: _tupled(v) for k, v in sizes.items()} for path, sizes in record["layers"].items()}
        return Architecture(
            record["model"], record["arguments"], sized, tuple(record["dropped"]), tuple(record["input_shape"])
        )

    def module(self) -> nn.Module:
        """The network as a Linen module: the base model itself where nothing was pruned, else a `Student`."""
        base = models.build(self.model, self.arguments)
        return Student.of(base, self) if self.layers or self.dropped else base


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_SIZE


def _is_size(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(_is_int, value)))


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Student(nn.Module):
    """A Linen module like any other: runs `base` at the sizes in `layers`, without the layers in `dropped`.

    Its variables lie at the same paths as those of `base`: leaves are smaller, dropped layers have none.
    Arguments, outputs and training mode are those of `base`.
    """

    base: nn.Module
    layers: Mapping[str, Mapping[str, Any]]
    dropped: tuple[str, ...] = ()

    @staticmethod
    def of(base: nn.Module, architecture: Architecture) -> Student:
        """The student of `base` that `architecture` describes."""
        return Student(base=base, layers=freeze(architecture.layers), dropped=tuple(architecture.dropped))

    def setup(self) -> None:
        """The variables of `base` are the student's own: no level of nesting between."""
        nn.share_scope(self, self.base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `base` at the student's sizes."""
        met: set[str] = set()
        with nn.intercept_methods(functools.partial(_intercept, self.layers, self.dropped, self.path, met)):
            output = self.base(*args, **kwargs)
        for path in sorted({*self.layers, *self.dropped} - met):
            _check_met(path, met)
        return output


def _check_met(path: str, met: set[str]) -> None:
    """Raises ValueError where no layer at `path` was called, though the network was."""
    parents = [path.rsplit("/", n)[0] for n in range(1, path.count("/") + 1)] + [""]
    parent = next((parent for parent in parents if parent in met), "")
    # A module that was called without its layers came from a cache of compiled functions (`nn.jit`).
    if any(other.startswith(f"{parent}/" if parent else "") and other != parent for other in met):
        near = difflib.get_close_matches(path, met, 1)
        raise ValueError(
            f"architecture: the model has no layer {path!r}, or does not call it at these sizes"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


def _intercept(
    layers: Any, dropped: Any, root: tuple[str, ...], met: set[str], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """Runs one method of one layer at its size (a plain function: Linen would intercept a method of `Student` too)."""
    layer, path = context.module, context.module.path
    path = "/".join(path[len(root) :]) if path[: len(root)] == root else ""
    met.add(path)
    sizes = layers.get(path, {})
    before = {name: _attribute(layer, path, name) for name in sizes}
    try:
        for name, value in sizes.items():
            # Linen modules are frozen against changes by mistake; this one is on purpose and undone below.
            object.__setattr__(layer, name, _like(value, before[name]))
        if path in dropped and context.method_name == "__call__":
            return _zeros(layer, args, kwargs)
        return call(*args, **kwargs)
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)


def _attribute(layer: nn.Module, path: str, name: str) -> Any:
    if name not in type(layer).__dataclass_fields__ or name in ("parent", "name"):
        raise ValueError(f"architecture: layer {path!r} is a {type(layer).__name__}, which has no size {name!r}")
    return getattr(layer, name)


def _like(value: Any, model: Any) -> Any:
    """A size as the layer's author gave it: an int or a tuple."""
    if isinstance(model, int) and isinstance(value, (tuple, list)) and len(value) == 1:
        return value[0]
    return tuple(value) if isinstance(value, list) else value


def _zeros(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """What `layer` would return, as zeros; its parameters are neither made nor read."""
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    detached = layer.clone(parent=None)
    output, _ = jax.eval_shape(lambda: detached.init_with_output(rngs, *args, **kwargs))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)
