"""The adapter for Flax Linen: how an unmodified module is traced, and which layers hold sizes as attributes.

The functions implement `kdsearch_jax.adapters.base.Adapter`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import errors
from flax.linen import recurrent

from kdsearch_jax.adapters.base import (
    LayerInfo,
    LayerSizes,
    Shapes,
    Sizes,
    apply_function,
    call_arguments,
    integer_attributes,
)
from kdsearch_jax.adapters.boxes import unboxed
from kdsearch_jax.adapters.call_spec import class_of
from kdsearch_jax.adapters.linen_student import StudentModule, resize

Resize = Callable[[Shapes, Shapes], Sizes]


def abstract_variables(module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Shapes of the module's variables, without boxes."""
    return unboxed(boxed_variables(module, inputs, kwargs))


def boxed_variables(module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Shapes of the variables that `module.init` creates, in their boxes."""
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}

    def init(*inputs: Any) -> Any:
        args, keywords = call_arguments(inputs, kwargs)
        return module.init(rngs, *args, **keywords)

    with _explain_errors(module, inputs, kwargs), nn.intercept_methods(_skip_initializers):
        return jax.eval_shape(init, *inputs)


def jaxpr(module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operations of `module.apply`."""
    with _explain_errors(module, inputs, kwargs), nn.intercept_methods(_skip_initializers):
        return jax.make_jaxpr(apply_function(module, kwargs))(variables, *inputs)


def traced(module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The traced call, to be lowered."""
    with nn.intercept_methods(_skip_initializers):
        return jax.jit(apply_function(module, kwargs)).trace(variables, *inputs)


def trace_layers(
    module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, LayerInfo], Any]:
    """Every layer that `module.apply` calls, and the operations of the call."""
    called: dict[str, LayerInfo] = {}
    sizes: dict[str, Mapping[str, Any]] = {}  # of layers in nested students, which have them only during the call

    def record(call: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        layer, path = context.module, "/".join(context.module.path)
        if isinstance(layer, StudentModule):
            for below, student_sizes in layer.layers.items():
                name = "/".join(filter(None, [path, below]))
                sizes[name] = {**student_sizes, **sizes.get(name, {})}  # the outermost student has the last word
            return call(*args, **call_kwargs)
        result = call(*args, **call_kwargs)
        if context.method_name == "__call__":
            with contextlib.ExitStack() as undo:
                resize(layer, sizes.get(path, {}), "__call__", undo)
                called[path] = _layer(layer, result)
        return result

    with nn.intercept_methods(record):
        return called, jaxpr(module, variables, inputs, kwargs)


def resized(module: nn.Module, layers: LayerSizes, dropped: Sequence[str]) -> nn.Module:
    """A module that runs `module` at these sizes."""
    return StudentModule.of(module, layers, dropped)


def layer_outputs(
    module: nn.Module, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The output of each layer's first call, if it is one array."""
    seen: dict[str, Any] = {}

    def record(call: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        result = call(*args, **call_kwargs)
        if context.method_name == "__call__" and isinstance(result, jax.Array):
            seen.setdefault("/".join(context.module.path), result)
        return result

    with nn.intercept_methods(record):
        apply_function(module, kwargs)(variables, *inputs)
    return seen


@contextlib.contextmanager
def _explain_errors(module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Turns errors of a call that does not fit the module into a ValueError that says what to change."""
    args, keywords = call_arguments(inputs, kwargs)
    try:
        inspect.signature(class_of(module).__call__).bind(module, *args, **keywords)
    except TypeError as error:
        raise ValueError(
            f"the call does not fit {class_of(module).__name__} ({error}); pass all inputs by position, and "
            "keywords by name"
        ) from error
    active: list[str] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        active.append("/".join(context.module.path))
        result = call(*args, **kwargs)
        active.pop()
        return result

    try:
        with nn.intercept_methods(watch):
            yield
    except errors.InvalidRngError as error:
        raise ValueError(
            f"layer {_innermost(active, module)} is random while the network is traced ({_first_line(error)}); "
            "switch that off by a keyword of the call, as deterministic=True or train=False"
        ) from error
    except errors.ModifyScopeVariableError as error:
        raise ValueError(
            f"layer {_innermost(active, module)} writes to its variables ({_first_line(error)}); switch that "
            "off by a keyword of the call, as train=False, use_running_average=True or decode=False"
        ) from error


def _innermost(active: Sequence[str], module: nn.Module) -> str:
    return repr(active[-1]) if active and active[-1] else class_of(module).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _skip_initializers(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Runs a layer with zeros for initializers, whose tracing would take most of the time of `apply`."""
    layer = context.module
    inits = {name: getattr(layer, name) for name in type(layer).__dataclass_fields__ if name.endswith("_init")}
    if not inits or not _is_flax(type(layer)):
        return call(*args, **kwargs)
    # Only JAX's own: other initializers may wrap their result in a box.
    plain = [n for n, init in inits.items() if _is_jax(init) and not hasattr(init, "__wrapped__")]
    scope = layer.scope
    slow = scope.param
    try:
        for name in plain:
            object.__setattr__(layer, name, nn.initializers.zeros)
        scope.param = partial(_parameter, scope, slow)
        return call(*args, **kwargs)
    finally:
        scope.param = slow
        for name in plain:
            object.__setattr__(layer, name, inits[name])


def _parameter(scope: Any, slow: Any, name: str, init: Any, *args: Any, unbox: bool = True, **kwargs: Any) -> Any:
    """`scope.param`, which does not trace the initializer for its shape if it is `zeros`."""
    if init is not nn.initializers.zeros or kwargs or not args:
        return slow(name, init, *args, unbox=unbox, **kwargs)
    if not scope.has_variable("params", name):
        if not scope.is_mutable_collection("params"):
            return slow(name, init, *args, unbox=unbox)
        scope.reserve(name, "params")
        scope.put_variable("params", name, init(None, *args))
        return scope.get_variable("params", name)
    scope.reserve(name, "params")
    value = scope.get_variable("params", name)
    value = nn.unbox(value) if unbox else value
    if np.shape(value) != tuple(args[0]):
        raise errors.ScopeParamShapeError(name, scope.path_text, np.shape(value), tuple(args[0]))
    return value


def _is_jax(value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", "").startswith("jax.")


def _is_flax(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("flax.linen")


def _layer(module: nn.Module, result: Any) -> LayerInfo:
    if not _is_flax(type(module)) and not isinstance(module, tuple(kind for kinds, _ in _RESIZE for kind in kinds)):
        held = {name: value for name, value in vars(module).items() if name not in ("parent", "name", "scope")}
        return LayerInfo(isinstance(result, jax.Array), _own_arrays, integers=integer_attributes(held))
    resize = next((make(module) for kinds, make in _RESIZE if isinstance(module, kinds)), None)
    droppable = _is_flax(type(module))
    if resize is None:
        return LayerInfo(droppable)
    return LayerInfo(droppable, resize, hasattr(module, "feature_group_count"))


def _own_arrays(before: Shapes, after: Shapes) -> Sizes:
    """The shapes of a module's own arrays ("params/w"), which replace those that its code asks for."""
    return {leaf: after[leaf] for leaf in before if leaf.count("/") == 1 and after[leaf]}


def _kernel(module: Any) -> Resize:
    """`features`, from the last axis of the kernel or its last axes."""
    flipped = isinstance(module, nn.ConvTranspose) and module.transpose_kernel
    leaf = "params/embedding" if isinstance(module, nn.Embed) else "params/kernel"
    groups = getattr(module, "feature_group_count", 1)
    return partial(_resized, leaf, module.features, groups, -2 if flipped else -1)


def _resized(leaf: str, features: Any, groups: int, axis: int, before: Shapes, after: Shapes) -> Sizes:
    if leaf not in after:
        return {}
    if isinstance(features, (tuple, list)):
        return {"features": after[leaf][len(after[leaf]) - len(features) :]}
    sizes: Sizes = {"features": after[leaf][axis]}
    if groups > 1:  # whole groups are removed: the outputs per group do not change
        sizes["feature_group_count"] = after[leaf][-1] * groups // before[leaf][-1]
    return sizes


def _einsum(module: nn.Einsum) -> Resize:
    return lambda before, after: {"shape": after["params/kernel"]} if "params/kernel" in after else {}


def _group_norm(module: nn.GroupNorm) -> Resize:
    """The number of remaining groups; only whole groups are removed."""

    def resize(before: Shapes, after: Shapes) -> Sizes:
        leaf = next((leaf for leaf in ("params/scale", "params/bias") if leaf in after), None)
        if leaf is None or module_groups is None:
            return {}
        return {"num_groups": max(1, module_groups * after[leaf][0] // before[leaf][0])}

    module_groups = module.num_groups
    return resize


def _attention(module: Any) -> Resize:
    """`qkv_features`, which by default is the input's width: without this, heads would change with the width."""
    heads = module.num_heads
    if module.qkv_features is not None:
        return lambda before, after: {}
    leaf = "params/query/kernel"
    return lambda before, after: {"qkv_features": heads * after[leaf][-1]} if leaf in after else {}


def _cell(module: Any) -> Resize:
    """`features` of a recurrent cell, in proportion to a recurrent kernel, which may combine several gates."""
    features = module.features

    def resize(before: Shapes, after: Shapes) -> Sizes:
        leaf = next((leaf for leaf in after if leaf.endswith("/kernel")), None)
        return {} if leaf is None else {"features": features * after[leaf][-1] // before[leaf][-1]}

    return resize


_RESIZE: list[tuple[tuple[type, ...], Callable[[Any], Resize]]] = [
    ((nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Dense, nn.DenseGeneral, nn.Embed, recurrent.DenseParams), _kernel),
    ((nn.Einsum,), _einsum),
    ((nn.GroupNorm,), _group_norm),
    ((nn.RNNCellBase,), _cell),
    ((nn.MultiHeadDotProductAttention,), _attention),
]
