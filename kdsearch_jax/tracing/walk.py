"""The walk over a network's operations: one rule a primitive (`rules`), over labels of indices.

What a value knows of its axes is in `labels`, what a rule may do and what is found in `findings`.
"""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from kdsearch_jax.tracing import branches
from kdsearch_jax.tracing.findings import Context, Site, Step, Tie, Walk
from kdsearch_jax.tracing.labels import FIXED, Labels, Value, constant
from kdsearch_jax.tracing.program import Program
from kdsearch_jax.tracing.rules import RULES
from kdsearch_jax.tracing.rules.mixing import unknown


def walk(program: Program, shapes: dict[str, tuple[int, ...]], paired: Collection[Site | Tie] = ()) -> Walk:
    """Runs the rules over a program whose first inputs are parameters of these shapes, pairing parts at some sites."""
    found = Walk(Labels.of(list(shapes.values())), paired)
    values = _start(program, found, len(shapes))
    names = {name: i for i, name in enumerate(shapes)}
    for tie in (each for each in paired if isinstance(each, Tie)):
        axes = ((tie.leaf, tie.axis), (tie.other, tie.other_axis))
        found.join(*(found.labels.value_axes(names[leaf])[axis] for leaf, axis in axes))
    for value in program.outputs:
        for axis in _get(program, values, value).axes:
            found.freeze(axis, "the network's output")
    active = np.array([bool(v and v.active) for v in values])
    found.graph = branches.Graph(program, active, len(shapes))
    found.branches, found.unscaled = branches.find(found.graph, found.op_terms)
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
    if any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for aval in program.avals):
        found.uncounted.add("complex numbers")
    _run(program, values, found, 1.0, top=True)
    return values


def _get(program: Program, values: list[Value | None], number: int) -> Value:
    value = values[number]
    if value is None:
        value = values[number] = constant(program.constants.get(number), program.shape(number))
    return value


def _run(program: Program, values: list[Value | None], found: Walk, times: float, top: bool = False) -> list[Value]:
    for index, op in enumerate(program.ops):
        ins = [_get(program, values, v) for v in op.inputs]
        context = Context(program, op, found, times, _run)
        before = len(found.terms)
        outs = RULES.get(op.name, unknown)(context, ins)
        for number, value in zip(op.outputs, outs, strict=True):
            if len(value.axes) != len(program.shape(number)):
                raise AssertionError(f"{op.name}: {len(value.axes)} axes for shape {program.shape(number)}")
            values[number] = value
        found.steps.append(Step(op, program, tuple(ins), tuple(outs)))
        if top and len(found.terms) > before:
            macs = sum(term.macs() for term in found.terms[before:])
            found.op_terms[index] = (macs, tuple(range(before, len(found.terms))))
    return [_get(program, values, v) for v in program.outputs]
