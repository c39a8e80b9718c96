"""Grouped and depthwise convolutions that are fast on CPUs; elsewhere, and for all else, XLA's own.

XLA compiles a convolution with feature groups into plain loops on CPUs, and its gradient into worse ones.
`conv_general_dilated` has the signature of `jax.lax.conv_general_dilated` and computes the same sums, up to the order
of their terms:

    depthwise   y[n, p, c] = Σ_k x[n, p·stride + k·dilation, c] w[k, c]: whole arrays shifted, multiplied, added
    few groups  one ordinary convolution a group
    grouped     few images at a time: the windows side by side times the kernels, as one batched product of matrices

Gradients are written out, since those that JAX derives are slow: that of the input is a convolution of the same kind
with the kernel turned round, that of the kernel is summed over few images at a time, while they are in the cache.

What runs is chosen by the platform that a program is lowered for, not by the one it is traced on; a program exported
for several platforms holds both. `fast_convolutions` brings it into a model that knows nothing of it. Inside, a grouped
convolution is no longer one operation of the jaxpr: whoever reads the structure of a model must do so outside. Its
derivatives are those of reverse mode (`jax.grad`, of any order), not of `jax.jvp`. The loop over images does not spread
over several CPU devices: XLA gathers the batch for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

_MOST_TAPS = 128  # a kernel with more places is left to XLA: every place is an operation to compile
_FEW_GROUPS = 4  # up to so many, one convolution a group is the fastest
_POSITIONS = 256  # so many windows are multiplied at once: enough for a product of matrices, few enough for the cache
_NARROW = (jnp.bfloat16, jnp.float16)  # added up in float32


@dataclass(frozen=True)
class _Window:
    """How a kernel moves, by axis of space; groups of features; how to multiply, and the dtype of the result."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    precision: Any
    dtype: Any


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> Array:
    """`jax.lax.conv_general_dilated`, where the arguments are explained; equal to it up to rounding."""
    native = partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **({} if out_sharding is None else {"out_sharding": out_sharding}),
    )
    input_dilated = lhs_dilation is not None and any(step != 1 for step in lhs_dilation)
    if feature_group_count == 1 or batch_group_count != 1 or input_dilated or out_sharding is not None:
        return native(lhs, rhs)
    expected = jax.eval_shape(native, lhs, rhs)  # raises what JAX raises for wrong arguments
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    lhs_axes, out_axes = ((spec[0], *spec[2:], spec[1]) for spec in (numbers.lhs_spec, numbers.out_spec))
    rhs_axes = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    space = [lhs.shape[axis] for axis in lhs_axes[1:-1]]
    taps = [rhs.shape[axis] for axis in rhs_axes[:-2]]
    sizes = [*space, lhs.shape[lhs_axes[-1]], *rhs.shape, *(expected.shape[axis] for axis in out_axes[1:])]
    sizes += [size for size in lhs.shape if isinstance(size, int)]
    plain = _all_known(sizes) and _all_real(lhs, rhs, expected) and not (_varies(lhs) or _varies(rhs))
    if not plain or math.prod(taps) > _MOST_TAPS:
        return native(lhs, rhs)
    dilation = tuple(rhs_dilation or (1,) * len(taps))
    if isinstance(padding, str):
        spans = [step * (size - 1) + 1 for step, size in zip(dilation, taps, strict=True)]
        padding = lax.padtype_to_pads(space, spans, window_strides, padding)
    pads = tuple((int(before), int(after)) for before, after in padding)
    window = _Window(tuple(window_strides), pads, dilation, feature_group_count, precision, expected.dtype)

    def fast(x: Array, w: Array) -> Array:
        y = _channels_last(x.transpose(lhs_axes), w.transpose(rhs_axes), window)
        return y.transpose([out_axes.index(axis) for axis in range(y.ndim)])

    return lax.platform_dependent(lhs, rhs, cpu=fast, default=native)


def _all_known(sizes: Sequence[Any]) -> bool:
    """Whether no size is 0 or a symbol of `jax.export`; the number of images may be either a number or a symbol."""
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _all_real(*arrays: Any) -> bool:
    """Whether these hold floating-point numbers in one of the usual formats."""
    return all(jnp.dtype(array.dtype) in map(jnp.dtype, (*_NARROW, jnp.float32, jnp.float64)) for array in arrays)


