"""What a walk finds, and what its rules may do: join labels, freeze them with a reason, count products.

A rule never asks which labels are already joined: joins are collected as pairs and resolved once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from kdsearch_jax.tracing import branches
from kdsearch_jax.tracing.contractions import Order
from kdsearch_jax.tracing.labels import FIXED, UNIFORM, Axis, Labels, Part, Value, labelled
from kdsearch_jax.tracing.program import Op, Program


class Step(NamedTuple):
    """One operation as the walk saw it: the values it read and made, and their shapes."""

    op: Op
    program: Program
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]


@dataclass(frozen=True)
class Site:
    """Where the code treats the parts of an axis alike: `split` in two, every other channel, groups of a convolution.

    Removing units from one part alone may break such code; pairing its parts index by index (`Walk.paired`) keeps them
    equally long. op: where, for reasons; line: file and line of the model's code, or the operation's scope.
    """

    op: str
    line: str


@dataclass(frozen=True)
class Tie:
    """Axes of two parameters that stay equally long, index by index, since the code has one number for both."""

    leaf: str
    axis: int
    other: str
    other_axis: int


class Term(NamedTuple):
    """`constant` times the product of the sizes of `axes` multiply-accumulates; leaves: the parameters it contracts."""

    constant: float
    axes: tuple[Any, ...]
    leaves: tuple[int, ...]

    def macs(self) -> float:
        """With all units in place."""
        return self.constant * math.prod(axis if isinstance(axis, int) else len(axis) for axis in self.axes)


_PADDED = "joined to a fixed index (padding or a constant)"


class Ordered(NamedTuple):
    """The order of one contraction, how often a loop runs it, and the module that it is in."""

    order: Order
    times: float
    scope: str


@dataclass
class Walk:
    """What a walk found: joined pairs, frozen and consumed labels, cost terms, branches.

    paired: sites whose parts are joined index by index; sites: {site: the labels of its parts}; within: kernels of
    grouped convolutions that lose channels of every group instead of whole groups, {leaf: number of groups}.
    """

    labels: Labels
    paired: Collection[Site | Tie] = ()
    sites: dict[Site, list[np.ndarray]] = field(default_factory=dict)
    within: dict[int, int] = field(default_factory=dict)
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    freezes: list[tuple[np.ndarray, str]] = field(default_factory=list)
    reads: list[np.ndarray] = field(default_factory=list)
    alongside: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    kinds: list[tuple[str, np.ndarray]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    op_terms: dict[int, tuple[float, tuple[int, ...]]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    orders: list[Ordered] = field(default_factory=list)
    graph: branches.Graph | None = None
    branches: list[branches.Branch] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    uncounted: set[str] = field(default_factory=set)
    flops: float = 0.0
    foldable: float = 0.0
    _units: np.ndarray | None = None

    def consumed(self) -> np.ndarray:
        """(labels,) whether a kernel reads the label's activation at this axis."""
        if not self.reads:
            return np.zeros(len(self.labels.leaf), bool)
        ids = np.concatenate(self.reads)
        # A reshaped kernel shows one label of each joined block: all of that axis in the same unit are read.
        keys = self.labels.keys() * len(self.labels.leaf) + self.components()
        found = np.isin(keys, keys[ids[ids > 0]])
        while True:  # of kernels that are read as one, all
            more = [b[found[a] & (b > 0)] for a, b in self.alongside]
            more = np.concatenate([ids[~found[ids]] for ids in more] or [np.zeros(0, int)])
            if not len(more):
                return found
            found |= np.isin(keys, keys[more])

    def components(self) -> np.ndarray:
        """(labels,) the number of the unit that each label belongs to."""
        if self._units is None:
            self._units = self._resolve()
        return self._units

    def frozen(self) -> tuple[np.ndarray, list[str]]:
        """((labels,) number of the reason why the label's unit is frozen or -1, the reasons)."""
        component = self.components()
        reasons = list(dict.fromkeys(reason for _, reason in self.freezes))
        number = {reason: i for i, reason in enumerate(reasons)}
        of_unit = np.full(int(component.max()) + 1, -1)
        for ids, reason in reversed(self.freezes):
            of_unit[component[ids[ids > 0]]] = number[reason]
        return of_unit[component], reasons

    def _resolve(self) -> np.ndarray:
        n = len(self.labels.leaf)
        left = np.concatenate([a for a, _ in self.pairs] or [np.zeros(0, int)])
        right = np.concatenate([b for _, b in self.pairs] or [np.zeros(0, int)])
        for ids in (left[right == 0], right[left == 0]):
            if (ids > 0).any():
                self.freezes.append((ids, _PADDED))
        real = (left > 0) & (right > 0)
        graph = sparse.coo_matrix((np.ones(real.sum()), (left[real], right[real])), shape=(n, n))
        return csgraph.connected_components(graph, directed=False)[1]

    def kind_of(self, label: int) -> str:
        """What a label's unit is."""
        component = self.components()
        same = component == component[label]
        seen = {kind for kind, ids in self.kinds if same[ids].any()}
        # The earlier is the more particular.
        return next((kind for kind in ("heads", "values", "groups", "channels") if kind in seen), "neurons")

    # What rules do.

    def join(self, a: np.ndarray, b: np.ndarray, where: Context | None = None) -> None:
        """Index by index, a and b live and die together.

        Args:
          where: the operation, to be named as the reason where one of two indices is fixed.

        Raises:
          AssertionError: they have different numbers of indices, which is a mistake in a rule.
        """
        if np.size(a) != np.size(b):
            raise AssertionError(f"{np.size(a)} indices joined to {np.size(b)}")
        a, b = np.ravel(a), np.ravel(b)
        self.pairs.append((a, b))
        if where is not None and (fixed := (a == 0) != (b == 0)).any():
            self.freeze((a + b)[fixed], lambda: f"{_PADDED} in {where.where}")

    def join_kernels(self, ins: Sequence[Value], axis: int) -> None:
        """Parameters put side by side: who reads one of them at this axis reads all."""
        arrays = [v.axes[axis] for v in ins if v.weight and isinstance(v.axes[axis], np.ndarray)]
        self.alongside.extend((arrays[0], other) for other in arrays[1:] if other is not arrays[0])

    def freeze(self, axis: Axis, reason: str | Callable[[], str]) -> None:
        """The labels of an axis must stay."""
        if labelled(axis):
            ids = axis.labels if isinstance(axis, Part) else axis
            self.freezes.append((np.ravel(ids), reason if isinstance(reason, str) else reason()))

    def stored(self, value: Value, axis: Axis) -> bool:
        """Whether a gate on the stored parameters, along one of the value's axes, removes units from the value."""
        if not value.linear or not isinstance(axis, np.ndarray):
            return False
        keys = self.labels.keys()
        return not (value.normalised and np.isin(keys[axis], keys[list(value.normalised)]).any())

    def pairable(self, site: Site, rows: np.ndarray) -> bool:
        """Notes the labels (parts, n) of a site; joins the parts index by index, and says so, where it is `paired`."""
        if len(rows) < 2 or rows.shape[1] < 2 or (rows == 0).any():
            return False
        self.sites.setdefault(site, []).append(rows)
        if site in self.paired:
            self.join(rows, np.broadcast_to(rows[:1], rows.shape))
        return site in self.paired

    def mark(self, kind: str, axis: Axis) -> None:
        """The labels of an axis are of a kind."""
        if isinstance(axis, np.ndarray):
            self.kinds.append((kind, np.ravel(axis)))

    def merge(self, axes: Sequence[Axis], where: Context) -> Axis:
        """One entry for axes that are combined index by index; none is a `Part`."""
        arrays = [axis for axis in axes if isinstance(axis, np.ndarray)]
        if not arrays:
            return FIXED if any(axis is FIXED for axis in axes) else UNIFORM
        for other in arrays[1:]:
            if other is not arrays[0]:
                self.join(arrays[0], other, where)
        if any(axis is FIXED for axis in axes):
            self.freeze(arrays[0], lambda: f"combined with a tensor of fixed size in {where.where}")
        return arrays[0]

    def settle(self, value: Value, carriers: Collection[int] = ()) -> Value:
        """The value without `Part`s: of the axes into which labels were split, one carries them, the others are fixed.

        The carrier is the first of the axes numbered in `carriers`, or else the first of all.
        """
        axes = list(value.axes)
        while (part := next((axis for axis in axes if isinstance(axis, Part)), None)) is not None:
            at = [i for i, axis in enumerate(axes) if isinstance(axis, Part) and axis.labels is part.labels]
            carrier = min(at, key=lambda i: (i not in carriers, axes[i].dim))
            dim = axes[carrier].dim
            line = np.moveaxis(part.labels, dim, 0).reshape(part.labels.shape[dim], -1)[:, 0]
            shape = [1] * part.labels.ndim
            shape[dim] = -1
            self.join(part.labels, np.broadcast_to(line.reshape(shape), part.labels.shape))
            for i in at:
                axes[i] = line if i == carrier else FIXED
        return value._replace(axes=tuple(axes))


