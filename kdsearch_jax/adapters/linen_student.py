"""Students of Linen modules: an unmodified module run at other sizes.

A Linen module fixes the size of a layer when the layer is called (`features=64`), so a sliced kernel does not fit. The
student runs the module's own code and intercepts its layers: a layer in `layers` gets the sizes given there for the
duration of the call; a layer in `dropped` returns zeros without computing them, so that everything that fed it is dead
code. A normalisation layer reads its size from its input and needs nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from kdsearch_jax.adapters.base import LayerSizes, replace_integer


@dataclass(frozen=True)
class Hidden:
    """Hides a module from Linen, which would otherwise register it as a submodule and reserve a name for it."""

    module: nn.Module


class StudentModule(nn.Module):
    """A Linen module that runs `base` at the sizes in `layers`, without the layers in `dropped`.

    Its variables have the same paths as those of `base`; dropped layers have none. Arguments, outputs and the training
    switch are those of `base`.
    """

    wraps: ClassVar[str] = "base"  # the attribute whose call signature this module has

    hidden: Hidden
    layers: LayerSizes
    dropped: tuple[str, ...] = ()

    @staticmethod
    def of(base: nn.Module, layers: LayerSizes, dropped: Sequence[str]) -> StudentModule:
        """The student of `base`, or of the module that `base` was pruned from if it is a student itself."""
        base = base.base if isinstance(base, StudentModule) else base
        return StudentModule(Hidden(base), layers=freeze(layers), dropped=tuple(dropped))

    @property
    def base(self) -> nn.Module:
        """The unmodified module."""
        return self.hidden.module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "hidden" not in vars(self):
                raise
            kind = type(self.base).__name__
            raise AttributeError(
                f"this student of a {kind} has no attribute {name!r}"
                + (f"; `base`, the {kind} that it was pruned from, has it" if hasattr(self.base, name) else "")
            ) from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `base` at the student's sizes."""
        # `base` shares the student's scope, so that variables keep the paths that they have in `base`.
        base = self.base.clone(parent=self.scope, _deep_clone=True)
        resizer = _Resizer(self.layers, self.dropped, self.path)
        with nn.intercept_methods(resizer.intercept):
            output = base(*args, **kwargs)
        for path in sorted({*self.layers, *self.dropped} - resizer.called):
            _check_called(path, resizer.called)
        return output


def _check_called(path: str, called: set[str]) -> None:
    """Raises ValueError if the network has no layer at `path`, or does not call it."""
    parents = [path.rsplit("/", n)[0] for n in range(1, path.count("/") + 1)] + [""]
    parent = next((parent for parent in parents if parent in called), "")
    # If none of the parent's other layers was called either, a cached function ran instead (`nn.jit`).
    if any(other.startswith(f"{parent}/" if parent else "") and other != parent for other in called):
        near = difflib.get_close_matches(path, called, 1)
        raise ValueError(
            f"architecture: the model has no layer {path!r}, or does not call it at these sizes"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


@dataclass(frozen=True)
class _Resizer:
    """The interceptor of a student's layers.

    Attributes:
      root: the student's own path.
      called: paths of the layers that were called.
      students: paths of submodules that run now and are students themselves; calls are passed through unchanged.
      detached: paths of dropped layers of which a detached copy is now traced for the shape of its output.
    """

    layers: LayerSizes
    dropped: Sequence[str]
    root: tuple[str, ...]
    called: set[str] = field(default_factory=set)
    students: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)

    def intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs one method of one layer at its size."""
        layer = context.module
        if self.detached:
            inside = "/".join([self.detached[-1], *(layer.path if layer.scope is not None else ())])
            with contextlib.ExitStack() as undo:
                resize(layer, self.layers.get(inside, {}), context.method_name, undo)
                return call(*args, **kwargs)
        path = _path(layer, self.root) or ""
        self.called.add(path)
        if self.students:
            return call(*args, **kwargs)
        if isinstance(layer, StudentModule):
            with _pushed(path, self.students), contextlib.ExitStack() as undo:
                for name, value in self._merged_sizes(layer, path).items():
                    _set(layer, name, value, undo)
                return call(*args, **kwargs)
        if path in self.dropped and context.method_name == "setup":
            return None  # `setup` would create its parameters
        with contextlib.ExitStack() as undo:
            for module in (layer, *_submodules(layer)):  # `nn.RNN` reads its cell's size before it calls the cell
                own_path = _path(module, self.root)
                sizes = {} if own_path is None else self.layers.get(own_path, {})
                resize(module, sizes, context.method_name, undo)
            if path not in self.dropped or context.method_name != "__call__":
                return call(*args, **kwargs)
            undo.enter_context(_pushed(path, self.detached))
            return _zeros(layer, args, kwargs)

    def _merged_sizes(self, student: StudentModule, path: str) -> dict[str, Any]:
        """The fields of a submodule that is a student itself, overridden by this student's sizes."""
        start = f"{path}/" if path else ""
        below = {name[len(start) :]: sizes for name, sizes in self.layers.items() if f"{name}/".startswith(start)}
        merged = {name: {**student.layers.get(name, {}), **below.get(name, {})} for name in {**student.layers, **below}}
        gone = {name[len(start) :] for name in self.dropped if name.startswith(start)}
        return {"layers": freeze(merged), "dropped": tuple(sorted({*student.dropped, *gone}))}


@contextlib.contextmanager
def _pushed(path: str, stack: list[str]) -> Iterator[None]:
    stack.append(path)
    try:
        yield
    finally:
        stack.pop()


