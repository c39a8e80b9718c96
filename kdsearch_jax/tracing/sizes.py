"""Whether a network's code computes, at other sizes, what the walk foresaw.

The walk reads a network at one set of sizes. A student runs the same code with fewer units, and a model's author may
have written a size into the code: `reshape(b, n, 4, 16)`, `x[..., :32]`, a division by √64. So the code is traced once
more with units gone, the walk is repeated over the new operations with the labels that are left, and each operation
must have made exactly what is left of what it made before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdsearch_jax.tracing.findings import Step, Walk
from kdsearch_jax.tracing.labels import UNIFORM, Part, Value, labelled
from kdsearch_jax.tracing.program import Program
from kdsearch_jax.tracing.rules.elementwise import NAMES as ELEMENTWISE

# These may pass on a tensor that is constant along an axis of whatever size.
_SIZELESS = ELEMENTWISE | {
    "broadcast_in_dim", "transpose", "expand_dims", "squeeze", "reshape", "concatenate", "pad", "slice", "split", "rev",
    "stack", "unstack", "tile", "scan", "cond", "while", "scatter", "scatter-add", "scatter-mul",
    "dynamic_update_slice",
}  # fmt: skip
_HOLD_SIZES = {
    "shape", "new_sizes", "sizes", "start_indices", "limit_indices", "slice_sizes", "feature_group_count",
    "padding_config",
}  # fmt: skip


def labels_left(found: Walk, masks: Mapping[tuple[str, int], np.ndarray], names: list[str]) -> np.ndarray:
    """(labels,) which are left when only `masks`, {(parameter, axis): bool}, stay."""
    left = np.ones(len(found.labels.leaf), bool)
    number = {name: i for i, name in enumerate(names)}
    for (name, axis), mask in masks.items():
        left[found.labels.value_axes(number[name])[axis]] = mask
    return left


def difference(before: Walk, after: Walk, left: np.ndarray) -> str | None:
    """What the second walk's operations do that the first's did not foresee; None where they agree.

    Args:
      before: the walk over the whole network; after: the walk over its code with only the labels `left`.
    """
    units = before.components()
    old_steps, new_steps = _without_stretches(before), _without_stretches(after)
    if len(old_steps) != len(new_steps):
        pairs = list(zip(old_steps, new_steps, strict=False))
        first = next((i for i, (old, new) in enumerate(pairs) if old.op.name != new.op.name), len(pairs))
        longer = max(old_steps, new_steps, key=len)[first:]  # the operation that is in one of the two only
        where = next((step.op.where() for step in longer if step.op.line()), longer[0].op.where())
        return f"its size decides which operations there are, in {where.replace(' of StudentModule/', ' of ')}"
    for old, new in zip(old_steps, new_steps, strict=True):
        if old.op.name != new.op.name:
            return f"its size decides which operations there are, in {old.op.where()}"
        if _numbers(old) != _numbers(new) or _parameters(old) != _parameters(new):
            return f"its size enters the computation as a number, in {old.op.where()}"
        sized = any(_stretched(*pair) for pair in zip(_shaped(old, "ins"), _shaped(new, "ins"), strict=True))
        if sized and old.op.name not in _SIZELESS:
            return f"its size enters the computation as a number, in {old.op.where()}"
        for (a, shape_a), (b, shape_b) in zip(_shaped(old, "outs"), _shaped(new, "outs"), strict=True):
            for x, y, n, m in zip(a.axes, b.axes, shape_a, shape_b, strict=True):
                if not _same(x, y, n, m, left, units) and not _single(x, b, m, left, units):
                    return f"the model's code needs this size, in {old.op.where()}"
    return None


def _without_stretches(found: Walk) -> list[Step]:
    """The steps without those that only stretch axes of size 1, of which a network with a single unit left has none.

    What reads their result is compared like any other operation, by the sizes that it makes of it.
    """
    return [step for step in found.steps if not _stretches(step)]


def _stretches(step: Step) -> bool:
    if step.op.name != "broadcast_in_dim" or len(step.op.inputs) != 1:
        return False
    shape, out = step.program.shape(step.op.inputs[0]), step.program.shape(step.op.outputs[0])
    return len(shape) == len(out) > 0


def _same(before: Any, after: Any, size: int, new_size: int, left: np.ndarray, units: np.ndarray) -> bool:
    """Whether an axis is what is left of it."""
    if isinstance(before, Part):
        return _same_parts(before, after, new_size, left, units)
    if not isinstance(before, np.ndarray):
        return size == new_size or before is UNIFORM
    expected = before[left[before]]
    if len(expected) != new_size:
        return False
    if not isinstance(after, np.ndarray):
        return new_size == 1
    return bool((units[expected] == units[after]).all())


def _single(before: Any, after: Value, new_size: int, left: np.ndarray, units: np.ndarray) -> bool:
    """Whether one unit is left of an axis, so that a split showed its labels on another one."""
    if not isinstance(before, np.ndarray):
        return False
    expected = units[before[left[before]]]
    others = [units[axis] for axis in after.axes if isinstance(axis, np.ndarray)]
    alike = len(expected) == new_size and (expected == expected[:1]).all()
    return bool(alike and others and all((other == expected[0]).all() for other in others))


def _same_parts(before: Part, after: Any, new_size: int, left: np.ndarray, units: np.ndarray) -> bool:
    """Whether what is left of the labels is a box, and the very labels of the other."""
    stay = left[before.labels]
    if not stay.any():
        return False
    box = np.ix_(*(np.flatnonzero(stay.any(tuple(o for o in range(stay.ndim) if o != d))) for d in range(stay.ndim)))
    expected = before.labels[box]
    if not stay[box].all() or expected.shape[before.dim] != new_size:
        return False
    if new_size == 1:  # of which no part is made
        return True
    found = after.labels if isinstance(after, Part) else after
    expected = expected.squeeze()
    return (
        isinstance(found, np.ndarray)
        and found.shape == expected.shape
        and bool((units[expected] == units[found]).all())
    )


def _stretched(before: tuple[Value, Any], after: tuple[Value, Any]) -> bool:
    """Whether a constant axis, or one that was thought fixed, has another size."""
    return any(n != m and not labelled(axis) for axis, n, m in zip(before[0].axes, before[1], after[1], strict=True))


def _shaped(step: Step, side: str) -> list[tuple[Value, tuple[int, ...]]]:
    values, numbers = (step.ins, step.op.inputs) if side == "ins" else (step.outs, step.op.outputs)
    return [(value, step.program.shape(v)) for value, v in zip(values, numbers, strict=True)]


def _parameters(step: Step) -> dict[str, Any]:
    """Plain parameters of an operation, but for those that hold sizes."""
    return {key: value for key, value in step.op.params.items() if key not in _HOLD_SIZES and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _numbers(step: Step) -> tuple[Any, ...]:
    """The numbers written into an operation: its constant operands, each by its value where it has only one."""
    inputs = step.op.inputs
    if step.op.name == "dynamic_slice":  # where it starts on an axis of labels is seen in what it makes
        labelled_ = [isinstance(axis, np.ndarray) for axis in step.ins[0].axes]
        inputs = (inputs[0], *(v for v, known in zip(inputs[1:], labelled_, strict=True) if not known))
    return tuple(_number(step.program, v) for v in inputs if v in step.program.constants)


def _number(program: Program, value: int) -> Any:
    array = np.asarray(program.constants[value])
    same = array.size and (array == array.flat[0]).all()
    return array.flat[0].tobytes() if same else (array.shape, array.tobytes())
