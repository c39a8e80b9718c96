"""Numbers in a model's code that are powers of a size, such as the 1/√d of attention, and the weights that undo them.

Code that divides queries by √d divides them by √n in a student with n of the d units. For the student to compute what
the network computed, whatever scales the value linearly (the kernel and bias of the queries, or the scale of a norm
behind them) is multiplied by √(n/d) when it is cut. Whether such a number follows the size is seen in trial cuts
(`size_check`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.tracing.analysis import Analysis, TracedOp
from kdsearch_jax.tracing.labels import AbstractValue

Path = tuple[int, ...]
_POWERS = (0.5, -0.5, 1.0, -1.0)
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Rescale:
    """A number that is a power of the length of a parameter's axis.

    Attributes:
      operand: of the operation, the number.
      leaf, axis: the axis. power: number = length ** power.
      divides: the number divides.
      scaled: parameters by which the value that it meets is scaled.
    """

    operand: int
    leaf: str
    axis: int
    power: float
    divides: bool
    scaled: tuple[str, ...]

    def is_number(self, number: float | None, size: int) -> bool:
        """Whether a number is that of this size."""
        return _is_power(number, size, self.power)

    def factor(self, before: int, after: int) -> float:
        """What the `scaled` parameters are multiplied by in a student whose axis has another length."""
        return (after / before) ** (self.power if self.divides else -self.power)


def find_rescales(
    analysis: Analysis, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[Path, Rescale]:
    """{path of an operation: number in it that may be a power of a size}."""
    found: dict[Path, Rescale] = {}
    graph = analysis.graph
    assert graph is not None
    for traced in analysis.ops:
        if traced.op.name not in ("mul", "div") or traced.program is not graph.program:
            continue
        for operand in (1,) if traced.op.name == "div" else (0, 1):
            value, number = traced.ins[1 - operand], traced.ins[operand].number
            if number in (None, 0.0, 1.0) or not value.active:
                continue
            axes = _axes(analysis, value, names, shapes)
            pairs = ((axis, power) for axis in axes for power in _POWERS)
            match = next((pair for pair in pairs if _is_power(number, shapes[pair[0][0]][pair[0][1]], pair[1])), None)
            if match is not None and (scaled := _scalers(analysis, traced, 1 - operand)):
                (leaf, axis), power = match
                kernels = tuple(names[i] for i in sorted(scaled))
                found[traced.op.path] = Rescale(operand, leaf, axis, power, traced.op.name == "div", kernels)
    return found


def _axes(
    analysis: Analysis, value: AbstractValue, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, int]]:
    """The parameter axes whose indices a value has, or was summed over, all of them."""
    arrays = [axis for axis in (*reversed(value.axes), *value.summed) if isinstance(axis, np.ndarray) and axis[0] > 0]
    axes = [(names[int(analysis.labels.leaf[a[0]])], int(analysis.labels.axis[a[0]]), len(a)) for a in arrays]
    return [(leaf, axis) for leaf, axis, size in axes if shapes[leaf][axis] == size]


def _scalers(analysis: Analysis, traced: TracedOp, operand: int) -> Collection[int]:
    """Parameters that scale an operand and nothing else; none if there are no such."""
    graph, value = analysis.graph, traced.op.inputs[operand]
    assert graph is not None
    region = graph.region(value)
    scaled = graph.scalers(value, region) or ()
    return scaled if all(graph.users_of(leaf) <= region for leaf in scaled) else ()


def _is_power(number: float | None, size: int, power: float) -> bool:
    return number is not None and math.isclose(number, size**power, rel_tol=_TOLERANCE)
