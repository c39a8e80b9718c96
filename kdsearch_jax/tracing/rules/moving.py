"""Rules for operations that move, repeat, cut or join axes and do no arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from kdsearch_jax.tracing.findings import Context, Rule
from kdsearch_jax.tracing.labels import FIXED, UNIFORM, Axis, Part, Value, blend, labelled, parts, remake


def _identity(c: Context, ins: list[Value]) -> list[Value]:
    return ins[: len(c.op.outputs)]


def _iota(c: Context, ins: list[Value]) -> list[Value]:
    return [Value(tuple(FIXED if i == c.op.params["dimension"] else UNIFORM for i in range(len(c.out_shape()))))]


def _broadcast(c: Context, ins: list[Value]) -> list[Value]:
    value = ins[0]
    targets = c.op.params["broadcast_dimensions"]
    stretched = {i for i, target in enumerate(targets) if c.shape(0)[i] != c.out_shape()[target]}
    if any(isinstance(value.axes[i], Part) for i in stretched):
        value = c.found.settle(value, [i for i in range(len(targets)) if i not in stretched])
    axes: list[Axis] = [UNIFORM] * len(c.out_shape())
    for i, target in enumerate(targets):
        if i in stretched:
            c.freeze(value.axes[i], "broadcast by")
        else:
            axes[target] = value.axes[i]
    return [value._replace(axes=tuple(axes))]


def _tile(c: Context, ins: list[Value]) -> list[Value]:
    value, reps = ins[0], c.op.params["reps"]
    value = c.found.settle(value, [i for i, n in enumerate(reps) if n == 1])
    axes = [np.tile(a, n) if isinstance(a, np.ndarray) else a for a, n in zip(value.axes, reps, strict=True)]
    return [value._replace(axes=tuple(axes))]


def _transpose(c: Context, ins: list[Value]) -> list[Value]:
    return [ins[0]._replace(axes=tuple(ins[0].axes[i] for i in c.op.params["permutation"]))]


def _squeeze(c: Context, ins: list[Value]) -> list[Value]:
    gone = set(c.op.params["dimensions"])
    for i in gone:
        c.freeze(ins[0].axes[i], "picked out by its index in")
    return [ins[0]._replace(axes=tuple(a for i, a in enumerate(ins[0].axes) if i not in gone))]


def _expand_dims(c: Context, ins: list[Value]) -> list[Value]:
    old = iter(ins[0].axes)
    new = set(c.op.params["dimensions"])
    return [ins[0]._replace(axes=tuple(UNIFORM if i in new else next(old) for i in range(len(c.out_shape()))))]


def _reshape(c: Context, ins: list[Value]) -> list[Value]:
    """Splits the reshape into blocks of axes with equal products, and carries the labels through each."""
    shape, new_shape = c.shape(0), c.out_shape()
    for i, n in enumerate(shape):
        if n == 1:
            c.freeze(ins[0].axes[i], "picked out by its index in")
    blocks = _blocks(shape, new_shape)
    value = _whole_parts(c, ins[0], blocks)
    axes: list[Axis] = [UNIFORM] * len(new_shape)
    for a, b in blocks:
        block = _reshape_block(c, [value.axes[i] for i in a], [shape[i] for i in a], [new_shape[i] for i in b])
        for i, axis in zip(b, block, strict=True):
            axes[i] = axis
    return [value._replace(axes=tuple(axes))]


def _blocks(shape: Sequence[int], new_shape: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of axes, before and after, that hold as many entries; axes of size 1 belong to none."""
    old = [i for i, n in enumerate(shape) if n != 1]
    new = [i for i, n in enumerate(new_shape) if n != 1]
    blocks = []
    while old or new:
        a, b = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(shape[i] for i in a)) != (right := math.prod(new_shape[i] for i in b)):
            (a if left < right else b).append((old if left < right else new).pop(0))
        blocks.append((a, b))
    return blocks


