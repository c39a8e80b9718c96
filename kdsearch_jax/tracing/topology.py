"""What can be pruned from a network, and what it costs: groups of coupled units and cost polynomials.

Every index of every parameter axis has a label, and operations couple labels: an elementwise operation couples the
channels of its operands index by index, a convolution or dot product couples the channels of its input with the input
axis of its kernel. A *unit* is a connected component of that relation, the set of parameter entries that are kept or
removed together: channel 7 of conv1, its BatchNorm entries, and row 7 of conv2's kernel. A *group* is the set of units
that own entries on the same parameter axes; all units of a group are interchangeable.

A unit can be removed only if every operation that mixes it with others is a contraction with a stored kernel. A gate
g ≥ 0 on those kernel rows then scales the unit's contribution, and g = 0 makes its removal exact, whatever BatchNorm,
bias or activation stands between. Sums over units, as in a LayerNorm, and contractions of two activations, as of
queries and keys, are made exact by leaving removed units out of them (`masking`). All other labels are frozen, with a
reason. Freezing is always safe.

A residual branch is a group with one unit, whose gate multiplies the parameters at the branch's end.

With x ∈ {0, 1}ᵘ the kept units, multiply-accumulates and parameters are exact polynomials

    cost(x) = Σₜ cₜ · ∏ᵢ (baseₜᵢ + Σⱼ countₜᵢⱼ xⱼ) · ∏_b x_b,

one term per convolution, dot product or parameter array, one factor per axis, and one x_b for each residual branch that
the term is part of; see `cost`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.kinds import KINDS


@dataclass(frozen=True)
class AxisSlice:
    """The entries that a group's units own along one axis of one parameter.

    Attributes:
      leaf: path of the parameter, "params/conv1/kernel".
      axis: the axis; -1 where a branch's gate multiplies the whole parameter.
      units: (size,) the unit that owns each index, -1 for none; None where a branch's gate multiplies the whole
        parameter.
      consumes: whether the axis is contracted with the units.
      gated: whether the gate multiplies the axis. If the axis only reads units of a `masked` group, it does not: the
        axis is then multiplied by 0 for removed units and by 1 for others.
    """

    leaf: str
    axis: int
    units: np.ndarray | None
    consumes: bool
    gated: bool = False


@dataclass(frozen=True)
class Group:
    """Interchangeable units: the channels of one layer, the heads of one attention layer, or one residual branch.

    Attributes:
      name: path of the layer that produces the units; "path:branch" for a residual branch.
      kind: one of `KINDS`.
      size: number of units.
      members: all parameter entries that the units own.
      layers: of a branch, the layers that are removed with it.
      masked: whether the units are also read without a stored kernel: by the statistics of a norm over channels, or as
        queries and keys. The gate then multiplies what produces the units, and the gated network computes these
        operations over the units that stay (`kdsearch_jax.tracing.masking`).
    """

    name: str
    kind: str
    size: int
    members: tuple[AxisSlice, ...]
    layers: tuple[str, ...] = ()
    masked: bool = False


@dataclass(frozen=True)
class FrozenAxis:
    """`count` indices of a parameter axis that must stay, and the reason."""

    leaf: str
    axis: int
    count: int
    reason: str


@dataclass(frozen=True)
class Topology:
    """The prunable structure of a network and its cost.

    Attributes:
      groups: what can be pruned.
      frozen: what cannot, with reasons.
      macs: multiply-accumulates of one example.
      params: number of parameters.
      flops: floating-point operations of a batch through the whole network, counted as XLA does (in-bounds products
        only, elementwise operations included), for comparison with XLA's own count.
      shapes: {path: shape} of every parameter and statistic.
      unknown: primitives without a rule.
      excluded: {group: reason} of groups that were free and have been frozen by choice.
    """

    groups: tuple[Group, ...]
    frozen: tuple[FrozenAxis, ...]
    macs: Cost
    params: Cost
    flops: float
    shapes: dict[str, tuple[int, ...]]
    unknown: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starts = np.cumsum([0] + [group.size for group in self.groups])
        object.__setattr__(self, "_starts", starts)

    @property
    def units(self) -> int:
        """Number of units in all groups."""
        return int(self._starts[-1])  # type: ignore[attr-defined]

    def flatten(self, tree: Mapping[str, Any]) -> np.ndarray:
        """Concatenates {group: (size,)} into one (units,) vector.

        Raises:
          ValueError: the groups are not the topology's.
        """
        if set(tree) != {group.name for group in self.groups}:
            odd = sorted(set(tree) ^ {group.name for group in self.groups})
            raise ValueError(f"gates: the groups differ from the topology's in {', '.join(odd[:5])}")
        return np.concatenate([np.asarray(tree[group.name]) for group in self.groups])

    def unflatten(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `flatten`."""
        starts = self._starts  # type: ignore[attr-defined]
        return {g.name: np.asarray(vector[a:b]) for g, a, b in zip(self.groups, starts, starts[1:], strict=False)}

    def total(self) -> tuple[int, int]:
        """(MACs of one example, parameters) of the whole network."""
        return self.cost(np.ones(self.units))

    def cost(self, keep: Mapping[str, Any] | np.ndarray) -> tuple[int, int]:
        """(MACs of one example, parameters) of keeping `keep`, {group: (size,) bool} or a (units,) vector."""
        flat = self.flatten(keep) if isinstance(keep, Mapping) else keep
        return round(self.macs.total(flat)), round(self.params.total(flat))

    def select(
        self, kinds: Sequence[str] = KINDS, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
    ) -> Topology:
        """The topology with only the groups of these kinds whose names match `include` and not `exclude`.

        Args:
          kinds: some of `KINDS`.
          include, exclude: shell patterns (`fnmatch`).

        Raises:
          ValueError: a kind is unknown or a pattern matches no group.
        """
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"gates.kinds: {kind!r} is not one of {', '.join(KINDS)}")
        for pattern in (*include, *exclude):
            if self.groups and not any(fnmatch.fnmatchcase(group.name, pattern) for group in self.groups):
                names = ", ".join(group.name for group in self.groups[:6])
                raise ValueError(f"gates: the pattern {pattern!r} matches no group; groups are {names}, …")

        def reason(group: Group) -> str | None:
            if group.kind not in kinds:
                return f"excluded: kind {group.kind}"
            if not any(fnmatch.fnmatchcase(group.name, p) for p in include):
                return "excluded: not in gates.include"
            hit = [p for p in exclude if fnmatch.fnmatchcase(group.name, p)]
            return f"excluded by the pattern {hit[0]!r}" if hit else None

        return self.without({g.name: why for g in self.groups if (why := reason(g)) is not None})

    def without(self, reasons: Mapping[str, str]) -> Topology:
        """The topology with the named groups frozen for the given reasons."""
        if not reasons:
            return self
        free = np.concatenate([np.full(g.size, g.name not in reasons) for g in self.groups] or [np.zeros(0, bool)])
        frozen = [
            FrozenAxis(m.leaf, m.axis, int((m.units >= 0).sum()), reasons[g.name])
            for g in self.groups
            if g.name in reasons
            for m in g.members
            if m.units is not None
        ]
        return replace(
            self,
            groups=tuple(g for g in self.groups if g.name not in reasons),
            frozen=self.frozen + tuple(frozen),
            macs=self.macs.restrict(free),
            params=self.params.restrict(free),
            excluded={**self.excluded, **reasons},
        )

    def masks(self, keep: Mapping[str, Any]) -> dict[tuple[str, int], np.ndarray]:
        """{(parameter, axis): (size,) bool, the indices that stay} for axes that lose any."""
        result: dict[tuple[str, int], np.ndarray] = {}
        for group in self.groups:
            stays = np.append(np.asarray(keep[group.name], bool), True)
            for member in group.members:
                if member.units is not None and not stays.all():
                    old = result.get((member.leaf, member.axis), True)
                    result[member.leaf, member.axis] = old & stays[member.units]
        return result

    def dropped(self, keep: Mapping[str, Any]) -> tuple[str, ...]:
        """The layers that are removed with the residual branches that `keep` drops."""
        gone = [layer for g in self.groups if g.kind == "branches" and not np.all(keep[g.name]) for layer in g.layers]
        return tuple(sorted(set(gone)))

    def sliced_shapes(self, keep: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """{path: shape} of all leaves when only `keep` stays, leaves of dropped layers included."""
        shapes = {path: list(shape) for path, shape in self.shapes.items()}
        for (leaf, axis), mask in self.masks(keep).items():
            shapes[leaf][axis] = int(mask.sum())
        return {path: tuple(shape) for path, shape in shapes.items()}

    def require_groups(self) -> Topology:
        """Returns itself.

        Raises:
          ValueError: nothing can be pruned; gives the reasons.
        """
        if self.groups:
            return self
        reasons = {f.leaf: f.reason for f in self.frozen} | self.excluded
        first = {reason: leaf for leaf, reason in reversed(reasons.items())}
        examples = sorted(reasons, key=lambda leaf: first[reasons[leaf]] != leaf)[:6]  # one of each reason at least
        lines = "; ".join(f"{leaf}: {reasons[leaf]}" for leaf in examples)
        raise ValueError(f"nothing in this network can be pruned ({lines or 'it has no parameters'})")

    def shares(self) -> dict[str, tuple[float, float]]:
        """{group: (share of MACs, share of parameters) that would be saved by removing the whole group}."""
        ones = np.ones(self.units)
        macs, params = self.total()
        result = {}
        for name in (group.name for group in self.groups):
            keep = {**self.unflatten(ones), name: np.zeros_like(self.unflatten(ones)[name])}
            less_macs, less_params = self.cost(keep)
            result[name] = (1 - less_macs / max(macs, 1), 1 - less_params / max(params, 1))
        return result

    def describe(self) -> str:
        """A table of the groups, followed by what is frozen and why."""
        macs, params = self.total()
        shares = self.shares()
        lines = [f"{macs:,} MACs an example, {params:,} parameters, {len(self.groups)} groups, {self.units} units"]
        lines += ["Shares are what removing a whole group saves; a cost that two groups share counts for both."]
        lines += [f"{'group':40} {'kind':9} {'units':>6} {'MACs':>7} {'params':>7}"]
        for group in self.groups:
            a, b = shares[group.name]
            lines.append(f"{group.name:40} {group.kind:9} {group.size:6d} {a:7.1%} {b:7.1%}")
        reasons: dict[str, list[str]] = {}
        for item in self.frozen:
            reasons.setdefault(item.reason, []).append(f"{item.leaf}[axis {item.axis}]")
        for reason, leaves in reasons.items():
            shown = ", ".join(leaves[:3]) + (f" and {len(leaves) - 3} more" if len(leaves) > 3 else "")
            lines.append(f"frozen: {reason}: {shown}")
        return "\n".join(lines + [f"unknown primitive: {name} (its operands are frozen)" for name in self.unknown])

    def to_json(self) -> dict[str, Any]:
        """Groups, shares and reasons as JSON values, for reports."""
        macs, params = self.total()
        shares = self.shares()
        groups = [
            {
                "name": g.name,
                "kind": g.kind,
                "size": g.size,
                "macs_share": shares[g.name][0],
                "params_share": shares[g.name][1],
                "layers": list(g.layers or dict.fromkeys(m.leaf.rsplit("/", 1)[0] for m in g.members)),
            }
            for g in self.groups
        ]
        frozen = [{"name": f.leaf, "axis": f.axis, "size": f.count, "reason": f.reason} for f in self.frozen]
        return {"macs": macs, "params": params, "groups": groups, "frozen": frozen, "unknown": list(self.unknown)}


def path_string(path: Sequence[Any]) -> str:
    """A pytree path as "params/conv1/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaf_shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every leaf, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {path_string(path): tuple(leaf.shape) for path, leaf in leaves}


def map_left(function: Callable[[str, Any], Any], variables: Any, gone: Collection[str]) -> Any:
    """Maps `function(path, leaf)` over the tree without the leaves of the layers in `gone`."""
    left = _without(variables, frozenset(gone), ()) if gone else variables
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_string(path), leaf), left)


def _without(tree: Any, gone: frozenset[str], path: tuple[str, ...]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    lost = "/".join(path[1:]) in gone
    left = {
        key: _without(value, gone, (*path, key))
        for key, value in tree.items()
        if isinstance(value, Mapping) or not lost
    }
    return {key: value for key, value in left.items() if not isinstance(value, Mapping) or value}


def batch_size(inputs: Any) -> int:
    """The size of the first input's leading axis. Raises ValueError where it has none."""
    first = jax.tree.leaves(inputs)
    if not first or not first[0].shape:
        raise ValueError("inputs: the first input must be an array with a leading batch axis")
    return first[0].shape[0]