def _varies(array: Array) -> bool:
    """Whether `jax.shard_map` checks which axes of the mesh this varies over; a gradient of one's own would have to."""
    kind = jax.typeof(array)
    return bool(getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", None))


def _wide(dtype: Any) -> Any:
    """The dtype to add up in."""
    return jnp.float32 if jnp.dtype(dtype) in map(jnp.dtype, _NARROW) else dtype


def _channels_last(x: Array, w: Array, window: _Window) -> Array:
    """x (batch, space…, inputs), w (taps…, inputs / groups, outputs) → (batch, space…, outputs)."""
    if x.shape[-1] == window.groups:
        times = w.shape[-1] // window.groups
        if times > 1:
            x = jnp.broadcast_to(x[..., None], (*x.shape, times)).reshape(*x.shape[:-1], -1)
        return _convolve(x, w, replace(window, groups=w.shape[-1]))
    if window.groups > _FEW_GROUPS:
        return _convolve(x, w, window)
    axes = (0, x.ndim - 1, *range(1, x.ndim - 1))
    numbers = lax.ConvDimensionNumbers(axes, (w.ndim - 1, w.ndim - 2, *range(w.ndim - 2)), axes)
    one = partial(
        lax.conv_general_dilated,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=numbers,
        precision=window.precision,
        preferred_element_type=window.dtype,
    )
    parts = (jnp.split(z, window.groups, -1) for z in (x, w))
    return jnp.concatenate([one(a, b) for a, b in zip(*parts, strict=True)], -1)


# --- with gradients of its own ----------------------------------------------------------------------------------------


def _values(x: Array, w: Array, window: _Window) -> Array:
    """As `_channels_last`, for many groups, or one output for each input."""
    padded = _pad(x, window.padding)
    return (_shift if w.shape[-1] == window.groups == x.shape[-1] else _match)(padded, w, window)


def _keep(x: Array, w: Array, window: _Window) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, w, window), (x, w)


def _gradients(window: _Window, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, w = operands
    return _input_gradient(cotangent, x, w, window), _kernel_gradient(cotangent, x, w, window)


def _differentiable() -> Callable[[Array, Array, _Window], Array]:
    function = jax.custom_vjp(_values, nondiff_argnums=(2,))
    function.defvjp(_keep, _gradients)
    return function


_convolve = _differentiable()


def _input_gradient(cotangent: Array, x: Array, w: Array, window: _Window) -> Array:
    """The cotangent, spread out by the strides, convolved with the kernel turned round, inputs and outputs swapped."""
    space, taps, groups = x.shape[1:-1], w.shape[:-2], window.groups
    pads = []
    axes = zip(space, cotangent.shape[1:-1], taps, window.padding, window.strides, window.dilation, strict=True)
    for size, out, tap, (before, _), stride, dilation in axes:
        first = dilation * (tap - 1) - before
        pads.append((first, size + dilation * (tap - 1) - (stride * (out - 1) + 1) - first))
    turned = jnp.flip(w, range(len(taps))).reshape(*taps, w.shape[-2], groups, -1)
    turned = jnp.swapaxes(turned, -1, -3).reshape(*taps, -1, x.shape[-1])
    spread = _pad(cotangent, ((0, 0),) * len(taps), window.strides)
    once = replace(window, strides=(1,) * len(taps), padding=tuple(pads), dtype=x.dtype)
    return _convolve(spread, turned, once)


def _kernel_gradient(cotangent: Array, x: Array, w: Array, window: _Window) -> Array:
    """The sum over images of the windows of the input times the cotangent."""
    depthwise = w.shape[-1] == window.groups == x.shape[-1]

    def some(images: Array, given: Array) -> Array:
        return (_shifted_sums if depthwise else _matched_sums)(images, given, w.shape[:-2], window)

    chunks = tuple(_chunks(z, cotangent.shape) for z in (_pad(x, window.padding), cotangent))
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(some, *(chunk[0] for chunk in chunks)))
    total, _ = lax.scan(lambda total, chunk: (total + some(*chunk), None), start, chunks)
    if not depthwise:  # (groups, taps · inputs of a group, outputs of a group)
        total = jnp.swapaxes(total, 0, 1)
    return total.reshape(w.shape).astype(w.dtype)