def _whole_parts(c: Context, value: Value, blocks: list[tuple[list[int], list[int]]]) -> Value:
    """The value with only such parts as a block takes as they are, or all of in their order."""
    if not any(isinstance(axis, Part) for axis in value.axes):
        return value
    arrays = {id(axis.labels): axis.labels for axis in value.axes if isinstance(axis, Part)}
    alone = set()  # with an axis to itself, or repeated along it
    for a, b in blocks:
        varying = [i for i in a if value.axes[i] is not UNIFORM]
        alone |= set(varying) if len(varying) == len(b) == 1 else set()
    for labels in arrays.values():
        at = [i for i, axis in enumerate(value.axes) if isinstance(axis, Part) and axis.labels is labels]
        holder = next((a for a, _ in blocks if set(at) & set(a)), [])
        split = [a[0] for a, b in blocks if len(b) > 1 and len(at) > 1 and a[0] in at and len(a) == 1]
        if split:  # heads into groups of them: what is split again carries the labels
            value = c.found.settle(value, split)
            continue
        in_order = holder == at and [value.axes[i].dim for i in at] == list(range(len(at)))
        if not in_order and not all([i] in [a for a, _ in blocks] for i in at):
            # Those to be flattened with others stay fixed. All of them turned about, as in a channel shuffle: the last.
            carriers = [i for i in at if i in alone] or [max(at, key=lambda i: value.axes[i].dim)]
            value = c.found.settle(value, carriers)
    return value


def _reshape_block(c: Context, axes: list[Axis], sizes: list[int], new: list[int]) -> list[Axis]:
    arrays = [i for i, axis in enumerate(axes) if labelled(axis)]
    if not arrays:
        return [UNIFORM if all(axis is UNIFORM for axis in axes) else FIXED] * len(new)
    if len(axes) == 1 and len(new) == 1:
        return axes
    if isinstance(axes[0], Part):
        return parts(axes[0].labels.reshape(new))
    # Of a convolution's kernel made a matrix, the inputs, not the window.
    keep = arrays[0] if len(arrays) < 3 else arrays[-1]
    for i in arrays:
        if i != keep:
            c.freeze(axes[i], "flattened together with another axis of units in")
    spread = [1] * len(sizes)
    spread[keep] = sizes[keep]
    labels = np.broadcast_to(axes[keep].reshape(spread), sizes).reshape(new)
    made = parts(labels)
    if not any(map(labelled, made)):
        c.freeze(labels, "split apart in")
    return made


def _concatenate(c: Context, ins: list[Value]) -> list[Value]:
    along = c.op.params["dimension"]
    if any(isinstance(axis, Part) for v in ins for axis in v.axes):
        turned = _concatenated_parts(c, ins, along)
        if turned is not None:
            return [turned]
        ins = [c.found.settle(v, [i for i in range(len(v.axes)) if i != along]) for v in ins]
    for i in range(len(c.out_shape())):
        if i != along:
            c.found.join_kernels(ins, i)
    axes = [
        _joined([v.axes[i] for v in ins], [c.shape(k)[i] for k in range(len(ins))])
        if i == along
        else c.found.merge([v.axes[i] for v in ins], c)
        for i in range(len(c.out_shape()))
    ]
    return [blend(ins, axes, all(v.linear for v in ins))]


def _concatenated_parts(c: Context, ins: list[Value], along: int) -> Value | None:
    """Where all operands are split into the same number of parts at the same axes, and `along` is one of them."""
    places = [[(i, axis.dim) for i, axis in enumerate(v.axes) if isinstance(axis, Part)] for v in ins]
    arrays = [next((axis.labels for axis in v.axes if isinstance(axis, Part)), None) for v in ins]
    whole = all(
        array is not None and len(place) == array.ndim and all(v.axes[i].labels is array for i, _ in place)
        for v, array, place in zip(ins, arrays, places, strict=True)
    )
    if not whole or any(place != places[0] for place in places) or along not in dict(places[0]):
        return None
    dim = dict(places[0])[along]
    rest = {tuple(np.delete(array.shape, dim)) for array in arrays if array is not None}
    if len(rest) != 1:
        return None
    labels = np.concatenate([array for array in arrays if array is not None], dim)
    inside = dict(places[0])
    for i in set(range(len(c.out_shape()))) - set(inside):
        c.found.join_kernels(ins, i)
    axes = [
        Part(labels, inside[i]) if i in inside else c.found.merge([v.axes[i] for v in ins], c)
        for i in range(len(c.out_shape()))
    ]
    return blend(ins, axes, all(v.linear for v in ins))


