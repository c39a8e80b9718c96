"""Grouped and depthwise convolutions that are fast on CPUs, channels last.

    depthwise   y[n, p, c] = Σ_k x[n, p·stride + k·dilation, c] w[k, c]: whole arrays shifted, multiplied, added
    few groups  one ordinary convolution a group
    grouped     few images at a time: the windows side by side times the kernels, as one batched product of matrices

Gradients are written out, since those that JAX derives are slow: that of the input is a convolution of the same kind
with the kernel turned round, that of the kernel is summed over few images at a time, while they are in the cache.
Their derivatives are those of reverse mode (`jax.grad`, of any order), not of `jax.jvp`. The loop over images does not
spread over several CPU devices: XLA gathers the batch for it.
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

FEW_GROUPS = 4  # up to so many, one convolution a group is the fastest
_POSITIONS = 256  # so many windows are multiplied at once: enough for a product of matrices, few enough for the cache
NARROW = (jnp.bfloat16, jnp.float16)  # added up in float32


@dataclass(frozen=True)
class Window:
    """How a kernel moves, by axis of space; groups of features; how to multiply, and the dtype of the result."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    precision: Any
    dtype: Any

    def convolve(self, x: Array, w: Array) -> Array:
        """XLA's own convolution, of one group."""
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
    """The dtype to add up in."""
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


# --- with gradients of its own ----------------------------------------------------------------------------------------


def _values(x: Array, w: Array, window: Window) -> Array:
    """As `convolve`, for many groups, or one output for each input."""
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
    """The cotangent, spread out by the strides, convolved with the kernel turned round, inputs and outputs swapped."""
    space, taps, groups = x.shape[1:-1], w.shape[:-2], window.groups
    pads = []
    axes = zip(space, cotangent.shape[1:-1], taps, window.padding, window.strides, window.dilation, strict=True)
    for size, out, tap, (before, _), stride, dilation in axes:
        first = dilation * (tap - 1) - before
        pads.append((first, size + dilation * (tap - 1) - (stride * (out - 1) + 1) - first))
    turned = jnp.flip(w, range(len(taps))).reshape(*taps, w.shape[-2], groups, -1)
    turned = jnp.swapaxes(turned, -1, -3).reshape(*taps, -1, x.shape[-1])
    spread = pad(cotangent, ((0, 0),) * len(taps), window.strides)
    once = replace(window, strides=(1,) * len(taps), padding=tuple(pads), dtype=x.dtype)
    return _convolve(spread, turned, once)


def _kernel_gradient(cotangent: Array, x: Array, w: Array, window: Window) -> Array:
    """The sum over images of the windows of the input times the cotangent."""
    depthwise = w.shape[-1] == window.groups == x.shape[-1]

    def some(images: Array, given: Array) -> Array:
        return (_shifted_sums if depthwise else _matched_sums)(images, given, w.shape[:-2], window)

    total = summed(some, pad(x, window.padding), cotangent, chunk_size(cotangent.shape, _POSITIONS))
    if not depthwise:  # (groups, taps · inputs of a group, outputs of a group)
        total = jnp.swapaxes(total, 0, 1)
    return total.reshape(w.shape).astype(w.dtype)


