"""Rules for dot products and convolutions: what reads units, what makes them, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdsearch_jax.tracing.findings import Context, Rule, Term
from kdsearch_jax.tracing.labels import FIXED, Axis, Value, blend


def contract(c: Context, a: Value, b: Value, i: int, j: int) -> None:
    """Axis i of a is summed against axis j of b."""
    left, right = a.axes[i], b.axes[j]
    if not isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
        for axis in (left, right):
            c.freeze(axis, "reads an axis of fixed size in")
        return
    c.found.join(left, right, c)
    kernels = sorted(((b, right), (a, left)), key=lambda each: not each[0].weight)
    kernel = next((axis for v, axis in kernels if c.found.stored(v, axis)), None)
    if kernel is not None:
        c.found.reads.append(kernel)
    elif a.weight or b.weight:
        c.freeze(left, "read by a kernel that is not used as stored, in")
    else:
        c.freeze(left, "two activations are contracted, and scaled by its size, in")


def leaves(c: Context, *values: Value) -> tuple[int, ...]:
    """The parameters whose labels are on the axes of `values`."""
    ids = [axis[axis > 0][:1] for v in values if v.weight for axis in v.axes if isinstance(axis, np.ndarray)]
    return tuple({int(c.found.labels.leaf[i]) for each in ids for i in each})


def size(axis: Axis, n: int) -> Any:
    """The size of an axis of length n as a factor of a cost: its labels, or n where it has none."""
    return axis if isinstance(axis, np.ndarray) else n


def _dot(c: Context, ins: list[Value]) -> list[Value]:
    (left, right), (batch_left, batch_right) = c.op.params["dimension_numbers"]
    a = c.found.settle(ins[0], batch_left or left)
    b = c.found.settle(ins[1], batch_right or right)
    for i, j in zip(left, right, strict=True):
        contract(c, a, b, i, j)
    batch = [c.found.merge([a.axes[i], b.axes[j]], c) for i, j in zip(batch_left, batch_right, strict=True)]
    free_left = [i for i in range(len(a.axes)) if i not in (*left, *batch_left)]
    free_right = [j for j in range(len(b.axes)) if j not in (*right, *batch_right)]
    axes = batch + [a.axes[i] for i in free_left] + [b.axes[j] for j in free_right]
    if a.active and b.active and left:
        for axis in batch:
            c.found.mark("heads", axis)
        for axis in axes[len(batch) :]:
            c.found.mark("values", axis)
    for v, free in ((a, free_left), (b, free_right)):
        for i in free if v.weight else ():
            c.found.mark("neurons", v.axes[i])
    shapes = (c.shape(0), c.shape(1))
    sizes = [size(axis, c.out_shape()[i]) for i, axis in enumerate(axes)]
    summed = a if any(isinstance(a.axes[i], np.ndarray) for i in left) else b
    sizes += [size(summed.axes[k], shapes[0][i]) for k, i in zip(left if summed is a else right, left, strict=True)]
    add_term(c, 1.0, sizes, leaves(c, a, b))
    c.count(2.0 * math.prod(c.out_shape()) * math.prod(shapes[0][i] for i in left))
    linear = all(v.linear for v in ins if v.weight)
    return [blend(ins, axes, linear)]


def add_term(c: Context, constant: float, sizes: Sequence[Any], leaves: tuple[int, ...]) -> None:
    """Adds multiply-accumulates to the cost: `constant` times the product of `sizes`, each from `size`."""
    fixed = math.prod(n for n in sizes if isinstance(n, int))
    arrays = tuple(n for n in sizes if not isinstance(n, int))
    c.found.terms.append(Term(constant * fixed * c.times, arrays, leaves))


def _conv(c: Context, ins: list[Value]) -> list[Value]:
    p = c.op.params
    x_spec, k_spec, o_spec = p["dimension_numbers"]
    x, kernel = c.found.settle(ins[0], [x_spec[1]]), c.found.settle(ins[1], k_spec[:2])
    for i in (x_spec[0], *x_spec[2:]):
        c.freeze(x.axes[i], "a batch or window axis of")
    for i in k_spec[2:]:
        c.found.freeze(kernel.axes[i], "a convolution's window")
    channels, made, read = x.axes[x_spec[1]], kernel.axes[k_spec[0]], kernel.axes[k_spec[1]]
    groups = p["feature_group_count"]
    if p["batch_group_count"] != 1:
        for axis in (channels, made, read):
            c.freeze(axis, "batch groups in")
    elif groups == 1:
        contract(c, x, kernel, x_spec[1], k_spec[1])
    else:
        made = _grouped(c, channels, made, kernel, k_spec[1], groups)
    if groups == 1:
        c.found.mark("channels", made)
    dilated = any(d != 1 for d in p["lhs_dilation"])
    positions = math.prod((c.shape(0) if dilated else c.out_shape())[i] for i in (x_spec if dilated else o_spec)[2:])
    window = math.prod(c.shape(1)[i] for i in k_spec[2:])
    batch = c.shape(0)[x_spec[0]] // p["batch_group_count"]
    sizes = [size(read, c.shape(1)[k_spec[1]]), size(made, c.shape(1)[k_spec[0]])]
    add_term(c, float(positions * window * batch), sizes, leaves(c, kernel))
    c.count(2.0 * _in_bounds(c) * batch * c.shape(1)[k_spec[1]] * c.shape(1)[k_spec[0]])
    axes: list[Axis] = [FIXED] * len(o_spec)
    axes[o_spec[1]] = made
    return [blend(ins, axes, False)]


def _grouped(c: Context, channels: Axis, made: Axis, kernel: Value, read: int, groups: int) -> Axis:
    """A grouped convolution loses whole groups, or, as a paired site, the same channels of every group.

    channels: of the input; made: of the kernel's output axis; read: which axis of the kernel has a group's inputs.
    """
    inputs = kernel.axes[read]
    if not isinstance(channels, np.ndarray) or not isinstance(made, np.ndarray):
        for axis in (channels, made, inputs):
            c.freeze(axis, "joined to an axis of fixed size in")
        return made
    blocks, outs = channels.reshape(groups, -1), made.reshape(groups, -1)
    if isinstance(inputs, np.ndarray) and c.found.stored(kernel, inputs) and c.found.pairable(c.site, blocks):
        c.found.join(outs, np.broadcast_to(outs[:1], outs.shape))
        c.found.join(inputs, blocks[0])
        c.found.reads.append(inputs)
        c.found.within.update(dict.fromkeys(np.unique(c.found.labels.leaf[made]).tolist(), groups))
        c.found.mark("channels", made)
        return made
    c.freeze(inputs, "the inputs of each group of")
    for block in (blocks, outs):
        c.found.join(block, np.broadcast_to(outs[:, :1], block.shape))
    if blocks.shape[1] > 1:
        c.found.mark("groups", made)
    return made


def _in_bounds(c: Context) -> int:
    """Products of a convolution that are not with padding, per batch, input and output channel."""
    p = c.op.params
    x_spec, k_spec, o_spec = p["dimension_numbers"]
    total = 1
    for d, (i, k, o) in enumerate(zip(x_spec[2:], k_spec[2:], o_spec[2:], strict=True)):
        out = np.arange(c.out_shape()[o])[:, None] * p["window_strides"][d]
        at = out + np.arange(c.shape(1)[k])[None] * p["rhs_dilation"][d] - p["padding"][d][0]
        size = (c.shape(0)[i] - 1) * p["lhs_dilation"][d] + 1
        total *= int(((at >= 0) & (at < size) & (at % p["lhs_dilation"][d] == 0)).sum())
    return total


RULES: dict[str, Rule] = {"dot_general": _dot, "conv_general_dilated": _conv}
