"""Replaces the operations of an einsum of three or more operands by a single operation.

`jnp.einsum` contracts its operands in pairs, in the order that is cheapest at their sizes. A student may therefore
contract in another order than the network it was cut from, although both compute the same sum of products.
`merge_einsums` replaces the operations of such a call by one operation named "einsum". Its parameter `equation` says
what is summed, as

    ((operand, indices), …), indices of the result,

numbered independently of the order: two calls with equal equations are the same multilinear function. Its parameter
`order` holds the order, which decides the cost.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsearch_jax.tracing.program import Op, Program

NAME = "einsum"
_MAX_ORDERINGS = 24


@dataclass(frozen=True)
class ContractionOrder:
    """The order in which an einsum is contracted.

    Attributes:
      products: the indices of each product of two operands.
      sizes: {index: size}.
    """

    products: tuple[tuple[int, ...], ...]
    sizes: Mapping[int, int]

    def macs(self, products: Sequence[Sequence[int]] | None = None) -> int:
        """Multiply-accumulates at these sizes, in this order or in the order of other `products`."""
        chosen = self.products if products is None else products
        return sum(math.prod(self.sizes[index] for index in product) for product in chosen)


@dataclass(frozen=True)
class _ProductSum:
    """A value as a sum of products of operands.

    Attributes:
      factors: (operand, its indices).
      indices: the indices of the value's axes; all others are summed over.
      products: as in `ContractionOrder`.
      types: precisions and dtypes of intermediate results.
    """

    factors: tuple[tuple[int, tuple[int, ...]], ...]
    indices: tuple[int, ...]
    products: tuple[tuple[int, ...], ...] = ()
    types: frozenset[str] = frozenset()

    def renamed(self, names: Mapping[int, int]) -> _ProductSum:
        def rename(indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(names[i] for i in indices)

        factors = tuple((operand, rename(indices)) for operand, indices in self.factors)
        return _ProductSum(factors, rename(self.indices), tuple(map(rename, self.products)), self.types)


def merge_einsums(program: Program) -> None:
    """Replaces the operations of each einsum of three or more operands by one, in place."""
    ops: list[Op] = []
    uses = Counter(v for op in program.ops for v in op.inputs) + Counter(program.outputs)
    for call_site, group in itertools.groupby(program.ops, key=_einsum_call):
        run = list(group)
        ops += run if call_site is None else _merge_trees(program, run, uses)
    program.ops = ops


def _einsum_call(op: Op) -> Any:
    """The scope and the stack of the `jnp.einsum` call that an operation belongs to; None where there is none."""
    if op.name not in _SUM_RULES:
        return None
    for traceback in op.tracebacks:
        frames = traceback.frames
        for i, frame in enumerate(frames):
            if frame.function_name == "einsum" and os.path.basename(frame.file_name) == "einsum.py":
                return op.scope, *((outer.file_name, outer.line_num) for outer in frames[i:])
    return None


def _merge_trees(program: Program, run: list[Op], uses: Counter[int]) -> list[Op]:
    """Merges the operations of one call, or of several on one line, into one operation per result."""
    trees: dict[int, list[Op]] = {}  # {result: the operations that compute it}
    for op in run:
        inside = [tree for v in op.inputs if uses[v] == 1 and (tree := trees.pop(v, None)) is not None]
        trees[op.outputs[0]] = [*itertools.chain(*inside), op]
    return list(itertools.chain(*(_merge_tree(program, tree) or tree for tree in trees.values())))


def _merge_tree(program: Program, ops: list[Op]) -> list[Op] | None:
    """A single operation for a tree of them; None where it has fewer than three operands."""
    inner = {op.outputs[0] for op in ops}
    inputs = tuple(sorted({v for op in ops for v in op.inputs} - inner))
    counter = itertools.count()
    sums: dict[int, _ProductSum] = {}

    def value(number: int) -> _ProductSum:
        if number in inner:
            return sums[number]
        indices = tuple(next(counter) for _ in program.shape(number))
        return _ProductSum(((inputs.index(number), indices),), indices)

    for op in ops:
        sums[op.outputs[0]] = _SUM_RULES[op.name](op, *map(value, op.inputs))
    whole = _canonical(sums[ops[-1].outputs[0]])
    if whole is None or len(whole.factors) < 3:
        return None
    sizes = {
        index: size
        for operand, indices in whole.factors
        for index, size in zip(indices, program.shape(inputs[operand]), strict=True)
        if size != 1
    }
    order = ContractionOrder(whole.products, {i: sizes.get(i, 1) for _, indices in whole.factors for i in indices})
    body = replace(program, ops=ops, inputs=list(inputs), outputs=list(ops[-1].outputs))
    params = {"equation": (whole.factors, whole.indices), "types": tuple(sorted(whole.types)), "order": order}
    return [replace(ops[-1], name=NAME, params={**params, "body": body}, inputs=inputs)]


def _dot(op: Op, a: _ProductSum, b: _ProductSum) -> _ProductSum:
    (left, right), (batch_left, batch_right) = op.params["dimension_numbers"]
    pairs = {b.indices[j]: a.indices[i] for i, j in zip((*left, *batch_left), (*right, *batch_right), strict=True)}
    b = b.renamed({i: pairs.get(i, i) for _, indices in b.factors for i in indices})
    batch = [a.indices[i] for i in batch_left]
    rest_a = [n for i, n in enumerate(a.indices) if i not in (*left, *batch_left)]
    rest_b = [n for j, n in enumerate(b.indices) if j not in (*right, *batch_right)]
    product = tuple(dict.fromkeys((*a.indices, *b.indices)))
    types = a.types | b.types | {str(op.params.get("preferred_element_type")), str(op.params.get("precision"))}
    return _ProductSum(a.factors + b.factors, (*batch, *rest_a, *rest_b), (*a.products, *b.products, product), types)


def _transpose(op: Op, a: _ProductSum) -> _ProductSum:
    return _ProductSum(a.factors, tuple(a.indices[i] for i in op.params["permutation"]), a.products, a.types)


def _drop_axes(name: str) -> Any:
    """The rule of an operation that sums over, or squeezes, the axes in its parameter `name`."""

    def rule(op: Op, a: _ProductSum) -> _ProductSum:
        gone = {i % max(len(a.indices), 1) for i in op.params[name]}
        return _ProductSum(a.factors, tuple(n for i, n in enumerate(a.indices) if i not in gone), a.products, a.types)

    return rule


def _convert(op: Op, a: _ProductSum) -> _ProductSum:
    return _ProductSum(a.factors, a.indices, a.products, a.types | {str(op.params["new_dtype"])})


_SUM_RULES: dict[str, Any] = {
    "dot_general": _dot, "transpose": _transpose, "reduce_sum": _drop_axes("axes"), "squeeze": _drop_axes("dimensions"),
    "convert_element_type": _convert,
}  # fmt: skip


def _canonical(value: _ProductSum) -> _ProductSum | None:
    """The value with factors in the order of their operands, and indices numbered by first use, the result's first.

    Uses of the same operand are interchangeable, so the smallest of all their orderings is returned; None where there
    are too many of them.
    """
    uses = [list(group) for _, group in itertools.groupby(sorted(value.factors), key=lambda factor: factor[0])]
    if math.prod(math.factorial(len(group)) for group in uses) > _MAX_ORDERINGS:
        return None

    def numbered(groups: tuple[Any, ...]) -> _ProductSum:
        factors = tuple(itertools.chain(*groups))
        names: dict[int, int] = {}
        for index in (*value.indices, *(i for _, indices in factors for i in indices)):
            names.setdefault(index, len(names))
        return _ProductSum(factors, value.indices, value.products, value.types).renamed(names)

    return min(
        (numbered(groups) for groups in itertools.product(*map(itertools.permutations, uses))),
        key=lambda candidate: (candidate.factors, candidate.indices),
    )
