"""Residual branches, found from the equations alone.

An addition of two activations where one operand has a part of the network to itself (its *region*: operations whose
results go nowhere else) and reads only what the other operand is made of, is a residual connection; the operand with
the costlier region is the branch. Its gate must scale it as a whole, so it scales the parameters that end it: the
scale and bias of a last BatchNorm, the kernel and bias of a last Dense, whatever the walk back finds to be linear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.program import Program

_PASS = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "neg", "slice",
    "reduce_sum", "copy", "reduce_precision", "rev", "split", "optimization_barrier", "reduce_window_sum", "cumsum",
}  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """scalers: leaves whose joint scaling scales the branch; leaves: those read nowhere else; ops: its region."""

    ops: frozenset[int]
    scalers: frozenset[int]
    leaves: frozenset[int]
    terms: tuple[int, ...]
    scope: str


def find(
    program: Program, active: np.ndarray, leaves: int, cost: dict[int, tuple[float, tuple[int, ...]]]
) -> tuple[list[Branch], list[str]]:
    """All residual branches, and the scopes of additions that look like one but that no parameter scales.

    Args:
      program: the network; its first `leaves` inputs are the parameters.
      active: (values,) whether a value depends on the network's inputs.
      cost: {op: (MACs, term numbers)} of convolutions, dots and loops.
    """
    graph = _Graph(program, active, leaves)
    branches, refused = [], []
    for index, op in enumerate(program.ops):
        if op.name not in ("add", "add_any") or not all(active[v] for v in op.inputs) or op.inputs[0] == op.inputs[1]:
            continue
        regions = [graph.region(v, index) for v in op.inputs]
        macs = [sum(cost[o][0] for o in region if o in cost) for region in regions]
        pick = int(macs[1] >= macs[0])
        region, shortcut = regions[pick], op.inputs[1 - pick]
        if not macs[pick] or not graph.reads_only(region, shortcut):
            continue
        scalers = graph.scalers(op.inputs[pick], region)
        if not scalers or not all(graph.users_of(leaf) <= region for leaf in scalers):
            refused.append(op.scope)
            continue
        inside = frozenset(leaf for leaf in range(leaves) if graph.uses[leaf] and graph.users_of(leaf) <= region)
        terms = tuple(term for o in sorted(region) if o in cost for term in cost[o][1])
        branches.append(Branch(frozenset(region), frozenset(scalers), inside, terms, op.scope))
    return branches, refused


class _Graph:
    """Who makes and who reads each value."""

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

    def users_of(self, leaf: int) -> set[int]:
        """Operations that read a parameter."""
        return set(self.uses[self.program.inputs[leaf]])

    def region(self, value: int, reader: int) -> set[int]:
        """Operations whose results reach nothing but `reader`, through `value`."""
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

    def reads_only(self, region: Collection[int], shortcut: int) -> bool:
        """Whether operations make all activations that enter the region, and the shortcut is made of these too."""
        entering = {
            v
            for op in region
            for v in self.program.ops[op].inputs
            if self.active[v] and self.maker.get(v, -1) not in region
        }
        if any(v not in self.maker for v in entering):
            return False
        missing = entering - {shortcut}
        floor = min((self.maker[v] for v in missing), default=0)
        seen, waiting = set(), [shortcut]
        while waiting and missing:
            maker = self.maker.get(waiting.pop(), -1)
            if maker < floor or maker in seen:
                continue
            seen.add(maker)
            missing -= set(self.program.ops[maker].inputs)
            waiting.extend(self.program.ops[maker].inputs)
        return not missing

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
        if op.name in ("add", "sub", "add_any", "concatenate"):
            parts = [self.scalers(v, region) for v in op.inputs]
            return None if any(part is None for part in parts) else set().union(*filter(None, parts))
        if op.name in ("mul", "dot_general", "conv_general_dilated"):
            weights_first = sorted(op.inputs, key=lambda v: bool(self.active[v]))
            return next((found for v in weights_first if (found := self.scalers(v, region))), None)
        if op.name == "div":
            return self.scalers(op.inputs[0], region)
        if op.name == "max" and any(np.all(self.program.constants.get(v, 1) == 0) for v in op.inputs):
            return next((found for v in op.inputs if (found := self.scalers(v, region))), None)
        return None
