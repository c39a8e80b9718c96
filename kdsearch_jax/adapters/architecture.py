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

import contextlib
import difflib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.base import with_number
from kdsearch_jax.adapters.call_spec import LARGEST, CallSpec
from kdsearch_jax.adapters.functional_module import FunctionalModule

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
      input_shape: shape of one example, without the batch axis, where it is one image.
      call: how the module is called, where that is not with one float32 image of `input_shape`.
    """

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()
    call: CallSpec | None = None

    @staticmethod
    def of(module: Any, input_shape: tuple[int, ...] = (), call: CallSpec | None = None) -> Architecture:
        """What describes `module`; of a student relative to the module that it was first cut from.

        Args:
          module: a Linen module or a `FunctionalModule`, cut or not.
        """
        name, arguments = registry.describe(base_of(module))
        layers, dropped = cuts_of(module)
        sized = {path: dict(sizes) for path, sizes in layers.items()}
        return Architecture(name, arguments, sized, tuple(dropped), tuple(input_shape), call)

    @property
    def called(self) -> CallSpec:
        """How the module is called."""
        return self.call or CallSpec.of_image(self.input_shape)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; `Architecture.from_json` inverts it."""
        return {
            "format": FORMAT,
            "model": self.model,
            "arguments": dict(self.arguments),
            "layers": {path: dict(sizes) for path, sizes in self.layers.items()},
            "dropped": list(self.dropped),
            "input_shape": list(self.input_shape),
            **({"call": self.call.to_json()} if self.call else {}),
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
        call = CallSpec.from_json(record["call"]) if "call" in record else None
        shape = tuple(record["input_shape"])
        return Architecture(record["model"], record["arguments"], sized, tuple(record["dropped"]), shape, call)

    def module(self, base: Any = None) -> Any:
        """The network as a module: the base model itself where nothing was pruned, else a `StudentModule`.

        base: the base model, where `model` says that it was given as an object: as `models.module_of` takes it.

        Raises:
          ValueError: there is no such model, none was given, or one of another class.
        """
        base = registry.build(self.model, self.arguments) if base is None else base_of(registry.module_of(base))
        registry.check_class(self.model, base)
        if not self.layers and not self.dropped:
            return base
        if isinstance(base, nn.Module):
            return StudentModule.of(base, self)
        return base.cut(self.layers, self.dropped)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_SIZE


def _is_size(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(_is_int, value)))


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Held:
    """A module that Linen does not take for a part of the one that has it: it would reserve a name for it."""

    module: nn.Module


class StudentModule(nn.Module):
    """A Linen module like any other: runs `base` at the sizes in `layers`, without the layers in `dropped`.

    Its variables lie at the same paths as those of `base`: leaves are smaller, dropped layers have none.
    Arguments, outputs and training mode are those of `base`.
    """

    wraps: ClassVar[str] = "base"  # whose signature is that of this module

    held: Held
    layers: Mapping[str, Mapping[str, Any]]
    dropped: tuple[str, ...] = ()

    @staticmethod
    def of(base: nn.Module, architecture: Architecture) -> StudentModule:
        """The student of `base` (or of what `base` was cut from, if it is a student) that `architecture` describes."""
        return StudentModule.cut(base, architecture.layers, architecture.dropped)

    @staticmethod
    def cut(base: nn.Module, layers: Mapping[str, Mapping[str, Any]], dropped: Sequence[str]) -> StudentModule:
        """The same by sizes and dropped layers, both relative to what was cut first."""
        return StudentModule(Held(base_of(base)), layers=freeze(layers), dropped=tuple(dropped))

    @property
    def base(self) -> nn.Module:
        """The unmodified module."""
        return self.held.module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "held" not in vars(self):
                raise
            kind = type(self.base).__name__
            raise AttributeError(
                f"this student of a {kind} has no attribute {name!r}"
                + (f"; `base`, the {kind} that it was cut from, has it" if hasattr(self.base, name) else "")
            ) from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `base` at the student's sizes."""
        # In the student's own scope: its variables, and those of modules in its fields, have no level of nesting more.
        base = self.base.clone(parent=self.scope, _deep_clone=True)
        cuts = _Cuts(self.layers, self.dropped, self.path)
        with nn.intercept_methods(cuts.intercept):
            output = base(*args, **kwargs)
        for path in sorted({*self.layers, *self.dropped} - cuts.met):
            _check_met(path, cuts.met)
        return output


def base_of(module: Any) -> Any:
    """The module that a student, Linen's or NNX's, was first cut from; the module itself where it is no student."""
    if isinstance(module, StudentModule):
        return module.base
    return module.base or module if isinstance(module, FunctionalModule) else module


def cuts_of(module: Any) -> tuple[Mapping[str, Mapping[str, Any]], tuple[str, ...]]:
    """(layers, dropped) of a student; ({}, ()) of any other module."""
    return (module.layers, tuple(module.dropped)) if isinstance(module, (StudentModule, FunctionalModule)) else ({}, ())


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


