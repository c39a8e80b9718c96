"""Rules for operations that move, repeat, slice or concatenate axes and do no arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from kdsearch_jax.tracing.analysis import Rule, RuleContext
from kdsearch_jax.tracing.labels import (
    FIXED,
    UNIFORM,
    AbstractValue,
    Axis,
    SplitAxis,
    combine,
    has_labels,
    replace_split,
    split_axes,
)


def _identity(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    return ins[: len(ctx.op.outputs)]


def _iota(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    return [
        AbstractValue(tuple(FIXED if i == ctx.op.params["dimension"] else UNIFORM for i in range(len(ctx.out_shape()))))
    ]


def _broadcast(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    value = ins[0]
    targets = ctx.op.params["broadcast_dimensions"]
    stretched = {i for i, target in enumerate(targets) if ctx.shape(0)[i] != ctx.out_shape()[target]}
    if any(isinstance(value.axes[i], SplitAxis) for i in stretched):
        value = ctx.analysis.resolve_splits(value, [i for i in range(len(targets)) if i not in stretched])
    axes: list[Axis] = [UNIFORM] * len(ctx.out_shape())
    for i, target in enumerate(targets):
        if i in stretched:
            ctx.freeze(value.axes[i], "broadcast by")
        else:
            axes[target] = value.axes[i]
    return [value._replace(axes=tuple(axes))]


def _tile(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    value, reps = ins[0], ctx.op.params["reps"]
    value = ctx.analysis.resolve_splits(value, [i for i, n in enumerate(reps) if n == 1])
    axes = [np.tile(a, n) if isinstance(a, np.ndarray) else a for a, n in zip(value.axes, reps, strict=True)]
    return [value._replace(axes=tuple(axes))]


def _transpose(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    return [ins[0]._replace(axes=tuple(ins[0].axes[i] for i in ctx.op.params["permutation"]))]


def _squeeze(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    gone = set(ctx.op.params["dimensions"])
    for i in gone:
        ctx.freeze(ins[0].axes[i], "picked out by its index in")
    return [ins[0]._replace(axes=tuple(a for i, a in enumerate(ins[0].axes) if i not in gone))]


def _expand_dims(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    old = iter(ins[0].axes)
    new = set(ctx.op.params["dimensions"])
    return [ins[0]._replace(axes=tuple(UNIFORM if i in new else next(old) for i in range(len(ctx.out_shape()))))]


def _reshape(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Divides the axes into blocks with equal products, before and after, and carries the labels through each."""
    shape, new_shape = ctx.shape(0), ctx.out_shape()
    for i, n in enumerate(shape):
        if n == 1:
            ctx.freeze(ins[0].axes[i], "picked out by its index in")
    blocks = _blocks(shape, new_shape)
    value = _resolve_for_reshape(ctx, ins[0], blocks)
    axes: list[Axis] = [UNIFORM] * len(new_shape)
    for a, b in blocks:
        block = _reshape_block(ctx, [value.axes[i] for i in a], [shape[i] for i in a], [new_shape[i] for i in b])
        for i, axis in zip(b, block, strict=True):
            axes[i] = axis
    return [value._replace(axes=tuple(axes))]


