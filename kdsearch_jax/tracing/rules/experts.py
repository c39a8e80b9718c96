"""The rule for `jax.lax.ragged_dot`: each token is multiplied by the kernel of the expert that it was sent to."""

from __future__ import annotations

import math

from kdsearch_jax.tracing.findings import Context, Rule
from kdsearch_jax.tracing.labels import FIXED, Axis, Value, blend
from kdsearch_jax.tracing.rules import products


def _ragged_dot(c: Context, ins: list[Value]) -> list[Value]:
    """A dot product of which one axis of the left operand, as a rule the tokens, is divided into groups of given sizes.

    The kernels have an axis of groups; where it is the tokens that are summed, the result has it instead. A token is in
    one group and is multiplied by one kernel: that is what is counted, whatever a backend does.
    """
    numbers = c.op.params["ragged_dot_dimension_numbers"]
    (left, right), (batch_left, batch_right) = numbers.dot_dimension_numbers
    divided, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    a, b = c.found.settle(ins[0], left), c.found.settle(ins[1], right)
    for i in divided:
        c.freeze(a.axes[i], "divided into groups by")
    for j in groups:
        c.freeze(b.axes[j], "indexed by the groups of")
    for value in ins[2:]:
        for axis in value.axes:
            c.freeze(axis, "used as an index in")
    for i, j in zip(left, right, strict=True):
        if i in divided:
            c.freeze(b.axes[j], "divided into groups by")
        else:
            products.contract(c, a, b, i, j)
    batch = [c.found.merge([a.axes[i], b.axes[j]], c) for i, j in zip(batch_left, batch_right, strict=True)]
    axes: list[Axis] = [FIXED] * len(set(left) & set(divided)) + batch
    axes += [FIXED if i in divided else a.axes[i] for i in range(len(a.axes)) if i not in (*left, *batch_left)]
    axes += [b.axes[j] for j in range(len(b.axes)) if j not in (*right, *batch_right, *groups)]
    for j in range(len(b.axes)):
        if b.weight and j not in (*right, *batch_right, *groups):
            c.found.mark("neurons", b.axes[j])
    summed = [products.size(a.axes[i], c.shape(0)[i]) for i in left]
    made = [products.size(axis, n) for axis, n in zip(axes, c.out_shape(), strict=True)]
    several = math.prod(c.out_shape()[: len(set(left) & set(divided))])  # of a sum over tokens, one for each group
    products.add_term(c, 1.0 / several, [*made, *summed], products.leaves(c, a, b))
    c.found.uncounted.add(c.op.name)
    return [blend(ins, axes, all(v.linear for v in ins[:2] if v.weight))]


RULES: dict[str, Rule] = {"ragged_dot_general": _ragged_dot}
