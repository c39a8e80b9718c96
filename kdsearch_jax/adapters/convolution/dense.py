"""Dense convolutions that are fast on CPUs: a primitive of JAX with a lowering of its own for that platform.

A convolution y = x ∗ w is bilinear, and its three products are derivatives of each other: the values y, the gradient of
x from (y, w), the gradient of w from (x, y). `product_p` computes any of the three from the other two, so that it has
derivatives of every order, in forward and in reverse mode.

On CPUs, float32 and narrower types are computed by the kernels of `kdsearch_jax.adapters.convolution.native`, in
float32. Where these are
not available, XLA computes values and the gradient of x, at the widths that suit it
(`kdsearch_jax.adapters.convolution.widths`), and the
gradient of w is summed over few images at a time as products of matrices. On other platforms all three lower to the
operations that `jax.lax.conv_general_dilated` and its derivatives lower to, so programs for TPU and GPU do not change.

Not here: convolutions over several devices. XLA can split its own convolutions among them, but no foreign function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kdsearch_jax.adapters.convolution import native, widths
from kdsearch_jax.adapters.convolution.grouped import NARROW, Window, chunk_size, pad, slices, summed

Operand = Literal["x", "w", "y"]

# Where there are no kernels: positions of the output whose windows are multiplied at once, and most places of a kernel.
_POSITIONS, _MOST_TAPS = 2048, 128


@dataclass(frozen=True)
class Convolution:
    """y = x ∗ w of arrays (batch, space…, channels) and a kernel (space…, inputs, outputs).

    x, w: their shapes; all three arrays have `window.dtype`.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    window: Window

    @property
    def y(self) -> tuple[int, ...]:
        """The shape of the result."""
        return jax.eval_shape(
            self.window.convolve, *(jax.ShapeDtypeStruct(s, self.window.dtype) for s in (self.x, self.w))
        ).shape


def convolve(x: Array, w: Array, window: Window) -> Array:
    """y = x ∗ w; the arrays and the window have one dtype.

    Args:
      x: (batch, space…, inputs).
      w: (space…, inputs, outputs).

    Returns:
      (batch, space…, outputs).
    """
    return _product(x, w, "y", Convolution(x.shape, w.shape, window))


def supported(shape: Sequence[Any], dtypes: Sequence[Any]) -> bool:
    """Whether `convolve` gains anything here, for an x of this shape, and arrays of these dtypes."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    known = len(shape) in (3, 4) and all(isinstance(size, int) for size in shape)
    return alone and known and len(set(dtypes)) == 1 and jnp.dtype(dtypes[0]) in map(jnp.dtype, (*NARROW, jnp.float32))


# --- the primitive ----------------------------------------------------------------------------------------------------

_OPERANDS: dict[Operand, tuple[Operand, Operand]] = {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}


def _product(a: Array, b: Array, result: Operand, convolution: Convolution) -> Array:
    """The one of x, w and y that `result` names, from the other two as `_OPERANDS` orders them."""
    return product_p.bind(a, b, result=result, convolution=convolution)


def _plain(a: Array, b: Array, *, result: Operand, convolution: Convolution) -> Array:
    """The product by XLA's own convolution and its transposes."""
    window = convolution.window
    if result == "y":
        return window.convolve(a, b)
    wanted = jax.ShapeDtypeStruct(getattr(convolution, result), window.dtype)
    if result == "x":
        return jax.linear_transpose(lambda x: window.convolve(x, b), wanted)(a)[0]
    return jax.linear_transpose(partial(window.convolve, a), wanted)(b)[0]


def _abstract(a: Any, b: Any, *, result: Operand, convolution: Convolution) -> Any:
    return ShapedArray(getattr(convolution, result), convolution.window.dtype)


def _transpose(place: int, cotangent: Array, a: Any, b: Any, *, result: Operand, convolution: Convolution) -> Array:
    """The cotangent of one operand of a product, which is a product as well."""
    wanted = _OPERANDS[result][place]
    known = {result: cotangent, _OPERANDS[result][1 - place]: (b, a)[place]}
    first, second = _OPERANDS[wanted]
    return _product(known[first], known[second], wanted, convolution)


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, result: Operand, convolution: Convolution) -> Any:
    """A batch of images becomes part of the images; where kernels are batched, too, XLA's own rules know best."""
    a, b = operands
    if result == "w" or axes[1] is not None:
        return jax.vmap(partial(_plain, result=result, convolution=convolution), axes)(a, b), 0
    a = jnp.moveaxis(a, axes[0], 0)
    number = a.shape[0]
    merged = Convolution((number * convolution.x[0], *convolution.x[1:]), convolution.w, convolution.window)
    found = _product(a.reshape(-1, *a.shape[2:]), b, result, merged)
    return found.reshape(number, -1, *found.shape[1:]), 0