def pad(x: Array, padding: Sequence[tuple[int, int]], strides: Sequence[int] | None = None) -> Array:
    """Zeros around, and stride − 1 between, along the axes of space."""
    between = [stride - 1 for stride in strides or (1,) * len(padding)]
    config = [(0, 0, 0), *((*pad, step) for pad, step in zip(padding, between, strict=True)), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def chunk_size(shape: Sequence[Any], positions: int) -> int:
    """How many images of outputs (batch, space…, channels) to take at once: about so many positions, a divisor."""
    if not isinstance(shape[0], int):
        return 1
    most = max(1, positions // math.prod(shape[1:-1]))
    return next(size for size in range(min(most, shape[0]), 0, -1) if shape[0] % size == 0)


def _chunks(x: Array, size: int) -> Array:
    """(batch, …) → (chunks, size, …)."""
    return x.reshape(-1, size, *x.shape[1:]) if size > 1 else x[:, None]


def summed(function: Callable[[Array, Array], Array], x: Array, y: Array, size: int) -> Array:
    """The sum of function(images of x, images of y) over chunks of so many images."""
    chunks = _chunks(x, size), _chunks(y, size)
    start = jnp.zeros_like(jax.eval_shape(function, *(chunk[0] for chunk in chunks)))
    return lax.scan(lambda total, chunk: (total + function(*chunk), None), start, chunks)[0]


def slices(x: Array, taps: Sequence[int], outs: Sequence[int], window: Window, axis: int = 1) -> Iterator[Array]:
    """What each place of the kernel sees of x, whose axes of space begin at `axis`."""
    for places in itertools.product(*map(range, taps)):
        begin, end, steps = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, (place, out) in enumerate(zip(places, outs, strict=True), start=axis):
            begin[i] = place * window.dilation[i - axis]
            end[i] = begin[i] + window.strides[i - axis] * (out - 1) + 1
            steps[i] = window.strides[i - axis]
        yield lax.slice(x, begin, end, steps)


def _outs(x: Array, taps: Sequence[int], window: Window) -> list[int]:
    """The output's size along the axes of space, for x padded."""
    axes = zip(x.shape[1:-1], taps, window.strides, window.dilation, strict=True)
    return [(size - dilation * (tap - 1) - 1) // stride + 1 for size, tap, stride, dilation in axes]


# --- depthwise: shift, multiply, add ----------------------------------------------------------------------------------


def _shift(x: Array, w: Array, window: Window) -> Array:
    """The convolution of x, padded, with one output for each input."""
    taps, wide = w.shape[:-2], _wide(x.dtype)
    seen = slices(x, taps, _outs(x, taps, window), window)
    kernels = w.reshape(-1, *(1,) * (x.ndim - 1), w.shape[-1]).astype(wide)
    terms = [part.astype(wide) * kernel for part, kernel in zip(seen, kernels, strict=True)]
    return functools.reduce(jnp.add, terms).astype(window.dtype)


def _shifted_sums(x: Array, cotangent: Array, taps: Sequence[int], window: Window) -> Array:
    """The kernel's gradient from a few images: (taps…, channels)."""
    wide, outs = _wide(x.dtype), cotangent.shape[1:-1]
    cotangent = cotangent.astype(wide)
    # XLA adds up along leading axes one number at a time; as a product with ones it takes many.
    ones = jnp.ones(math.prod(cotangent.shape[:-1]), wide)

    def row(place: Array) -> Array:
        height = window.strides[0] * (outs[0] - 1) + 1
        part = lax.dynamic_slice_in_dim(x, place * window.dilation[0], height, 1).astype(wide)
        seen = slices(part, (1, *taps[1:]), outs, window)
        return jnp.stack([ones @ (one * cotangent).reshape(len(ones), -1) for one in seen])

    return lax.map(row, jnp.arange(taps[0]))  # a loop, since 49 of these would take seconds to compile


# --- grouped: windows side by side, times kernels ---------------------------------------------------------------------


def _match(x: Array, w: Array, window: Window) -> Array:
    """The convolution of x, padded, in groups."""
    taps, groups = w.shape[:-2], window.groups
    outs = _outs(x, taps, window)
    kernels = w.reshape(-1, groups, w.shape[-1] // groups).astype(_wide(w.dtype))  # (taps · inputs, groups, outputs)

    def some(images: Array) -> Array:
        seen = _windows(images, taps, outs, window)
        y = lax.dot_general(seen, kernels, (((2,), (0,)), ((0,), (1,))), window.precision)
        return jnp.swapaxes(y, 0, 1).reshape(-1, *outs, w.shape[-1]).astype(window.dtype)

    y = lax.map(some, _chunks(x, chunk_size((x.shape[0], *outs, 0), _POSITIONS)))
    return y.reshape(x.shape[0], *outs, w.shape[-1])


def _matched_sums(x: Array, cotangent: Array, taps: Sequence[int], window: Window) -> Array:
    """The kernel's gradient from a few images: (groups, taps · inputs of a group, outputs of a group)."""
    seen = _windows(x, taps, cotangent.shape[1:-1], window)
    given = cotangent.reshape(seen.shape[1], window.groups, -1).astype(seen.dtype)
    return lax.dot_general(seen, given, (((1,), (0,)), ((0,), (1,))), window.precision)


def _windows(x: Array, taps: Sequence[int], outs: Sequence[int], window: Window) -> Array:
    """(groups, images · space of the output, taps · inputs of a group)."""
    by_group = jnp.moveaxis(x.reshape(*x.shape[:-1], window.groups, -1), -2, 0)
    seen = jnp.concatenate(list(slices(by_group, taps, outs, window, axis=2)), -1)
    return seen.reshape(window.groups, -1, seen.shape[-1]).astype(_wide(x.dtype))