@dataclass(frozen=True)
class _Cuts:
    """What a student does to the calls of its layers. root: the student's path; met: paths of layers that were called.

    passed: not empty while calls are only passed on: "zeros" of a dropped layer are being made of a copy, whose paths
    are its own, or "part": a part of the model is called that is a student itself.
    """

    layers: Mapping[str, Mapping[str, Any]]
    dropped: Sequence[str]
    root: tuple[str, ...]
    met: set[str] = field(default_factory=set)
    passed: list[str] = field(default_factory=list)

    def intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs one method of one layer at its size."""
        layer = context.module
        path = _path(layer, self.root) or ""
        if "zeros" not in self.passed:
            self.met.add(path)
        if self.passed:
            return call(*args, **kwargs)
        if isinstance(layer, StudentModule):
            with self._passing("part"), contextlib.ExitStack() as undo:
                for name, value in self._below(layer, path).items():
                    _set(layer, name, value, undo)
                return call(*args, **kwargs)
        if path in self.dropped and context.method_name == "setup":
            return None  # its parameters would be made there
        with contextlib.ExitStack() as undo:
            for each in (layer, *_held(layer)):  # `nn.RNN` reads its cell's size before it calls the cell
                own = _path(each, self.root)
                resize(each, {} if own is None else self.layers.get(own, {}), context.method_name, undo)
            if path not in self.dropped or context.method_name != "__call__":
                return call(*args, **kwargs)
            undo.enter_context(self._passing("zeros"))
            return _zeros(layer, args, kwargs)

    @contextlib.contextmanager
    def _passing(self, why: str) -> Iterator[None]:
        self.passed.append(why)
        try:
            yield
        finally:
            self.passed.pop()

    def _below(self, part: StudentModule, path: str) -> dict[str, Any]:
        """The cuts of a part that is a student itself: its own, and those of this student on top."""
        start = f"{path}/" if path else ""
        own = {name[len(start) :]: sizes for name, sizes in self.layers.items() if f"{name}/".startswith(start)}
        merged = {name: {**part.layers.get(name, {}), **own.get(name, {})} for name in {**part.layers, **own}}
        gone = {name[len(start) :] for name in self.dropped if name.startswith(start)}
        return {"layers": freeze(merged), "dropped": tuple(sorted({*part.dropped, *gone}))}


def resize(layer: nn.Module, sizes: Mapping[str, Any], method: str, undo: contextlib.ExitStack) -> None:
    """Gives a layer its sizes until `undo` is closed.

    method: of the layer that is called.
    sizes: of attributes, of numbers inside them ("config.heads"), and of the layer's own arrays ("params/w").
    """
    arrays: dict[str, tuple[int, ...]] = {}
    for name, value in sizes.items():
        if "/" in name:
            arrays[name] = tuple(value)
            continue
        attribute, _, inside = name.partition(".")
        if method == "setup" and attribute not in type(layer).__dataclass_fields__:
            continue  # made by `setup`
        _set(layer, attribute, _changed(layer, name, _attribute(layer, attribute), inside, value), undo)
    if arrays and layer.scope is not None:
        scope = layer.scope
        for name, function in (("param", _sized_param), ("variable", _sized_variable)):
            before = getattr(scope, name)
            undo.callback(setattr, scope, name, before)
            setattr(scope, name, functools.partial(function, scope, before, arrays))


def _set(layer: nn.Module, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    # Linen modules are frozen against changes by mistake; this one is on purpose, and undone.
    undo.callback(object.__setattr__, layer, name, getattr(layer, name))
    object.__setattr__(layer, name, value)


def _sized_param(scope: Any, param: Any, arrays: Any, name: str, init: Any, *args: Any, **kwargs: Any) -> Any:
    """`scope.param` for a parameter whose shape the architecture gives, whatever shape the code asks for."""
    shape = arrays.get(f"params/{name}")
    if shape is None:
        return param(name, init, *args, **kwargs)
    if scope.has_variable("params", name):  # Flax compares its shape with the initializer's
        return param(name, lambda *_, **__: scope.get_variable("params", name), *args, **kwargs)
    return param(name, lambda *args, **kwargs: _first(init(*args, **kwargs), shape), *args, **kwargs)


def _sized_variable(_: Any, variable: Any, arrays: Any, col: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """`scope.variable` likewise; Flax does not compare the shapes of these."""
    shape, (init, *rest) = arrays.get(f"{col}/{name}"), args or (None,)
    if shape is None or init is None:
        return variable(col, name, *args, **kwargs)
    return variable(col, name, lambda *args, **kwargs: _first(init(*args, **kwargs), shape), *rest, **kwargs)


def _first(value: Any, shape: tuple[int, ...]) -> Any:
    """The first entries of an array, boxed or not, over again where it has too few.

    In a stack of layers, the last axes of `shape` are one layer's.
    """

    def fitted(leaf: Any) -> Any:
        own = shape[len(shape) - leaf.ndim :]
        leaf = leaf[tuple(map(slice, own))]
        missing = [(0, n - m) for n, m in zip(own, leaf.shape, strict=True)]
        return jnp.pad(leaf, missing, mode="wrap") if any(n for _, n in missing) else leaf

    return jax.tree.map(fitted, value)


def _path(layer: nn.Module, root: tuple[str, ...]) -> str | None:
    """Where a layer is below the student; None for one that is not there yet."""
    if layer.scope is None:
        return None
    path = layer.path
    return "/".join(path[len(root) :]) if path[: len(root)] == root else ""


def _held(layer: nn.Module) -> list[nn.Module]:
    """Layers of Flax's own that another was given as an attribute."""
    if not type(layer).__module__.startswith("flax.linen"):
        return []
    held = [getattr(layer, name) for name in type(layer).__dataclass_fields__ if name != "parent"]
    return [each for each in held if isinstance(each, nn.Module)]


def _attribute(layer: nn.Module, name: str) -> Any:
    if name in ("parent", "name", "scope") or name.startswith("_") or not hasattr(layer, name):
        path = "/".join(layer.path)
        raise ValueError(f"architecture: layer {path!r} is a {type(layer).__name__}, which has no size {name!r}")
    return getattr(layer, name)


def _changed(layer: nn.Module, name: str, old: Any, inside: str, value: Any) -> Any:
    if not inside:
        return _like(value, old)
    try:
        return with_number(old, inside, value)
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        path = "/".join(layer.path)
        raise ValueError(
            f"architecture: layer {path!r} is a {type(layer).__name__}, which has no size {name!r}"
        ) from error


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