def resize(layer: nn.Module, sizes: Mapping[str, Any], method: str, undo: contextlib.ExitStack) -> None:
    """Gives a layer its sizes until `undo` is closed.

    Args:
      sizes: values of attributes ("features"), of integers inside them ("config.heads"), and shapes of the layer's own
        arrays ("params/w").
      method: the layer's method that is called.
    """
    arrays: dict[str, tuple[int, ...]] = {}
    for name, value in sizes.items():
        if "/" in name:
            arrays[name] = tuple(value)
            continue
        attribute, _, inside = name.partition(".")
        if method == "setup" and attribute not in type(layer).__dataclass_fields__:
            continue  # `setup` creates it
        _set(layer, attribute, _changed(layer, name, _attribute(layer, attribute), inside, value), undo)
    if arrays and layer.scope is not None:
        scope = layer.scope
        for name, function in (("param", _sized_param), ("variable", _sized_variable)):
            before = getattr(scope, name)
            undo.callback(setattr, scope, name, before)
            setattr(scope, name, functools.partial(function, scope, before, arrays))


def _set(layer: nn.Module, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    # Linen modules are frozen; this change is undone when the call ends.
    undo.callback(object.__setattr__, layer, name, getattr(layer, name))
    object.__setattr__(layer, name, value)


def _sized_param(scope: Any, param: Any, arrays: Any, name: str, init: Any, *args: Any, **kwargs: Any) -> Any:
    """`scope.param` with the shape that the student gives, instead of the one that the module's code asks for."""
    shape = arrays.get(f"params/{name}")
    if shape is None:
        return param(name, init, *args, **kwargs)
    if scope.has_variable("params", name):  # Flax compares its shape with that of the initializer's result
        return param(name, lambda *_, **__: scope.get_variable("params", name), *args, **kwargs)
    return param(name, lambda *args, **kwargs: _first_entries(init(*args, **kwargs), shape), *args, **kwargs)


def _sized_variable(_: Any, variable: Any, arrays: Any, col: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """`scope.variable` likewise; Flax does not compare the shapes of variables."""
    shape, (init, *rest) = arrays.get(f"{col}/{name}"), args or (None,)
    if shape is None or init is None:
        return variable(col, name, *args, **kwargs)
    return variable(col, name, lambda *args, **kwargs: _first_entries(init(*args, **kwargs), shape), *rest, **kwargs)


def _first_entries(value: Any, shape: tuple[int, ...]) -> Any:
    """The first entries of an array, boxed or not, repeated from the start if it has too few.

    In a stack of layers (`nn.scan`), the last axes of `shape` are those of one layer.
    """

    def resize_leaf(leaf: Any) -> Any:
        sizes = shape[len(shape) - leaf.ndim :]
        leaf = leaf[tuple(map(slice, sizes))]
        missing = [(0, n - m) for n, m in zip(sizes, leaf.shape, strict=True)]
        return jnp.pad(leaf, missing, mode="wrap") if any(n for _, n in missing) else leaf

    return jax.tree.map(resize_leaf, value)


def _path(layer: nn.Module, root: tuple[str, ...]) -> str | None:
    """A layer's path below the student; None if it is not bound to a scope yet."""
    if layer.scope is None:
        return None
    path = layer.path
    return "/".join(path[len(root) :]) if path[: len(root)] == root else ""


def _submodules(layer: nn.Module) -> list[nn.Module]:
    """Modules in the fields of one of Flax's own layers."""
    if not type(layer).__module__.startswith("flax.linen"):
        return []
    values = [getattr(layer, name) for name in type(layer).__dataclass_fields__ if name != "parent"]
    return [value for value in values if isinstance(value, nn.Module)]


def _attribute(layer: nn.Module, name: str) -> Any:
    if name in ("parent", "name", "scope") or name.startswith("_") or not hasattr(layer, name):
        path = "/".join(layer.path)
        raise ValueError(f"architecture: layer {path!r} is a {type(layer).__name__}, which has no size {name!r}")
    return getattr(layer, name)


def _changed(layer: nn.Module, name: str, old: Any, inside: str, value: Any) -> Any:
    if not inside:
        return _like(value, old)
    try:
        return replace_integer(old, inside, value)
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        path = "/".join(layer.path)
        raise ValueError(
            f"architecture: layer {path!r} is a {type(layer).__name__}, which has no size {name!r}"
        ) from error


def _like(value: Any, old: Any) -> Any:
    """The size as an int or a tuple, like the attribute's own value."""
    if isinstance(old, int) and isinstance(value, (tuple, list)) and len(value) == 1:
        return value[0]
    return tuple(value) if isinstance(value, list) else value


def _zeros(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Zeros of the shapes and dtypes that `layer` would return; its parameters are neither created nor read."""
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    detached = layer.clone(parent=None)
    output, variables = jax.eval_shape(lambda: detached.init_with_output(rngs, *args, **kwargs))
    # Its parameters would have been cast like all others. Float32 zeros would widen what they are added to.
    dtypes = _float_dtypes(layer.scope.root.variables().get("params", {})) if layer.scope is not None else set()
    if len(dtypes) == 1 and _float_dtypes(variables.get("params", {})) - dtypes:
        (dtype,) = dtypes
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if _is_float(x) else x, variables["params"])
        variables = {**variables, "params": cast}
        output = jax.eval_shape(lambda v: detached.apply(v, *args, rngs=rngs, mutable=True, **kwargs)[0], variables)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _float_dtypes(tree: Any) -> set[Any]:
    return {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(tree) if _is_float(leaf)}
