"""Residual branches, found from the equations alone.

An addition of two activations where one operand has a part of the network to itself (its *region*: operations whose
results go nowhere else) and reads something that the other operand is made of, is a residual connection; the operand
with the costlier region is the branch. Its gate must scale it as a whole, so it scales the parameters that end it: the
scale and bias of a last BatchNorm, the kernel and bias of a last Dense, whatever the walk back finds to be linear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.tracing.program import Program

_PASS = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "neg", "slice",
    "reduce_sum", "copy", "reduce_precision", "rev", "split", "optimization_barrier", "reduce_window_sum", "cumsum",
    "gather", "fft", "real", "imag", "conj",
}  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """end: the value that is added; ops: its region; scalers: leaves whose joint scaling scales it; leaves: those read
    nowhere else; terms: by operation, the products it counts."""

    end: int
    ops: frozenset[int]
    scalers: frozenset[int]
    leaves: frozenset[int]
    terms: dict[int, tuple[int, ...]]
    scope: str


def find(graph: Graph, cost: dict[int, tuple[float, tuple[int, ...]]]) -> tuple[list[Branch], list[str]]:
    """All residual branches, and the scopes of additions that look like one but that no parameter scales.

    Args:
      cost: {op: (MACs, term numbers)} of convolutions, dots and loops.
    """
    branches, refused = [], []
    for op in graph.program.ops:
        if op.name not in ("add", "add_any") or not all(graph.active[v] for v in op.inputs):
            continue
        if op.inputs[0] == op.inputs[1]:
            continue
        regions = [graph.region(v) for v in op.inputs]
        macs = [sum(cost[o][0] for o in region if o in cost) for region in regions]
        unscaled = False
        for pick in (0, 1) if macs[0] > macs[1] else (1, 0):
            region = regions[pick]
            if not macs[pick] or not graph.related(region, op.inputs[1 - pick]):
                continue
            scalers = graph.scalers(op.inputs[pick], region)
            if not scalers or not all(graph.users_of(leaf) <= region for leaf in scalers):
                unscaled = True
                continue
            inside = frozenset(n for n in graph.leaf.values() if graph.users_of(n) and graph.users_of(n) <= region)
            terms = {o: cost[o][1] for o in sorted(region) if o in cost}
            branches.append(Branch(op.inputs[pick], frozenset(region), frozenset(scalers), inside, terms, op.scope))
            break
        else:
            refused += [op.scope] * unscaled
    return branches, refused


class Graph:
    """Who makes and who reads each value.

    program: the network; its first `leaves` inputs are the parameters; active: (values,) whether a value depends on the
    network's inputs.
    """

    def __init__(self, program: Program, active: np.ndarray, leaves: int):
        self.program, self.active = program, active
        self.maker = {v: i for i, op in enumerate(program.ops) for v in op.outputs}
        self.uses: dict[int, list[int]] = {v: [] for v in range(len(program.avals))}
        for i, op in enumerate(program.ops):
            for v in op.inputs:
                self.uses[v].append(i)
        for v in program.outputs:
            self.uses[v].append(len(program.ops))
        self.leaf = {v: i for i, v in enumerate(program.inputs[:leaves])}
        self._sources: list[int] | None = None

    def users_of(self, leaf: int) -> set[int]:
        """Operations that read a parameter."""
        return set(self.uses[self.program.inputs[leaf]])

    def region(self, value: int) -> set[int]:
        """Operations whose results reach nothing but the one reader of `value`, through it."""
        if len(self.uses[value]) != 1 or value not in self.maker:
            return set()
        inside: set[int] = set()
        met: Counter[int] = Counter()
        waiting = [self.maker[value]]
        while waiting:
            op = waiting.pop()
            inside.add(op)
            for v in self.program.ops[op].inputs:
                maker = self.maker.get(v)
                if maker is None:
                    continue
                met[maker] += 1
                if met[maker] == sum(len(self.uses[out]) for out in self.program.ops[maker].outputs):
                    waiting.append(maker)
        return inside

    def related(self, region: Collection[int], shortcut: int) -> bool:
        """Whether what enters the region is made of the shortcut, or of something that the shortcut is made of too."""
        sources = self.sources()
        entering = {v for op in region for v in self.program.ops[op].inputs if self.active[v]}
        entering = {v for v in entering if self.maker.get(v, -1) not in region}
        if shortcut in entering:
            return True
        ancestors = sources[self.maker[shortcut]] if shortcut in self.maker else 0
        return any(v in self.maker and sources[self.maker[v]] & ancestors for v in entering)

    def sources(self) -> list[int]:
        """For each operation, as the bits of a number, the operations on activations that its result is made of."""
        if self._sources is None:
            self._sources = []
            for index, op in enumerate(self.program.ops):
                bits = 1 << index if any(self.active[v] for v in op.outputs) else 0
                for v in op.inputs:
                    bits |= self._sources[self.maker[v]] if v in self.maker else 0
                self._sources.append(bits)
        return self._sources

    def left(self, branch: Branch, gone: Collection[int]) -> set[int]:
        """Operations of a branch that its end still needs when the layers with the parameters `gone` return zeros."""
        without = {self.program.inputs[leaf] for leaf in gone}
        needed: set[int] = set()
        waiting = [branch.end]
        while waiting:
            maker = self.maker.get(waiting.pop(), -1)
            if maker not in branch.ops or maker in needed or self._reads(maker, without):
                continue
            needed.add(maker)
            waiting.extend(self.program.ops[maker].inputs)
        return needed

    def _reads(self, op: int, values: Collection[int]) -> bool:
        """Whether an operation reads one of `values`, or what is made of these and of constants alone."""
        waiting = [v for v in self.program.ops[op].inputs if not self.active[v]]
        while waiting:
            value = waiting.pop()
            if value in values:
                return True
            waiting.extend(self.program.ops[self.maker[value]].inputs if value in self.maker else ())
        return False

    def scalers(self, value: int, region: Collection[int]) -> set[int] | None:
        """Parameters such that scaling all of them by g ≥ 0 scales `value` by g; None where there are none."""
        if value in self.leaf:
            return {self.leaf[value]}
        maker = self.maker.get(value, -1)
        if maker not in region:
            return None
        op = self.program.ops[maker]
        if op.name in _PASS:
            return self.scalers(op.inputs[0], region)
        if op.name in ("add", "sub", "add_any", "complex", "concatenate"):
            parts = [self.scalers(v, region) for v in op.inputs]
            return None if any(part is None for part in parts) else set().union(*filter(None, parts))
        if op.name in ("mul", "dot_general", "conv_general_dilated", "einsum", "ragged_dot_general"):
            weights_first = sorted(op.inputs, key=lambda v: bool(self.active[v]))
            return next((found for v in weights_first if (found := self.scalers(v, region))), None)
        if op.name == "div":
            return self.scalers(op.inputs[0], region)
        if op.name == "max" and any(np.all(self.program.constants.get(v, 1) == 0) for v in op.inputs):
            return next((found for v in op.inputs if (found := self.scalers(v, region))), None)
        return None
