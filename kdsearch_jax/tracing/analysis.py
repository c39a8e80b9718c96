"""What the analysis of a program collects, and the operations that rules perform on it.

A rule joins labels, freezes them with a reason, or adds terms to the cost. Joins are collected as pairs and resolved
once, at the end, as connected components; a rule never asks which labels are already joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from kdsearch_jax.tracing import residual
from kdsearch_jax.tracing.einsum import ContractionOrder
from kdsearch_jax.tracing.labels import FIXED, UNIFORM, AbstractValue, Axis, Labels, SplitAxis, has_labels
from kdsearch_jax.tracing.program import Op, Program


class TracedOp(NamedTuple):
    """One operation with the abstract values that it read and returned."""

    op: Op
    program: Program
    ins: tuple[AbstractValue, ...]
    outs: tuple[AbstractValue, ...]


@dataclass(frozen=True)
class SplitSite:
    """A place in the code that treats equal parts of an axis alike: `split` in two, every other channel, conv groups.

    Removing units from one part alone may break such code. Pairing the parts index by index (`Analysis.paired`) keeps
    them equally long.

    Attributes:
      op: the operation, for messages.
      line: file and line of the model's code, or the operation's scope where the line is unknown.
    """

    op: str
    line: str


@dataclass(frozen=True)
class AxisTie:
    """Axes of two parameters that are joined index by index because the model's code has one number for both sizes."""

    leaf: str
    axis: int
    other: str
    other_axis: int


class CostTerm(NamedTuple):
    """`constant` · ∏ sizes of `axes` multiply-accumulates; `leaves` are the parameters that are contracted."""

    constant: float
    axes: tuple[Any, ...]
    leaves: tuple[int, ...]

    def macs(self) -> float:
        """Multiply-accumulates with all units in place."""
        return self.constant * math.prod(axis if isinstance(axis, int) else len(axis) for axis in self.axes)


class MixingSite(NamedTuple):
    """An operation whose result depends on which units there are, although it reads them by no stored kernel.

    Such as the sum over channels in a LayerNorm. In the gated network it must see the units that stay only
    (`kdsearch_jax.tracing.masking`).

    Attributes:
      path: of the operation in the jaxpr (`Op.path`).
      operand: number of the operand that is corrected.
      masked: {axis of the operand: labels} of the indices that are set to 0 where their units are removed.
      count: what the operand, a constant, counts: labels or sizes whose product it is; () for a masked operand.
      inverse: the operand is 1 over that product.
    """

    path: tuple[int, ...]
    operand: int
    masked: Mapping[int, np.ndarray]
    count: tuple[Any, ...] = ()
    inverse: bool = False

    @property
    def labels(self) -> np.ndarray:
        """All labels that the operation mixes."""
        arrays = [*self.masked.values(), *(n for n in self.count if not isinstance(n, int))]
        return np.concatenate([np.ravel(labels) for labels in arrays])


class Contraction(NamedTuple):
    """The contraction order of one einsum, how often a loop runs it, and its module scope."""

    order: ContractionOrder
    times: float
    scope: str


class Product(NamedTuple):
    """A matrix product or a convolution: its operation, the shapes of its operands, and its FLOPs."""

    op: Op
    operands: tuple[Any, ...]
    flops: float


COMBINED = "combined with a tensor of fixed size"
_PADDED = "joined to a fixed index (padding or a constant)"


