"""The adapter for Flax Linen: how an unmodified module is traced, and which layers hold sizes as attributes.

What is Linen's own is here: how a module becomes a function, what a layer's `features` must be for a sliced kernel, and
how its calls are watched. See `kdsearch_jax.library.Library` for what each function promises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax.core import freeze

from kdsearch_jax.library import Layer, Layers, Shapes, Sizes
from kdsearch_jax.student import Student


def variables(module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Shapes of the module's variables."""
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    with nn.intercept_methods(_without_initializers):
        return jax.eval_shape(lambda *xs: module.init(rngs, *xs, **kwargs), *inputs)


def jaxpr(module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operations of `module.apply`."""
    with nn.intercept_methods(_without_initializers):
        return jax.make_jaxpr(_call(module, kwargs))(variables, *inputs)


def traced(module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same, to be lowered."""
    with nn.intercept_methods(_without_initializers):
        return jax.jit(_call(module, kwargs)).trace(variables, *inputs)


def layers(
    module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Layer], Any]:
    """Every layer that `module.apply` calls, and its operations."""
    met: dict[str, Layer] = {}

    def record(call: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            met["/".join(context.module.path)] = _layer(context.module)
        return call(*args, **call_kwargs)

    with nn.intercept_methods(record):
        return met, jaxpr(module, variables, inputs, kwargs)


def cut(module: nn.Module, layers: Layers, dropped: Sequence[str]) -> nn.Module:
    """The module run at these sizes, as a module."""
    base = module.base if isinstance(module, Student) else module
    return Student(base=base, layers=freeze(layers), dropped=tuple(dropped))


def already_cut(module: nn.Module) -> tuple[Layers, tuple[str, ...]]:
    """The sizes of a `Student`."""
    return (module.layers, tuple(module.dropped)) if isinstance(module, Student) else ({}, ())


def outputs(module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Each layer's first output that is one array."""
    seen: dict[str, Any] = {}

    def record(call: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        result = call(*args, **call_kwargs)
        if context.method_name == "__call__" and isinstance(result, jax.Array):
            seen.setdefault("/".join(context.module.path), result)
        return result

    with nn.intercept_methods(record):
        module.apply(variables, *inputs, **kwargs)
    return seen


def _call(module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    return lambda variables, *inputs: module.apply(variables, *inputs, **kwargs)


def _without_initializers(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Runs a layer with zeros for initializers: Linen traces them all at every `apply`, most of its time."""
    layer = context.module
    inits = {name: getattr(layer, name) for name in type(layer).__dataclass_fields__ if name.endswith("_init")}
    if not inits or not _is_flax(type(layer)):
        return call(*args, **kwargs)
    # Others than JAX's own may wrap what they return, to say how it is sharded.
    plain = [n for n, init in inits.items() if _is_jax(init) and not hasattr(init, "__wrapped__")]
    try:
        for name in plain:
            object.__setattr__(layer, name, nn.initializers.zeros)
        return call(*args, **kwargs)
    finally:
        for name in plain:
            object.__setattr__(layer, name, inits[name])


def _is_jax(value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", "").startswith("jax.")


def _is_flax(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("flax.linen")


_SIZES = {
    nn.Conv: ("features", "feature_group_count"),
    nn.ConvTranspose: ("features",),
    nn.ConvLocal: ("features",),
    nn.Dense: ("features",),
    nn.DenseGeneral: ("features",),
    nn.Embed: ("features",),
}


def _layer(module: nn.Module) -> Layer:
    names = next((names for kind, names in _SIZES.items() if isinstance(module, kind)), ())
    if not names:
        return Layer(_is_flax(type(module)))
    flipped = isinstance(module, nn.ConvTranspose) and module.transpose_kernel
    leaf = "params/embedding" if isinstance(module, nn.Embed) else "params/kernel"
    sizes = {name: getattr(module, name) for name in names}
    return Layer(_is_flax(type(module)), partial(_resized, leaf, sizes, -2 if flipped else -1))


def _resized(leaf: str, old: Sizes, axis: int, before: Shapes, after: Shapes) -> Sizes:
    """A layer's attributes for its sliced kernel, on whose `axis` its features are counted."""
    if leaf not in after:
        return {}
    features = old["features"]
    if isinstance(features, (tuple, list)):
        return {"features": after[leaf][len(after[leaf]) - len(features) :]}
    sizes: Sizes = {"features": after[leaf][axis]}
    groups = old.get("feature_group_count", 1)
    if groups > 1:  # whole groups go, so the outputs of each stay as many as they were
        sizes["feature_group_count"] = after[leaf][-1] * groups // before[leaf][-1]
    return sizes
