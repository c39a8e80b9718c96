"""Rules for operations that combine their operands index by index."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from kdsearch_jax.tracing.findings import Context, Rule
from kdsearch_jax.tracing.labels import FIXED, UNIFORM, Axis, Part, Value, blend, labelled
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

# Operations that XLA expands into others: what it then counts for each element.
_EXPANDED = {
    "erfc": 62, "erf_inv": 37, "logistic": 3, "sinh": 10, "cosh": 3, "asin": 5, "acos": 3, "asinh": 11, "acosh": 7,
    "atanh": 6, "lgamma": 53, "digamma": 73, "copy": 0, "copy_p": 0, "stop_gradient": 0, "name": 0,
}  # fmt: skip
_SUMS = {"add", "add_any", "sub", "complex"}
_CHOICES = {"max", "min", "select_n"}
_UNCOUNTED = {"conj", "complex", "imag", "real", "bessel_i0e", "bessel_i1e", "igamma", "igammac", "igamma_grad_a",
              "random_gamma_grad", "polygamma", "zeta", "regularized_incomplete_beta", "mulhi", "eq_to", "lt_to",
              "le_to"}  # fmt: skip


def _elementwise(c: Context, ins: list[Value]) -> list[Value]:
    shape = c.out_shape()
    name = c.op.name
    if name in _UNCOUNTED:
        c.found.uncounted.add(name)
    (c.fold if _folded(name, ins) else c.count)(math.prod(shape) * _flops(c.op))
    number = _number(c.op, [v.number for v in ins])
    if number is not None:
        return [Value((UNIFORM,) * len(shape), number=number)]
    if len(ins) == 1 and len(ins[0].axes) == len(shape):
        return [blend(ins, ins[0].axes, ins[0].linear and _keeps_zeros(c.op))]
    ins = [_broadcast(c, v, c.shape(i), shape) for i, v in enumerate(ins)]
    full = [v for v in ins if len(v.axes) == len(shape)]
    if any(isinstance(axis, Part) for v in full for axis in v.axes):
        ins = _aligned(c, ins, len(shape))
        full = [v for v in ins if len(v.axes) == len(shape)]
    linear = not any(v.active for v in ins) and _linear(name, ins, full)
    if linear and name == "mul":  # whose labels are the product's
        full.sort(key=lambda v: not _is_kernel(v, ins))
    elif linear and name in _SUMS | _CHOICES:
        for i in range(len(shape)):
            c.found.join_kernels(full, i)
    if name == "div":  # nothing is divided by a kernel that a gate has set to 0
        ins = [ins[0], ins[1]._replace(linear=False)]
    axes = [_one([v.axes[i] for v in full], c) for i in range(len(shape))]
    return [blend(ins, axes, linear)]


def _linear(name: str, ins: Sequence[Value], full: Sequence[Value]) -> bool:
    """Whether the result is 0 at an index where a kernel among the operands is 0; of a sum, where all of them are."""
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


def _is_kernel(value: Value, others: Sequence[Value]) -> bool:
    """Whether a value is linear in parameters, with labels of its own on every axis where any of the others has."""
    axes = [i for v in others for i, axis in enumerate(v.axes) if labelled(axis)]
    return value.weight and value.linear and all(i < len(value.axes) and labelled(value.axes[i]) for i in axes)


def _keeps_zeros(op: Op) -> bool:
    """Whether the operation leaves zeros of a kernel at zero, and a gate on it a gradient."""
    return op.name in LINEAR or op.name in ("square", "abs") or (op.name == "integer_pow" and op.params["y"] > 0)


def _broadcast(c: Context, value: Value, shape: Sequence[int], out: Sequence[int]) -> Value:
    """The operand as the operation stretches it: constant along axes of size 1 where the result's are longer.

    Since jax 0.10 an elementwise primitive takes such operands; older versions put a `broadcast_in_dim` before it.
    """
    stretched = [i for i, (n, m) in enumerate(zip(shape, out, strict=True)) if n != m] if len(shape) == len(out) else []
    if not stretched:
        return value
    if any(isinstance(value.axes[i], Part) for i in stretched):
        value = c.found.settle(value, [i for i in range(len(out)) if i not in stretched])
    for i in stretched:
        c.freeze(value.axes[i], "picked out by its index and broadcast by")
    return value._replace(axes=tuple(UNIFORM if i in stretched else axis for i, axis in enumerate(value.axes)))


def _one(axes: list[Axis], c: Context) -> Axis:
    part = next((axis for axis in axes if isinstance(axis, Part)), None)
    return c.found.merge(axes, c) if part is None else part


def _aligned(c: Context, ins: list[Value], rank: int) -> list[Value]:
    """Operands whose `Part`s, if any are left, are the very same."""
    full = [v for v in ins if len(v.axes) == rank]
    split = [v for v in full if any(isinstance(axis, Part) for axis in v.axes)]
    where = [i for i in range(rank) if any(isinstance(v.axes[i], Part) for v in split)]
    first = split[0]
    others = [v for v in full if v is not first]
    if all(_alike(first, v) or not any(labelled(v.axes[i]) or v.axes[i] is FIXED for i in where) for v in others):
        for v in split[1:]:
            for a, b in {(id(x.labels), id(y.labels)): (x, y) for x, y in _pairs(first, v)}.values():
                c.found.join(a.labels, b.labels)
        same = {id(v): v._replace(axes=_with_parts(v, first)) for v in split}
        return [same.get(id(v), v) for v in ins]
    free = [i for i in range(rank) if not any(v.axes[i] is FIXED for v in full)]
    return [c.found.settle(v, free) if len(v.axes) == rank else v for v in ins]


def _pairs(a: Value, b: Value) -> list[tuple[Part, Part]]:
    return [(x, y) for x, y in zip(a.axes, b.axes, strict=True) if isinstance(x, Part) and isinstance(y, Part)]


def _alike(a: Value, b: Value) -> bool:
    """Whether two values are split in the same way."""
    if [isinstance(axis, Part) for axis in a.axes] != [isinstance(axis, Part) for axis in b.axes]:
        return False
    pairs = _pairs(a, b)
    if any(x.dim != y.dim or x.labels.shape != y.labels.shape for x, y in pairs):
        return False
    return len({(id(x.labels), id(y.labels)) for x, y in pairs}) == len({id(x.labels) for x, _ in pairs})


def _with_parts(value: Value, first: Value) -> tuple:
    return tuple(a if isinstance(a, Part) else b for a, b in zip(first.axes, value.axes, strict=True))


def _flops(op: Op) -> int:
    """What XLA counts for one element of an elementwise operation, transcendental functions apart."""
    if op.name == "integer_pow":
        power = abs(op.params["y"])
        return power.bit_length() - 2 + power.bit_count() + (op.params["y"] < 0)
    return _EXPANDED.get(op.name, int(op.name not in TRANSCENDENTAL))


def _folded(name: str, ins: list[Value]) -> bool:
    """Whether XLA may never see the operation: constants, a zero or a one that changes nothing, a mask of one value."""
    numbers = [v.number for v in ins]
    neutral: dict[str, tuple[float, ...]] = {
        "add": (0.0,), "add_any": (0.0,), "sub": (0.0,), "mul": (0.0, 1.0), "and": (0.0, 1.0), "or": (0.0, 1.0),
    }  # fmt: skip
    which = numbers[1:] if name == "sub" else numbers
    return None not in numbers or any(n in which for n in neutral.get(name, ()))


def _number(op: Op, numbers: list[float | None]) -> float | None:
    """What is computed of constants that are one number everywhere; None where that is not known."""
    known = [n for n in numbers if n is not None]
    if len(known) != len(numbers) or not known or op.name not in _OF_NUMBERS:
        return None
    try:
        number = float(_OF_NUMBERS[op.name](*known, *([op.params["y"]] if op.name == "integer_pow" else [])))
    except (ArithmeticError, ValueError):
        return None
    return number if math.isfinite(number) else None


_OF_NUMBERS = {
    "add": operator.add, "add_any": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "max": max, "min": min, "neg": operator.neg, "tanh": math.tanh, "exp": math.exp, "erf": math.erf, "sqrt": math.sqrt,
    "integer_pow": operator.pow, "square": lambda n: n * n, "logistic": lambda n: 0.5 * (1 + math.tanh(n / 2)),
    "convert_element_type": lambda n: n if n == int(n) else math.nan,
}  # fmt: skip


RULES: dict[str, Rule] = dict.fromkeys(NAMES, _elementwise)