@dataclass
class Analysis:
    """Everything found about one program.

    Attributes:
      labels: one label for each index of each parameter axis.
      paired: split sites and ties whose parts are joined index by index.
      split_sites: {site: label arrays (parts, n)} of all sites met.
      kept_groups: {leaf: number of groups} of grouped convolutions that lose channels of every group instead of whole
        groups.
      joins: pairs of label arrays that are kept or removed together.
      freezes: label arrays that must stay, with the reason.
      contracted: label arrays of kernel axes that are summed over.
      produced: label arrays of kernel axes that are not, and of the rows of tables.
      sites: operations that mix units without a stored kernel.
      read_together: pairs of label arrays of kernels that are read as one, such as concatenated kernels.
      terms: the multiply-accumulates.
      op_terms: {operation: (MACs, its terms)}, top level only.
      ops: the operations, in order.
      unscaled: scopes of residual additions that no parameter scales.
      unknown: primitives without a rule. uncounted: primitives that only XLA counts.
      products: matrix products and convolutions.
      flops, foldable_flops: arithmetic as XLA counts it; on constants, which XLA may fold away.
    """

    labels: Labels
    paired: Collection[SplitSite | AxisTie] = ()
    split_sites: dict[SplitSite, list[np.ndarray]] = field(default_factory=dict)
    kept_groups: dict[int, int] = field(default_factory=dict)
    joins: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    freezes: list[tuple[np.ndarray, str]] = field(default_factory=list)
    contracted: list[np.ndarray] = field(default_factory=list)
    produced: list[np.ndarray] = field(default_factory=list)
    sites: list[MixingSite] = field(default_factory=list)
    read_together: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    kind_marks: list[tuple[str, np.ndarray]] = field(default_factory=list)
    terms: list[CostTerm] = field(default_factory=list)
    op_terms: dict[int, tuple[float, tuple[int, ...]]] = field(default_factory=dict)
    ops: list[TracedOp] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    graph: residual.DataflowGraph | None = None
    branches: list[residual.ResidualBranch] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    uncounted: set[str] = field(default_factory=set)
    flops: float = 0.0
    foldable_flops: float = 0.0
    _components: np.ndarray | None = None

    def components(self) -> np.ndarray:
        """(labels,) number of the unit that each label belongs to."""
        if self._components is None:
            self._components = self._resolve_joins()
        return self._components

    def _resolve_joins(self) -> np.ndarray:
        n = len(self.labels.leaf)
        left = np.concatenate([a for a, _ in self.joins] or [np.zeros(0, int)])
        right = np.concatenate([b for _, b in self.joins] or [np.zeros(0, int)])
        for ids in (left[right == 0], right[left == 0]):
            if (ids > 0).any():
                self.freezes.append((ids, _PADDED))
        real = (left > 0) & (right > 0)
        graph = sparse.coo_matrix((np.ones(real.sum()), (left[real], right[real])), shape=(n, n))
        return csgraph.connected_components(graph, directed=False)[1]

    def consumed(self) -> np.ndarray:
        """(labels,) whether a kernel contracts the label's activation along this axis."""
        if not self.contracted:
            return np.zeros(len(self.labels.leaf), bool)
        ids = np.concatenate(self.contracted)
        # A reshaped kernel shows one label of each joined block only: every label of that unit on that axis counts.
        keys = self.labels.keys() * len(self.labels.leaf) + self.components()
        consumed = np.isin(keys, keys[ids[ids > 0]])
        while True:  # a kernel that is read together with a consumed one is consumed
            more = [b[consumed[a] & (b > 0)] for a, b in self.read_together]
            more = np.concatenate([ids[~consumed[ids]] for ids in more] or [np.zeros(0, int)])
            if not len(more):
                return consumed
            consumed |= np.isin(keys, keys[more])

    def frozen(self) -> tuple[np.ndarray, list[str]]:
        """((labels,) index of the reason that freezes the label's unit, or -1; the reasons)."""
        component = self.components()
        reasons = list(dict.fromkeys(reason for _, reason in self.freezes))
        number = {reason: i for i, reason in enumerate(reasons)}
        of_unit = np.full(int(component.max()) + 1, -1)
        for ids, reason in reversed(self.freezes):
            of_unit[component[ids[ids > 0]]] = number[reason]
        return of_unit[component], reasons

    def kind_of(self, label: int) -> str:
        """The kind of a label's unit, the most specific one where several operations marked it."""
        component = self.components()
        same = component == component[label]
        seen = {kind for kind, ids in self.kind_marks if same[ids].any()}
        kinds = ("heads", "queries", "width", "values", "groups", "channels")
        return next((kind for kind in kinds if kind in seen), "neurons")

    def mixed(self) -> np.ndarray:
        """(labels,) whether the label's unit is mixed with others at one of the `sites`."""
        component = self.components()
        result = np.zeros(int(component.max()) + 1, bool)
        for site in self.sites:
            result[component[site.labels[site.labels > 0]]] = True
        return result[component]

    # --- what rules call ---

    def join(self, a: np.ndarray, b: np.ndarray, where: RuleContext | None = None) -> None:
        """Joins a and b index by index: they are kept or removed together.

        Args:
          where: the operation named in the reason where one of two indices is fixed.

        Raises:
          AssertionError: the numbers of indices differ, which is a mistake in a rule.
        """
        if np.size(a) != np.size(b):
            raise AssertionError(f"{np.size(a)} indices joined to {np.size(b)}")
        a, b = np.ravel(a), np.ravel(b)
        self.joins.append((a, b))
        if where is not None and (fixed := (a == 0) != (b == 0)).any():
            self.freeze((a + b)[fixed], lambda: f"{_PADDED} in {where.where}")

    def join_kernels(self, ins: Sequence[AbstractValue], axis: int) -> None:
        """Records that parameters are read as one along an axis, as after a concatenation."""
        arrays = [v.axes[axis] for v in ins if v.weight and isinstance(v.axes[axis], np.ndarray)]
        self.read_together.extend((arrays[0], other) for other in arrays[1:] if other is not arrays[0])

    def freeze(self, axis: Axis, reason: str | Callable[[], str]) -> None:
        """Freezes the labels of an axis."""
        if has_labels(axis):
            ids = axis.labels if isinstance(axis, SplitAxis) else axis
            self.freezes.append((np.ravel(ids), reason if isinstance(reason, str) else reason()))

    def is_stored(self, value: AbstractValue, axis: Axis) -> bool:
        """Whether scaling the stored parameters along one of the value's axes scales the value along it."""
        if not value.linear or not isinstance(axis, np.ndarray):
            return False
        return not value.normalised or self.owners(axis).isdisjoint(self.owners(list(value.normalised)))

    def owners(self, labels: Any) -> set[tuple[int, int]]:
        """{(parameter, axis)} that own the labels."""
        return set(zip(self.labels.leaf[labels].tolist(), self.labels.axis[labels].tolist(), strict=True))

    def mix(self, ctx: RuleContext, operand: int, axes: Mapping[int, np.ndarray], kind: str) -> None:
        """Records that an operation mixes the units on these axes of an operand, {axis: labels}; kind: of the units."""
        self.sites.append(MixingSite(ctx.op.path, operand, axes))
        for labels in axes.values():
            self.mark(kind, labels)

    def pair_parts(self, site: SplitSite, rows: np.ndarray) -> bool:
        """Records the labels (parts, n) of a split site; joins the parts, and returns True, if the site is `paired`."""
        if len(rows) < 2 or rows.shape[1] < 2 or (rows == 0).any():
            return False
        self.split_sites.setdefault(site, []).append(rows)
        if site in self.paired:
            self.join(rows, np.broadcast_to(rows[:1], rows.shape))
        return site in self.paired

    def produce(self, axis: Axis) -> None:
        """Records that a kernel or a table produces the units on one of its axes."""
        if isinstance(axis, np.ndarray):
            self.produced.append(axis)

    def mark(self, kind: str, axis: Axis) -> None:
        """Marks the labels of an axis as units of a kind."""
        if isinstance(axis, np.ndarray):
            self.kind_marks.append((kind, np.ravel(axis)))

    def merge(self, axes: Sequence[Axis], where: RuleContext) -> Axis:
        """The result of combining axes index by index, none of them a `SplitAxis`."""
        arrays = [axis for axis in axes if isinstance(axis, np.ndarray)]
        if not arrays:
            return FIXED if any(axis is FIXED for axis in axes) else UNIFORM
        for other in arrays[1:]:
            if other is not arrays[0]:
                self.join(arrays[0], other, where)
        if any(axis is FIXED for axis in axes):
            self.freeze(arrays[0], lambda: f"{COMBINED} in {where.where}")
        return arrays[0]

    def resolve_splits(self, value: AbstractValue, carriers: Collection[int] = ()) -> AbstractValue:
        """The value without `SplitAxis` entries: of each split, one axis keeps the labels and the others become fixed.

        The axis that keeps them is the first one numbered in `carriers`, or the first of the split.
        """
        axes = list(value.axes)
        while (part := next((axis for axis in axes if isinstance(axis, SplitAxis)), None)) is not None:
            at = [i for i, axis in enumerate(axes) if isinstance(axis, SplitAxis) and axis.labels is part.labels]
            carrier = min(at, key=lambda i: (i not in carriers, axes[i].dim))
            dim = axes[carrier].dim
            line = np.moveaxis(part.labels, dim, 0).reshape(part.labels.shape[dim], -1)[:, 0]
            shape = [1] * part.labels.ndim
            shape[dim] = -1
            self.join(part.labels, np.broadcast_to(line.reshape(shape), part.labels.shape))
            for i in at:
                axes[i] = line if i == carrier else FIXED
        return value._replace(axes=tuple(axes))


