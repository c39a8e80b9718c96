"""The rule for elementwise operations, which couple their operands index by index."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import jax.numpy as jnp

from kdsearch_jax.tracing.analysis import MixingSite, Rule, RuleContext
from kdsearch_jax.tracing.labels import FIXED, UNIFORM, AbstractValue, Axis, SplitAxis, combine, has_labels
from kdsearch_jax.tracing.program import Op

LINEAR = {"neg", "convert_element_type", "copy", "copy_p", "real", "imag", "conj", "reduce_precision", "stop_gradient",
          "name", "sharding_constraint", "device_put", "reshard", "layout_constraint", "with_memory_space_constraint",
          "pin", "unpin"}  # fmt: skip
TRANSCENDENTAL = {"exp", "log", "log1p", "expm1", "tanh", "sin", "cos", "tan", "sqrt", "rsqrt", "cbrt", "erf",
                  "pow", "atan", "atan2"}  # fmt: skip
NAMES = LINEAR | TRANSCENDENTAL | {
    "exp2", "logistic", "add", "add_any", "sub", "mul", "div", "rem", "max", "min", "abs", "sign", "floor", "ceil",
    "round", "square", "integer_pow", "is_finite", "not", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
    "select_n", "clamp", "erf_inv", "erfc", "sinh", "cosh", "asin", "acos", "asinh", "acosh", "atanh", "nextafter",
    "imag", "conj", "complex", "lgamma", "digamma", "shift_left", "shift_right_logical", "shift_right_arithmetic",
    "population_count", "clz", "bitcast_convert_type", "bessel_i0e", "bessel_i1e", "igamma", "igammac", "igamma_grad_a",
    "random_gamma_grad", "polygamma", "zeta", "regularized_incomplete_beta", "mulhi", "eq_to", "lt_to", "le_to",
}  # fmt: skip

# Operations that XLA expands into others: FLOPs that it counts for each element.
_EXPANDED = {
    "erfc": 62, "erf_inv": 37, "logistic": 3, "sinh": 10, "cosh": 3, "asin": 5, "acos": 3, "asinh": 11, "acosh": 7,
    "atanh": 6, "lgamma": 53, "digamma": 73, "copy": 0, "copy_p": 0, "stop_gradient": 0, "name": 0,
}  # fmt: skip
_ROUNDING = 1e-6  # of a number in float32
_SUMS = {"add", "add_any", "sub", "complex"}
_CHOICES = {"max", "min", "select_n"}
_UNCOUNTED = {"conj", "complex", "imag", "real", "bessel_i0e", "bessel_i1e", "igamma", "igammac", "igamma_grad_a",
              "random_gamma_grad", "polygamma", "zeta", "regularized_incomplete_beta", "mulhi", "eq_to", "lt_to",
              "le_to"}  # fmt: skip


def _elementwise(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    shape = ctx.out_shape()
    name = ctx.op.name
    if name in _UNCOUNTED:
        ctx.analysis.uncounted.add(name)
    (ctx.count_foldable if _folded(name, ins) else ctx.count)(math.prod(shape) * _flops(ctx.op))
    number = _number(ctx.op, [v.number for v in ins])
    if number is not None:
        return [AbstractValue((UNIFORM,) * len(shape), number=number)]
    if len(ins) == 1 and len(ins[0].axes) == len(shape):
        value = combine(ins, ins[0].axes, ins[0].linear and _keeps_zeros(ctx.op))
        return [value._replace(summed=ins[0].summed) if name in LINEAR else value]
    ins = [_broadcast(ctx, v, ctx.shape(i), shape) for i, v in enumerate(ins)]
    full = [v for v in ins if len(v.axes) == len(shape)]
    if any(isinstance(axis, SplitAxis) for v in full for axis in v.axes):
        ins = _align_splits(ctx, ins, len(shape))
        full = [v for v in ins if len(v.axes) == len(shape)]
    linear = not any(v.active for v in ins) and _linear(name, ins, full)
    if linear and name == "mul":  # the product has the kernel's labels
        full.sort(key=lambda v: not _is_kernel(v, ins))
    elif linear and name in _SUMS | _CHOICES:
        for i in range(len(shape)):
            ctx.analysis.join_kernels(full, i)
    if (divisor := mean_divisor(name, ins)) is not None:
        sizes = next(v.summed for v in ins if v.summed)
        ctx.analysis.sites.append(MixingSite(ctx.op.path, divisor, {}, sizes, name == "mul"))
    if name == "div":  # a divisor is not gated: it could become 0
        ins = [ins[0], ins[1]._replace(linear=False)]
    axes = [_merge_axis([v.axes[i] for v in full], ctx) for i in range(len(shape))]
    return [combine(ins, axes, linear)]


def mean_divisor(name: str, ins: Sequence[AbstractValue]) -> int | None:
    """The operand that turns a sum over units into their mean: their number in a division, or 1 over it; else None."""
    if len(ins) != 2 or name not in ("div", "mul"):
        return None
    for i in (1,) if name == "div" else (0, 1):
        number, terms = ins[i].number, ins[1 - i].terms
        if (
            number
            and terms
            and ins[1 - i].active
            and math.isclose(number if name == "div" else 1 / number, terms, rel_tol=_ROUNDING)
        ):
            return i
    return None


def _linear(name: str, ins: Sequence[AbstractValue], full: Sequence[AbstractValue]) -> bool:
    """Whether the result is linear in stored kernels: 0 where one is (a product), or where all are (a sum)."""
    if name == "mul":
        return any(_is_kernel(v, ins) for v in ins)
    if name == "div":
        return _is_kernel(ins[0], ins)
    if name in _SUMS:
        return len(full) == len(ins) and all(_is_kernel(v, ins) for v in ins)
    if name in _CHOICES:
        values = ins[1:] if name == "select_n" else ins
        return not (name == "select_n" and ins[0].weight) and all(v.number == 0.0 or _is_kernel(v, ins) for v in values)
    return name in LINEAR and all(_is_kernel(v, ins) for v in ins)


def _is_kernel(value: AbstractValue, others: Sequence[AbstractValue]) -> bool:
    """Whether a value is linear in parameters and has labels on every axis where any other operand has."""
    axes = [i for v in others for i, axis in enumerate(v.axes) if has_labels(axis)]
    return value.weight and value.linear and all(i < len(value.axes) and has_labels(value.axes[i]) for i in axes)


def _keeps_zeros(op: Op) -> bool:
    """Whether the operation maps zeros of a kernel to zero and lets a gradient through to its gate."""
    return op.name in LINEAR or op.name in ("square", "abs") or (op.name == "integer_pow" and op.params["y"] > 0)


def _broadcast(ctx: RuleContext, value: AbstractValue, shape: Sequence[int], out: Sequence[int]) -> AbstractValue:
    """The operand with axes of size 1 broadcast to those of the result.

    Since jax 0.10 an elementwise primitive takes such operands; older versions insert a `broadcast_in_dim`.
    """
    stretched = [i for i, (n, m) in enumerate(zip(shape, out, strict=True)) if n != m] if len(shape) == len(out) else []
    if not stretched:
        return value
    if any(isinstance(value.axes[i], SplitAxis) for i in stretched):
        value = ctx.analysis.resolve_splits(value, [i for i in range(len(out)) if i not in stretched])
    for i in stretched:
        ctx.freeze(value.axes[i], "picked out by its index and broadcast by")
    return value._replace(axes=tuple(UNIFORM if i in stretched else axis for i, axis in enumerate(value.axes)))


def _merge_axis(axes: list[Axis], ctx: RuleContext) -> Axis:
    part = next((axis for axis in axes if isinstance(axis, SplitAxis)), None)
    return ctx.analysis.merge(axes, ctx) if part is None else part


def _align_splits(ctx: RuleContext, ins: list[AbstractValue], rank: int) -> list[AbstractValue]:
    """The operands with equal splits, or with all splits resolved."""
    full = [v for v in ins if len(v.axes) == rank]
    split = [v for v in full if any(isinstance(axis, SplitAxis) for axis in v.axes)]
    where = [i for i in range(rank) if any(isinstance(v.axes[i], SplitAxis) for v in split)]
    first = split[0]
    others = [v for v in full if v is not first]
    if all(_alike(first, v) or not any(has_labels(v.axes[i]) or v.axes[i] is FIXED for i in where) for v in others):
        for v in split[1:]:
            for a, b in {(id(x.labels), id(y.labels)): (x, y) for x, y in _pairs(first, v)}.values():
                ctx.analysis.join(a.labels, b.labels)
        same = {id(v): v._replace(axes=_with_splits_of(v, first)) for v in split}
        return [same.get(id(v), v) for v in ins]
    free = [i for i in range(rank) if not any(v.axes[i] is FIXED for v in full)]
    return [ctx.analysis.resolve_splits(v, free) if len(v.axes) == rank else v for v in ins]


def _pairs(a: AbstractValue, b: AbstractValue) -> list[tuple[SplitAxis, SplitAxis]]:
    return [
        (x, y) for x, y in zip(a.axes, b.axes, strict=True) if isinstance(x, SplitAxis) and isinstance(y, SplitAxis)
    ]


def _alike(a: AbstractValue, b: AbstractValue) -> bool:
    """Whether two values are split at the same axes into the same sizes."""
    if [isinstance(axis, SplitAxis) for axis in a.axes] != [isinstance(axis, SplitAxis) for axis in b.axes]:
        return False
    pairs = _pairs(a, b)
    if any(x.dim != y.dim or x.labels.shape != y.labels.shape for x, y in pairs):
        return False
    return len({(id(x.labels), id(y.labels)) for x, y in pairs}) == len({id(x.labels) for x, _ in pairs})


def _with_splits_of(value: AbstractValue, first: AbstractValue) -> tuple:
    return tuple(a if isinstance(a, SplitAxis) else b for a, b in zip(first.axes, value.axes, strict=True))


def _flops(op: Op) -> int:
    """FLOPs that XLA counts for one element; it counts transcendental functions separately."""
    if op.name == "integer_pow":
        power = abs(op.params["y"])
        return power.bit_length() - 2 + power.bit_count() + (op.params["y"] < 0)
    return _EXPANDED.get(op.name, int(op.name not in TRANSCENDENTAL))


def _folded(name: str, ins: list[AbstractValue]) -> bool:
    """Whether XLA may fold the operation away: its operands are constants, or one of them is a neutral element."""
    numbers = [v.number for v in ins]
    neutral: dict[str, tuple[float, ...]] = {
        "add": (0.0,), "add_any": (0.0,), "sub": (0.0,), "mul": (0.0, 1.0), "and": (0.0, 1.0), "or": (0.0, 1.0),
    }  # fmt: skip
    which = numbers[1:] if name == "sub" else numbers
    return None not in numbers or any(n in which for n in neutral.get(name, ()))


def _number(op: Op, numbers: list[float | None]) -> float | None:
    """The result for operands that are each one known number; None where it is not known."""
    known = [n for n in numbers if n is not None]
    if len(known) != len(numbers) or not known or op.name not in _SCALAR_FUNCTIONS:
        return None
    if op.name == "convert_element_type" and not jnp.issubdtype(op.params["new_dtype"], jnp.floating):
        whole = jnp.issubdtype(op.params["new_dtype"], jnp.integer) and known[0] == int(known[0])
        return known[0] if whole or known[0] in (0.0, 1.0) else None
    try:
        number = float(_SCALAR_FUNCTIONS[op.name](*known, *([op.params["y"]] if op.name == "integer_pow" else [])))
    except (ArithmeticError, ValueError, TypeError):  # TypeError: a root of a negative number
        return None
    return number if math.isfinite(number) else None


_SCALAR_FUNCTIONS = {
    "add": operator.add, "add_any": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "max": max, "min": min, "neg": operator.neg, "tanh": math.tanh, "exp": math.exp, "erf": math.erf, "sqrt": math.sqrt,
    "integer_pow": operator.pow, "square": lambda n: n * n, "logistic": lambda n: 0.5 * (1 + math.tanh(n / 2)),
    "convert_element_type": float, "rsqrt": lambda n: n**-0.5, "pow": operator.pow, "gt": operator.gt,
    "lt": operator.lt, "ge": operator.ge, "le": operator.le, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


RULES: dict[str, Rule] = dict.fromkeys(NAMES, _elementwise)
