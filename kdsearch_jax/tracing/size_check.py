"""Checks that a network's code computes, at other sizes, what the analysis predicts.

The analysis reads a network at one set of sizes. A student runs the same code with fewer units, but its author may have
hard-coded a size: `reshape(b, n, 4, 16)`, `x[..., :32]`, a division by √64. So the code is traced again with units
removed, the analysis is repeated over the new operations with the remaining labels, and each operation must produce
exactly what remains of its previous result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdsearch_jax.tracing.analysis import Analysis, TracedOp
from kdsearch_jax.tracing.labels import UNIFORM, AbstractValue, SplitAxis, has_labels
from kdsearch_jax.tracing.program import Program
from kdsearch_jax.tracing.rescaling import Path, Rescale
from kdsearch_jax.tracing.rules.elementwise import NAMES as ELEMENTWISE
from kdsearch_jax.tracing.rules.elementwise import mean_divisor

# These may pass on a tensor that is constant along an axis, whatever the size of the axis.
_SIZE_AGNOSTIC = ELEMENTWISE | {
    "broadcast_in_dim", "transpose", "expand_dims", "squeeze", "reshape", "concatenate", "pad", "slice", "split", "rev",
    "stack", "unstack", "tile", "scan", "cond", "while", "scatter", "scatter-add", "scatter-mul",
    "dynamic_update_slice",
}  # fmt: skip
_SIZE_PARAMETERS = {
    "shape", "new_sizes", "sizes", "start_indices", "limit_indices", "slice_sizes", "feature_group_count",
    "padding_config",
}  # fmt: skip


@dataclass
class RescaleCheck:
    """Whether a number follows a size, as seen in trials so far.

    Attributes:
      size: the size in the present trial. whole: in the network.
      follows: None if no trial has changed the size yet.
    """

    found: Rescale
    whole: int
    size: int
    follows: bool | None = None

    def agrees(self, new: TracedOp) -> bool:
        """Whether an operation of a trial has the number that earlier trials lead to expect."""
        follows = self.found.is_number(new.ins[self.found.operand].number, self.size)
        if self.size == self.whole:
            return follows
        self.follows = follows if self.follows is None else self.follows
        return follows == self.follows


def remaining_labels(analysis: Analysis, masks: Mapping[tuple[str, int], np.ndarray], names: list[str]) -> np.ndarray:
    """(labels,) whether each label remains when parameters keep only `masks`, {(parameter, axis): (size,) bool}."""
    remaining = np.ones(len(analysis.labels.leaf), bool)
    number = {name: i for i, name in enumerate(names)}
    for (name, axis), mask in masks.items():
        remaining[analysis.labels.value_axes(number[name])[axis]] = mask
    return remaining


def find_mismatch(
    before: Analysis, after: Analysis, remaining: np.ndarray, rescales: Mapping[Path, RescaleCheck] | None = None
) -> str | None:
    """What the second program does that the first analysis did not predict; None where they agree.

    Args:
      before: the analysis of the whole network.
      after: the analysis of its code with only the labels in `remaining`.
      remaining: (labels,) bool.
      rescales: {path of an operation: number in it that may follow a size}.
    """
    units = before.components()
    old_ops, new_ops = _without_stretches(before), _without_stretches(after)
    if len(old_ops) != len(new_ops):
        pairs = list(zip(old_ops, new_ops, strict=False))
        first = next((i for i, (old, new) in enumerate(pairs) if old.op.name != new.op.name), len(pairs))
        extra = max(old_ops, new_ops, key=len)[first:]  # begins with the operation that only one of the two has
        where = next((traced.op.where() for traced in extra if traced.op.line()), extra[0].op.where())
        return f"its size decides which operations there are, in {where.replace(' of StudentModule/', ' of ')}"
    for old, new in zip(old_ops, new_ops, strict=True):
        if reason := _mismatch(old, new, remaining, units, (rescales or {}).get(old.op.path)):
            return f"{reason}, in {old.op.where()}"
    return None


def _mismatch(
    old: TracedOp, new: TracedOp, remaining: np.ndarray, units: np.ndarray, rescale: RescaleCheck | None
) -> str | None:
    if old.op.name != new.op.name:
        return "its size decides which operations there are"
    if all(value.number is not None for value in (*old.outs, *new.outs)):
        return None  # a number made of numbers; it is compared where it meets an array
    divisor = mean_divisor(old.op.name, old.ins)
    if divisor is not None and not _divides_by_size(old, new, divisor, remaining):
        return "a number that equals its size is written into the code"
    if rescale is not None and divisor is None:
        if not rescale.agrees(new):
            return "its size enters the computation as a number"
        divisor = rescale.found.operand if rescale.follows else None
    if _constants(old, divisor) != _constants(new, divisor) or _parameters(old) != _parameters(new):
        return "its size enters the computation as a number"
    resized = any(_constant_axis_resized(*pair) for pair in zip(_shaped(old, "ins"), _shaped(new, "ins"), strict=True))
    if resized and old.op.name not in _SIZE_AGNOSTIC:
        return "its size enters the computation as a number"
    for (a, shape_a), (b, shape_b) in zip(_shaped(old, "outs"), _shaped(new, "outs"), strict=True):
        for x, y, n, m in zip(a.axes, b.axes, shape_a, shape_b, strict=True):
            if not _same_axis(x, y, n, m, remaining, units) and not _single_unit(x, b, m, remaining, units):
                return "the model's code needs this size"
    return None


def _divides_by_size(old: TracedOp, new: TracedOp, divisor: int, remaining: np.ndarray) -> bool:
    """Whether the mean of the remaining units is taken over as many as there are."""
    summed = old.ins[1 - divisor].summed
    terms = math.prod(n if isinstance(n, int) else int(remaining[n].sum()) for n in summed)
    number = new.ins[divisor].number
    return bool(number) and math.isclose(number if old.op.name == "div" else 1 / number, terms, rel_tol=1e-6)


def _without_stretches(analysis: Analysis) -> list[TracedOp]:
    """The operations except those that only broadcast axes of size 1, which JAX omits where a single unit remains.

    Their consumers are compared like any other operation, by the sizes of their results.
    """
    return [traced for traced in analysis.ops if not _only_stretches(traced)]


def _only_stretches(traced: TracedOp) -> bool:
    if traced.op.name != "broadcast_in_dim" or len(traced.op.inputs) != 1:
        return False
    shape, out = traced.program.shape(traced.op.inputs[0]), traced.program.shape(traced.op.outputs[0])
    return len(shape) == len(out) > 0


def _same_axis(before: Any, after: Any, size: int, new_size: int, remaining: np.ndarray, units: np.ndarray) -> bool:
    """Whether an axis has exactly the labels that remain of it."""
    if isinstance(before, SplitAxis):
        return _same_split(before, after, new_size, remaining, units)
    if not isinstance(before, np.ndarray):
        return size == new_size or before is UNIFORM
    expected = before[remaining[before]]
    if len(expected) != new_size:
        return False
    if not isinstance(after, np.ndarray):
        return new_size == 1
    return bool((units[expected] == units[after]).all())


def _single_unit(before: Any, after: AbstractValue, new_size: int, remaining: np.ndarray, units: np.ndarray) -> bool:
    """Whether a single unit remains of an axis, so that a split put its labels on another axis."""
    if not isinstance(before, np.ndarray):
        return False
    expected = units[before[remaining[before]]]
    others = [units[axis] for axis in after.axes if isinstance(axis, np.ndarray)]
    alike = len(expected) == new_size and (expected == expected[:1]).all()
    return bool(alike and others and all((other == expected[0]).all() for other in others))


def _same_split(before: SplitAxis, after: Any, new_size: int, remaining: np.ndarray, units: np.ndarray) -> bool:
    """Whether the remaining labels of a split form a box that equals the labels of the other axis."""
    stay = remaining[before.labels]
    if not stay.any():
        return False
    box = np.ix_(*(np.flatnonzero(stay.any(tuple(o for o in range(stay.ndim) if o != d))) for d in range(stay.ndim)))
    expected = before.labels[box]
    if not stay[box].all() or expected.shape[before.dim] != new_size:
        return False
    if new_size == 1:  # an axis of size 1 is not a `SplitAxis`
        return True
    labels = after.labels if isinstance(after, SplitAxis) else after
    expected = expected.squeeze()
    return (
        isinstance(labels, np.ndarray)
        and labels.shape == expected.shape
        and bool((units[expected] == units[labels]).all())
    )


def _constant_axis_resized(before: tuple[AbstractValue, Any], after: tuple[AbstractValue, Any]) -> bool:
    """Whether an axis without labels has another size."""
    return any(n != m and not has_labels(axis) for axis, n, m in zip(before[0].axes, before[1], after[1], strict=True))


def _shaped(traced: TracedOp, side: str) -> list[tuple[AbstractValue, tuple[int, ...]]]:
    values, numbers = (traced.ins, traced.op.inputs) if side == "ins" else (traced.outs, traced.op.outputs)
    return [(value, traced.program.shape(v)) for value, v in zip(values, numbers, strict=True)]


def _parameters(traced: TracedOp) -> dict[str, Any]:
    """The operation's plain parameters, except those that hold sizes."""
    return {key: value for key, value in traced.op.params.items() if key not in _SIZE_PARAMETERS and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _constants(traced: TracedOp, divisor: int | None) -> tuple[Any, ...]:
    """The operation's constant operands, each by its one number where it has only one; without a mean's divisor."""
    inputs = [v for i, v in enumerate(traced.op.inputs) if i != divisor]
    numbers = {v: value.number for v, value in zip(traced.op.inputs, traced.ins, strict=True)}
    if traced.op.name == "dynamic_slice":  # where it starts on an axis with labels shows in its result
        axes = traced.ins[0].axes
        inputs = (inputs[0], *(v for v, axis in zip(inputs[1:], axes, strict=True) if not isinstance(axis, np.ndarray)))
    known = traced.program.constants
    return tuple(
        _fingerprint(traced.program, v) if v in known else numbers[v]
        for v in inputs
        if v in known or numbers[v] is not None
    )


def _fingerprint(program: Program, value: int) -> Any:
    array = np.asarray(program.constants[value])
    same = array.size and (array == array.flat[0]).all()
    return array.flat[0].tobytes() if same else (array.shape, array.tobytes())
