"""Ungrouped convolutions at channel counts that suit XLA:CPU, built from XLA's own operations.

XLA:CPU runs a 2-D convolution with YNNPACK if one side has more than 16 channels, and with Eigen otherwise. Eigen's
time hardly depends on the number of channels, and YNNPACK is up to four times slower at odd numbers, so a pruned
network would run no faster than its teacher. `convolve` computes the same sums at other widths:

    narrow   pairs of positions as one with twice the channels: a kernel (3, 3, 10, 11) becomes (3, 2, 20, 32)
    other    inputs zero-padded to an even number, outputs to a multiple of 16

The second output of a pair applies the kernel one position later, which takes 4/3 of the multiplications of a 3 × 3
kernel. The choice of widths was measured with jaxlib 0.10.2 on AVX-512; it affects the time, not the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kdsearch_jax.adapters.convolution.grouped import Window

_NARROW = 16  # up to this many channels, XLA:CPU calls Eigen
_TILE = 16  # outputs that YNNPACK computes at a time
_LEAST = 20  # fewest outputs at which YNNPACK is called and fast


def supported(x: Sequence[Any], w: Sequence[int], window: Window) -> bool:
    """Whether `convolve` applies to a convolution with one group of arrays with these shapes."""
    return len(x) == 4 and max(window.strides) <= 2 and math.prod(w[:2]) > 1


def convolve(x: Array, w: Array, window: Window) -> Array:
    """The convolution of x (batch, height, width, inputs) with w (height, width, inputs, outputs), with one group."""
    outputs = w.shape[-1]
    if max(w.shape[-2:]) > _NARROW:
        y = _padded(x, w, window, _multiple(outputs, _TILE if outputs > _NARROW else 8))
    elif _pairs(x, w, window):
        y = _paired(x, w, window)
    else:
        y = _padded(x, w, window, _LEAST)
    return y[..., :outputs]


def _padded(x: Array, w: Array, window: Window, outputs: int) -> Array:
    """The convolution with the outputs zero-padded to this number."""
    inputs = _multiple(x.shape[-1], 2)
    return window.convolve(_widen(x, -1, inputs), _widen(_widen(w, -2, inputs), -1, outputs))


def _pairs(x: Array, w: Array, window: Window) -> bool:
    """Whether positions along the width can be processed in pairs."""
    taps, (before, after) = w.shape[1], window.padding[1]
    simple = window.strides[1] == window.dilation[1] == 1 and taps % 2 == 1 and taps > 1
    return simple and (x.shape[2] + before + after) % 2 == 0


def _paired(x: Array, w: Array, window: Window) -> Array:
    """The convolution over pairs of positions."""
    rows, taps, inputs, outputs = w.shape
    before, after = window.padding[1]
    x = x[:, :, max(0, -before) : x.shape[2] - max(0, -after)]
    margins = [jnp.zeros((*x.shape[:2], max(0, size), inputs), x.dtype) for size in (before, after)]
    x = jnp.concatenate([margins[0], x, margins[1]], 2)  # faster on XLA:CPU than `pad`
    pairs = x.reshape(*x.shape[:2], x.shape[2] // 2, 2 * inputs)
    shifted = [jnp.pad(w, ((0, 0), (j, 1 - j), (0, 0), (0, 0))) for j in range(2)]
    kernel = jnp.concatenate(shifted, -1).reshape(rows, (taps + 1) // 2, 2 * inputs, 2 * outputs)
    wide = max(_multiple(2 * outputs, _TILE), _LEAST if 2 * inputs <= _NARROW else 0)
    inner = replace(window, padding=(window.padding[0], (0, 0)))
    y = inner.convolve(pairs, _widen(kernel, -1, wide))[..., : 2 * outputs]
    return y.reshape(*y.shape[:2], 2 * y.shape[2], outputs)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _widen(x: Array, axis: int, size: int) -> Array:
    """Zero-pads an axis at its end."""
    if x.shape[axis] == size:
        return x
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)
