"""Labels of parameter indices, and the abstract values that carry them through a program.

Every index of every parameter axis has a label. An abstract value has one entry per axis:

- an array of labels, one per index;
- `FIXED`: the indices have a meaning that pruning must not change (batch, pixels, the vocabulary);
- `UNIFORM`: the value is constant along the axis, so the axis may have any size;
- a `SplitAxis`: one of several axes into which a reshape split an axis of labels.

Label 0 is a single fixed index among others, such as a padded channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

FIXED: Literal["fixed"] = "fixed"
UNIFORM = None
Axis = Any  # np.ndarray of labels | FIXED | UNIFORM | SplitAxis


@dataclass(frozen=True, eq=False)
class SplitAxis:
    """One of the axes into which labels were split, such as 3 × heads × size; all of them share the `labels` array.

    Which of the axes may shrink stays open until an operation decides it (`Analysis.resolve_splits`).
    """

    labels: np.ndarray
    dim: int


class AbstractValue(NamedTuple):
    """What is known about a value of the network.

    Attributes:
      axes: one entry per axis, see the module's docstring.
      active: it depends on the network's inputs.
      weight: it depends on parameters only.
      linear: scaling an index of a parameter by 0 zeroes that index of the value and leaves the rest as if the
        parameter did not have the index.
      normalised: labels, at least one for each parameter axis along which `linear` does not hold because the value was
        also multiplied by a function of the same index.
      number: the number that a constant holds everywhere.
      summed: of a sum over units, what was summed over: labels, or sizes of axes without labels. Their product is the
        number of terms, by which a mean is divided.
    """

    axes: tuple[Axis, ...]
    active: bool = False
    weight: bool = False
    linear: bool = False
    number: float | None = None
    normalised: frozenset[int] = frozenset()
    summed: tuple[Any, ...] = ()

    @property
    def terms(self) -> int:
        """The number of terms of a sum over units; 0 if it is none."""
        return math.prod(n if isinstance(n, int) else len(n) for n in self.summed) if self.summed else 0


def has_labels(axis: Axis) -> bool:
    """Whether an axis has labels."""
    return isinstance(axis, (np.ndarray, SplitAxis))


def combine(ins: Sequence[AbstractValue], axes: Sequence[Axis], linear: bool = False) -> AbstractValue:
    """The value with these axes that is computed from `ins`."""
    active = any(v.active for v in ins)
    weight = not active and any(v.weight for v in ins)
    normalised: frozenset[int] = frozenset()
    if weight:
        normalised = normalised.union(*(v.normalised if v.linear else _representatives(v) for v in ins if v.weight))
    return AbstractValue(tuple(axes), active, weight, weight and linear, normalised=normalised)


def _representatives(value: AbstractValue) -> frozenset[int]:
    """Labels of a value's axes, at least one for each parameter axis among them."""
    arrays = [np.ravel(axis.labels if isinstance(axis, SplitAxis) else axis) for axis in value.axes if has_labels(axis)]
    return value.normalised.union(*(ids[np.append(True, np.diff(ids) != 1)].tolist() for ids in arrays))


def constant(array: Any, shape: tuple[int, ...]) -> AbstractValue:
    """The abstract value of a known array: uniform along the axes where it does not vary."""
    if array is None:
        return AbstractValue((FIXED,) * len(shape))
    real = array.dtype.kind in "iub" or jnp.issubdtype(array.dtype, np.floating)  # bfloat16 is of kind "V"
    if array.size and real and (array == array.flat[0]).all():
        return AbstractValue((UNIFORM,) * len(shape), number=float(array.flat[0]))
    varies = [size > 1 and bool((array != array.take([0], axis)).any()) for axis, size in enumerate(array.shape)]
    return AbstractValue(tuple(FIXED if v else UNIFORM for v in varies))


def split_axes(labels: np.ndarray) -> list[Axis]:
    """The axes of an array of labels; those along which the labels do not vary are fixed."""
    varying = [i for i in range(labels.ndim) if (labels != labels.take([0], i)).any()]
    if not varying:
        return [FIXED] * labels.ndim
    core = labels[tuple(slice(None) if i in varying else 0 for i in range(labels.ndim))]
    if core.ndim == 1:
        return [core if i in varying else FIXED for i in range(labels.ndim)]
    return [SplitAxis(core, varying.index(i)) if i in varying else FIXED for i in range(labels.ndim)]


def replace_split(axes: Sequence[Axis], old: np.ndarray, new: np.ndarray) -> list[Axis]:
    """`axes` with the split of the labels `old` replaced by that of `new`, from which some indices are missing."""
    several = [d for d, n in enumerate(new.shape) if n != 1]
    core = new.reshape([new.shape[d] for d in several])

    def entry(axis: Axis) -> Axis:
        if not isinstance(axis, SplitAxis) or axis.labels is not old:
            return axis
        if axis.dim not in several:
            return UNIFORM
        return core if core.ndim == 1 else SplitAxis(core, several.index(axis.dim))

    return [entry(axis) for axis in axes]


@dataclass
class Labels:
    """(labels,) arrays of parameter number, axis and index. Label 0 belongs to no parameter: its entries are -1."""

    leaf: np.ndarray
    axis: np.ndarray
    index: np.ndarray
    _axes: list[tuple[Any, ...]]

    def keys(self) -> np.ndarray:
        """(labels,) a number that identifies the parameter axis: parameter · 16 + axis."""
        return self.leaf.astype(np.int64) * 16 + self.axis

    def kept(self, keep: np.ndarray) -> Labels:
        """The same labels on parameters that have lost those outside `keep`, (labels,) bool."""
        axes = [tuple(axis if axis is UNIFORM else axis[keep[axis]] for axis in leaf) for leaf in self._axes]
        return Labels(self.leaf, self.axis, self.index, axes)

    @staticmethod
    def of(shapes: Sequence[tuple[int, ...]]) -> Labels:
        """Fresh labels for every axis longer than 1 of parameters with these shapes."""
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
        """The abstract axes of a parameter."""
        return self._axes[leaf]

    def axes_of(self, leaf: int) -> list[Any]:
        """The labels of a parameter's axes; 1 for an axis of size 1, which has none."""
        return [1 if axis is UNIFORM else axis for axis in self._axes[leaf]]