class Context(NamedTuple):
    """What a rule may ask besides its operands. run: walks the body of a loop."""

    program: Program
    op: Op
    found: Walk
    times: float  # how often a loop runs the operation
    run: Callable[[Program, list[Value | None], Walk, float], list[Value]]

    @property
    def where(self) -> str:
        """The operation, its module, and the line of the model's code, for reasons."""
        return self.op.where()

    @property
    def site(self) -> Site:
        """The operation as a place where parts may be paired."""
        return Site(self.where, f"{self.op.name} {self.op.line() or self.op.scope}")

    def shape(self, i: int) -> tuple[int, ...]:
        """The shape of operand i."""
        return self.program.shape(self.op.inputs[i])

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """The shape of result i."""
        return self.program.shape(self.op.outputs[i])

    def count(self, flops: float) -> None:
        """Adds arithmetic as XLA counts it, which is once for a loop's body."""
        self.found.flops += flops

    def fold(self, flops: float) -> None:
        """Adds arithmetic on constants, which XLA counts only where it does not see that they are constant."""
        self.found.foldable += flops

    def freeze(self, axis: Axis, reason: str) -> None:
        """The labels of an axis must stay, because of this operation."""
        self.found.freeze(axis, lambda: f"{reason} {self.where}")


Rule = Callable[[Context, list[Value]], list[Value]]
