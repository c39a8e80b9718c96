"""Rules for operations that mix or pick the indices of some axes, and for what no rule understands."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax

from kdsearch_jax.tracing.findings import Context, Rule
from kdsearch_jax.tracing.labels import FIXED, UNIFORM, Axis, Value, blend
from kdsearch_jax.tracing.rules.moving import cut_axes


def _spare(c: Context, value: Value, mixed: Collection[int]) -> Value:
    """The value with what is split settled on axes that are not mixed."""
    return c.found.settle(value, [i for i in range(len(value.axes)) if i not in mixed])


def unknown(c: Context, ins: list[Value]) -> list[Value]:
    """Freezes whatever it touches."""
    ins = [c.found.settle(v) for v in ins]
    for v in ins:
        for axis in v.axes:
            c.freeze(axis, "touched by the unknown primitive")
    if any(axis is not FIXED and axis is not None for v in ins for axis in v.axes):
        c.found.unknown.add(c.op.name)
    c.found.uncounted.add(c.op.name)
    return [blend(ins, (FIXED,) * len(c.out_shape(i))) for i in range(len(c.op.outputs))]


def _fresh(c: Context, ins: list[Value]) -> list[Value]:
    """Random bits and the like: made at whatever size is asked for, but varying along every axis."""
    c.found.uncounted.add(c.op.name)
    return [blend(ins, (FIXED,) * len(c.out_shape(i))) for i in range(len(c.op.outputs))]


def _reduce(c: Context, ins: list[Value]) -> list[Value]:
    gone = set(c.op.params["axes"])
    ins = [_spare(c, v, gone) for v in ins]
    if c.op.name in ("argmax", "argmin"):
        c.found.uncounted.add(c.op.name)
    zero = c.op.name == "reduce_sum" and ins[0].number == 0.0
    (c.fold if zero else c.count)(math.prod(c.shape(0)) - math.prod(c.out_shape()))
    if zero:
        return [Value((UNIFORM,) * len(c.out_shape()), number=0.0)]
    for v in ins:
        for i in gone:
            if c.op.name == "reduce_sum" and v.weight and c.found.stored(v, v.axes[i]):
                c.found.reads.append(v.axes[i])  # as the norm of a kernel, to which what is gated by 0 adds nothing
            else:
                c.freeze(v.axes[i], "its units are mixed by")
    keep = [i for i in range(len(c.shape(0))) if i not in gone]
    axes = [c.found.merge([v.axes[i] for v in ins if len(v.axes) > i], c) for i in keep]
    linear = c.op.name == "reduce_sum" and all(v.linear for v in ins)
    return [blend(ins, axes, linear)] * len(c.op.outputs)


def _along(c: Context, ins: list[Value]) -> list[Value]:
    """Sorts and cumulative operations: mix the indices of one axis."""
    axis = c.op.params["axis"] if "axis" in c.op.params else c.op.params["dimension"]
    ins = [_spare(c, v, [axis]) for v in ins]
    c.found.uncounted.add(c.op.name)
    for v in ins:
        c.freeze(v.axes[axis], "its units are mixed by")
    axes = [c.found.merge([v.axes[i] for v in ins], c) for i in range(len(c.out_shape()))]
    axes[axis] = FIXED
    return [blend(ins, axes)] * len(c.op.outputs)


def _top_k(c: Context, ins: list[Value]) -> list[Value]:
    return _along(c, ins) if "axis" in c.op.params else unknown(c, ins)


def _window(c: Context, ins: list[Value]) -> list[Value]:
    """Pooling: free along axes whose window is 1."""
    sizes = c.op.params["window_dimensions"]
    pooled = [i for i, n in enumerate(c.out_shape()) if sizes[i] != 1 or n != c.shape(0)[i]]
    ins = [_spare(c, v, pooled) for v in ins]
    c.count(math.prod(c.out_shape()) * (math.prod(sizes) - 1))
    axes: list[Axis] = list(ins[0].axes)
    for i in pooled:
        c.freeze(axes[i], "its units are pooled by")
        axes[i] = FIXED
    return [blend(ins, axes)] * len(c.op.outputs)


def _gather(c: Context, ins: list[Value]) -> list[Value]:
    numbers, sizes = c.op.params["dimension_numbers"], c.op.params["slice_sizes"]
    hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = [i for i, n in enumerate(c.shape(0)) if i not in hidden and sizes[i] == n]  # these can only start at 0
    table = c.found.settle(ins[0], whole)
    shown = [i for i in range(len(table.axes)) if i not in hidden]
    axes: list[Axis] = [FIXED] * len(c.out_shape())
    for target, i in zip(numbers.offset_dims, shown, strict=True):
        if i in whole:
            axes[target] = table.axes[i]
    for i in range(len(table.axes)):
        if i not in whole:
            c.freeze(table.axes[i], "indexed by")
    for axis in ins[1].axes:
        c.freeze(axis, "used as an index in")
    if c.op.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        c.count(math.prod(c.out_shape()) + 3 * math.prod(c.shape(1)))
    # Linear in the stored kernels also where the network's inputs decide which are picked, as a token's experts.
    return [blend(ins, axes)._replace(linear=table.linear, normalised=table.normalised)]


def _scatter(c: Context, ins: list[Value]) -> list[Value]:
    """Free along axes of which the updates have all."""
    c.found.uncounted.add(c.op.name)
    numbers = c.op.params["dimension_numbers"]
    hidden = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    shown = [i for i in range(len(c.shape(0))) if i not in hidden]
    target = dict(zip(shown, numbers.update_window_dims, strict=True))
    whole = {i: j for i, j in target.items() if c.shape(0)[i] == c.shape(2)[j]}
    operand, updates = c.found.settle(ins[0], list(whole)), c.found.settle(ins[2], list(whole.values()))
    return [_written(c, [operand, ins[1], updates], whole)]


def _dynamic_update_slice(c: Context, ins: list[Value]) -> list[Value]:
    c.found.uncounted.add(c.op.name)
    whole = {i: i for i, (n, m) in enumerate(zip(c.shape(0), c.shape(1), strict=True)) if n == m}
    operand, updates = (c.found.settle(v, list(whole)) for v in ins[:2])
    return [_written(c, [operand, *ins[2:], updates], whole)]


def _written(c: Context, ins: list[Value], whole: dict[int, int]) -> Value:
    """The first operand with parts of it replaced by the last; whole: axes that both have in full."""
    operand, *indices, updates = ins
    axes: list[Axis] = []
    for i, axis in enumerate(operand.axes):
        if i in whole:
            axes.append(c.found.merge([axis, updates.axes[whole[i]]], c))
        else:
            c.freeze(axis, "written to at some of its indices by")
            axes.append(FIXED)
    for j, axis in enumerate(updates.axes):
        if j not in whole.values():
            c.freeze(axis, "written to places given by indices in")
    for value in indices:
        for axis in value.axes:
            c.freeze(axis, "used as an index in")
    return blend(ins, axes)


def _dynamic_slice(c: Context, ins: list[Value]) -> list[Value]:
    cut = [i for i, (n, m) in enumerate(zip(c.shape(0), c.out_shape(), strict=True)) if n != m]
    starts = [v.number for v in ins[1:]]
    if None not in starts:  # known, so that it is a slice
        sizes = [(i, c.out_shape()[i], c.shape(0)[i]) for i in cut]
        first = {i: min(max(int(starts[i] or 0), 0), size - n) for i, n, size in sizes}  # as the primitive clamps it
        return [cut_axes(c, ins[0], {i: slice(first[i], first[i] + n) for i, n, _ in sizes})]
    table = _spare(c, ins[0], cut)
    axes: list[Axis] = list(table.axes)
    for i in cut:
        c.freeze(axes[i], "indexed by")
        axes[i] = FIXED
    return [blend(ins, axes, table.linear)]


RULES: dict[str, Rule] = {
    "gather": _gather, "dynamic_slice": _dynamic_slice, "dynamic_update_slice": _dynamic_update_slice, "top_k": _top_k,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max"), _scatter),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
                     "argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), _along),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _window),
    **dict.fromkeys(("random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split",
                     "threefry2x32", "rng_bit_generator", "rng_uniform", "random_gamma"), _fresh),
}  # fmt: skip
