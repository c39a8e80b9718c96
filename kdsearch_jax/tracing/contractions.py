"""An einsum of three or more operands as one operation, in whatever order JAX contracts them.

`jnp.einsum` contracts operands in pairs, in the order that is cheapest at their sizes. A student may therefore contract
in another order than the network it was cut from, although both compute the same sum of products. `join` replaces the
operations of such a call by a single one, named "einsum". Its parameter `network` says what is summed, as

    {operand: indices, …} → indices of the result,

numbered so that it does not depend on the order; two calls with equal networks are the same multilinear function. Its
parameter `order` holds the order, for the cost.
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
_MOST_ORDERINGS = 24


@dataclass(frozen=True)
class Order:
    """An order of contraction. products: the indices of each product of two operands; sizes: {index: its size}."""

    products: tuple[tuple[int, ...], ...]
    sizes: Mapping[int, int]

    def macs(self, products: Sequence[Sequence[int]] | None = None) -> int:
        """Multiply-accumulates at these sizes, of this order or of other `products`."""
        chosen = self.products if products is None else products
        return sum(math.prod(self.sizes[index] for index in product) for product in chosen)


@dataclass(frozen=True)
class _Sum:
    """A value as a sum of products of operands.

    factors: (operand, its indices); indices: those of the value's axes, all others are summed; products: as in `Order`;
    types: precisions and types of what was computed on the way.
    """

    factors: tuple[tuple[int, tuple[int, ...]], ...]
    indices: tuple[int, ...]
    products: tuple[tuple[int, ...], ...] = ()
    types: frozenset[str] = frozenset()

    def renamed(self, names: Mapping[int, int]) -> _Sum:
        def rename(indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(names[i] for i in indices)

        factors = tuple((operand, rename(indices)) for operand, indices in self.factors)
        return _Sum(factors, rename(self.indices), tuple(map(rename, self.products)), self.types)


def join(program: Program) -> None:
    """Replaces the operations of each einsum of three or more operands by one."""
    ops: list[Op] = []
    uses = Counter(v for op in program.ops for v in op.inputs) + Counter(program.outputs)
    for call, group in itertools.groupby(program.ops, key=_call):
        run = list(group)
        ops += run if call is None else _joined(program, run, uses)
    program.ops = ops


def _call(op: Op) -> Any:
    """The scope and the lines of the call of `jnp.einsum` that an operation is part of; None where it is of none."""
    if op.name not in _STEPS:
        return None
    for traceback in op.tracebacks:
        frames = traceback.frames
        for i, frame in enumerate(frames):
            if frame.function_name == "einsum" and os.path.basename(frame.file_name) == "einsum.py":
                return op.scope, *((each.file_name, each.line_num) for each in frames[i:])
    return None


def _joined(program: Program, run: list[Op], uses: Counter[int]) -> list[Op]:
    """The operations of one call, or of several in one line; those whose results meet in a single one are joined."""
    trees: dict[int, list[Op]] = {}  # by the value that the tree makes
    for op in run:
        inside = [tree for v in op.inputs if uses[v] == 1 and (tree := trees.pop(v, None)) is not None]
        trees[op.outputs[0]] = [*itertools.chain(*inside), op]
    return list(itertools.chain(*(_one(program, tree) or tree for tree in trees.values())))


def _one(program: Program, ops: list[Op]) -> list[Op] | None:
    """The operation that stands for a tree of them; None where it has fewer than three operands."""
    made = {op.outputs[0] for op in ops}
    inputs = tuple(sorted({v for op in ops for v in op.inputs} - made))
    counter = itertools.count()
    sums: dict[int, _Sum] = {}

    def value(number: int) -> _Sum:
        if number in made:
            return sums[number]
        indices = tuple(next(counter) for _ in program.shape(number))
        return _Sum(((inputs.index(number), indices),), indices)

    for op in ops:
        sums[op.outputs[0]] = _STEPS[op.name](op, *map(value, op.inputs))
    whole = _canonical(sums[ops[-1].outputs[0]])
    if whole is None or len(whole.factors) < 3:
        return None
    sizes = {
        index: size
        for operand, indices in whole.factors
        for index, size in zip(indices, program.shape(inputs[operand]), strict=True)
        if size != 1
    }
    order = Order(whole.products, {i: sizes.get(i, 1) for _, indices in whole.factors for i in indices})
    body = replace(program, ops=ops, inputs=list(inputs), outputs=list(ops[-1].outputs))
    params = {"network": (whole.factors, whole.indices), "types": tuple(sorted(whole.types)), "order": order}
    return [replace(ops[-1], name=NAME, params={**params, "body": body}, inputs=inputs)]


def _dot(op: Op, a: _Sum, b: _Sum) -> _Sum:
    (left, right), (batch_left, batch_right) = op.params["dimension_numbers"]
    pairs = {b.indices[j]: a.indices[i] for i, j in zip((*left, *batch_left), (*right, *batch_right), strict=True)}
    b = b.renamed({i: pairs.get(i, i) for i in _all(b)})
    batch = [a.indices[i] for i in batch_left]
    rest_a = [n for i, n in enumerate(a.indices) if i not in (*left, *batch_left)]
    rest_b = [n for j, n in enumerate(b.indices) if j not in (*right, *batch_right)]
    product = tuple(dict.fromkeys((*a.indices, *b.indices)))
    types = a.types | b.types | {str(op.params.get("preferred_element_type")), str(op.params.get("precision"))}
    return _Sum(a.factors + b.factors, (*batch, *rest_a, *rest_b), (*a.products, *b.products, product), types)


def _all(value: _Sum) -> set[int]:
    return {i for _, indices in value.factors for i in indices}


def _transpose(op: Op, a: _Sum) -> _Sum:
    return _Sum(a.factors, tuple(a.indices[i] for i in op.params["permutation"]), a.products, a.types)


def _without(name: str) -> Any:
    """The rule of an operation that sums over the axes which its parameter `name` lists, or drops those of size 1."""

    def rule(op: Op, a: _Sum) -> _Sum:
        gone = {i % max(len(a.indices), 1) for i in op.params[name]}
        return _Sum(a.factors, tuple(n for i, n in enumerate(a.indices) if i not in gone), a.products, a.types)

    return rule


def _convert(op: Op, a: _Sum) -> _Sum:
    return _Sum(a.factors, a.indices, a.products, a.types | {str(op.params["new_dtype"])})


_STEPS: dict[str, Any] = {
    "dot_general": _dot, "transpose": _transpose, "reduce_sum": _without("axes"), "squeeze": _without("dimensions"),
    "convert_element_type": _convert,
}  # fmt: skip


def _canonical(value: _Sum) -> _Sum | None:
    """The value with factors in the order of their operands and indices numbered as they appear, the result's first.

    Several uses of one operand are interchangeable: of all their orderings the smallest is taken. None where there are
    too many.
    """
    uses = [list(group) for _, group in itertools.groupby(sorted(value.factors), key=lambda factor: factor[0])]
    if math.prod(math.factorial(len(group)) for group in uses) > _MOST_ORDERINGS:
        return None

    def numbered(groups: tuple[Any, ...]) -> _Sum:
        factors = tuple(itertools.chain(*groups))
        names: dict[int, int] = {}
        for index in (*value.indices, *(i for _, indices in factors for i in indices)):
            names.setdefault(index, len(names))
        return _Sum(factors, value.indices, value.products, value.types).renamed(names)

    return min(
        (numbered(groups) for groups in itertools.product(*map(itertools.permutations, uses))),
        key=lambda each: (each.factors, each.indices),
    )
