"""Rules for gathers, scatters and dynamic slices."""

from __future__ import annotations

import math

import jax

from kdsearch_jax.tracing.analysis import Rule, RuleContext
from kdsearch_jax.tracing.labels import FIXED, AbstractValue, Axis, combine
from kdsearch_jax.tracing.rules.data_movement import slice_axes
from kdsearch_jax.tracing.rules.mixing import spare


def _gather(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    numbers, sizes = ctx.op.params["dimension_numbers"], ctx.op.params["slice_sizes"]
    hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = [
        i for i, n in enumerate(ctx.shape(0)) if i not in hidden and sizes[i] == n
    ]  # a slice of the whole axis starts at 0
    table = ctx.analysis.resolve_splits(ins[0], whole)
    shown = [i for i in range(len(table.axes)) if i not in hidden]
    axes: list[Axis] = [FIXED] * len(ctx.out_shape())
    for target, i in zip(numbers.offset_dims, shown, strict=True):
        if i in whole:
            axes[target] = table.axes[i]
            if table.weight:
                ctx.analysis.produce(table.axes[i])
    for i in range(len(table.axes)):
        if i not in whole:
            ctx.freeze(table.axes[i], "indexed by")
    for axis in ins[1].axes:
        ctx.freeze(axis, "used as an index in")
    if ctx.op.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        ctx.count(math.prod(ctx.out_shape()) + 3 * math.prod(ctx.shape(1)))
    # Linear in the stored kernels, even where the inputs decide which are picked, as for the experts of a token.
    return [combine(ins, axes)._replace(linear=table.linear, normalised=table.normalised)]


def _scatter(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Free along axes that the updates cover completely."""
    ctx.analysis.uncounted.add(ctx.op.name)
    numbers = ctx.op.params["dimension_numbers"]
    hidden = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    shown = [i for i in range(len(ctx.shape(0))) if i not in hidden]
    target = dict(zip(shown, numbers.update_window_dims, strict=True))
    whole = {i: j for i, j in target.items() if ctx.shape(0)[i] == ctx.shape(2)[j]}
    operand, updates = (
        ctx.analysis.resolve_splits(ins[0], list(whole)),
        ctx.analysis.resolve_splits(ins[2], list(whole.values())),
    )
    return [_written(ctx, [operand, ins[1], updates], whole)]


def _dynamic_update_slice(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    ctx.analysis.uncounted.add(ctx.op.name)
    whole = {i: i for i, (n, m) in enumerate(zip(ctx.shape(0), ctx.shape(1), strict=True)) if n == m}
    operand, updates = (ctx.analysis.resolve_splits(v, list(whole)) for v in ins[:2])
    return [_written(ctx, [operand, *ins[2:], updates], whole)]


def _written(ctx: RuleContext, ins: list[AbstractValue], whole: dict[int, int]) -> AbstractValue:
    """The first operand with parts of it replaced by the last.

    Args:
      whole: {axis of the operand: axis of the updates} that are covered completely.
    """
    operand, *indices, updates = ins
    axes: list[Axis] = []
    for i, axis in enumerate(operand.axes):
        if i in whole:
            axes.append(ctx.analysis.merge([axis, updates.axes[whole[i]]], ctx))
        else:
            ctx.freeze(axis, "written to at some of its indices by")
            axes.append(FIXED)
    for j, axis in enumerate(updates.axes):
        if j not in whole.values():
            ctx.freeze(axis, "written to places given by indices in")
    for value in indices:
        for axis in value.axes:
            ctx.freeze(axis, "used as an index in")
    return combine(ins, axes)


def _dynamic_slice(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    cut = [i for i, (n, m) in enumerate(zip(ctx.shape(0), ctx.out_shape(), strict=True)) if n != m]
    starts = [v.number for v in ins[1:]]
    if None not in starts:  # known indices: an ordinary slice
        sizes = [(i, ctx.out_shape()[i], ctx.shape(0)[i]) for i in cut]
        first = {i: min(max(int(starts[i] or 0), 0), size - n) for i, n, size in sizes}  # clamped, as by the primitive
        return [slice_axes(ctx, ins[0], {i: slice(first[i], first[i] + n) for i, n, _ in sizes})]
    table = spare(ctx, ins[0], cut)
    axes: list[Axis] = list(table.axes)
    for i in cut:
        ctx.freeze(axes[i], "indexed by")
        axes[i] = FIXED
    return [combine(ins, axes, table.linear)]


RULES: dict[str, Rule] = {
    "gather": _gather, "dynamic_slice": _dynamic_slice, "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max"), _scatter),
}  # fmt: skip