def _joined(axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    if not any(isinstance(axis, np.ndarray) for axis in axes):
        return FIXED
    return np.concatenate(
        [a if isinstance(a, np.ndarray) else np.zeros(n, int) for a, n in zip(axes, sizes, strict=True)]
    )


def _stack(c: Context, ins: list[Value]) -> list[Value]:
    ins = [c.found.settle(v) for v in ins]
    axes = [c.found.merge([v.axes[i] for v in ins], c) for i in range(len(ins[0].axes))]
    for i in range(len(axes)):
        c.found.join_kernels(ins, i)
    axes.insert(c.op.params["axis"], FIXED)
    return [blend(ins, axes, all(v.linear for v in ins))]


def _unstack(c: Context, ins: list[Value]) -> list[Value]:
    axis = c.op.params["axis"]
    return [_drop(cut_axes(c, ins[0], {axis: slice(i, i + 1)}), axis, c) for i in range(c.shape(0)[axis])]


def _drop(value: Value, axis: int, c: Context) -> Value:
    c.freeze(value.axes[axis], "picked out by its index in")
    return value._replace(axes=value.axes[:axis] + value.axes[axis + 1 :])


def _slice(c: Context, ins: list[Value]) -> list[Value]:
    start, limit = c.op.params["start_indices"], c.op.params["limit_indices"]
    stride = c.op.params["strides"] or (1,) * len(start)
    cut = {
        i: slice(a, b, s)
        for i, (a, b, s, n) in enumerate(zip(start, limit, stride, c.shape(0), strict=True))
        if (a, b, s) != (0, n, 1)
    }
    return [cut_axes(c, ins[0], cut)]


def _split(c: Context, ins: list[Value]) -> list[Value]:
    axis, sizes = c.op.params["axis"], c.op.params["sizes"]
    starts = np.cumsum([0, *sizes]).tolist()
    return [cut_axes(c, ins[0], {axis: slice(a, b)}) for a, b in itertools.pairwise(starts)]


def _rev(c: Context, ins: list[Value]) -> list[Value]:
    return [cut_axes(c, ins[0], {i: slice(None, None, -1) for i in c.op.params["dimensions"]})]


def cut_axes(c: Context, value: Value, cut: dict[int, slice]) -> Value:
    """The value with some of its axes cut."""
    axes = list(value.axes)
    for i, piece in cut.items():
        axis = axes[i]
        if isinstance(axis, np.ndarray):
            _note_parts(c, axis, piece)
            axes[i] = axis[piece]
        elif isinstance(axis, Part):
            c.found.pairable(c.site, np.moveaxis(axis.labels, axis.dim, 0).reshape(axis.labels.shape[axis.dim], -1))
            labels = axis.labels[(slice(None),) * axis.dim + (piece,)]
            if labels.size == 1:
                c.freeze(labels, "picked out by its index in")
            axes = remake(axes, axis.labels, labels)
    return value._replace(axes=tuple(axes))


def _note_parts(c: Context, axis: np.ndarray, piece: slice) -> None:
    """Notes that an axis is cut into parts of equal length, where `piece` is such a part."""
    start, stop, step = piece.indices(len(axis))
    size = len(range(start, stop, step))
    if size == 0 or len(axis) % size or size == len(axis):
        return
    if step == 1 and start % size == 0:
        c.found.pairable(c.site, axis.reshape(-1, size))
    elif step == len(axis) // size and start < step:
        c.found.pairable(c.site, axis.reshape(size, step).T)


def _pad(c: Context, ins: list[Value]) -> list[Value]:
    config = c.op.params["padding_config"]
    padded = [i for i, each in enumerate(config) if any(each)]
    value = ins[0]
    if any(isinstance(value.axes[i], Part) for i in padded):
        value = c.found.settle(value, [i for i in range(len(config)) if i not in padded])
    axes = []
    for axis, (low, high, interior) in zip(value.axes, config, strict=True):
        if isinstance(axis, np.ndarray) and (low or high or interior):
            if interior or low < 0 or high < 0:
                c.freeze(axis, "padded between its indices in")
                axis = FIXED
            else:
                axis = np.concatenate([np.zeros(low, int), axis, np.zeros(high, int)])
        elif axis is UNIFORM and (low or high or interior):
            axis = FIXED
        axes.append(axis)
    return [blend(ins, axes, ins[0].linear)]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast, "transpose": _transpose, "reshape": _reshape, "squeeze": _squeeze, "rev": _rev,
    "expand_dims": _expand_dims, "concatenate": _concatenate, "slice": _slice, "split": _split, "pad": _pad,
    "tile": _tile, "stack": _stack, "unstack": _unstack, "iota": _iota, "optimization_barrier": _identity,
}  # fmt: skip
