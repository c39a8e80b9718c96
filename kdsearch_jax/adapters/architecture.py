"""`Architecture`: the JSON record that, with the model's own code, is all that is needed to rebuild a student."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.base import LayerSizes
from kdsearch_jax.adapters.call_spec import LARGEST, CallSpec
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.adapters.linen_student import StudentModule

FORMAT = 1
_FIELDS = {"model": str, "arguments": dict, "layers": dict, "dropped": list, "input_shape": list}
_MAX_SIZE = 1 << 24  # bounds the layer sizes that a file from elsewhere can ask for


@dataclass(frozen=True)
class Architecture:
    """A network as JSON values.

    Attributes:
      model: name in `kdsearch_jax.models`, or `package.module:factory`.
      arguments: the factory's keyword arguments, JSON values.
      layers: {module path, joined by "/": {attribute: size}} of all layers that hold sizes; {} if nothing was pruned.
      dropped: paths of layers that return zeros because their residual branch was removed.
      input_shape: shape of one image, without the batch axis, for a network of images.
      custom_call: how the module is called, unless that is with one float32 image of `input_shape`.
    """

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()
    custom_call: CallSpec | None = None

    @staticmethod
    def of(module: Any, input_shape: tuple[int, ...] = (), custom_call: CallSpec | None = None) -> Architecture:
        """The architecture of a Linen module or `FunctionalModule`; a student's is relative to its base module."""
        name, arguments = registry.identify(base_module(module))
        layers, dropped = pruned_sizes(module)
        sized = {path: dict(sizes) for path, sizes in layers.items()}
        return Architecture(name, arguments, sized, tuple(dropped), tuple(input_shape), custom_call)

    @property
    def call_spec(self) -> CallSpec:
        """How the module is called."""
        return self.custom_call or CallSpec.of_image(self.input_shape)

    def to_json(self) -> dict[str, Any]:
        """JSON values; the inverse is `Architecture.from_json`."""
        return {
            "format": FORMAT,
            "model": self.model,
            "arguments": dict(self.arguments),
            "layers": {path: dict(sizes) for path, sizes in self.layers.items()},
            "dropped": list(self.dropped),
            "input_shape": list(self.input_shape),
            **({"call": self.custom_call.to_json()} if self.custom_call else {}),
        }

    @staticmethod
    def from_json(record: Any) -> Architecture:
        """The inverse of `to_json`.

        Raises:
          ValueError: the record is invalid; names the key, the value and what is expected.
        """
        if not isinstance(record, dict):
            raise ValueError(f"architecture: a JSON object is expected, not {type(record).__name__}")
        if record.get("format") != FORMAT:
            raise ValueError(f"architecture: format {record.get('format')!r} is unknown; this version reads {FORMAT}")
        for key in record:
            if key not in ("format", "call", *_FIELDS):
                near = difflib.get_close_matches(str(key), ["call", *_FIELDS], 1)
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
        if not all(map(_is_int, record["input_shape"])) or math.prod(record["input_shape"]) > LARGEST:
            raise ValueError(f"architecture: 'input_shape' must list sizes, not {record['input_shape']!r:.80}")
        sized = {path: {k: _tupled(v) for k, v in sizes.items()} for path, sizes in record["layers"].items()}
        custom_call = CallSpec.from_json(record["call"]) if "call" in record else None
        shape = tuple(record["input_shape"])
        return Architecture(record["model"], record["arguments"], sized, tuple(record["dropped"]), shape, custom_call)

    def module(self, base: Any = None) -> Any:
        """The network as a module: the base model itself if nothing was pruned, else a student of it.

        Args:
          base: the base model, see `registry.as_module`; needed if `model` says that it was passed as an object.

        Raises:
          ValueError: there is no such model, the base is missing, or it has another class.
        """
        base = registry.build(self.model, self.arguments) if base is None else base_module(registry.as_module(base))
        registry.check_class(self.model, base)
        if not self.layers and not self.dropped:
            return base
        if isinstance(base, nn.Module):
            return StudentModule.of(base, self.layers, self.dropped)
        return base.resized(self.layers, self.dropped)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_SIZE


def _is_size(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(_is_int, value)))


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def base_module(module: Any) -> Any:
    """The module that a Linen or NNX student was pruned from; the module itself if it is not a student."""
    if isinstance(module, StudentModule):
        return module.base
    return module.base or module if isinstance(module, FunctionalModule) else module


def pruned_sizes(module: Any) -> tuple[LayerSizes, tuple[str, ...]]:
    """(layers, dropped) of a student, as in `Architecture`; ({}, ()) for any other module."""
    return (module.layers, tuple(module.dropped)) if isinstance(module, (StudentModule, FunctionalModule)) else ({}, ())
