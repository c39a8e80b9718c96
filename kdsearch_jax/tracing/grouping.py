"""Builds a topology from an analysis: numbers the units, collects them in groups, and sums up the costs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kdsearch_jax.tracing.analysis import Analysis
from kdsearch_jax.tracing.cost import CostBuilder
from kdsearch_jax.tracing.residual import ResidualBranch
from kdsearch_jax.tracing.topology import AxisSlice, FrozenAxis, Group, Topology


def build_topology(
    analysis: Analysis, shapes: dict[str, tuple[int, ...]], batch: int, droppable: Callable[[str], bool]
) -> Topology:
    """The topology of an analyzed network.

    Args:
      shapes: {path: shape} of every parameter and statistic, in the order of the analysis.
      batch: size of the batch that the network was traced with.
      droppable: whether the layer at a path can be left out of the student when its residual branch is removed.
    """
    names = list(shapes)
    unit_of, sizes, frozen = _units(analysis, names)
    used_names: Counter[str] = Counter()
    groups = _groups(analysis, unit_of, sizes, names, used_names)
    start = sum(group.size for group in groups)
    branches, refused = _branches(analysis, shapes, droppable)
    groups += [
        Group(
            _unique(f"{_common_path(layers)}:branch", used_names),
            "branches",
            1,
            tuple(AxisSlice(names[leaf], -1, None, True, True) for leaf in sorted(branch.scalers)),
            tuple(layers),
        )
        for branch, layers in branches
    ]
    branches_of_term: dict[int, list[int]] = {}
    branches_of_leaf: dict[str, list[int]] = {}
    for unit, (branch, layers) in enumerate(branches, start):
        for term in itertools.chain(*branch.terms.values()):
            branches_of_term.setdefault(term, []).append(unit)
        for leaf in sorted(branch.leaves):
            if _layer(names[leaf]) in layers:
                branches_of_leaf.setdefault(names[leaf], []).append(unit)
    costs = CostBuilder(unit_of, start + len(branches))
    macs = costs.cost(
        [
            (term.constant / batch, [costs.row(axis) for axis in term.axes], tuple(branches_of_term.get(i, ())))
            for i, term in enumerate(analysis.terms)
        ]
    )
    params = costs.cost(
        [
            (1.0, [costs.row(axis) for axis in analysis.labels.axes_of(i)], tuple(branches_of_leaf.get(name, ())))
            for i, name in enumerate(names)
            if name.startswith("params/")
        ]
    )
    return Topology(tuple(groups), (*frozen, *refused), macs, params, analysis.flops, shapes, tuple(analysis.unknown))


def _branches(
    analysis: Analysis, shapes: dict[str, tuple[int, ...]], droppable: Callable[[str], bool]
) -> tuple[list[tuple[ResidualBranch, list[str]]], list[FrozenAxis]]:
    """(residual branches with the layers that are removed with each, those that cannot be removed)."""
    names, graph = list(shapes), analysis.graph
    reason = "a residual branch that no parameters scale as a whole"
    removable, refused = [], [FrozenAxis(scope, -1, 1, reason) for scope in analysis.unscaled]
    operations = _operations(analysis, names) if analysis.branches else {}
    for branch in analysis.branches:
        assert graph is not None
        inside = [names[leaf] for leaf in sorted(branch.leaves)]
        layers = sorted({_layer(leaf) for leaf in inside if leaf.count("/") > 1})
        layers = [layer for layer in layers if _is_inside(layer, inside, shapes) and droppable(layer)]
        # A layer of the user's own may contain the addition itself.
        layers = [layer for layer in layers if layer in operations and operations[layer] <= branch.ops]
        removed = {leaf for leaf in branch.leaves if _layer(names[leaf]) in layers}
        if layers and graph.remaining_ops(branch, removed).isdisjoint(branch.terms):
            removable.append((branch, layers))
        else:
            reason = "a residual branch whose layers cannot be left out by themselves"
            refused.append(FrozenAxis(inside[-1], -1, 1, reason))
    return removable, refused


def _units(analysis: Analysis, names: list[str]) -> tuple[np.ndarray, np.ndarray, tuple[FrozenAxis, ...]]:
    """((labels,) unit or -1, the units of a group in sequence; size of each group; what is frozen)."""
    labels, component = analysis.labels, analysis.components()
    keys = labels.keys()
    why, reasons = analysis.frozen()
    unread, alone = len(reasons), len(reasons) + 1
    reasons = [*reasons, "no kernel reads it", "a single unit, which must stay"]
    read = np.zeros(len(component), bool)
    read[component[analysis.consumed()]] = True
    read[component[analysis.mixed()]] = True
    why[(why < 0) & ~read[component]] = unread

    free = np.flatnonzero((why < 0) & (labels.leaf >= 0))
    _, first, unit = np.unique(component[free], return_index=True, return_inverse=True)
    # The units of a group have labels on the same axes, which is found by comparing sums of one random number per axis.
    random = np.random.default_rng(0).integers(2**63, size=max(int(keys.max()), 0) + 1, dtype=np.uint64)
    sums = np.zeros(len(first), np.uint64)
    np.add.at(sums, unit, random[keys[free]])
    _, group, size = np.unique(sums, return_inverse=True, return_counts=True)
    begin = np.full(len(size), len(component))
    np.minimum.at(begin, group, first)
    order = np.lexsort((first, begin[group]))
    order = order[size[group[order]] > 1]
    number = np.full(len(first), -1)
    number[order] = np.arange(len(order))
    unit_of = np.full(len(component), -1)
    unit_of[free] = number[unit]
    why[free] = np.where(number[unit] < 0, alone, -1)

    stays = np.flatnonzero((why >= 0) & (labels.leaf >= 0))
    combined, counts = np.unique(keys[stays] * len(reasons) + why[stays], return_counts=True)
    return (
        unit_of,
        size[group[order[_starts(group[order])]]],
        tuple(
            FrozenAxis(names[key // len(reasons) // 16], key // len(reasons) % 16, n, reasons[key % len(reasons)])
            for key, n in zip(combined.tolist(), counts.tolist(), strict=True)
        ),
    )


def _starts(values: np.ndarray) -> np.ndarray:
    """The indices at which runs of equal values begin."""
    return np.flatnonzero(np.append(True, np.diff(values) != 0)[: len(values)])


def _groups(
    analysis: Analysis, unit_of: np.ndarray, sizes: np.ndarray, names: list[str], used_names: Counter[str]
) -> list[Group]:
    """The groups of these sizes, whose units are numbered in sequence by `unit_of`."""
    labels, keys = analysis.labels, analysis.labels.keys()
    consumed = set(np.flatnonzero(np.bincount(keys[analysis.consumed()])).tolist())
    produced = set(np.unique(keys[np.concatenate([*analysis.produced, np.zeros(1, int)])]).tolist())
    mixed = analysis.mixed()
    order = np.argsort(unit_of, kind="stable")
    numbers = unit_of[order]
    groups: list[Group] = []
    start = 0
    for size in sizes.tolist():
        first = order[slice(*np.searchsorted(numbers, [start, start + 1]))]  # labels of the group's first unit
        masked, members = bool(mixed[first[0]]), []
        for key in sorted(set(keys[first].tolist())):
            local = unit_of[labels.axes_of(key // 16)[key % 16]] - start
            local = np.where((local >= 0) & (local < size), local, -1)
            name, reads = names[key // 16], key in consumed
            writes = name.startswith("params/") and (not reads or key in produced)
            members.append(AxisSlice(name, key % 16, local, reads, writes if masked else reads))
        if not any(member.gated for member in members):
            members = [replace(member, gated=member.consumes) for member in members]
        name = _group_name(members, used_names)
        groups.append(Group(name, analysis.kind_of(first[0]), size, tuple(members), masked=masked))
        start += size
    return groups


def _group_name(members: Sequence[AxisSlice], used_names: Counter[str]) -> str:
    """The layer that produces the units: that of the first kernel whose axis is not contracted."""
    leaves = [m.leaf for m in members if not m.consumes] or [m.leaf for m in members]
    kernels = [leaf for leaf in leaves if leaf.startswith("params/") and leaf.endswith(("/kernel", "/embedding"))]
    return _unique(_layer([*kernels, *leaves][0]), used_names)


def _unique(name: str, used_names: Counter[str]) -> str:
    used_names[name] += 1
    return name if used_names[name] == 1 else f"{name}#{used_names[name]}"


def _layer(leaf: str) -> str:
    """The path of the layer that holds a parameter."""
    return leaf.split("/", 1)[1].rsplit("/", 1)[0]


def _is_inside(layer: str, inside: Sequence[str], shapes: Mapping[str, Any]) -> bool:
    """Whether every leaf of `layer` is among `inside`."""
    return {leaf for leaf in shapes if _layer(leaf) == layer} <= set(inside)


def _operations(analysis: Analysis, names: Sequence[str]) -> dict[str, set[int]]:
    """{path of a layer without layers inside of it: its operations}."""
    assert analysis.graph is not None
    scopes: dict[str, list[int]] = {}
    for i, op in enumerate(analysis.graph.program.ops):
        scopes.setdefault(op.scope, []).append(i)
    layers = {_layer(name) for name in names}
    above = {layer.rsplit("/", n)[0] for layer in layers for n in range(1, layer.count("/") + 1)}
    result: dict[str, set[int]] = {layer: set() for layer in layers - above}
    for scope, ops in scopes.items():
        parts = [part.split(".")[0] for part in scope.split("/")]  # a layer's name may be followed by that of a method
        for i in range(len(parts)):
            for j in range(i + 1, len(parts) + 1):
                result.get("/".join(parts[i:j]), set()).update(ops)
    return result


def _common_path(layers: Sequence[str]) -> str:
    """The longest common module path of layers; the names of the first and the last where there is none."""
    parts = [layer.split("/") for layer in layers]
    n = 0
    while all(len(p) > n + 1 and p[n] == parts[0][n] for p in parts):
        n += 1
    return "/".join(parts[0][:n]) or "+".join(dict.fromkeys((layers[0], layers[-1])))
