"""Which parameters live and die together, what they cost, and why the rest must stay: read off a network's jaxpr.

Every index of every axis of every parameter has a label. The walk over the network's equations carries, for each value,
one label array per axis, and joins labels that must go together: an elementwise operation joins index by index, a
convolution or dot joins the channels of its input with the input axis of its kernel, concatenation and slicing move
labels about. What ends up joined is one *unit* ("channel 7 of conv1 with its BatchNorm entries and its row in conv2's
kernel"); units of the same make are a *group*.

A unit may go only if all that reads it is a kernel: then a gate on those kernel rows, set to zero, makes the removal
exact whatever stands between. Whatever the walk does not understand, or that mixes the units of an axis, freezes the
labels it touches, with a reason. Frozen is always safe; silent is never.

A residual branch (an operand of an addition that has an exclusive part of the network behind it) is a unit of its own:
its gate scales the parameters that end the branch.

Costs are exact: each convolution and dot is a product of axis sizes, each size is a count of kept units.

This file knows jaxprs only; what a library of layers adds (sizes held as attributes) is behind
`kdsearch_jax.adapters.base`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from scipy import sparse

from kdsearch_jax.tracing import program as program_lib
from kdsearch_jax.tracing.findings import Walk
from kdsearch_jax.tracing.walk import walk

KINDS = ("channels", "neurons", "heads", "values", "groups", "branches")


@dataclass(frozen=True)
class Member:
    """One axis of one parameter that a group's units own entries of.

    leaf: path of the parameter; axis: which axis; units: for each index of the axis its unit, -1 for none; None where a
    branch gate scales the whole parameter. consumes: the axis is contracted, so the gate multiplies it.
    """

    leaf: str
    axis: int
    units: np.ndarray | None
    consumes: bool


@dataclass(frozen=True)
class Group:
    """Units of the same make: `size` channels of one layer, the heads of one attention, or one residual branch."""

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    layers: tuple[str, ...] = ()  # for a branch: the layers that go with it


@dataclass(frozen=True)
class Frozen:
    """`count` indices of an axis that must stay, and why."""

    leaf: str
    axis: int
    count: int
    reason: str


@dataclass(frozen=True)
class Cost:
    """A sum of products of axis sizes, each size a constant plus a count of kept units.

    constants: (terms,); factors: (terms, k) rows of `counts`, padded with row 0, which is always 1;
    alive: (terms, b) unit numbers whose removal ends the term, padded with -1;
    base: (sizes,) units that always stay; counts: sparse (sizes, units).
    """

    constants: np.ndarray
    factors: np.ndarray
    alive: np.ndarray
    base: np.ndarray
    counts: sparse.csr_matrix

    def _parts(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.base + self.counts @ keep
        alive = np.where(self.alive < 0, 1.0, np.append(keep, 1.0)[self.alive]).prod(1)
        return sizes[self.factors], alive

    def total(self, keep: np.ndarray) -> float:
        """The cost of keeping `keep`, a (units,) vector of 0 and 1 in the order of `Topology.flatten`."""
        sizes, alive = self._parts(np.asarray(keep, float))
        return float((self.constants * sizes.prod(1) * alive).sum())

    def marginal(self, keep: np.ndarray) -> np.ndarray:
        """(units,) derivative of `total`: what one more unit of its make costs; for a branch, what it costs in all."""
        keep = np.asarray(keep, float)
        sizes, alive = self._parts(keep)
        slope = np.zeros(len(self.base))
        for k in range(sizes.shape[1]):
            others = np.delete(sizes, k, 1).prod(1)
            np.add.at(slope, self.factors[:, k], self.constants * others * alive)
        slope[0] = 0.0
        result = self.counts.T @ slope
        for b in range(self.alive.shape[1]):
            used = self.alive[:, b] >= 0
            units = self.alive[used, b]
            rest = np.where(self.alive[used] == units[:, None], -1, self.alive[used])
            others = np.where(rest < 0, 1.0, np.append(keep, 1.0)[rest]).prod(1)
            np.add.at(result, units, self.constants[used] * sizes[used].prod(1) * others)
        return result


@dataclass(frozen=True)
class Topology:
    """What `trace` found.

    macs, params: exact costs of one example and of the parameters. flops: what XLA would count for one batch of the
    whole network (in-bounds products only, elementwise work included), to check against its own analysis.
    shapes: {path: shape} of every parameter and statistic.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
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
        """How many units there are in all groups."""
        return int(self._starts[-1])  # type: ignore[attr-defined]

    def flatten(self, tree: Mapping[str, Any]) -> np.ndarray:
        """{group: vector} → one (units,) vector, groups in order."""
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
        """(MACs of one example, parameters) when only `keep` stays; {group: bool vector} or flat."""
        flat = self.flatten(keep) if isinstance(keep, Mapping) else keep
        return round(self.macs.total(flat)), round(self.params.total(flat))

    def select(
        self, kinds: Sequence[str] = KINDS, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
    ) -> Topology:
        """The topology with only the groups of these kinds whose names match `include` and not `exclude` (fnmatch).

        Raises:
          ValueError: for an unknown kind, a pattern that matches nothing, or when no group is left.
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
        stay = np.concatenate([np.full(g.size, g.name not in reasons) for g in self.groups] or [np.zeros(0, bool)])
        frozen = [
            Frozen(m.leaf, m.axis, int((m.units >= 0).sum()), reasons[g.name])
            for g in self.groups
            if g.name in reasons
            for m in g.members
            if m.units is not None
        ]
        return replace(
            self,
            groups=tuple(g for g in self.groups if g.name not in reasons),
            frozen=self.frozen + tuple(frozen),
            macs=_restrict(self.macs, stay),
            params=_restrict(self.params, stay),
            excluded={**self.excluded, **reasons},
        )

    def masks(self, keep: Mapping[str, Any]) -> dict[tuple[str, int], np.ndarray]:
        """{(parameter, axis): bool vector of the indices that stay}, for axes that lose any."""
        result: dict[tuple[str, int], np.ndarray] = {}
        for group in self.groups:
            stays = np.append(np.asarray(keep[group.name], bool), True)
            for member in group.members:
                if member.units is not None and not stays.all():
                    old = result.get((member.leaf, member.axis), True)
                    result[member.leaf, member.axis] = old & stays[member.units]
        return result

    def dropped(self, keep: Mapping[str, Any]) -> tuple[str, ...]:
        """Layers that go with the residual branches that `keep` drops."""
        gone = [layer for g in self.groups if g.kind == "branches" and not np.all(keep[g.name]) for layer in g.layers]
        return tuple(sorted(set(gone)))

    def sliced_shapes(self, keep: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of all leaves when only `keep` stays; leaves of dropped layers included."""
        shapes = {path: list(shape) for path, shape in self.shapes.items()}
        for (leaf, axis), mask in self.masks(keep).items():
            shapes[leaf][axis] = int(mask.sum())
        return {path: tuple(shape) for path, shape in shapes.items()}

    def require_groups(self) -> Topology:
        """Itself, where anything can be pruned.

        Raises:
          ValueError: where nothing can, with the reasons.
        """
        if self.groups:
            return self
        reasons = {**{f.leaf: f.reason for f in self.frozen}, **self.excluded}
        lines = "; ".join(f"{leaf}: {reason}" for leaf, reason in list(reasons.items())[:6])
        raise ValueError(f"nothing in this network can be pruned ({lines or 'it has no parameters'})")

    def shares(self) -> dict[str, tuple[float, float]]:
        """{group: (share of MACs, share of parameters) that go if the group could be emptied}."""
        ones = np.ones(self.units)
        macs, params = self.total()
        result = {}
        for name in (group.name for group in self.groups):
            keep = {**self.unflatten(ones), name: np.zeros_like(self.unflatten(ones)[name])}
            less_macs, less_params = self.cost(keep)
            result[name] = (1 - less_macs / max(macs, 1), 1 - less_params / max(params, 1))
        return result

    def describe(self) -> str:
        """A table of groups, and what is frozen and why."""
        macs, params = self.total()
        shares = self.shares()
        lines = [f"{macs:,} MACs an example, {params:,} parameters, {len(self.groups)} groups, {self.units} units"]
        lines += ["Shares are what goes with a whole group; what two groups share is counted with both."]
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
        return "\n".join(lines + [f"unknown primitive: {name} (froze what it touched)" for name in self.unknown])

    def to_json(self) -> dict[str, Any]:
        """Groups, shares and reasons as plain JSON, for reports."""
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


