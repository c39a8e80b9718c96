"""The rule for an einsum of three or more operands: its products of two are walked like any others."""

from __future__ import annotations

from kdsearch_jax.tracing import contractions
from kdsearch_jax.tracing.findings import Context, Ordered, Rule
from kdsearch_jax.tracing.labels import Value
from kdsearch_jax.tracing.program import Program


def _einsum(c: Context, ins: list[Value]) -> list[Value]:
    """Labels are joined, frozen and read alike in any order of the products; the cost is that of this order."""
    body: Program = c.op.params["body"]
    values: list[Value | None] = [None] * len(body.avals)
    for number, value in zip(body.inputs, ins, strict=True):
        values[number] = value
    before = len(c.found.steps)
    outs = c.run(body, values, c.found, c.times)
    del c.found.steps[before:]  # a student may contract in another order
    c.found.orders.append(Ordered(c.op.params["order"], c.times, c.op.scope))
    return outs


RULES: dict[str, Rule] = {contractions.NAME: _einsum}
