"""Ungrouped convolutions as a JAX primitive with a CPU lowering.

A convolution y = x ∗ w is bilinear, and its three products are derivatives of each other: the values y, the gradient of
x from (y, w), and the gradient of w from (x, y). `product_p` computes each of them from the other two, so it has
derivatives of every order, in forward and reverse mode.

On CPUs, the kernels in `native` compute in float32; on those with AMX, they multiply bfloat16 numbers where arrays have
that type, or are to be rounded to it. Without kernels, XLA computes the
values and the gradient of x at widths that suit it (`widths`), and the gradient of w is a sum of matrix products over a
few images each. On other platforms, all three products lower to the operations that `jax.lax.conv_general_dilated` and
its derivatives lower to, so programs for TPU and GPU do not change.

Convolutions that are partitioned over several devices are not supported: XLA cannot partition a foreign function.
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

# Without native kernels: output positions per matrix product, and the largest kernel.
_POSITIONS, _MOST_TAPS = 2048, 128


@dataclass(frozen=True)
class Convolution:
    """y = x ∗ w for arrays (batch, space…, channels) and a kernel (space…, inputs, outputs).

    Attributes:
      x, w: their shapes. All three arrays have `window.dtype`.
      rounded: whether factors are rounded to bfloat16 before they are multiplied, in the derivatives as well.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    window: Window
    rounded: bool = False

    @property
    def y(self) -> tuple[int, ...]:
        """The shape of the result."""
        return jax.eval_shape(
            self.window.convolve, *(jax.ShapeDtypeStruct(s, self.window.dtype) for s in (self.x, self.w))
        ).shape


def convolve(x: Array, w: Array, window: Window, *, rounded: bool = False) -> Array:
    """y = x ∗ w; both arrays have the window's dtype.

    Args:
      x: (batch, space…, inputs).
      w: (space…, inputs, outputs).
      rounded: round factors to bfloat16 before they are multiplied, in the derivatives as well.

    Returns:
      (batch, space…, outputs).
    """
    return _product(x, w, "y", Convolution(x.shape, w.shape, window, rounded))


def supported(shape: Sequence[Any], dtypes: Sequence[Any]) -> bool:
    """Whether `convolve` is useful here, for an x of this shape and arrays of these dtypes."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    known = len(shape) in (3, 4) and all(isinstance(size, int) for size in shape)
    return alone and known and len(set(dtypes)) == 1 and jnp.dtype(dtypes[0]) in map(jnp.dtype, (*NARROW, jnp.float32))


# --- the primitive ----------------------------------------------------------------------------------------------------

_OPERANDS: dict[Operand, tuple[Operand, Operand]] = {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}


def _product(a: Array, b: Array, result: Operand, convolution: Convolution) -> Array:
    """One of x, w and y, named by `result`, from the other two in the order of `_OPERANDS`."""
    return product_p.bind(a, b, result=result, convolution=convolution)


def _plain(a: Array, b: Array, *, result: Operand, convolution: Convolution) -> Array:
    """The product by XLA's own convolution and its transposes."""
    window = convolution.window
    a, b = _rounded(a, b, convolution)
    if result == "y":
        return window.convolve(a, b)
    wanted = jax.ShapeDtypeStruct(getattr(convolution, result), window.dtype)
    if result == "x":
        return jax.linear_transpose(lambda x: window.convolve(x, b), wanted)(a)[0]
    return jax.linear_transpose(partial(window.convolve, a), wanted)(b)[0]


def _rounded(a: Array, b: Array, convolution: Convolution) -> tuple[Array, Array]:
    """The factors as they are multiplied."""
    if not convolution.rounded:
        return a, b
    bits = jnp.finfo(jnp.bfloat16)
    return lax.reduce_precision(a, bits.nexp, bits.nmant), lax.reduce_precision(b, bits.nexp, bits.nmant)


def _abstract(a: Any, b: Any, *, result: Operand, convolution: Convolution) -> Any:
    return ShapedArray(getattr(convolution, result), convolution.window.dtype)