def _blocks(shape: Sequence[int], new_shape: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes, before and after, with equal products; axes of size 1 are in none."""
    old = [i for i, n in enumerate(shape) if n != 1]
    new = [i for i, n in enumerate(new_shape) if n != 1]
    blocks = []
    while old or new:
        a, b = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(shape[i] for i in a)) != (right := math.prod(new_shape[i] for i in b)):
            (a if left < right else b).append((old if left < right else new).pop(0))
        blocks.append((a, b))
    return blocks


def _resolve_for_reshape(
    ctx: RuleContext, value: AbstractValue, blocks: list[tuple[list[int], list[int]]]
) -> AbstractValue:
    """Resolves the splits except those whose axes a block keeps unchanged, or merges completely and in order."""
    if not any(isinstance(axis, SplitAxis) for axis in value.axes):
        return value
    arrays = {id(axis.labels): axis.labels for axis in value.axes if isinstance(axis, SplitAxis)}
    alone = set()  # axes that keep an axis to themselves, or are repeated along it
    for a, b in blocks:
        varying = [i for i in a if value.axes[i] is not UNIFORM]
        alone |= set(varying) if len(varying) == len(b) == 1 else set()
    for labels in arrays.values():
        at = [i for i, axis in enumerate(value.axes) if isinstance(axis, SplitAxis) and axis.labels is labels]
        holder = next((a for a, _ in blocks if set(at) & set(a)), [])
        split = [a[0] for a, b in blocks if len(b) > 1 and len(at) > 1 and a[0] in at and len(a) == 1]
        if split:  # such as heads into groups of heads: the axis that is split again carries the labels
            value = ctx.analysis.resolve_splits(value, split)
            continue
        in_order = holder == at and [value.axes[i].dim for i in at] == list(range(len(at)))
        if not in_order and not all([i] in [a for a, _ in blocks] for i in at):
            # Axes that are flattened with others become fixed. Where all are permuted, as in a channel shuffle, the
            # last one carries the labels.
            carriers = [i for i in at if i in alone] or [max(at, key=lambda i: value.axes[i].dim)]
            value = ctx.analysis.resolve_splits(value, carriers)
    return value


def _reshape_block(ctx: RuleContext, axes: list[Axis], sizes: list[int], new: list[int]) -> list[Axis]:
    arrays = [i for i, axis in enumerate(axes) if has_labels(axis)]
    if not arrays:
        return [UNIFORM if all(axis is UNIFORM for axis in axes) else FIXED] * len(new)
    if len(axes) == 1 and len(new) == 1:
        return axes
    if isinstance(axes[0], SplitAxis):
        return split_axes(axes[0].labels.reshape(new))
    # Of a convolution kernel that is flattened to a matrix, the input channels and not the window.
    keep = arrays[0] if len(arrays) < 3 else arrays[-1]
    for i in arrays:
        if i != keep:
            ctx.freeze(axes[i], "flattened together with another axis of units in")
    spread = [1] * len(sizes)
    spread[keep] = sizes[keep]
    labels = np.broadcast_to(axes[keep].reshape(spread), sizes).reshape(new)
    new_axes = split_axes(labels)
    if not any(map(has_labels, new_axes)):
        ctx.freeze(labels, "split apart in")
    return new_axes


def _concatenate(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    along = ctx.op.params["dimension"]
    if any(isinstance(axis, SplitAxis) for v in ins for axis in v.axes):
        merged = _concatenate_splits(ctx, ins, along)
        if merged is not None:
            return [merged]
        ins = [ctx.analysis.resolve_splits(v, [i for i in range(len(v.axes)) if i != along]) for v in ins]
    for i in range(len(ctx.out_shape())):
        if i != along:
            ctx.analysis.join_kernels(ins, i)
    axes = [
        _concatenate_labels([v.axes[i] for v in ins], [ctx.shape(k)[i] for k in range(len(ins))])
        if i == along
        else ctx.analysis.merge([v.axes[i] for v in ins], ctx)
        for i in range(len(ctx.out_shape()))
    ]
    return [combine(ins, axes, all(v.linear for v in ins))]


def _concatenate_splits(ctx: RuleContext, ins: list[AbstractValue], along: int) -> AbstractValue | None:
    """Concatenates splits, where all operands are split alike and `along` is one of the split axes; else None."""
    positions = [[(i, axis.dim) for i, axis in enumerate(v.axes) if isinstance(axis, SplitAxis)] for v in ins]
    arrays = [next((axis.labels for axis in v.axes if isinstance(axis, SplitAxis)), None) for v in ins]
    whole = all(
        array is not None and len(position) == array.ndim and all(v.axes[i].labels is array for i, _ in position)
        for v, array, position in zip(ins, arrays, positions, strict=True)
    )
    if not whole or any(position != positions[0] for position in positions) or along not in dict(positions[0]):
        return None
    dim = dict(positions[0])[along]
    rest = {tuple(np.delete(array.shape, dim)) for array in arrays if array is not None}
    if len(rest) != 1:
        return None
    labels = np.concatenate([array for array in arrays if array is not None], dim)
    inside = dict(positions[0])
    for i in set(range(len(ctx.out_shape()))) - set(inside):
        ctx.analysis.join_kernels(ins, i)
    axes = [
        SplitAxis(labels, inside[i]) if i in inside else ctx.analysis.merge([v.axes[i] for v in ins], ctx)
        for i in range(len(ctx.out_shape()))
    ]
    return combine(ins, axes, all(v.linear for v in ins))


def _concatenate_labels(axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    if not any(isinstance(axis, np.ndarray) for axis in axes):
        return FIXED
    return np.concatenate(
        [a if isinstance(a, np.ndarray) else np.zeros(n, int) for a, n in zip(axes, sizes, strict=True)]
    )


def _stack(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    ins = [ctx.analysis.resolve_splits(v) for v in ins]
    axes = [ctx.analysis.merge([v.axes[i] for v in ins], ctx) for i in range(len(ins[0].axes))]
    for i in range(len(axes)):
        ctx.analysis.join_kernels(ins, i)
    axes.insert(ctx.op.params["axis"], FIXED)
    return [combine(ins, axes, all(v.linear for v in ins))]


def _unstack(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    axis = ctx.op.params["axis"]
    return [_drop_axis(slice_axes(ctx, ins[0], {axis: slice(i, i + 1)}), axis, ctx) for i in range(ctx.shape(0)[axis])]


def _drop_axis(value: AbstractValue, axis: int, ctx: RuleContext) -> AbstractValue:
    ctx.freeze(value.axes[axis], "picked out by its index in")
    return value._replace(axes=value.axes[:axis] + value.axes[axis + 1 :])


def _slice(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    start, limit = ctx.op.params["start_indices"], ctx.op.params["limit_indices"]
    stride = ctx.op.params["strides"] or (1,) * len(start)
    slices = {
        i: slice(a, b, s)
        for i, (a, b, s, n) in enumerate(zip(start, limit, stride, ctx.shape(0), strict=True))
        if (a, b, s) != (0, n, 1)
    }
    return [slice_axes(ctx, ins[0], slices)]


def _split(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    axis, sizes = ctx.op.params["axis"], ctx.op.params["sizes"]
    starts = np.cumsum([0, *sizes]).tolist()
    return [slice_axes(ctx, ins[0], {axis: slice(a, b)}) for a, b in itertools.pairwise(starts)]


def _rev(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    return [slice_axes(ctx, ins[0], {i: slice(None, None, -1) for i in ctx.op.params["dimensions"]})]


def slice_axes(ctx: RuleContext, value: AbstractValue, slices: dict[int, slice]) -> AbstractValue:
    """The value with some of its axes sliced, {axis: slice}."""
    axes = list(value.axes)
    for i, piece in slices.items():
        axis = axes[i]
        if isinstance(axis, np.ndarray):
            _record_parts(ctx, axis, piece)
            axes[i] = axis[piece]
        elif isinstance(axis, SplitAxis):
            ctx.analysis.pair_parts(
                ctx.site, np.moveaxis(axis.labels, axis.dim, 0).reshape(axis.labels.shape[axis.dim], -1)
            )
            labels = axis.labels[(slice(None),) * axis.dim + (piece,)]
            if labels.size == 1:
                ctx.freeze(labels, "picked out by its index in")
            axes = replace_split(axes, axis.labels, labels)
    return value._replace(axes=tuple(axes))


def _record_parts(ctx: RuleContext, axis: np.ndarray, piece: slice) -> None:
    """Records that an axis is divided into parts of equal length, where `piece` is one of them."""
    start, stop, step = piece.indices(len(axis))
    size = len(range(start, stop, step))
    if size == 0 or len(axis) % size or size == len(axis):
        return
    if step == 1 and start % size == 0:
        ctx.analysis.pair_parts(ctx.site, axis.reshape(-1, size))
    elif step == len(axis) // size and start < step:
        ctx.analysis.pair_parts(ctx.site, axis.reshape(size, step).T)


def _pad(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    config = ctx.op.params["padding_config"]
    padded = [i for i, amounts in enumerate(config) if any(amounts)]
    value = ins[0]
    if any(isinstance(value.axes[i], SplitAxis) for i in padded):
        value = ctx.analysis.resolve_splits(value, [i for i in range(len(config)) if i not in padded])
    axes = []
    for axis, (low, high, interior) in zip(value.axes, config, strict=True):
        if isinstance(axis, np.ndarray) and (low or high or interior):
            if interior or low < 0 or high < 0:
                ctx.freeze(axis, "padded between its indices in")
                axis = FIXED
            else:
                axis = np.concatenate([np.zeros(low, int), axis, np.zeros(high, int)])
        elif axis is UNIFORM and (low or high or interior):
            axis = FIXED
        axes.append(axis)
    return [combine(ins, axes, ins[0].linear)]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast, "transpose": _transpose, "reshape": _reshape, "squeeze": _squeeze, "rev": _rev,
    "expand_dims": _expand_dims, "concatenate": _concatenate, "slice": _slice, "split": _split, "pad": _pad,
    "tile": _tile, "stack": _stack, "unstack": _unstack, "iota": _iota, "optimization_barrier": _identity,
}  # fmt: skip