def _restrict(cost: Cost, stay: np.ndarray) -> Cost:
    """The cost over the units in `stay` only; the others are kept for good."""
    number = np.where(stay, np.cumsum(stay) - 1, -1)
    base = cost.base + np.asarray(cost.counts[:, ~stay].sum(1)).ravel()
    alive = np.where(cost.alive >= 0, number[cost.alive], -1) if cost.alive.size else cost.alive
    return Cost(cost.constants, cost.factors, alive, base, cost.counts[:, stay].tocsr())


def path_string(path: Sequence[Any]) -> str:
    """A pytree path as "params/conv1/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def trace(function: Callable[..., Any], variables: Any, *inputs: Any, droppable: Callable[[str], bool]) -> Topology:
    """Traces `function(variables, *inputs)` and finds what can be pruned.

    Args:
      function: pure; its outputs' sizes are fixed.
      variables: {"params": …, other collections: …} of arrays or shapes.
      inputs: example inputs or shapes; the leading axis of the first is the batch.
      droppable: whether the layer at a path can be left out of the student when its branch goes.

    Raises:
      ValueError: where `inputs` have no batch axis.
    """
    batch = batch_size(inputs)
    program = program_lib.flatten(jax.make_jaxpr(function)(variables, *inputs))
    return assemble(walk(program, leaf_shapes(variables)), leaf_shapes(variables), batch, droppable)


def leaf_shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every leaf, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {path_string(path): tuple(leaf.shape) for path, leaf in leaves}


def map_left(function: Callable[[str, Any], Any], variables: Any, gone: Collection[str]) -> Any:
    """`function` of each leaf's path and value, in a tree without the leaves of the layers in `gone`."""
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
    """The leading axis of the first input. Raises ValueError where it has none."""
    first = jax.tree.leaves(inputs)
    if not first or not first[0].shape:
        raise ValueError("inputs: the first input must be an array with a leading batch axis")
    return first[0].shape[0]


