"""Rules for operations that mix the indices of some axes (reductions, sorts, pooling, transforms), and the fallback."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from kdsearch_jax.tracing.analysis import Rule, RuleContext
from kdsearch_jax.tracing.labels import FIXED, UNIFORM, AbstractValue, Axis, combine


def spare(ctx: RuleContext, value: AbstractValue, mixed: Collection[int]) -> AbstractValue:
    """The value with its splits resolved to axes that are not mixed."""
    return ctx.analysis.resolve_splits(value, [i for i in range(len(value.axes)) if i not in mixed])


def unknown(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """The rule for a primitive without one: freezes its operands."""
    ins = [ctx.analysis.resolve_splits(v) for v in ins]
    for v in ins:
        for axis in v.axes:
            ctx.freeze(axis, "touched by the unknown primitive")
    if any(axis is not FIXED and axis is not None for v in ins for axis in v.axes):
        ctx.analysis.unknown.add(ctx.op.name)
    ctx.analysis.uncounted.add(ctx.op.name)
    return [combine(ins, (FIXED,) * len(ctx.out_shape(i))) for i in range(len(ctx.op.outputs))]


def _fresh(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Random bits and similar: produced at any size, and varying along every axis."""
    ctx.analysis.uncounted.add(ctx.op.name)
    return [combine(ins, (FIXED,) * len(ctx.out_shape(i))) for i in range(len(ctx.op.outputs))]