class RuleContext(NamedTuple):
    """What a rule knows besides its operands.

    Attributes:
      times: how often the enclosing loops run the operation.
      run: analyzes the body of a loop.
    """

    program: Program
    op: Op
    analysis: Analysis
    times: float
    run: Callable[[Program, list[AbstractValue | None], Analysis, float], list[AbstractValue]]

    @property
    def where(self) -> str:
        """The operation, its module, and the line of the model's code, for messages."""
        return self.op.where()

    @property
    def site(self) -> SplitSite:
        """The operation as a split site."""
        return SplitSite(self.where, f"{self.op.name} {self.op.line() or self.op.scope}")

    def shape(self, i: int) -> tuple[int, ...]:
        """The shape of operand i."""
        return self.program.shape(self.op.inputs[i])

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """The shape of result i."""
        return self.program.shape(self.op.outputs[i])

    def count(self, flops: float) -> None:
        """Adds arithmetic as XLA counts it: once for a loop's body."""
        self.analysis.flops += flops

    def count_product(self, flops: float) -> None:
        """Adds the arithmetic of a matrix product or a convolution."""
        self.count(flops)
        operands = tuple(self.program.avals[value] for value in self.op.inputs)
        self.analysis.products.append(Product(self.op, operands, flops))

    def count_foldable(self, flops: float) -> None:
        """Adds arithmetic on constants, which XLA counts only where it does not fold it."""
        self.analysis.foldable_flops += flops

    def freeze(self, axis: Axis, reason: str) -> None:
        """Freezes the labels of an axis because of this operation."""
        self.analysis.freeze(axis, lambda: f"{reason} {self.where}")


Rule = Callable[[RuleContext, list[AbstractValue]], list[AbstractValue]]