def assemble(found: Walk, shapes: dict[str, tuple[int, ...]], batch: int, droppable: Callable[[str], bool]) -> Topology:
    """The topology that a walk over a network with parameters of these shapes found; arguments as for `trace`."""
    names = list(shapes)
    labels = found.labels
    unit_of, counts, frozen = _units(found, names)
    taken: dict[str, int] = {}
    groups = _groups(found, unit_of, counts, names, taken)
    start = sum(group.size for group in groups)
    branch_of_term: list[tuple[int, ...]] = [()] * len(found.terms)
    dead: dict[str, list[int]] = {}
    refused = [
        Frozen(scope, -1, 1, "a residual branch that no parameters scale as a whole") for scope in found.unscaled
    ]
    operations = _operations(found, names) if found.branches else {}
    for branch in found.branches:
        inside = [names[leaf] for leaf in sorted(branch.leaves)]
        layers = sorted({leaf.split("/", 1)[1].rsplit("/", 1)[0] for leaf in inside if leaf.count("/") > 1})
        layers = [layer for layer in layers if _whole(layer, inside, shapes) and droppable(layer)]
        # A stranger's layer may hold the addition itself.
        layers = [layer for layer in layers if layer in operations and operations[layer] <= branch.ops]
        gone = {leaf for leaf in branch.leaves if _layer(names[leaf]) in layers}
        assert found.graph is not None
        if not layers or not found.graph.left(branch, gone).isdisjoint(branch.terms):
            refused.append(Frozen(inside[-1], -1, 1, "a residual branch whose layers cannot be left out by themselves"))
            continue
        name = _unique(_common(layers) + ":branch", taken)
        members = tuple(Member(names[leaf], -1, None, True) for leaf in sorted(branch.scalers))
        groups.append(Group(name, "branches", 1, members, tuple(layers)))
        for t in (t for terms in branch.terms.values() for t in terms):
            branch_of_term[t] = (*branch_of_term[t], start)
        for leaf in inside:
            if leaf.split("/", 1)[1].rsplit("/", 1)[0] in layers:
                dead.setdefault(leaf, []).append(start)
        start += 1

    sizes = _Sizes(unit_of, start)
    macs = sizes.cost(
        [
            (term.constant / batch, [sizes.row(axis) for axis in term.axes], branch_of_term[i])
            for i, term in enumerate(found.terms)
        ]
    )
    params = sizes.cost(
        [
            (1.0, [sizes.row(axis) for axis in labels.axes_of(i)], tuple(dead.get(name, ())))
            for i, name in enumerate(names)
            if name.startswith("params/")
        ]
    )
    return Topology(tuple(groups), frozen + tuple(refused), macs, params, found.flops, shapes, tuple(found.unknown))