def _reduce(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    gone = set(ctx.op.params["axes"])
    ins = [spare(ctx, v, gone) for v in ins]
    if ctx.op.name in ("argmax", "argmin"):
        ctx.analysis.uncounted.add(ctx.op.name)
    zero = ctx.op.name == "reduce_sum" and ins[0].number == 0.0
    (ctx.count_foldable if zero else ctx.count)(math.prod(ctx.shape(0)) - math.prod(ctx.out_shape()))
    if zero:
        return [AbstractValue((UNIFORM,) * len(ctx.out_shape()), number=0.0)]
    keep = [i for i in range(len(ctx.shape(0))) if i not in gone]
    if ctx.op.name == "reduce_sum":
        return [_sum(ctx, ins[0], gone, keep)]
    for v in ins:
        for i in gone:
            ctx.freeze(v.axes[i], "its units are mixed by")
    axes = [ctx.analysis.merge([v.axes[i] for v in ins if len(v.axes) > i], ctx) for i in keep]
    return [combine(ins, axes)] * len(ctx.op.outputs)


def _sum(ctx: RuleContext, value: AbstractValue, gone: Collection[int], keep: Collection[int]) -> AbstractValue:
    """A sum over units: of a stored kernel, whose gated entries add nothing, or of the units that stay."""
    labels = {i: axis for i in gone if isinstance(axis := value.axes[i], np.ndarray)}
    for i in [i for i in labels if value.weight and ctx.analysis.is_stored(value, labels[i])]:
        ctx.analysis.contracted.append(labels.pop(i))
    if labels and value.active:
        ctx.analysis.mix(ctx, 0, labels, "width")
    for axis in labels.values() if not value.active else ():
        ctx.freeze(axis, "its units are mixed by")
    sizes = [axis if isinstance(axis := value.axes[i], np.ndarray) else ctx.shape(0)[i] for i in gone]
    terms = (*value.summed, *sizes)
    result = combine([value], [value.axes[i] for i in keep], value.linear)
    return result._replace(summed=terms) if any(isinstance(n, np.ndarray) for n in terms) else result


def _along(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Sorts and cumulative operations, which mix the indices of one axis."""
    axis = ctx.op.params["axis"] if "axis" in ctx.op.params else ctx.op.params["dimension"]
    ins = [spare(ctx, v, [axis]) for v in ins]
    ctx.analysis.uncounted.add(ctx.op.name)
    for v in ins:
        ctx.freeze(v.axes[axis], "its units are mixed by")
    axes = [ctx.analysis.merge([v.axes[i] for v in ins], ctx) for i in range(len(ctx.out_shape()))]
    axes[axis] = FIXED
    return [combine(ins, axes)] * len(ctx.op.outputs)


def _top_k(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    return _along(ctx, ins) if "axis" in ctx.op.params else unknown(ctx, ins)


def _window(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Pooling, free along axes whose window is 1."""
    sizes = ctx.op.params["window_dimensions"]
    pooled = [i for i, n in enumerate(ctx.out_shape()) if sizes[i] != 1 or n != ctx.shape(0)[i]]
    ins = [spare(ctx, v, pooled) for v in ins]
    ctx.count(math.prod(ctx.out_shape()) * (math.prod(sizes) - 1))
    axes: list[Axis] = list(ins[0].axes)
    for i in pooled:
        ctx.freeze(axes[i], "its units are pooled by")
        axes[i] = FIXED
    return [combine(ins, axes)] * len(ctx.op.outputs)


def _fft(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """A Fourier transform of the last axes, linear along the others."""
    rank, count = len(ctx.shape(0)), len(ctx.op.params["fft_lengths"])
    kept = range(rank - count)
    value = ctx.analysis.resolve_splits(ins[0], kept)
    for axis in value.axes[rank - count :]:
        ctx.freeze(axis, "its units are mixed by")
    ctx.analysis.uncounted.add(ctx.op.name)
    return [combine(ins, [*(value.axes[i] for i in kept), *[FIXED] * count], value.linear)]


def _reduce_by_function(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """`jax.lax.reduce` by an arbitrary function; the second half of the operands are initial values."""
    ctx.analysis.uncounted.add(ctx.op.name)
    gone = ctx.op.params["dimensions"]
    kept = [i for i in range(len(ctx.shape(0))) if i not in gone]
    arrays = [ctx.analysis.resolve_splits(v, kept) for v in ins[: len(ins) // 2]]
    for v in arrays:
        for i in gone:
            ctx.freeze(v.axes[i], "its units are mixed by")
    return [combine(ins, [ctx.analysis.merge([v.axes[i] for v in arrays], ctx) for i in kept])] * len(ctx.op.outputs)


def _approx_top_k(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    ctx.analysis.uncounted.add(ctx.op.name)
    along = ctx.op.params["reduction_dimension"] % len(ctx.shape(0))
    value = ctx.analysis.resolve_splits(ins[0], [i for i in range(len(ctx.shape(0))) if i != along])
    ctx.freeze(value.axes[along], "its units are mixed by")
    axes: list[Axis] = [FIXED if i == along else axis for i, axis in enumerate(value.axes)]
    return [combine(ins, axes)] * len(ctx.op.outputs)


def _triangular_solve(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Free along the axis of the right-hand sides; the matrix mixes the other axis."""
    ctx.analysis.uncounted.add(ctx.op.name)
    rank = len(ctx.out_shape())
    solved, sides = (rank - 2, rank - 1) if ctx.op.params["left_side"] else (rank - 1, rank - 2)
    matrix, value = (
        ctx.analysis.resolve_splits(ins[0], range(rank - 2)),
        ctx.analysis.resolve_splits(ins[1], [*range(rank - 2), sides]),
    )
    for axis in (*matrix.axes[-2:], value.axes[solved]):
        ctx.freeze(axis, "its units are mixed by")
    axes: list[Axis] = [ctx.analysis.merge([matrix.axes[i], value.axes[i]], ctx) for i in range(rank - 2)] + [
        FIXED,
        FIXED,
    ]
    axes[sides] = value.axes[sides]
    return [combine(ins, axes, value.linear and not matrix.weight)]


RULES: dict[str, Rule] = {
    "top_k": _top_k, "reduce": _reduce_by_function, "approx_top_k": _approx_top_k, "fft": _fft,
    "triangular_solve": _triangular_solve,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
                     "argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), _along),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _window),
    **dict.fromkeys(("random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split",
                     "threefry2x32", "rng_bit_generator", "rng_uniform", "random_gamma"), _fresh),
}  # fmt: skip
