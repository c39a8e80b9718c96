"""The walk over a network's operations: one rule a primitive, each of which moves, joins or freezes labels.

A value has one entry per axis: an array of labels (one per index), `FIXED` (indices mean something that no pruning may
change: batch, pixels, the vocabulary), or `UNIFORM` (the value is constant along the axis, so that any size will do).
Label 0 is a single fixed index among others, such as a padded channel.

A rule never asks which labels are already joined: joins are collected as pairs and resolved once, at the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from kdsearch_jax import branches
from kdsearch_jax.program import Op, Program, flatten

FIXED: Literal["fixed"] = "fixed"
UNIFORM = None
Axis = Any  # np.ndarray of labels | FIXED | UNIFORM


class Value(NamedTuple):
    """axes: an entry per axis; active: depends on the network's inputs; weight: depends on parameters only; linear: and
    scaling an index of a parameter scales that index of the value; number: what a constant is everywhere."""

    axes: tuple[Axis, ...]
    active: bool = False
    weight: bool = False
    linear: bool = False
    number: float | None = None


class Step(NamedTuple):
    """One operation as the walk saw it: the values it read and made, and their shapes."""

    op: Op
    program: Program
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]


class Term(NamedTuple):
    """`constant` times the product of the sizes of `axes` multiply-accumulates; leaves: the parameters it contracts."""

    constant: float
    axes: tuple[Any, ...]
    leaves: tuple[int, ...]

    def macs(self) -> float:
        """With all units in place."""
        return self.constant * math.prod(axis if isinstance(axis, int) else len(axis) for axis in self.axes)


@dataclass
class Labels:
    """Whose label is it: arrays over labels of parameter number, axis and index (label 0 is nobody's, -1)."""

    leaf: np.ndarray
    axis: np.ndarray
    index: np.ndarray
    _axes: list[tuple[Any, ...]]

    def keys(self) -> np.ndarray:
        """(labels,) one number for each axis of each parameter."""
        return self.leaf.astype(np.int64) * 16 + self.axis

    def kept(self, keep: np.ndarray) -> Labels:
        """The same labels on parameters that have lost those outside `keep`, a (labels,) bool vector."""
        axes = [tuple(axis if axis is UNIFORM else axis[keep[axis]] for axis in leaf) for leaf in self._axes]
        return Labels(self.leaf, self.axis, self.index, axes)

    @staticmethod
    def of(shapes: Sequence[tuple[int, ...]]) -> Labels:
        """Fresh labels for every axis longer than 1 of every parameter."""
        leaf, axis, index, axes, start = [np.array([-1])], [np.array([-1])], [np.array([-1])], [], 1
        for number, shape in enumerate(shapes):
            entry: list[Any] = []
            for a, size in enumerate(shape):
                if size == 1:
                    entry.append(UNIFORM)
                    continue
                entry.append(np.arange(start, start + size))
                leaf.append(np.full(size, number))
                axis.append(np.full(size, a))
                index.append(np.arange(size))
                start += size
            axes.append(tuple(entry))
        return Labels(np.concatenate(leaf), np.concatenate(axis), np.concatenate(index), axes)

    def value_axes(self, leaf: int) -> tuple[Any, ...]:
        """The entries of a parameter's axes."""
        return self._axes[leaf]

    def axes_of(self, leaf: int) -> list[Any]:
        """The same with the size 1 where an axis has no labels."""
        return [1 if axis is UNIFORM else axis for axis in self._axes[leaf]]


@dataclass
class Walk:
    """What a walk found: joined pairs, frozen and consumed labels, cost terms, branches."""

    labels: Labels
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    freezes: list[tuple[np.ndarray, str]] = field(default_factory=list)
    reads: list[np.ndarray] = field(default_factory=list)
    kinds: dict[str, list[np.ndarray]] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    op_terms: dict[int, tuple[float, tuple[int, ...]]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    branches: list[branches.Branch] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    uncounted: set[str] = field(default_factory=set)
    flops: float = 0.0
    _units: np.ndarray | None = None

    def consumed(self) -> np.ndarray:
        """(labels,) whether a kernel reads the label's activation at this axis."""
        if not self.reads:
            return np.zeros(len(self.labels.leaf), bool)
        ids = np.concatenate(self.reads)
        # A reshaped kernel shows one label of each joined block: all of that axis in the same unit are read.
        keys = self.labels.keys() * len(self.labels.leaf) + self.components()
        return np.isin(keys, keys[ids[ids > 0]])

    def components(self) -> np.ndarray:
        """(labels,) the number of the unit that each label belongs to."""
        if self._units is None:
            self._units = self._resolve()
        return self._units

    def frozen(self) -> tuple[np.ndarray, list[str]]:
        """((labels,) number of the reason why the label's unit is frozen or -1, the reasons)."""
        component = self.components()
        reasons = list(dict.fromkeys(reason for _, reason in self.freezes))
        number = {reason: i for i, reason in enumerate(reasons)}
        of_unit = np.full(int(component.max()) + 1, -1)
        for ids, reason in reversed(self.freezes):
            of_unit[component[ids[ids > 0]]] = number[reason]
        return of_unit[component], reasons

    def _resolve(self) -> np.ndarray:
        n = len(self.labels.leaf)
        left = np.concatenate([a for a, _ in self.pairs] or [np.zeros(0, int)])
        right = np.concatenate([b for _, b in self.pairs] or [np.zeros(0, int)])
        for ids in (left[right == 0], right[left == 0]):
            if (ids > 0).any():
                self.freezes.append((ids, "joined to a fixed index (padding or a constant)"))
        real = (left > 0) & (right > 0)
        graph = sparse.coo_matrix((np.ones(real.sum()), (left[real], right[real])), shape=(n, n))
        return csgraph.connected_components(graph, directed=False)[1]

    def kind_of(self, label: int) -> str:
        """What a label's unit is."""
        component = self.components()
        found = ("heads", "values", "groups", "channels")  # the earlier is the more particular
        same = component == component[label]
        return next((kind for kind in found if any(same[ids].any() for ids in self.kinds.get(kind, ()))), "neurons")

    # What rules do.

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Index by index, a and b live and die together."""
        self.pairs.append((np.ravel(a), np.ravel(b)))

    def freeze(self, axis: Axis, reason: str) -> None:
        """The labels of an axis must stay."""
        if isinstance(axis, np.ndarray):
            self.freezes.append((np.ravel(axis), reason))

    def mark(self, kind: str, axis: Axis) -> None:
        """The labels of an axis are of a kind."""
        if isinstance(axis, np.ndarray):
            self.kinds.setdefault(kind, []).append(np.ravel(axis))

    def merge(self, axes: Sequence[Axis], where: str) -> Axis:
        """One entry for axes that are combined index by index."""
        arrays = [axis for axis in axes if isinstance(axis, np.ndarray)]
        if not arrays:
            return FIXED if any(axis is FIXED for axis in axes) else UNIFORM
        for other in arrays[1:]:
            if other is not arrays[0]:
                self.join(arrays[0], other)
        if any(axis is FIXED for axis in axes):
            self.freeze(arrays[0], f"combined with a tensor of fixed size in {where}")
        return arrays[0]


def walk(program: Program, shapes: dict[str, tuple[int, ...]]) -> Walk:
    """Runs the rules over a program whose first inputs are parameters of these shapes."""
    found = Walk(Labels.of(list(shapes.values())))
    values = _start(program, found, len(shapes))
    for value in program.outputs:
        for axis in _get(program, values, value).axes:
            found.freeze(axis, "the network's output")
    active = np.array([bool(v and v.active) for v in values])
    found.branches, found.unscaled = branches.find(program, active, len(shapes), found.op_terms)
    return found


def again(program: Program, labels: Labels, leaves: int) -> Walk:
    """Runs the rules over a program whose parameters have these labels; only its `steps` are of use."""
    found = Walk(labels)
    _start(program, found, leaves)
    return found


def _start(program: Program, found: Walk, leaves: int) -> list[Value | None]:
    values: list[Value | None] = [None] * len(program.avals)
    for i, value in enumerate(program.inputs):
        if i < leaves:
            values[value] = Value(found.labels.value_axes(i), weight=True, linear=True)
        else:
            values[value] = Value((FIXED,) * len(program.shape(value)), active=True)
    _run(program, values, found, 1.0, top=True)
    return values


def _get(program: Program, values: list[Value | None], number: int) -> Value:
    value = values[number]
    if value is None:
        value = values[number] = constant(program.constants.get(number), program.shape(number))
    return value


def constant(array: Any, shape: tuple[int, ...]) -> Value:
    """The entries of a known array: uniform along the axes where it does not vary."""
    if array is None:
        return Value((FIXED,) * len(shape))
    if array.size and array.dtype.kind in "fiu" and (array == array.flat[0]).all():
        return Value((UNIFORM,) * len(shape), number=float(array.flat[0]))
    varies = [size > 1 and bool((array != array.take([0], axis)).any()) for axis, size in enumerate(array.shape)]
    return Value(tuple(FIXED if v else UNIFORM for v in varies))


def _run(program: Program, values: list[Value | None], found: Walk, times: float, top: bool = False) -> None:
    for index, op in enumerate(program.ops):
        ins = [_get(program, values, v) for v in op.inputs]
        context = Context(program, op, found, times)
        rule = RULES.get(op.name, _elementwise if op.name in ELEMENTWISE else _unknown)
        before = len(found.terms)
        outs = rule(context, ins)
        for number, value in zip(op.outputs, outs, strict=True):
            if len(value.axes) != len(program.shape(number)):
                raise AssertionError(f"{op.name}: {len(value.axes)} axes for shape {program.shape(number)}")
            values[number] = value
        found.steps.append(Step(op, program, tuple(ins), tuple(outs)))
        if top and len(found.terms) > before:
            macs = sum(term.macs() for term in found.terms[before:])
            found.op_terms[index] = (macs, tuple(range(before, len(found.terms))))


class Context(NamedTuple):
    """What a rule may ask besides its operands."""

    program: Program
    op: Op
    found: Walk
    times: float  # how often a loop runs the operation

    @property
    def where(self) -> str:
        """The module, for reasons."""
        return f"{self.op.name} of {self.op.scope}" if self.op.scope else self.op.name

    def shape(self, i: int) -> tuple[int, ...]:
        """The shape of operand i."""
        return self.program.shape(self.op.inputs[i])

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """The shape of result i."""
        return self.program.shape(self.op.outputs[i])

    def count(self, flops: float) -> None:
        """Adds arithmetic as XLA counts it, which is once for a loop's body."""
        self.found.flops += flops


Rule = Callable[[Context, list[Value]], list[Value]]

LINEAR = {"neg", "convert_element_type", "copy", "copy_p", "real", "reduce_precision", "stop_gradient", "name"}
TRANSCENDENTAL = {"exp", "log", "log1p", "expm1", "tanh", "sin", "cos", "tan", "sqrt", "rsqrt", "cbrt", "erf",
                  "pow", "atan", "atan2"}  # fmt: skip
ELEMENTWISE = LINEAR | TRANSCENDENTAL | {
    "exp2", "logistic", "add", "add_any", "sub", "mul", "div", "rem", "max", "min", "abs", "sign", "floor", "ceil",
    "round", "square", "integer_pow", "is_finite", "not", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
    "select_n", "clamp", "erf_inv", "erfc", "sinh", "cosh", "asin", "acos", "asinh", "acosh", "atanh", "nextafter",
    "imag", "lgamma", "digamma", "shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count",
    "clz", "device_put", "sharding_constraint", "bitcast_convert_type",
}  # fmt: skip


# Operations that XLA expands into others: what it then counts for each element.
_EXPANDED = {
    "erfc": 62, "erf_inv": 37, "logistic": 3, "sinh": 10, "cosh": 3, "asin": 5, "acos": 3, "asinh": 11, "acosh": 7,
    "atanh": 6, "lgamma": 53, "digamma": 73, "copy": 0, "copy_p": 0, "stop_gradient": 0, "name": 0,
}  # fmt: skip


def _flops(op: Op) -> int:
    """What XLA counts for one element of an elementwise operation, transcendental functions apart."""
    if op.name == "integer_pow":
        power = abs(op.params["y"])
        return power.bit_length() - 2 + power.bit_count() + (op.params["y"] < 0)
    return _EXPANDED.get(op.name, int(op.name not in TRANSCENDENTAL))


def _blend(ins: Sequence[Value], axes: Sequence[Axis], linear: bool = False) -> Value:
    active = any(v.active for v in ins)
    weight = not active and any(v.weight for v in ins)
    return Value(tuple(axes), active, weight, weight and linear)


def _elementwise(c: Context, ins: list[Value]) -> list[Value]:
    shape = c.out_shape()
    if not _folded(c.op.name, ins):
        c.count(math.prod(shape) * _flops(c.op))
    weights = [v for v in ins if v.weight]
    name = c.op.name
    linear = len(weights) == 1 and weights[0].linear and (name in LINEAR or name in ("mul", "div"))
    linear = linear and not (name == "div" and ins[1].weight)
    if name == "mul" and len(weights) == 2:  # a kernel times a kernel: scaling either scales the product
        ins = sorted(ins, key=lambda v: not (v.linear and _covers(v, ins)))
        linear = ins[0].linear and _covers(ins[0], ins)
    full = [v for v in ins if len(v.axes) == len(shape)]
    axes = [c.found.merge([v.axes[i] for v in full], c.where) for i in range(len(shape))]
    return [_blend(ins, axes, linear)]


def _folded(name: str, ins: list[Value]) -> bool:
    """Whether XLA never sees the operation: constants, and a zero added or a one multiplied."""
    numbers = [v.number for v in ins]
    neutral = {"add": 0.0, "add_any": 0.0, "sub": 0.0, "mul": 1.0}.get(name)
    return None not in numbers or (neutral is not None and neutral in (numbers[1:] if name == "sub" else numbers))


def _covers(value: Value, others: Sequence[Value]) -> bool:
    """Whether `value` has labels of its own on every axis where any of the others has."""
    labelled = [i for v in others for i, axis in enumerate(v.axes) if isinstance(axis, np.ndarray)]
    return all(i < len(value.axes) and isinstance(value.axes[i], np.ndarray) for i in labelled)


def _unknown(c: Context, ins: list[Value]) -> list[Value]:
    touched = [axis for v in ins for axis in v.axes if isinstance(axis, np.ndarray)]
    for axis in touched:
        c.found.freeze(axis, f"touched by the unknown primitive {c.where}")
    if touched:
        c.found.unknown.add(c.op.name)
    c.found.uncounted.add(c.op.name)
    return [_blend(ins, (FIXED,) * len(c.out_shape(i))) for i in range(len(c.op.outputs))]


def _identity(c: Context, ins: list[Value]) -> list[Value]:
    return ins[: len(c.op.outputs)]


def _fresh(c: Context, ins: list[Value]) -> list[Value]:
    """Random bits and the like: made at whatever size is asked for, but varying along every axis."""
    c.found.uncounted.add(c.op.name)
    return [_blend(ins, (FIXED,) * len(c.out_shape(i))) for i in range(len(c.op.outputs))]


def _iota(c: Context, ins: list[Value]) -> list[Value]:
    return [Value(tuple(FIXED if i == c.op.params["dimension"] else UNIFORM for i in range(len(c.out_shape()))))]


def _broadcast(c: Context, ins: list[Value]) -> list[Value]:
    axes: list[Axis] = [UNIFORM] * len(c.out_shape())
    for i, target in enumerate(c.op.params["broadcast_dimensions"]):
        if c.shape(0)[i] == c.out_shape()[target]:
            axes[target] = ins[0].axes[i]
        else:
            c.found.freeze(ins[0].axes[i], f"broadcast by {c.where}")
    return [ins[0]._replace(axes=tuple(axes))]


def _transpose(c: Context, ins: list[Value]) -> list[Value]:
    return [ins[0]._replace(axes=tuple(ins[0].axes[i] for i in c.op.params["permutation"]))]


def _squeeze(c: Context, ins: list[Value]) -> list[Value]:
    gone = set(c.op.params["dimensions"])
    for i in gone:
        c.found.freeze(ins[0].axes[i], f"picked out by its index in {c.where}")
    return [ins[0]._replace(axes=tuple(a for i, a in enumerate(ins[0].axes) if i not in gone))]


def _expand_dims(c: Context, ins: list[Value]) -> list[Value]:
    old = iter(ins[0].axes)
    new = set(c.op.params["dimensions"])
    return [ins[0]._replace(axes=tuple(UNIFORM if i in new else next(old) for i in range(len(c.out_shape()))))]


def _reshape(c: Context, ins: list[Value]) -> list[Value]:
    """Splits the reshape into blocks of axes with equal products, and carries the labels through each."""
    axes: list[Axis] = [UNIFORM] * len(c.out_shape())
    old = [i for i, n in enumerate(c.shape(0)) if n != 1]
    new = [i for i, n in enumerate(c.out_shape()) if n != 1]
    for i, n in enumerate(c.shape(0)):
        if n == 1:
            c.found.freeze(ins[0].axes[i], f"picked out by its index in {c.where}")
    while old or new:
        a, b = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(c.shape(0)[i] for i in a)) != (right := math.prod(c.out_shape()[i] for i in b)):
            (a if left < right else b).append((old if left < right else new).pop(0))
        block = _reshape_block(
            c, [ins[0].axes[i] for i in a], [c.shape(0)[i] for i in a], [c.out_shape()[i] for i in b]
        )
        for i, axis in zip(b, block, strict=True):
            axes[i] = axis
    return [ins[0]._replace(axes=tuple(axes))]


def _reshape_block(c: Context, axes: list[Axis], sizes: list[int], new: list[int]) -> list[Axis]:
    arrays = [i for i, axis in enumerate(axes) if isinstance(axis, np.ndarray)]
    if not arrays:
        return [UNIFORM if all(axis is UNIFORM for axis in axes) else FIXED] * len(new)
    if len(axes) == 1 and len(new) == 1:
        return axes
    for i in arrays[1:]:
        c.found.freeze(axes[i], f"flattened together with another axis of units in {c.where}")
    keep = arrays[0]
    spread = [1] * len(sizes)
    spread[keep] = sizes[keep]
    labels = np.broadcast_to(axes[keep].reshape(spread), sizes).reshape(new)
    varying = [i for i in range(len(new)) if (labels != labels.take([0], i)).any()]
    if not varying:
        c.found.freeze(labels, f"split apart in {c.where}")
        return [FIXED] * len(new)
    carrier = varying[0]
    line = labels[tuple(slice(None) if i == carrier else 0 for i in range(len(new)))]
    if len(varying) > 1:
        shape = [1] * len(new)
        shape[carrier] = new[carrier]
        c.found.join(labels, np.broadcast_to(line.reshape(shape), new))
    return [line if i == carrier else FIXED for i in range(len(new))]


def _concatenate(c: Context, ins: list[Value]) -> list[Value]:
    along = c.op.params["dimension"]
    axes = [
        _stack([v.axes[i] for v in ins], [c.shape(k)[i] for k in range(len(ins))])
        if i == along
        else c.found.merge([v.axes[i] for v in ins], c.where)
        for i in range(len(c.out_shape()))
    ]
    return [_blend(ins, axes, all(v.linear for v in ins))]


def _stack(axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    if not any(isinstance(axis, np.ndarray) for axis in axes):
        return FIXED
    return np.concatenate(
        [a if isinstance(a, np.ndarray) else np.zeros(n, int) for a, n in zip(axes, sizes, strict=True)]
    )


def _slice(c: Context, ins: list[Value]) -> list[Value]:
    start, limit = c.op.params["start_indices"], c.op.params["limit_indices"]
    stride = c.op.params["strides"] or (1,) * len(start)
    cut = [slice(*each) for each in zip(start, limit, stride, strict=True)]
    axes = tuple(a[s] if isinstance(a, np.ndarray) else a for a, s in zip(ins[0].axes, cut, strict=True))
    return [ins[0]._replace(axes=axes)]


def _split(c: Context, ins: list[Value]) -> list[Value]:
    axis, sizes = c.op.params["axis"], c.op.params["sizes"]
    starts = np.cumsum([0, *sizes])
    outs = []
    for a, b in itertools.pairwise(starts):
        axes = list(ins[0].axes)
        axes[axis] = axes[axis][a:b] if isinstance(axes[axis], np.ndarray) else axes[axis]
        outs.append(ins[0]._replace(axes=tuple(axes)))
    return outs


def _pad(c: Context, ins: list[Value]) -> list[Value]:
    axes = []
    for axis, (low, high, interior) in zip(ins[0].axes, c.op.params["padding_config"], strict=True):
        if isinstance(axis, np.ndarray) and (low or high or interior):
            if interior or low < 0 or high < 0:
                c.found.freeze(axis, f"padded between its indices in {c.where}")
                axis = FIXED
            else:
                axis = np.concatenate([np.zeros(low, int), axis, np.zeros(high, int)])
        elif axis is UNIFORM and (low or high or interior):
            axis = FIXED
        axes.append(axis)
    return [ins[0]._replace(axes=tuple(axes))]


def _rev(c: Context, ins: list[Value]) -> list[Value]:
    flip = c.op.params["dimensions"]
    axes = [a[::-1] if i in flip and isinstance(a, np.ndarray) else a for i, a in enumerate(ins[0].axes)]
    return [ins[0]._replace(axes=tuple(axes))]


def _reduce(c: Context, ins: list[Value]) -> list[Value]:
    gone = set(c.op.params["axes"])
    if c.op.name in ("argmax", "argmin"):
        c.found.uncounted.add(c.op.name)
    c.count(math.prod(c.shape(0)) - math.prod(c.out_shape()))
    for v in ins:
        for i in gone:
            c.found.freeze(v.axes[i], f"its units are mixed by {c.where}")
    keep = [i for i in range(len(c.shape(0))) if i not in gone]
    axes = [c.found.merge([v.axes[i] for v in ins if len(v.axes) > i], c.where) for i in keep]
    linear = c.op.name == "reduce_sum" and all(v.linear for v in ins)
    return [_blend(ins, axes, linear)] * len(c.op.outputs)


def _along(c: Context, ins: list[Value]) -> list[Value]:
    """Sorts and cumulative operations: mix the indices of one axis."""
    along = c.op.params["axis"] if "axis" in c.op.params else c.op.params["dimension"]
    c.found.uncounted.add(c.op.name)
    for v in ins:
        c.found.freeze(v.axes[along], f"its units are mixed by {c.where}")
    axes = [c.found.merge([v.axes[i] for v in ins], c.where) for i in range(len(c.out_shape()))]
    return [_blend(ins, axes)] * len(c.op.outputs)


def _window(c: Context, ins: list[Value]) -> list[Value]:
    """Pooling: free along axes whose window is 1."""
    sizes = c.op.params["window_dimensions"]
    c.count(math.prod(c.out_shape()) * (math.prod(sizes) - 1))
    axes: list[Axis] = list(ins[0].axes)
    for i, n in enumerate(c.out_shape()):
        if sizes[i] != 1 or n != c.shape(0)[i]:
            c.found.freeze(axes[i], f"its units are pooled by {c.where}")
            axes[i] = FIXED
    return [_blend(ins, axes)] * len(c.op.outputs)


def _gather(c: Context, ins: list[Value]) -> list[Value]:
    table, indices = ins[0], ins[1]
    numbers = c.op.params["dimension_numbers"]
    hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    shown = [i for i in range(len(table.axes)) if i not in hidden]
    axes: list[Axis] = [FIXED] * len(c.out_shape())
    for target, i in zip(numbers.offset_dims, shown, strict=True):
        if c.op.params["slice_sizes"][i] == c.shape(0)[i] and i not in numbers.start_index_map:
            axes[target] = table.axes[i]
        elif c.op.params["slice_sizes"][i] == c.shape(0)[i]:
            axes[target] = table.axes[i]  # a full slice can only start at 0
        else:
            c.found.freeze(table.axes[i], f"indexed by {c.where}")
    for i in hidden:
        c.found.freeze(table.axes[i], f"indexed by {c.where}")
    for axis in indices.axes:
        c.found.freeze(axis, f"used as an index in {c.where}")
    if c.op.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        c.count(math.prod(c.out_shape()) + 3 * math.prod(c.shape(1)))
    return [_blend(ins, axes, table.linear)]


def _dynamic_slice(c: Context, ins: list[Value]) -> list[Value]:
    axes: list[Axis] = []
    for axis, n, m in zip(ins[0].axes, c.shape(0), c.out_shape(), strict=True):
        if n != m:
            c.found.freeze(axis, f"indexed by {c.where}")
            axis = FIXED
        axes.append(axis)
    return [_blend(ins, axes, ins[0].linear)]


def _contract(c: Context, a: Value, b: Value, i: int, j: int) -> None:
    """Axis i of a is summed against axis j of b."""
    left, right = a.axes[i], b.axes[j]
    if not isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
        for axis in (left, right):
            c.found.freeze(axis, f"reads an axis of fixed size in {c.where}")
        return
    c.found.join(left, right)
    kernel = next((axis for v, axis in ((b, right), (a, left)) if v.weight and v.linear), None)
    if kernel is not None:
        c.found.reads.append(kernel)
    elif a.weight or b.weight:
        c.found.freeze(left, f"read by a kernel that is not used as stored, in {c.where}")
    else:
        c.found.freeze(left, f"two activations are contracted, and scaled by its size, in {c.where}")


def _leaves(c: Context, *values: Value) -> tuple[int, ...]:
    ids = [axis[axis > 0][:1] for v in values if v.weight for axis in v.axes if isinstance(axis, np.ndarray)]
    return tuple({int(c.found.labels.leaf[i]) for each in ids for i in each})


def _size(axis: Axis, n: int) -> Any:
    return axis if isinstance(axis, np.ndarray) else n


def _dot(c: Context, ins: list[Value]) -> list[Value]:
    a, b = ins[0], ins[1]
    (left, right), (batch_left, batch_right) = c.op.params["dimension_numbers"]
    for i, j in zip(left, right, strict=True):
        _contract(c, a, b, i, j)
    batch = [c.found.merge([a.axes[i], b.axes[j]], c.where) for i, j in zip(batch_left, batch_right, strict=True)]
    free_left = [i for i in range(len(a.axes)) if i not in (*left, *batch_left)]
    free_right = [j for j in range(len(b.axes)) if j not in (*right, *batch_right)]
    axes = batch + [a.axes[i] for i in free_left] + [b.axes[j] for j in free_right]
    if a.active and b.active:
        for axis in batch:
            c.found.mark("heads", axis)
        for axis in axes[len(batch) :]:
            c.found.mark("values", axis)
    for v, free in ((a, free_left), (b, free_right)):
        for i in free if v.weight else ():
            c.found.mark("neurons", v.axes[i])
    shapes = (c.shape(0), c.shape(1))
    sizes = [_size(axis, c.out_shape()[i]) for i, axis in enumerate(axes)]
    summed = a if any(isinstance(a.axes[i], np.ndarray) for i in left) else b
    sizes += [_size(summed.axes[k], shapes[0][i]) for k, i in zip(left if summed is a else right, left, strict=True)]
    _add_term(c, 1.0, sizes, _leaves(c, a, b))
    c.count(2.0 * math.prod(c.out_shape()) * math.prod(shapes[0][i] for i in left))
    linear = all(v.linear for v in ins if v.weight)
    return [_blend(ins, axes, linear)]


def _add_term(c: Context, constant: float, sizes: Sequence[Any], leaves: tuple[int, ...]) -> None:
    fixed = math.prod(n for n in sizes if isinstance(n, int))
    arrays = tuple(n for n in sizes if not isinstance(n, int))
    c.found.terms.append(Term(constant * fixed * c.times, arrays, leaves))


def _conv(c: Context, ins: list[Value]) -> list[Value]:
    x, kernel = ins
    p = c.op.params
    x_spec, k_spec, o_spec = p["dimension_numbers"]
    where = c.where
    for i in (x_spec[0], *x_spec[2:]):
        c.found.freeze(x.axes[i], f"a batch or window axis of {where}")
    for i in k_spec[2:]:
        c.found.freeze(kernel.axes[i], "a convolution's window")
    channels, made, read = x.axes[x_spec[1]], kernel.axes[k_spec[0]], kernel.axes[k_spec[1]]
    groups = p["feature_group_count"]
    if p["batch_group_count"] != 1:
        for axis in (channels, made, read):
            c.found.freeze(axis, f"batch groups in {where}")
    elif groups == 1:
        _contract(c, x, kernel, x_spec[1], k_spec[1])
    else:
        made = _grouped(c, channels, made, read, groups, c.shape(1)[k_spec[0]])
    if groups == 1:
        c.found.mark("channels", made)
    dilated = any(d != 1 for d in p["lhs_dilation"])
    positions = math.prod((c.shape(0) if dilated else c.out_shape())[i] for i in (x_spec if dilated else o_spec)[2:])
    window = math.prod(c.shape(1)[i] for i in k_spec[2:])
    batch = c.shape(0)[x_spec[0]] // p["batch_group_count"]
    sizes = [_size(read, c.shape(1)[k_spec[1]]), _size(made, c.shape(1)[k_spec[0]])]
    _add_term(c, float(positions * window * batch), sizes, _leaves(c, kernel))
    c.count(2.0 * _in_bounds(c) * batch * c.shape(1)[k_spec[1]] * c.shape(1)[k_spec[0]])
    axes: list[Axis] = [FIXED] * len(o_spec)
    axes[o_spec[1]] = made
    return [_blend(ins, axes, False)]


def _grouped(c: Context, channels: Axis, made: Axis, read: Axis, groups: int, outputs: int) -> Axis:
    """Channels in a group, and all that is made of them, are one unit; the kernel's input axis stays."""
    c.found.freeze(read, f"the inputs of each group of {c.where}")
    if not isinstance(channels, np.ndarray) or not isinstance(made, np.ndarray):
        for axis in (channels, made):
            c.found.freeze(axis, f"joined to an axis of fixed size in {c.where}")
        return made
    blocks, outs = channels.reshape(groups, -1), made.reshape(groups, outputs // groups)
    for block in (blocks, outs):
        c.found.join(block, np.broadcast_to(outs[:, :1], block.shape))
    if blocks.shape[1] > 1:
        c.found.mark("groups", made)
    return made


def _in_bounds(c: Context) -> int:
    """Products of a convolution that are not with padding, per batch, input and output channel."""
    p = c.op.params
    x_spec, k_spec, o_spec = p["dimension_numbers"]
    total = 1
    for d, (i, k, o) in enumerate(zip(x_spec[2:], k_spec[2:], o_spec[2:], strict=True)):
        out = np.arange(c.out_shape()[o])[:, None] * p["window_strides"][d]
        at = out + np.arange(c.shape(1)[k])[None] * p["rhs_dilation"][d] - p["padding"][d][0]
        size = (c.shape(0)[i] - 1) * p["lhs_dilation"][d] + 1
        total *= int(((at >= 0) & (at < size) & (at % p["lhs_dilation"][d] == 0)).sum())
    return total


def _scan(c: Context, ins: list[Value]) -> list[Value]:
    """The body is walked until it is known what comes around in the carry; then all of it is joined to what entered."""
    p = c.op.params
    body = flatten(p["jaxpr"])
    # Constants, carry, slices come in, carry and slices go out; what is sliced has an axis more outside. (How the
    # primitive's parameters say so differs between versions of JAX.)
    sliced = sum(len(c.shape(i)) > len(body.shape(v)) for i, v in enumerate(body.inputs))
    stacked = sum(len(c.out_shape(i)) > len(body.shape(v)) for i, v in enumerate(body.outputs))
    carried = len(body.outputs) - stacked
    fixed = len(body.inputs) - sliced - carried
    xs = []
    for v in ins[fixed + carried :]:
        c.found.freeze(v.axes[0], f"stacked over the steps of {c.where}")
        xs.append(v._replace(axes=v.axes[1:]))
    carry = list(ins[fixed : fixed + carried])
    c.count(2)  # its counter
    while True:
        terms, flops = len(c.found.terms), c.found.flops
        values: list[Value | None] = [None] * len(body.avals)
        for number, value in zip(body.inputs, ins[:fixed] + carry + xs, strict=True):
            values[number] = value
        _run(body, values, c.found, c.times * p["length"])
        outs = [_get(body, values, v) for v in body.outputs]
        entered = carry
        carry = [
            _blend([a, b], [c.found.merge([x, y], c.where) for x, y in zip(a.axes, b.axes, strict=True)])
            for a, b in zip(carry, outs[:carried], strict=True)
        ]
        if [_outline(v) for v in entered] == [_outline(v) for v in carry]:
            return carry + [v._replace(axes=(FIXED, *v.axes)) for v in outs[carried:]]
        del c.found.terms[terms:]
        c.found.flops = flops


def _outline(value: Value) -> tuple[Any, ...]:
    """What is known of a value, but for whose the labels are."""
    return (*value[1:], *("labels" if isinstance(axis, np.ndarray) else axis for axis in value.axes))


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast, "transpose": _transpose, "reshape": _reshape, "squeeze": _squeeze,
    "expand_dims": _expand_dims, "concatenate": _concatenate, "slice": _slice, "split": _split, "pad": _pad,
    "rev": _rev, "iota": _iota, "gather": _gather, "dynamic_slice": _dynamic_slice, "dot_general": _dot,
    "conv_general_dilated": _conv, "scan": _scan, "optimization_barrier": _identity,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax",
                     "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), _along),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _window),
    **dict.fromkeys(("random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split",
                     "threefry2x32", "rng_bit_generator", "rng_uniform"), _fresh),
}  # fmt: skip