def _units(found: Walk, names: list[str]) -> tuple[np.ndarray, np.ndarray, tuple[Frozen, ...]]:
    """((labels,) unit number or -1, units of the same make in a row; how many of each make; labels that must stay)."""
    labels, component = found.labels, found.components()
    keys = labels.keys()
    why, reasons = found.frozen()
    unread, alone = len(reasons), len(reasons) + 1
    reasons = [*reasons, "no kernel reads it", "a single unit, which must stay"]
    read = np.zeros(len(component), bool)
    read[component[found.consumed()]] = True
    why[(why < 0) & ~read[component]] = unread

    free = np.flatnonzero((why < 0) & (labels.leaf >= 0))
    _, first, unit = np.unique(component[free], return_index=True, return_inverse=True)
    # Units of the same make have labels on the same axes: equal sums of random numbers, one for each axis.
    random = np.random.default_rng(0).integers(2**63, size=max(int(keys.max()), 0) + 1, dtype=np.uint64)
    sums = np.zeros(len(first), np.uint64)
    np.add.at(sums, unit, random[keys[free]])
    _, make, size = np.unique(sums, return_inverse=True, return_counts=True)
    begin = np.full(len(size), len(component))
    np.minimum.at(begin, make, first)
    order = np.lexsort((first, begin[make]))
    order = order[size[make[order]] > 1]
    number = np.full(len(first), -1)
    number[order] = np.arange(len(order))
    unit_of = np.full(len(component), -1)
    unit_of[free] = number[unit]
    why[free] = np.where(number[unit] < 0, alone, -1)

    stays = np.flatnonzero((why >= 0) & (labels.leaf >= 0))
    combined, counts = np.unique(keys[stays] * len(reasons) + why[stays], return_counts=True)
    return (
        unit_of,
        size[make[order[_starts(make[order])]]],
        tuple(
            Frozen(names[key // len(reasons) // 16], key // len(reasons) % 16, n, reasons[key % len(reasons)])
            for key, n in zip(combined.tolist(), counts.tolist(), strict=True)
        ),
    )


def _starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.append(True, np.diff(values) != 0)[: len(values)])


def _groups(
    found: Walk, unit_of: np.ndarray, counts: np.ndarray, names: list[str], taken: dict[str, int]
) -> list[Group]:
    """The groups of numbered units, of which there are `counts` in each."""
    labels, keys = found.labels, found.labels.keys()
    consumed = set(np.flatnonzero(np.bincount(keys[found.consumed()])).tolist())
    order = np.argsort(unit_of, kind="stable")
    numbers = unit_of[order]
    groups: list[Group] = []
    start = 0
    for count in counts.tolist():
        first = order[slice(*np.searchsorted(numbers, [start, start + 1]))]  # labels of the group's first unit
        members = []
        for key in sorted(set(keys[first].tolist())):
            local = unit_of[labels.axes_of(key // 16)[key % 16]] - start
            local = np.where((local >= 0) & (local < count), local, -1)
            members.append(Member(names[key // 16], key % 16, local, key in consumed))
        groups.append(Group(_group_name(members, taken), found.kind_of(first[0]), count, tuple(members)))
        start += count
    return groups


def _group_name(members: Sequence[Member], taken: dict[str, int]) -> str:
    """The layer that produces the units: the first kernel whose axis is not contracted."""
    made = [m for m in members if not m.consumes] or list(members)
    return _unique(made[0].leaf.split("/", 1)[-1].rsplit("/", 1)[0], taken, prefer=_kernels(made))


def _kernels(members: Sequence[Member]) -> str | None:
    for member in members:
        if member.leaf.startswith("params/") and member.leaf.rsplit("/", 1)[-1] in ("kernel", "embedding"):
            return member.leaf.split("/", 1)[1].rsplit("/", 1)[0]
    return None


def _unique(name: str, taken: dict[str, int], prefer: str | None = None) -> str:
    name = prefer or name
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _layer(leaf: str) -> str:
    """The path of the layer that holds a parameter."""
    return leaf.split("/", 1)[1].rsplit("/", 1)[0]


def _whole(layer: str, inside: Sequence[str], shapes: Mapping[str, Any]) -> bool:
    """Whether every parameter of `layer` lies inside."""
    own = [leaf for leaf in shapes if leaf.split("/", 1)[1].rsplit("/", 1)[0] == layer]
    return set(own) <= set(inside)


def _operations(found: Walk, names: Sequence[str]) -> dict[str, set[int]]:
    """{path of a layer that has none below it: its operations}."""
    assert found.graph is not None
    scopes: dict[str, list[int]] = {}
    for i, op in enumerate(found.graph.program.ops):
        scopes.setdefault(op.scope, []).append(i)
    layers = {_layer(name) for name in names}
    above = {layer.rsplit("/", n)[0] for layer in layers for n in range(1, layer.count("/") + 1)}
    result: dict[str, set[int]] = {layer: set() for layer in layers - above}
    for scope, ops in scopes.items():
        parts = [part.split(".")[0] for part in scope.split("/")]  # a method's name may stand behind that of its layer
        for i in range(len(parts)):
            for j in range(i + 1, len(parts) + 1):
                result.get("/".join(parts[i:j]), set()).update(ops)
    return result


def _common(layers: Sequence[str]) -> str:
    """The longest common module path of layers; the last layer's where they share none."""
    parts = [layer.split("/") for layer in layers]
    n = 0
    while all(len(p) > n + 1 and p[n] == parts[0][n] for p in parts):
        n += 1
    return "/".join(parts[0][:n]) or "+".join(dict.fromkeys((layers[0], layers[-1])))


class _Sizes:
    """Axis sizes as counts of kept units; equal axes share a row. Row 0 is the constant 1."""

    def __init__(self, unit_of: np.ndarray, units: int):
        self.unit_of, self.units = unit_of, units
        self.rows: dict[bytes, int] = {b"": 0}
        self.base: list[float] = [1.0]
        self.entries: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, int), np.zeros(0))]

    def row(self, axis: np.ndarray | int) -> int:
        numbers = np.full(axis, -1) if isinstance(axis, int) else self.unit_of[axis]
        key = numbers.tobytes()
        if key not in self.rows:
            self.rows[key] = len(self.base)
            self.base.append(float((numbers < 0).sum()))
            units = numbers[numbers >= 0]
            ascending = (np.diff(units) > 0).all()  # as almost always
            self.entries.append((units, np.ones(len(units))) if ascending else np.unique(units, return_counts=True))
        return self.rows[key]

    def cost(self, terms: Sequence[tuple[float, list[int], tuple[int, ...]]]) -> Cost:
        width = max([len(rows) for _, rows, _ in terms] + [1])
        depth = max([len(alive) for _, _, alive in terms] + [1])
        factors = np.array([rows + [0] * (width - len(rows)) for _, rows, _ in terms], int).reshape(-1, width)
        alive = np.array([list(a) + [-1] * (depth - len(a)) for *_, a in terms], int).reshape(-1, depth)
        indptr = np.cumsum([0] + [len(u) for u, _ in self.entries])
        columns = np.concatenate([u for u, _ in self.entries]).astype(int)
        values = np.concatenate([n for _, n in self.entries]).astype(float)
        counts = sparse.csr_matrix((values, columns, indptr), shape=(len(self.base), self.units))
        return Cost(np.array([c for c, *_ in terms], float), factors, alive, np.array(self.base), counts)
