"""Whose index is it: labels of parameters' indices, and what a value of the network knows about each of its axes.

A value has one entry per axis: an array of labels (one per index), `FIXED` (indices mean something that no pruning may
change: batch, pixels, the vocabulary), `UNIFORM` (the value is constant along the axis, so that any size will do), or a
`Part` of an axis of labels that a reshape split in several. Label 0 is a single fixed index among others, such as a
padded channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

FIXED: Literal["fixed"] = "fixed"
UNIFORM = None
Axis = Any  # np.ndarray of labels | FIXED | UNIFORM | Part


@dataclass(frozen=True, eq=False)
class Part:
    """One of the axes into which labels were split, such as 3 × heads × size: all share the array of their labels.

    Which of the axes may shrink is left open until an operation decides it (`Walk.settle`).
    """

    labels: np.ndarray
    dim: int


class Value(NamedTuple):
    """What is known of a value.

    axes: an entry per axis. active: it depends on the network's inputs; weight: on parameters only. linear: where an
    index of a parameter is scaled by 0, that index of the value is 0 and the rest is as if the parameter did not have
    it. normalised: the parameters' axes along which that does not hold, because the value was also multiplied by a
    function of the same index, given by one label or more of each. number: what a constant is everywhere.
    """

    axes: tuple[Axis, ...]
    active: bool = False
    weight: bool = False
    linear: bool = False
    number: float | None = None
    normalised: frozenset[int] = frozenset()


def labelled(axis: Axis) -> bool:
    """Whether an axis has labels."""
    return isinstance(axis, (np.ndarray, Part))


def blend(ins: Sequence[Value], axes: Sequence[Axis], linear: bool = False) -> Value:
    """A value with these axes, made of `ins`."""
    active = any(v.active for v in ins)
    weight = not active and any(v.weight for v in ins)
    normalised: frozenset[int] = frozenset()
    if weight:
        normalised = normalised.union(*(v.normalised if v.linear else _firsts(v) for v in ins if v.weight))
    return Value(tuple(axes), active, weight, weight and linear, normalised=normalised)


def _firsts(value: Value) -> frozenset[int]:
    """Labels of a value's axes, at least one of each axis of a parameter that is among them."""
    arrays = [np.ravel(axis.labels if isinstance(axis, Part) else axis) for axis in value.axes if labelled(axis)]
    return value.normalised.union(*(ids[np.append(True, np.diff(ids) != 1)].tolist() for ids in arrays))


def constant(array: Any, shape: tuple[int, ...]) -> Value:
    """The entries of a known array: uniform along the axes where it does not vary."""
    if array is None:
        return Value((FIXED,) * len(shape))
    real = array.dtype.kind in "iub" or jnp.issubdtype(array.dtype, np.floating)  # bfloat16 is of kind "V"
    if array.size and real and (array == array.flat[0]).all():
        return Value((UNIFORM,) * len(shape), number=float(array.flat[0]))
    varies = [size > 1 and bool((array != array.take([0], axis)).any()) for axis, size in enumerate(array.shape)]
    return Value(tuple(FIXED if v else UNIFORM for v in varies))


def parts(labels: np.ndarray) -> list[Axis]:
    """The axes of an array of labels: those along which the labels do not vary are fixed."""
    varying = [i for i in range(labels.ndim) if (labels != labels.take([0], i)).any()]
    if not varying:
        return [FIXED] * labels.ndim
    core = labels[tuple(slice(None) if i in varying else 0 for i in range(labels.ndim))]
    if core.ndim == 1:
        return [core if i in varying else FIXED for i in range(labels.ndim)]
    return [Part(core, varying.index(i)) if i in varying else FIXED for i in range(labels.ndim)]


def remake(axes: Sequence[Axis], old: np.ndarray, new: np.ndarray) -> list[Axis]:
    """`axes` with the parts of the array `old` replaced by those of `new`, in which single indices are gone."""
    several = [d for d, n in enumerate(new.shape) if n != 1]
    core = new.reshape([new.shape[d] for d in several])

    def entry(axis: Axis) -> Axis:
        if not isinstance(axis, Part) or axis.labels is not old:
            return axis
        if axis.dim not in several:
            return UNIFORM
        return core if core.ndim == 1 else Part(core, several.index(axis.dim))

    return [entry(axis) for axis in axes]


@dataclass
class Labels:
    """Arrays over labels of parameter number, axis and index (label 0 is nobody's, -1)."""

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