def _pad(x: Array, padding: Sequence[tuple[int, int]], strides: Sequence[int] | None = None) -> Array:
    """Zeros around, and stride − 1 between, along the axes of space."""
    between = [stride - 1 for stride in strides or (1,) * len(padding)]
    config = [(0, 0, 0), *((*pad, step) for pad, step in zip(padding, between, strict=True)), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _chunks(x: Array, shape: Sequence[int]) -> Array:
    """(batch, …) → (chunks, batch of a chunk, …), for outputs of this shape (batch, space…, channels)."""
    size = 1
    if isinstance(x.shape[0], int):
        most = max(1, _POSITIONS // math.prod(shape[1:-1]))
        size = next(size for size in range(min(most, x.shape[0]), 0, -1) if x.shape[0] % size == 0)
    return x.reshape(-1, size, *x.shape[1:]) if size > 1 else x[:, None]


def _slices(x: Array, taps: Sequence[int], outs: Sequence[int], window: _Window, axis: int = 1) -> Iterator[Array]:
    """What each place of the kernel sees of x, whose axes of space begin at `axis`."""
    for places in itertools.product(*map(range, taps)):
        begin, end, steps = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, (place, out) in enumerate(zip(places, outs, strict=True), start=axis):
            begin[i] = place * window.dilation[i - axis]
            end[i] = begin[i] + window.strides[i - axis] * (out - 1) + 1
            steps[i] = window.strides[i - axis]
        yield lax.slice(x, begin, end, steps)


def _outs(x: Array, taps: Sequence[int], window: _Window) -> list[int]:
    """The output's size along the axes of space, for x padded."""
    axes = zip(x.shape[1:-1], taps, window.strides, window.dilation, strict=True)
    return [(size - dilation * (tap - 1) - 1) // stride + 1 for size, tap, stride, dilation in axes]


# --- depthwise: shift, multiply, add ----------------------------------------------------------------------------------


def _shift(x: Array, w: Array, window: _Window) -> Array:
    """The convolution of x, padded, with one output for each input."""
    taps, wide = w.shape[:-2], _wide(x.dtype)
    seen = _slices(x, taps, _outs(x, taps, window), window)
    kernels = w.reshape(-1, *(1,) * (x.ndim - 1), w.shape[-1]).astype(wide)
    terms = [part.astype(wide) * kernel for part, kernel in zip(seen, kernels, strict=True)]
    return functools.reduce(jnp.add, terms).astype(window.dtype)


def _shifted_sums(x: Array, cotangent: Array, taps: Sequence[int], window: _Window) -> Array:
    """The kernel's gradient from a few images: (taps…, channels)."""
    wide, outs = _wide(x.dtype), cotangent.shape[1:-1]
    cotangent = cotangent.astype(wide)
    # XLA adds up along leading axes one number at a time; as a product with ones it takes many.
    ones = jnp.ones(math.prod(cotangent.shape[:-1]), wide)

    def row(place: Array) -> Array:
        height = window.strides[0] * (outs[0] - 1) + 1
        part = lax.dynamic_slice_in_dim(x, place * window.dilation[0], height, 1).astype(wide)
        seen = _slices(part, (1, *taps[1:]), outs, window)
        return jnp.stack([ones @ (one * cotangent).reshape(len(ones), -1) for one in seen])

    return lax.map(row, jnp.arange(taps[0]))  # a loop, since 49 of these would take seconds to compile


# --- grouped: windows side by side, times kernels ---------------------------------------------------------------------


def _match(x: Array, w: Array, window: _Window) -> Array:
    """The convolution of x, padded, in groups."""
    taps, groups = w.shape[:-2], window.groups
    outs = _outs(x, taps, window)
    kernels = w.reshape(-1, groups, w.shape[-1] // groups).astype(_wide(w.dtype))  # (taps · inputs, groups, outputs)

    def some(images: Array) -> Array:
        seen = _windows(images, taps, outs, window)
        y = lax.dot_general(seen, kernels, (((2,), (0,)), ((0,), (1,))), window.precision)
        return jnp.swapaxes(y, 0, 1).reshape(-1, *outs, w.shape[-1]).astype(window.dtype)

    y = lax.map(some, _chunks(x, (x.shape[0], *outs, 0)))
    return y.reshape(x.shape[0], *outs, w.shape[-1])


def _matched_sums(x: Array, cotangent: Array, taps: Sequence[int], window: _Window) -> Array:
    """The kernel's gradient from a few images: (groups, taps · inputs of a group, outputs of a group)."""
    seen = _windows(x, taps, cotangent.shape[1:-1], window)
    given = cotangent.reshape(seen.shape[1], window.groups, -1).astype(seen.dtype)
    return lax.dot_general(seen, given, (((1,), (0,)), ((0,), (1,))), window.precision)


def _windows(x: Array, taps: Sequence[int], outs: Sequence[int], window: _Window) -> Array:
    """(groups, images · space of the output, taps · inputs of a group)."""
    by_group = jnp.moveaxis(x.reshape(*x.shape[:-1], window.groups, -1), -2, 0)
    seen = jnp.concatenate(list(_slices(by_group, taps, outs, window, axis=2)), -1)
    return seen.reshape(window.groups, -1, seen.shape[-1]).astype(_wide(x.dtype))


# --- in models that know nothing of it --------------------------------------------------------------------------------


@contextmanager
def fast_convolutions(*models: Any) -> Iterator[None]:
    """Grouped `Conv` layers of Linen modules called inside, and of these NNX modules, are computed as above.

    A layer whose author gave a function for its convolution keeps it. Nothing is changed for other threads, and
    everything is as before at the end; an NNX module itself is changed meanwhile: give a copy (`nnx.merge`) where
    others use it.
    """
    changed = [layer for model in models for layer in _nnx_layers(model)]
    try:
        for layer in changed:
            layer.conv_general_dilated = conv_general_dilated
        with nn.intercept_methods(_intercept):
            yield
    finally:
        for layer in changed:
            layer.conv_general_dilated = lax.conv_general_dilated


def _intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    if not (isinstance(layer, nn.Conv) and context.method_name == "__call__" and layer.feature_group_count > 1):
        return call(*args, **kwargs)
    if layer.conv_general_dilated is not None or layer.conv_general_dilated_cls is not None:
        return call(*args, **kwargs)
    try:
        # Linen modules are frozen against changes by mistake; this one is on purpose and undone below.
        object.__setattr__(layer, "conv_general_dilated", conv_general_dilated)
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, "conv_general_dilated", None)


def _nnx_layers(model: Any) -> list[Any]:
    """The grouped convolutions of an NNX module that use JAX's own function."""
    from flax import nnx

    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Conv)]
    return [x for x in layers if x.feature_group_count > 1 and x.conv_general_dilated is lax.conv_general_dilated]
