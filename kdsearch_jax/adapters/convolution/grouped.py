"""Grouped and depthwise convolutions for CPUs, channels last.

    depthwise   y[n, p, c] = Σ_k x[n, p·stride + k·dilation, c] w[k, c], as sums of shifted whole arrays
    few groups  one ordinary convolution per group
    grouped     a few images at a time: their windows (im2col) times the kernels, as one batched matrix product

Gradients are custom, since the derived ones are slow: that of the input is a convolution of the same kind with the
flipped kernel; that of the kernel is summed over a few images at a time, while they are in the cache. They support
reverse mode of any order (`jax.grad`), not `jax.jvp`. The loop over images is not partitioned over several CPU devices:
XLA gathers the batch for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

FEW_GROUPS = 4  # up to this many, one convolution per group is fastest
_POSITIONS = 256  # windows per matrix product: enough for efficiency, few enough for the cache
NARROW = (jnp.bfloat16, jnp.float16)  # accumulated in float32


@dataclass(frozen=True)
class Window:
    """The parameters of a convolution; the tuples have one entry per spatial axis, `dtype` is that of the result."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    precision: Any
    dtype: Any

    def convolve(self, x: Array, w: Array) -> Array:
        """XLA's own convolution with one group."""
        last = x.ndim - 1
        axes = (0, last, *range(1, last))
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            rhs_dilation=self.dilation,
            dimension_numbers=lax.ConvDimensionNumbers(axes, (last, last - 1, *range(last - 1)), axes),
            precision=self.precision,
            preferred_element_type=self.dtype,
        )


def _wide(dtype: Any) -> Any:
    """The dtype of accumulators."""
    return jnp.float32 if jnp.dtype(dtype) in map(jnp.dtype, NARROW) else dtype


def convolve(x: Array, w: Array, window: Window) -> Array:
    """x (batch, space…, inputs), w (taps…, inputs / groups, outputs) → (batch, space…, outputs)."""
    if x.shape[-1] == window.groups:
        times = w.shape[-1] // window.groups
        if times > 1:
            x = jnp.broadcast_to(x[..., None], (*x.shape, times)).reshape(*x.shape[:-1], -1)
        return _convolve(x, w, replace(window, groups=w.shape[-1]))
    if window.groups > FEW_GROUPS:
        return _convolve(x, w, window)
    parts = (jnp.split(z, window.groups, -1) for z in (x, w))
    return jnp.concatenate([window.convolve(a, b) for a, b in zip(*parts, strict=True)], -1)


# --- with custom gradients --------------------------------------------------------------------------------------------


def _values(x: Array, w: Array, window: Window) -> Array:
    """As `convolve`, for more than `FEW_GROUPS` groups or one output per input."""
    padded = pad(x, window.padding)
    return (_shift if w.shape[-1] == window.groups == x.shape[-1] else _match)(padded, w, window)


def _keep(x: Array, w: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, w, window), (x, w)


