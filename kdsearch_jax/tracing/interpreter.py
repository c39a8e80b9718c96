"""An abstract interpreter: runs one rule per primitive (`rules`) over labels instead of numbers.

`labels` has the abstract values, `analysis` what the rules collect.
"""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from kdsearch_jax.tracing import residual
from kdsearch_jax.tracing.analysis import Analysis, AxisTie, RuleContext, SplitSite, TracedOp
from kdsearch_jax.tracing.labels import FIXED, AbstractValue, Labels, constant
from kdsearch_jax.tracing.program import Program
from kdsearch_jax.tracing.rules import RULES
from kdsearch_jax.tracing.rules.mixing import unknown


def analyze(
    program: Program, shapes: dict[str, tuple[int, ...]], paired: Collection[SplitSite | AxisTie] = ()
) -> Analysis:
    """Analyzes a program.

    Args:
      program: its first inputs are the parameters.
      shapes: {path: shape} of these parameters, in order.
      paired: split sites and ties whose parts are joined index by index.
    """
    analysis = Analysis(Labels.of(list(shapes.values())), paired)
    values = _interpret(program, analysis, len(shapes))
    number = {name: i for i, name in enumerate(shapes)}
    for tie in paired:
        if isinstance(tie, AxisTie):
            axes = ((tie.leaf, tie.axis), (tie.other, tie.other_axis))
            analysis.join(*(analysis.labels.value_axes(number[leaf])[axis] for leaf, axis in axes))
    for value in program.outputs:
        for axis in _get(program, values, value).axes:
            analysis.freeze(axis, "the network's output")
    active = np.array([bool(v and v.active) for v in values])
    analysis.graph = residual.DataflowGraph(program, active, len(shapes))
    analysis.branches, analysis.unscaled = residual.find_branches(analysis.graph, analysis.op_terms)
    return analysis


def reanalyze(program: Program, labels: Labels, leaves: int) -> Analysis:
    """Analyzes a program whose first `leaves` inputs are parameters with the given labels. Only `ops` is meaningful."""
    analysis = Analysis(labels)
    _interpret(program, analysis, leaves)
    return analysis


def _interpret(program: Program, analysis: Analysis, leaves: int) -> list[AbstractValue | None]:
    values: list[AbstractValue | None] = [None] * len(program.avals)
    for i, value in enumerate(program.inputs):
        if i < leaves:
            values[value] = AbstractValue(analysis.labels.value_axes(i), weight=True, linear=True)
        else:
            values[value] = AbstractValue((FIXED,) * len(program.shape(value)), active=True)
    if any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for aval in program.avals):
        analysis.uncounted.add("complex numbers")
    _run(program, values, analysis, 1.0, top=True)
    return values


def _get(program: Program, values: list[AbstractValue | None], number: int) -> AbstractValue:
    value = values[number]
    if value is None:
        value = values[number] = constant(program.constants.get(number), program.shape(number))
    return value


def _run(
    program: Program, values: list[AbstractValue | None], analysis: Analysis, times: float, top: bool = False
) -> list[AbstractValue]:
    for index, op in enumerate(program.ops):
        ins = [_get(program, values, v) for v in op.inputs]
        before = len(analysis.terms)
        outs = RULES.get(op.name, unknown)(RuleContext(program, op, analysis, times, _run), ins)
        for number, value in zip(op.outputs, outs, strict=True):
            if len(value.axes) != len(program.shape(number)):
                raise AssertionError(f"{op.name}: {len(value.axes)} axes for shape {program.shape(number)}")
            values[number] = value
        analysis.ops.append(TracedOp(op, program, tuple(ins), tuple(outs)))
        if top and len(analysis.terms) > before:
            macs = sum(term.macs() for term in analysis.terms[before:])
            analysis.op_terms[index] = (macs, tuple(range(before, len(analysis.terms))))
    return [_get(program, values, v) for v in program.outputs]
