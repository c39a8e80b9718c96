"""Rules for operations that few networks use: reductions by a function, approximate top-k, triangular solves."""

from __future__ import annotations

from kdsearch_jax.tracing.findings import Context, Rule
from kdsearch_jax.tracing.labels import FIXED, Axis, Value, blend


def _reduce(c: Context, ins: list[Value]) -> list[Value]:
    """`jax.lax.reduce`, by any function of two numbers; the second half of the operands are its initial values."""
    c.found.uncounted.add(c.op.name)
    gone = c.op.params["dimensions"]
    kept = [i for i in range(len(c.shape(0))) if i not in gone]
    arrays = [c.found.settle(v, kept) for v in ins[: len(ins) // 2]]
    for v in arrays:
        for i in gone:
            c.freeze(v.axes[i], "its units are mixed by")
    return [blend(ins, [c.found.merge([v.axes[i] for v in arrays], c) for i in kept])] * len(c.op.outputs)


def _approx_top_k(c: Context, ins: list[Value]) -> list[Value]:
    c.found.uncounted.add(c.op.name)
    along = c.op.params["reduction_dimension"] % len(c.shape(0))
    value = c.found.settle(ins[0], [i for i in range(len(c.shape(0))) if i != along])
    c.freeze(value.axes[along], "its units are mixed by")
    axes: list[Axis] = [FIXED if i == along else axis for i, axis in enumerate(value.axes)]
    return [blend(ins, axes)] * len(c.op.outputs)


def _triangular_solve(c: Context, ins: list[Value]) -> list[Value]:
    """Free along the axis of the right-hand sides; the matrix mixes the other one."""
    c.found.uncounted.add(c.op.name)
    rank = len(c.out_shape())
    solved, sides = (rank - 2, rank - 1) if c.op.params["left_side"] else (rank - 1, rank - 2)
    matrix, value = c.found.settle(ins[0], range(rank - 2)), c.found.settle(ins[1], [*range(rank - 2), sides])
    for axis in (*matrix.axes[-2:], value.axes[solved]):
        c.freeze(axis, "its units are mixed by")
    axes: list[Axis] = [c.found.merge([matrix.axes[i], value.axes[i]], c) for i in range(rank - 2)] + [FIXED, FIXED]
    axes[sides] = value.axes[sides]
    return [blend(ins, axes, value.linear and not matrix.weight)]


RULES: dict[str, Rule] = {
    "reduce": _reduce, "approx_top_k": _approx_top_k, "triangular_solve": _triangular_solve,
}  # fmt: skip
