"""Replaces XLA's convolutions in unmodified models by faster ones on CPUs.

`conv_general_dilated` has the signature of `jax.lax.conv_general_dilated` and computes the same sums, up to the order
of their terms. Grouped convolutions, which XLA:CPU compiles to plain loops, are computed by `grouped`; all others,
whose gradients are slow on XLA:CPU, by `dense`, or by `widths` in programs that will be exported. `fast_convolutions`
installs it in the `Conv` layers of Linen and NNX models for the duration of a call.

The implementation is chosen by the platform that a program is lowered for, not the one it is traced on; other platforms
get XLA's own convolutions. A replaced convolution is not a `conv_general_dilated` in the jaxpr, so a model's structure
must be traced without it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from kdsearch_jax.adapters import functional_module
from kdsearch_jax.adapters.convolution import dense, grouped, widths
from kdsearch_jax.adapters.convolution.grouped import NARROW, Window

_MOST_TAPS = 128  # larger kernels of grouped convolutions are left to XLA, since every tap compiles to an operation
_SIGNATURE = inspect.signature(lax.conv_general_dilated)


def conv_general_dilated(
    lhs: Array, rhs: Array, *args: Any, portable: bool = False, rounded: bool = False, **kwargs: Any
) -> Array:
    """`jax.lax.conv_general_dilated` with the same arguments, equal up to rounding.

    Args:
      portable: uses XLA's own operations only, so that the program can be exported.
      rounded: rounds the factors of convolutions that `dense` computes to bfloat16, sums and results are not rounded.
    """

    def native(lhs: Array, rhs: Array) -> Array:
        return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    bound = _SIGNATURE.bind(lhs, rhs, *args, **kwargs)
    bound.apply_defaults()
    options = bound.arguments
    input_dilated = any(step != 1 for step in options["lhs_dilation"] or ())
    if options["batch_group_count"] != 1 or input_dilated or options.get("out_sharding") is not None:
        return native(lhs, rhs)
    out = jax.eval_shape(native, lhs, rhs)  # raises JAX's own errors for wrong arguments
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, options["dimension_numbers"])
    lhs_axes, out_axes = ((spec[0], *spec[2:], spec[1]) for spec in (numbers.lhs_spec, numbers.out_spec))
    rhs_axes = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    sizes = [*(lhs.shape[i] for i in lhs_axes[1:]), *rhs.shape, *(out.shape[i] for i in out_axes[1:])]
    if not (_all_known(sizes, lhs.shape[lhs_axes[0]]) and _all_real(lhs, rhs, out)) or _varies(lhs) or _varies(rhs):
        return native(lhs, rhs)
    window = _window([lhs.shape[i] for i in lhs_axes[1:-1]], [rhs.shape[i] for i in rhs_axes[:-2]], options, out.dtype)
    channels_last = all(axes == tuple(range(lhs.ndim)) for axes in (lhs_axes, rhs_axes, out_axes))
    if window.groups > 1:
        fast = grouped.convolve if math.prod(rhs.shape[i] for i in rhs_axes[:-2]) <= _MOST_TAPS else None
    elif portable:
        fast = widths.convolve if channels_last and widths.supported(lhs.shape, rhs.shape, window) else None
    elif channels_last and dense.supported(lhs.shape, (lhs.dtype, rhs.dtype, out.dtype)):
        return dense.convolve(lhs, rhs, window, rounded=rounded and out.dtype == jnp.float32)
    else:
        fast = None
    if fast is None:
        return native(lhs, rhs)

    def on_cpu(x: Array, w: Array) -> Array:
        y = fast(x.transpose(lhs_axes), w.transpose(rhs_axes), window)
        return y.transpose([out_axes.index(axis) for axis in range(y.ndim)])

    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=native)


def _window(space: Sequence[int], taps: Sequence[int], options: Mapping[str, Any], dtype: Any) -> Window:
    """The window of a convolution over an image with these spatial sizes and a kernel with these taps."""
    dilation = tuple(options["rhs_dilation"] or (1,) * len(taps))
    padding = options["padding"]
    if isinstance(padding, str):
        spans = [step * (size - 1) + 1 for step, size in zip(dilation, taps, strict=True)]
        padding = lax.padtype_to_pads(space, spans, options["window_strides"], padding)
    pads = tuple((int(before), int(after)) for before, after in padding)
    strides, groups = tuple(options["window_strides"]), options["feature_group_count"]
    return Window(strides, pads, dilation, groups, options["precision"], dtype)


def _all_known(sizes: Sequence[Any], images: Any) -> bool:
    """Whether no size is 0 or symbolic (`jax.export`); the number of images may be symbolic."""
    sizes = [*sizes, images] if isinstance(images, int) else sizes
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _all_real(*arrays: Any) -> bool:
    """Whether all arrays are bfloat16, float16, float32 or float64."""
    return all(jnp.dtype(array.dtype) in map(jnp.dtype, (*NARROW, jnp.float32, jnp.float64)) for array in arrays)


def _varies(array: Array) -> bool:
    """Whether `jax.shard_map` tracks the mesh axes that the array varies over; custom gradients would have to, too."""
    kind = jax.typeof(array)
    return bool(getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", None))


# --- in unmodified models ---------------------------------------------------------------------------------------------


@contextmanager
def fast_convolutions(*models: Any, portable: bool = False, rounded: bool = False) -> Iterator[None]:
    """Within this context, `Conv` layers compute their convolutions with `conv_general_dilated` of this module.

    This applies to all Linen modules and `FunctionalModule`s that are called inside, and to the NNX modules in
    `models`, which are modified until the context ends. A layer with a convolution function of its own keeps it. Other
    threads are not affected.

    Args:
      models: NNX modules; pass copies (`nnx.merge`) of modules that other threads use.
      portable: whether the programs traced inside will be exported.
      rounded: whether dense convolutions of float32 arrays multiply bfloat16 numbers.
    """
    options = {"portable": portable, "rounded": rounded}
    function = partial(conv_general_dilated, **options) if any(options.values()) else conv_general_dilated
    changed = [layer for model in models for layer in _nnx_layers(model)]
    token = functional_module.module_hook.set(partial(_set_convolution, function))
    try:
        for layer in changed:
            layer.conv_general_dilated = function
        with nn.intercept_methods(partial(_intercept, function)):
            yield
    finally:
        functional_module.module_hook.reset(token)
        for layer in changed:
            layer.conv_general_dilated = lax.conv_general_dilated


def _intercept(function: Any, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    if not (isinstance(layer, nn.Conv) and context.method_name == "__call__"):
        return call(*args, **kwargs)
    if layer.conv_general_dilated is not None or layer.conv_general_dilated_cls is not None:
        return call(*args, **kwargs)
    try:
        # Linen modules are frozen; this change is undone below.
        object.__setattr__(layer, "conv_general_dilated", function)
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, "conv_general_dilated", None)


def _set_convolution(function: Any, model: nnx.Module) -> None:
    for layer in _nnx_layers(model):
        layer.conv_general_dilated = function


def _nnx_layers(model: Any) -> list[Any]:
    """The convolution layers of an NNX module that use JAX's own function."""
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Conv)]
    return [layer for layer in layers if layer.conv_general_dilated is lax.conv_general_dilated]
