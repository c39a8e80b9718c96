"""Finds residual branches from the equations alone.

An addition of two activations is a residual connection where one operand has an exclusive part of the network behind it
(its *region*: operations whose results are used nowhere else) whose inputs the other operand also depends on. The
operand with the more expensive region is the branch. The branch's gate must scale all of it, so it multiplies the
parameters at its end: the scale and bias of a final BatchNorm, the kernel and bias of a final Dense, or whatever linear
parameters are found by going back from the addition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.tracing.program import Program

_LINEAR = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "neg", "slice",
    "reduce_sum", "copy", "reduce_precision", "rev", "split", "optimization_barrier", "reduce_window_sum", "cumsum",
    "gather", "fft", "real", "imag", "conj",
}  # fmt: skip


@dataclass(frozen=True)
class ResidualBranch:
    """A residual branch.

    Attributes:
      end: the value that is added to the shortcut.
      ops: its region.
      scalers: parameters; scaling all of them by g scales the branch by g.
      leaves: parameters that only the region reads.
      terms: {operation: its cost terms}.
    """

    end: int
    ops: frozenset[int]
    scalers: frozenset[int]
    leaves: frozenset[int]
    terms: dict[int, tuple[int, ...]]
    scope: str


def find_branches(
    graph: DataflowGraph, cost: dict[int, tuple[float, tuple[int, ...]]]
) -> tuple[list[ResidualBranch], list[str]]:
    """All residual branches, and the scopes of residual additions whose branch no parameter scales.

    Args:
      cost: {operation: (MACs, term numbers)} of convolutions, dots and loops.
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
            branches.append(
                ResidualBranch(op.inputs[pick], frozenset(region), frozenset(scalers), inside, terms, op.scope)
            )
            break
        else:
            refused += [op.scope] * unscaled
    return branches, refused


class DataflowGraph:
    """Producers and consumers of each value.

    Args:
      program: its first `leaves` inputs are the parameters.
      active: (values,) whether a value depends on the network's inputs.
    """

    def __init__(self, program: Program, active: np.ndarray, leaves: int):
        self.program, self.active = program, active
        self.producer = {v: i for i, op in enumerate(program.ops) for v in op.outputs}
        self.uses: dict[int, list[int]] = {v: [] for v in range(len(program.avals))}
        for i, op in enumerate(program.ops):
            for v in op.inputs:
                self.uses[v].append(i)
        for v in program.outputs:
            self.uses[v].append(len(program.ops))
        self.leaf = {v: i for i, v in enumerate(program.inputs[:leaves])}
        self._sources: list[int] | None = None

    def users_of(self, leaf: int) -> set[int]:
        """The operations that read a parameter."""
        return set(self.uses[self.program.inputs[leaf]])

    def region(self, value: int) -> set[int]:
        """The operations whose results are used only through `value`, which has a single consumer."""
        if len(self.uses[value]) != 1 or value not in self.producer:
            return set()
        inside: set[int] = set()
        uses_inside: Counter[int] = Counter()
        waiting = [self.producer[value]]
        while waiting:
            op = waiting.pop()
            inside.add(op)
            for v in self.program.ops[op].inputs:
                producer = self.producer.get(v)
                if producer is None:
                    continue
                uses_inside[producer] += 1
                if uses_inside[producer] == sum(len(self.uses[out]) for out in self.program.ops[producer].outputs):
                    waiting.append(producer)
        return inside

    def related(self, region: Collection[int], shortcut: int) -> bool:
        """Whether an input of the region is the shortcut, or depends on an activation that the shortcut depends on."""
        sources = self.sources()
        entering = {v for op in region for v in self.program.ops[op].inputs if self.active[v]}
        entering = {v for v in entering if self.producer.get(v, -1) not in region}
        if shortcut in entering:
            return True
        ancestors = sources[self.producer[shortcut]] if shortcut in self.producer else 0
        return any(v in self.producer and sources[self.producer[v]] & ancestors for v in entering)

    def sources(self) -> list[int]:
        """For each operation a bit mask of the operations on activations that its result depends on."""
        if self._sources is None:
            self._sources = []
            for index, op in enumerate(self.program.ops):
                bits = 1 << index if any(self.active[v] for v in op.outputs) else 0
                for v in op.inputs:
                    bits |= self._sources[self.producer[v]] if v in self.producer else 0
                self._sources.append(bits)
        return self._sources

    def remaining_ops(self, branch: ResidualBranch, gone: Collection[int]) -> set[int]:
        """The operations that a branch still needs when the layers that hold the parameters `gone` return zeros."""
        without = {self.program.inputs[leaf] for leaf in gone}
        needed: set[int] = set()
        waiting = [branch.end]
        while waiting:
            producer = self.producer.get(waiting.pop(), -1)
            if producer not in branch.ops or producer in needed or self._reads(producer, without):
                continue
            needed.add(producer)
            waiting.extend(self.program.ops[producer].inputs)
        return needed

    def _reads(self, op: int, values: Collection[int]) -> bool:
        """Whether an operation reads one of `values`, directly or through operations on parameters only."""
        waiting = [v for v in self.program.ops[op].inputs if not self.active[v]]
        while waiting:
            value = waiting.pop()
            if value in values:
                return True
            waiting.extend(self.program.ops[self.producer[value]].inputs if value in self.producer else ())
        return False

    def scalers(self, value: int, region: Collection[int]) -> set[int] | None:
        """Parameters such that scaling all of them by g ≥ 0 scales `value` by g; None where there are no such."""
        if value in self.leaf:
            return {self.leaf[value]}
        producer = self.producer.get(value, -1)
        if producer not in region:
            return None
        op = self.program.ops[producer]
        if op.name in _LINEAR:
            return self.scalers(op.inputs[0], region)
        if op.name in ("add", "sub", "add_any", "complex", "concatenate"):
            parts = [self.scalers(v, region) for v in op.inputs]
            return None if any(part is None for part in parts) else set().union(*filter(None, parts))
        if op.name in ("mul", "dot_general", "conv_general_dilated", "einsum", "ragged_dot_general"):
            weights_first = sorted(op.inputs, key=lambda v: bool(self.active[v]))
            return next((leaves for v in weights_first if (leaves := self.scalers(v, region))), None)
        if op.name == "div":
            return self.scalers(op.inputs[0], region)
        if op.name == "max" and any(np.all(self.program.constants.get(v, 1) == 0) for v in op.inputs):
            return next((leaves for v in op.inputs if (leaves := self.scalers(v, region))), None)
        return None