# --- on CPUs ----------------------------------------------------------------------------------------------------------


def _on_cpu(a: Array, b: Array, *, result: Operand, convolution: Convolution) -> Array:
    if _suits_xla(result, convolution):
        return _plain(a, b, result=result, convolution=convolution)
    if native.ready():
        return _compiled(a, b, result, convolution)
    if result == "w" and math.prod(convolution.w[:-2]) <= _MOST_TAPS:
        return _summed(a, b, convolution)
    if result != "w" and (found := _widened(a, b, result, convolution)) is not None:
        return found
    return _plain(a, b, result=result, convolution=convolution)


def _suits_xla(result: Operand, convolution: Convolution) -> bool:
    """Whether XLA's own product is as fast: nearly products of matrices, from what was measured on one machine."""
    positions = math.prod(convolution.y[1:-1])
    if result == "w":
        return positions < 16
    return positions < 4 or max(convolution.window.strides) > 2


def _compiled(a: Array, b: Array, result: Operand, convolution: Convolution) -> Array:
    """The product by the compiled kernels, for which an image with one axis has one row."""
    window, extra = convolution.window, (1,) * (2 - len(convolution.window.strides))
    pads = tuple(before for before, _ in window.padding)
    x, y = ((shape[0], *extra, *shape[1:]) for shape in (convolution.x, convolution.y))
    w = (*extra, *convolution.w)
    shapes: dict[Operand, tuple[int, ...]] = {"x": x, "w": w, "y": y}
    moves = (*extra, *window.strides, *(0 for _ in extra), *pads, *extra, *window.dilation)
    first, second = (
        operand.astype(jnp.float32).reshape(shapes[name])
        for operand, name in zip((a, b), _OPERANDS[result], strict=True)
    )
    handler = {"y": "forward", "x": "input_gradient", "w": "kernel_gradient"}[result]
    found = native.product(handler, shapes[result], first, second, (*x, *w[:2], w[3], *y[1:3], *moves))
    return found.reshape(getattr(convolution, result)).astype(window.dtype)


def _widened(a: Array, w: Array, result: Operand, convolution: Convolution) -> Array | None:
    """The values, or the gradient of x as a convolution of y with the kernel turned round; None under strides."""
    window = convolution.window
    if result == "x":
        if max(window.strides) > 1:
            return None
        w = jnp.swapaxes(jnp.flip(w, range(w.ndim - 2)), -1, -2)
        spans = [dilation * (taps - 1) for dilation, taps in zip(window.dilation, w.shape, strict=False)]
        pads = tuple((span - before, span - after) for span, (before, after) in zip(spans, window.padding, strict=True))
        window = replace(window, padding=pads)
    return widths.convolve(a, w, window) if widths.supported(a.shape, w.shape, window) else None


def _summed(x: Array, y: Array, convolution: Convolution) -> Array:
    """The gradient of the kernel as products of matrices: the windows of few images side by side, times y."""
    window, taps, channels = convolution.window, convolution.w[:-2], convolution.w[-1]

    def some(images: Array, given: Array) -> Array:
        seen = jnp.concatenate(list(slices(images, taps, given.shape[1:-1], window)), -1)
        left, right = (z.reshape(-1, z.shape[-1]).astype(jnp.float32) for z in (given, seen))
        return lax.dot_general(left, right, (((0,), (0,)), ((), ())), window.precision)

    total = summed(some, pad(x, window.padding), y, chunk_size(convolution.y, _POSITIONS))
    return total.reshape(channels, *taps, -1).transpose(*range(1, len(taps) + 2), 0).astype(window.dtype)


# --- for JAX ----------------------------------------------------------------------------------------------------------


def _primitive() -> Primitive:
    """The primitive with its rules: shapes, derivatives, batches, programs."""
    made = Primitive("kdsearch_convolution_product")
    made.def_impl(jax.jit(made.bind, static_argnames=("result", "convolution")))
    made.def_abstract_eval(_abstract)
    ad.defbilinear(made, partial(_transpose, 0), partial(_transpose, 1))
    batching.primitive_batchers[made] = _batch
    mlir.register_lowering(made, mlir.lower_fun(_plain, multiple_results=False))
    mlir.register_lowering(made, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
    return made


product_p = _primitive()
