"""Rules for dot products, einsums and convolutions: what contracts units, what produces them, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdsearch_jax.tracing import einsum
from kdsearch_jax.tracing.analysis import Contraction, CostTerm, Rule, RuleContext
from kdsearch_jax.tracing.labels import FIXED, AbstractValue, Axis, combine
from kdsearch_jax.tracing.program import Program


def _contract(ctx: RuleContext, a: AbstractValue, b: AbstractValue, i: int, j: int) -> None:
    """Contracts axis i of a with axis j of b."""
    left, right = a.axes[i], b.axes[j]
    if not isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
        for axis in (left, right):
            ctx.freeze(axis, "reads an axis of fixed size in")
        return
    ctx.analysis.join(left, right, ctx)
    kernels = sorted(((b, right), (a, left)), key=lambda operand: not operand[0].weight)
    kernel = next((axis for v, axis in kernels if ctx.analysis.is_stored(v, axis)), None)
    if kernel is not None:
        ctx.analysis.contracted.append(kernel)
    elif a.active and b.active:
        ctx.analysis.mix(ctx, 0, {i: left}, "width" if len(set(ctx.op.inputs)) == 1 else "queries")
    else:
        ctx.freeze(left, "read by a kernel that is not used as stored, in")


def _leaves(ctx: RuleContext, *values: AbstractValue) -> tuple[int, ...]:
    """The parameters that own labels on the axes of `values`."""
    ids = [axis[axis > 0][:1] for v in values if v.weight for axis in v.axes if isinstance(axis, np.ndarray)]
    return tuple({int(ctx.analysis.labels.leaf[i]) for first in ids for i in first})


def _size(axis: Axis, n: int) -> Any:
    """The size of an axis of length n as a factor of a cost term: its labels, or n where it has none."""
    return axis if isinstance(axis, np.ndarray) else n


def _dot(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    (left, right), (batch_left, batch_right) = ctx.op.params["dimension_numbers"]
    a = ctx.analysis.resolve_splits(ins[0], batch_left or left)
    b = ctx.analysis.resolve_splits(ins[1], batch_right or right)
    for i, j in zip(left, right, strict=True):
        _contract(ctx, a, b, i, j)
    batch = [ctx.analysis.merge([a.axes[i], b.axes[j]], ctx) for i, j in zip(batch_left, batch_right, strict=True)]
    free_left = [i for i in range(len(a.axes)) if i not in (*left, *batch_left)]
    free_right = [j for j in range(len(b.axes)) if j not in (*right, *batch_right)]
    axes = batch + [a.axes[i] for i in free_left] + [b.axes[j] for j in free_right]
    if a.active and b.active and left:
        for axis in batch:
            ctx.analysis.mark("heads", axis)
        for axis in axes[len(batch) :]:
            ctx.analysis.mark("values", axis)
    for v, free in ((a, free_left), (b, free_right)):
        for i in free if v.weight else ():
            ctx.analysis.mark("neurons", v.axes[i])
            ctx.analysis.produce(v.axes[i])
    shapes = (ctx.shape(0), ctx.shape(1))
    sizes = [_size(axis, ctx.out_shape()[i]) for i, axis in enumerate(axes)]
    summed = a if any(isinstance(a.axes[i], np.ndarray) for i in left) else b
    sizes += [_size(summed.axes[k], shapes[0][i]) for k, i in zip(left if summed is a else right, left, strict=True)]
    _add_term(ctx, 1.0, sizes, _leaves(ctx, a, b))
    ctx.count_product(2.0 * math.prod(ctx.out_shape()) * math.prod(shapes[0][i] for i in left))
    linear = all(v.linear for v in ins if v.weight)
    terms = tuple(sizes[len(axes) :])
    counts = a.active and b.active and any(isinstance(n, np.ndarray) for n in terms)
    return [combine(ins, axes, linear)._replace(summed=terms if counts else ())]


def _add_term(ctx: RuleContext, constant: float, sizes: Sequence[Any], leaves: tuple[int, ...]) -> None:
    """Adds `constant` · ∏ `sizes` multiply-accumulates to the cost; sizes as from `_size`."""
    fixed = math.prod(n for n in sizes if isinstance(n, int))
    arrays = tuple(n for n in sizes if not isinstance(n, int))
    ctx.analysis.terms.append(CostTerm(constant * fixed * ctx.times, arrays, leaves))


def _conv(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    p = ctx.op.params
    x_spec, k_spec, o_spec = p["dimension_numbers"]
    x, kernel = ctx.analysis.resolve_splits(ins[0], [x_spec[1]]), ctx.analysis.resolve_splits(ins[1], k_spec[:2])
    for i in (x_spec[0], *x_spec[2:]):
        ctx.freeze(x.axes[i], "a batch or window axis of")
    for i in k_spec[2:]:
        ctx.analysis.freeze(kernel.axes[i], "a convolution's window")
    channels, outputs, inputs = x.axes[x_spec[1]], kernel.axes[k_spec[0]], kernel.axes[k_spec[1]]
    groups = p["feature_group_count"]
    if p["batch_group_count"] != 1:
        for axis in (channels, outputs, inputs):
            ctx.freeze(axis, "batch groups in")
    elif groups == 1:
        _contract(ctx, x, kernel, x_spec[1], k_spec[1])
    else:
        outputs = _grouped(ctx, channels, outputs, kernel, k_spec[1], groups)
    ctx.analysis.produce(outputs)
    if groups == 1:
        ctx.analysis.mark("channels", outputs)
    dilated = any(d != 1 for d in p["lhs_dilation"])
    positions = math.prod(
        (ctx.shape(0) if dilated else ctx.out_shape())[i] for i in (x_spec if dilated else o_spec)[2:]
    )
    window = math.prod(ctx.shape(1)[i] for i in k_spec[2:])
    batch = ctx.shape(0)[x_spec[0]] // p["batch_group_count"]
    sizes = [_size(inputs, ctx.shape(1)[k_spec[1]]), _size(outputs, ctx.shape(1)[k_spec[0]])]
    _add_term(ctx, float(positions * window * batch), sizes, _leaves(ctx, kernel))
    ctx.count_product(2.0 * _in_bounds(ctx) * batch * ctx.shape(1)[k_spec[1]] * ctx.shape(1)[k_spec[0]])
    axes: list[Axis] = [FIXED] * len(o_spec)
    axes[o_spec[1]] = outputs
    return [combine(ins, axes, False)]


def _grouped(ctx: RuleContext, channels: Axis, outputs: Axis, kernel: AbstractValue, read: int, groups: int) -> Axis:
    """Couples a grouped convolution: it loses whole groups or, if its site is paired, the same channels of every group.

    Args:
      channels: the input's channels. outputs: the kernel's output axis. read: the kernel axis of a group's inputs.

    Returns:
      the channels of the output.
    """
    inputs = kernel.axes[read]
    if not isinstance(channels, np.ndarray) or not isinstance(outputs, np.ndarray):
        for axis in (channels, outputs, inputs):
            ctx.freeze(axis, "joined to an axis of fixed size in")
        return outputs
    blocks, outs = channels.reshape(groups, -1), outputs.reshape(groups, -1)
    if (
        isinstance(inputs, np.ndarray)
        and ctx.analysis.is_stored(kernel, inputs)
        and ctx.analysis.pair_parts(ctx.site, blocks)
    ):
        ctx.analysis.join(outs, np.broadcast_to(outs[:1], outs.shape))
        ctx.analysis.join(inputs, blocks[0])
        ctx.analysis.contracted.append(inputs)
        ctx.analysis.kept_groups.update(dict.fromkeys(np.unique(ctx.analysis.labels.leaf[outputs]).tolist(), groups))
        ctx.analysis.mark("channels", outputs)
        return outputs
    ctx.freeze(inputs, "the inputs of each group of")
    for block in (blocks, outs):
        ctx.analysis.join(block, np.broadcast_to(outs[:, :1], block.shape))
    if blocks.shape[1] > 1:
        ctx.analysis.mark("groups", outputs)
    return outputs


def _in_bounds(ctx: RuleContext) -> int:
    """Products that are not with padding, for one image, one input and one output channel."""
    p = ctx.op.params
    x_spec, k_spec, o_spec = p["dimension_numbers"]
    total = 1
    for d, (i, k, o) in enumerate(zip(x_spec[2:], k_spec[2:], o_spec[2:], strict=True)):
        out = np.arange(ctx.out_shape()[o])[:, None] * p["window_strides"][d]
        at = out + np.arange(ctx.shape(1)[k])[None] * p["rhs_dilation"][d] - p["padding"][d][0]
        size = (ctx.shape(0)[i] - 1) * p["lhs_dilation"][d] + 1
        total *= int(((at >= 0) & (at < size) & (at % p["lhs_dilation"][d] == 0)).sum())
    return total


def _ragged_dot(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """`jax.lax.ragged_dot`: one axis of the left operand, usually tokens, is divided into groups (experts).

    Each group has its own kernel. Where the divided axis is contracted, the result has an axis of groups instead. A
    token is multiplied by the kernel of its own group only, and the cost counts that, whatever a backend computes.
    """
    numbers = ctx.op.params["ragged_dot_dimension_numbers"]
    (left, right), (batch_left, batch_right) = numbers.dot_dimension_numbers
    divided, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    a, b = ctx.analysis.resolve_splits(ins[0], left), ctx.analysis.resolve_splits(ins[1], right)
    for i in divided:
        ctx.freeze(a.axes[i], "divided into groups by")
    for j in groups:
        ctx.freeze(b.axes[j], "indexed by the groups of")
    for value in ins[2:]:
        for axis in value.axes:
            ctx.freeze(axis, "used as an index in")
    for i, j in zip(left, right, strict=True):
        if i in divided:
            ctx.freeze(b.axes[j], "divided into groups by")
        else:
            _contract(ctx, a, b, i, j)
    batch = [ctx.analysis.merge([a.axes[i], b.axes[j]], ctx) for i, j in zip(batch_left, batch_right, strict=True)]
    axes: list[Axis] = [FIXED] * len(set(left) & set(divided)) + batch
    axes += [FIXED if i in divided else a.axes[i] for i in range(len(a.axes)) if i not in (*left, *batch_left)]
    axes += [b.axes[j] for j in range(len(b.axes)) if j not in (*right, *batch_right, *groups)]
    for j in range(len(b.axes)):
        if b.weight and j not in (*right, *batch_right, *groups):
            ctx.analysis.mark("neurons", b.axes[j])
            ctx.analysis.produce(b.axes[j])
    summed = [_size(a.axes[i], ctx.shape(0)[i]) for i in left]
    outputs = [_size(axis, n) for axis, n in zip(axes, ctx.out_shape(), strict=True)]
    groups_in_result = math.prod(ctx.out_shape()[: len(set(left) & set(divided))])
    _add_term(ctx, 1.0 / groups_in_result, [*outputs, *summed], _leaves(ctx, a, b))
    ctx.analysis.uncounted.add(ctx.op.name)
    return [combine(ins, axes, all(v.linear for v in ins[:2] if v.weight))]


def _einsum(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """An einsum of three or more operands: its pairwise products are analyzed like any others.

    The effect on labels does not depend on the order of the products; the cost is that of this order.
    """
    body: Program = ctx.op.params["body"]
    values: list[AbstractValue | None] = [None] * len(body.avals)
    for number, value in zip(body.inputs, ins, strict=True):
        values[number] = value
    before = len(ctx.analysis.ops)
    outs = ctx.run(body, values, ctx.analysis, ctx.times)
    del ctx.analysis.ops[before:]  # a student may contract in another order
    ctx.analysis.contractions.append(Contraction(ctx.op.params["order"], ctx.times, ctx.op.scope))
    return outs


RULES: dict[str, Rule] = {
    "dot_general": _dot, "conv_general_dilated": _conv, "ragged_dot_general": _ragged_dot, einsum.NAME: _einsum,
}  # fmt: skip