def _transpose(place: int, cotangent: Array, a: Any, b: Any, *, result: Operand, convolution: Convolution) -> Array:
    """The cotangent of one operand of a product, itself one of the three products."""
    wanted = _OPERANDS[result][place]
    known = {result: cotangent, _OPERANDS[result][1 - place]: (b, a)[place]}
    first, second = _OPERANDS[wanted]
    return _product(known[first], known[second], wanted, convolution)


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, result: Operand, convolution: Convolution) -> Any:
    """Merges a batch axis of images into the images; batched kernels are left to XLA's own batching rule."""
    a, b = operands
    if result == "w" or axes[1] is not None:
        return jax.vmap(partial(_plain, result=result, convolution=convolution), axes)(a, b), 0
    a = jnp.moveaxis(a, axes[0], 0)
    number = a.shape[0]
    merged = replace(convolution, x=(number * convolution.x[0], *convolution.x[1:]))
    output = _product(a.reshape(-1, *a.shape[2:]), b, result, merged)
    return output.reshape(number, -1, *output.shape[1:]), 0


# --- on CPUs ----------------------------------------------------------------------------------------------------------


def _on_cpu(a: Array, b: Array, *, result: Operand, convolution: Convolution) -> Array:
    narrow = convolution.rounded or convolution.window.dtype == jnp.bfloat16
    if narrow and native.ready(bf16=True):
        return _compiled(a, b, result, convolution)
    a, b = _rounded(a, b, convolution)
    if _suits_xla(result, convolution):
        return _plain(a, b, result=result, convolution=convolution)
    if native.ready():
        single = replace(convolution, rounded=False, window=replace(convolution.window, dtype=jnp.float32))
        output = _compiled(a.astype(jnp.float32), b.astype(jnp.float32), result, single)
        return output.astype(convolution.window.dtype)
    if result == "w" and math.prod(convolution.w[:-2]) <= _MOST_TAPS:
        return _summed(a, b, convolution)
    if result != "w" and (output := _widened(a, b, result, convolution)) is not None:
        return output
    return _plain(a, b, result=result, convolution=convolution)


def _suits_xla(result: Operand, convolution: Convolution) -> bool:
    """Whether XLA's own product is as fast, because it is close to a matrix product; measured on one machine."""
    positions = math.prod(convolution.y[1:-1])
    if result == "w":
        return positions < 16
    return positions < 4 or max(convolution.window.strides) > 2


def _compiled(a: Array, b: Array, result: Operand, convolution: Convolution) -> Array:
    """The product by the native kernels, which take an image with one axis as one with a single row."""
    window, extra = convolution.window, (1,) * (2 - len(convolution.window.strides))
    pads = tuple(before for before, _ in window.padding)
    x, y = ((shape[0], *extra, *shape[1:]) for shape in (convolution.x, convolution.y))
    w = (*extra, *convolution.w)
    shapes: dict[Operand, tuple[int, ...]] = {"x": x, "w": w, "y": y}
    moves = (*extra, *window.strides, *(0 for _ in extra), *pads, *extra, *window.dilation)
    first, second = (operand.reshape(shapes[name]) for operand, name in zip((a, b), _OPERANDS[result], strict=True))
    handler = {"y": "forward", "x": "input_gradient", "w": "kernel_gradient"}[result]
    shape = (*x, *w[:2], w[3], *y[1:3], *moves)
    output = native.product(handler, shapes[result], first, second, shape, rounded=convolution.rounded)
    return output.reshape(getattr(convolution, result))


def _widened(a: Array, w: Array, result: Operand, convolution: Convolution) -> Array | None:
    """The values, or the gradient of x as a convolution of y with the flipped kernel; None where `widths` cannot."""
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
    """The gradient of the kernel as matrix products: the windows of a few images (im2col), times y."""
    window, taps, channels = convolution.window, convolution.w[:-2], convolution.w[-1]

    def chunk_gradient(images: Array, cotangent: Array) -> Array:
        windows = jnp.concatenate(list(slices(images, taps, cotangent.shape[1:-1], window)), -1)
        left, right = (z.reshape(-1, z.shape[-1]).astype(jnp.float32) for z in (cotangent, windows))
        return lax.dot_general(left, right, (((0,), (0,)), ((), ())), window.precision)

    total = summed(chunk_gradient, pad(x, window.padding), y, chunk_size(convolution.y, _POSITIONS))
    return total.reshape(channels, *taps, -1).transpose(*range(1, len(taps) + 2), 0).astype(window.dtype)


# --- for JAX ----------------------------------------------------------------------------------------------------------


def _primitive() -> Primitive:
    """The primitive with its abstract evaluation, transpose, batching and lowering rules."""
    primitive = Primitive("kdsearch_convolution_product")
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("result", "convolution")))
    primitive.def_abstract_eval(_abstract)
    ad.defbilinear(primitive, partial(_transpose, 0), partial(_transpose, 1))
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, mlir.lower_fun(_plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
    return primitive


product_p = _primitive()