def _gradients(window: Window, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, w = operands
    return _input_gradient(cotangent, x, w, window), _kernel_gradient(cotangent, x, w, window)


def _differentiable() -> Callable[[Array, Array, Window], Array]:
    function = jax.custom_vjp(_values, nondiff_argnums=(2,))
    function.defvjp(_keep, _gradients)
    return function


_convolve = _differentiable()


def _input_gradient(cotangent: Array, x: Array, w: Array, window: Window) -> Array:
    """The cotangent, dilated by the strides, convolved with the flipped kernel with inputs and outputs swapped."""
    space, taps, groups = x.shape[1:-1], w.shape[:-2], window.groups
    pads = []
    axes = zip(space, cotangent.shape[1:-1], taps, window.padding, window.strides, window.dilation, strict=True)
    for size, out, tap, (before, _), stride, dilation in axes:
        first = dilation * (tap - 1) - before
        pads.append((first, size + dilation * (tap - 1) - (stride * (out - 1) + 1) - first))
    flipped = jnp.flip(w, range(len(taps))).reshape(*taps, w.shape[-2], groups, -1)
    flipped = jnp.swapaxes(flipped, -1, -3).reshape(*taps, -1, x.shape[-1])
    dilated = pad(cotangent, ((0, 0),) * len(taps), window.strides)
    unit_stride = replace(window, strides=(1,) * len(taps), padding=tuple(pads), dtype=x.dtype)
    return _convolve(dilated, flipped, unit_stride)


def _kernel_gradient(cotangent: Array, x: Array, w: Array, window: Window) -> Array:
    """The sum over images of the input's windows times the cotangent."""
    depthwise = w.shape[-1] == window.groups == x.shape[-1]

    def chunk_gradient(images: Array, cotangent: Array) -> Array:
        return (_shifted_sums if depthwise else _matched_sums)(images, cotangent, w.shape[:-2], window)

    total = summed(chunk_gradient, pad(x, window.padding), cotangent, chunk_size(cotangent.shape, _POSITIONS))
    if not depthwise:  # (groups, taps · inputs of a group, outputs of a group)
        total = jnp.swapaxes(total, 0, 1)
    return total.reshape(w.shape).astype(w.dtype)


def pad(x: Array, padding: Sequence[tuple[int, int]], strides: Sequence[int] | None = None) -> Array:
    """Pads the spatial axes with zeros, and puts stride − 1 zeros between their entries."""
    between = [stride - 1 for stride in strides or (1,) * len(padding)]
    config = [(0, 0, 0), *((*pad, step) for pad, step in zip(padding, between, strict=True)), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def chunk_size(shape: Sequence[Any], positions: int) -> int:
    """Images per chunk of outputs (batch, space…, channels): a divisor of the batch, with at most `positions` positions
    unless one image has more.
    """
    if not isinstance(shape[0], int):
        return 1
    most = max(1, positions // math.prod(shape[1:-1]))
    return next(size for size in range(min(most, shape[0]), 0, -1) if shape[0] % size == 0)


def _chunks(x: Array, size: int) -> Array:
    """(batch, …) → (chunks, size, …)."""
    return x.reshape(-1, size, *x.shape[1:]) if size > 1 else x[:, None]


def summed(function: Callable[[Array, Array], Array], x: Array, y: Array, size: int) -> Array:
    """The sum of `function(chunk of x, chunk of y)` over chunks of `size` images."""
    chunks = _chunks(x, size), _chunks(y, size)
    start = jnp.zeros_like(jax.eval_shape(function, *(chunk[0] for chunk in chunks)))
    return lax.scan(lambda total, chunk: (total + function(*chunk), None), start, chunks)[0]


def slices(x: Array, taps: Sequence[int], outs: Sequence[int], window: Window, axis: int = 1) -> Iterator[Array]:
    """For each kernel tap, the entries of x that it multiplies; spatial axes begin at `axis`."""
    for places in itertools.product(*map(range, taps)):
        begin, end, steps = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, (place, out) in enumerate(zip(places, outs, strict=True), start=axis):
            begin[i] = place * window.dilation[i - axis]
            end[i] = begin[i] + window.strides[i - axis] * (out - 1) + 1
            steps[i] = window.strides[i - axis]
        yield lax.slice(x, begin, end, steps)


def _outs(x: Array, taps: Sequence[int], window: Window) -> list[int]:
    """The output's spatial sizes for padded x."""
    axes = zip(x.shape[1:-1], taps, window.strides, window.dilation, strict=True)
    return [(size - dilation * (tap - 1) - 1) // stride + 1 for size, tap, stride, dilation in axes]


# --- depthwise: shift, multiply, add ----------------------------------------------------------------------------------


def _shift(x: Array, w: Array, window: Window) -> Array:
    """The convolution of padded x with one output per input."""
    taps, wide = w.shape[:-2], _wide(x.dtype)
    seen = slices(x, taps, _outs(x, taps, window), window)
    kernels = w.reshape(-1, *(1,) * (x.ndim - 1), w.shape[-1]).astype(wide)
    terms = [part.astype(wide) * kernel for part, kernel in zip(seen, kernels, strict=True)]
    return functools.reduce(jnp.add, terms).astype(window.dtype)


def _shifted_sums(x: Array, cotangent: Array, taps: Sequence[int], window: Window) -> Array:
    """The kernel's gradient from one chunk of images: (taps…, channels)."""
    wide, outs = _wide(x.dtype), cotangent.shape[1:-1]
    cotangent = cotangent.astype(wide)
    # XLA reduces leading axes one number at a time; a product with ones is vectorized.
    ones = jnp.ones(math.prod(cotangent.shape[:-1]), wide)

    def row(place: Array) -> Array:
        height = window.strides[0] * (outs[0] - 1) + 1
        part = lax.dynamic_slice_in_dim(x, place * window.dilation[0], height, 1).astype(wide)
        seen = slices(part, (1, *taps[1:]), outs, window)
        return jnp.stack([ones @ (one * cotangent).reshape(len(ones), -1) for one in seen])

    return lax.map(row, jnp.arange(taps[0]))  # a loop, since 49 taps would take seconds to compile


# --- grouped: windows times kernels -----------------------------------------------------------------------------------


def _match(x: Array, w: Array, window: Window) -> Array:
    """The grouped convolution of padded x."""
    taps, groups = w.shape[:-2], window.groups
    outs = _outs(x, taps, window)
    kernels = w.reshape(-1, groups, w.shape[-1] // groups).astype(_wide(w.dtype))  # (taps · inputs, groups, outputs)

    def convolve_chunk(images: Array) -> Array:
        windows = _windows(images, taps, outs, window)
        y = lax.dot_general(windows, kernels, (((2,), (0,)), ((0,), (1,))), window.precision)
        return jnp.swapaxes(y, 0, 1).reshape(-1, *outs, w.shape[-1]).astype(window.dtype)

    y = lax.map(convolve_chunk, _chunks(x, chunk_size((x.shape[0], *outs, 0), _POSITIONS)))
    return y.reshape(x.shape[0], *outs, w.shape[-1])


def _matched_sums(x: Array, cotangent: Array, taps: Sequence[int], window: Window) -> Array:
    """The kernel's gradient from one chunk of images: (groups, taps · inputs of a group, outputs of a group)."""
    windows = _windows(x, taps, cotangent.shape[1:-1], window)
    cotangent = cotangent.reshape(windows.shape[1], window.groups, -1).astype(windows.dtype)
    return lax.dot_general(windows, cotangent, (((1,), (0,)), ((0,), (1,))), window.precision)


def _windows(x: Array, taps: Sequence[int], outs: Sequence[int], window: Window) -> Array:
    """The windows of x: (groups, images · output positions, taps · inputs of a group)."""
    by_group = jnp.moveaxis(x.reshape(*x.shape[:-1], window.groups, -1), -2, 0)
    seen = jnp.concatenate(list(slices(by_group, taps, outs, window, axis=2)), -1)
    return seen.reshape(window.groups, -1, seen.shape[-1]).astype(_wide(x.dtype))
