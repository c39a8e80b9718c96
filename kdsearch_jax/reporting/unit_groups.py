"""Groups of prunable units: which units were kept, when the others were pruned, and names short enough for a figure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 40  # of a figure; more groups are merged
_COLLECTION = re.compile("^(params|batch_stats)/")


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of the teacher that can be pruned one by one: channels of a layer, heads, or a whole residual branch.

    Args:
      name, kind, size: as in `topology.json`.
      layers: paths of the layers that the units run through.
      macs_share: share in [0, 1] of the teacher's MACs that pruning the whole group would save.
      kept: (size,) bool, or None if the search has not selected units yet.
      gates: (T, size) float32 gates over the recorded steps, or None.
    """

    name: str
    kind: str
    size: int
    layers: tuple[str, ...]
    macs_share: float
    kept: NDArray[np.bool_] | None
    gates: NDArray[np.floating] | None

    @property
    def kept_count(self) -> int:
        """Number of units kept; all of them before a selection."""
        return self.size if self.kept is None else int(self.kept.sum())

    @property
    def is_branch(self) -> bool:
        """Whether the group's only unit is a residual branch."""
        return self.kind == "branches"

    def last_positive(self) -> NDArray[np.integer]:
        """For each unit the index of the last recorded row with a gate above zero, −1 if there is none: (size,)."""
        assert self.gates is not None
        positive = self.gates > 0
        return np.where(positive.any(0), len(positive) - 1 - np.argmax(positive[::-1], axis=0), -1)


@dataclass(frozen=True, eq=False)
class PruneSteps:
    """When the units of a group were pruned.

    Args:
      step: (size,) int, the first recorded step from which on a pruned unit's gate stayed zero; −1 for all other units.
      at_end: (size,) bool, units with a gate above zero that the final selection removed.
    """

    step: NDArray[np.integer]
    at_end: NDArray[np.bool_]

    @classmethod
    def of(cls, group: UnitGroup, history: Mapping[str, np.ndarray] | None) -> PruneSteps | None:
        """The steps of one group, or None if its gates were not recorded."""
        if history is None or group.gates is None or group.kept is None:
            return None
        steps, last = history["steps"], group.last_positive()
        zero = last < len(steps) - 1
        step = np.where(zero & ~group.kept, steps[np.minimum(last + 1, len(steps) - 1)], -1)
        return cls(step, ~group.kept & ~zero)

    def units_by_step(self) -> list[tuple[int, list[int]]]:
        """[(step, indices of the units pruned there), …] in order."""
        return [(int(step), np.flatnonzero(self.step == step).tolist()) for step in np.unique(self.pruned)]

    @property
    def pruned(self) -> NDArray[np.integer]:
        """The steps of all units that were pruned during the search, sorted."""
        return np.sort(self.step[self.step >= 0])


def make_groups(path: Path, topology: Any, selection: Any, history: Any) -> tuple[UnitGroup, ...]:
    """The groups of `topology.json`, with numbers in names sorted as numbers.

    Args:
      path: of `topology.json`, for messages.
      topology, selection: the JSON objects, or None.
      history: arrays of `history.npz`, or None.

    Raises:
      ValueError: in one line, if the three do not fit together.
    """
    if topology is None:
        return ()
    try:
        groups = [_make_group(record, selection, history) for record in topology["groups"]]
        return _without_removed_branches(sorted(groups, key=lambda group: natural_key(group.name)))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} does not fit selection.json or history.npz: {type(error).__name__} {error}") from None


def _make_group(record: dict[str, Any], selection: Any, history: Any) -> UnitGroup:
    name, size = record["name"], int(record["size"])
    gates = None if history is None else history.get(f"gate/{name}")
    if gates is not None and gates.shape[1:] != (size,):
        raise ValueError(f"gate {name!r} has {gates.shape[1:]} units, the topology {size}")
    kept = None
    if selection is not None:
        kept = np.zeros(size, bool)
        kept[np.asarray(selection["kept"].get(name, range(size)), int)] = True  # unlisted groups are kept whole
    elif gates is not None:
        kept = gates[-1] > 0
    layers = tuple(dict.fromkeys(_COLLECTION.sub("", layer) for layer in record.get("layers", ())))
    return UnitGroup(name, record["kind"], size, layers, record.get("macs_share", 0.0), kept, gates)


def _without_removed_branches(groups: list[UnitGroup]) -> tuple[UnitGroup, ...]:
    """The groups, with no units kept in those that lie inside a removed branch."""
    removed = {layer for group in groups if group.is_branch and group.kept_count == 0 for layer in group.layers}
    return tuple(
        dataclasses.replace(group, kept=np.zeros(group.size, bool))
        if group.kept is not None and group.layers and removed.issuperset(group.layers)
        else group
        for group in groups
    )


def natural_key(name: str) -> list[Any]:
    """A sort key that puts block2 before block10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def kept_by_stage(groups: Sequence[UnitGroup]) -> list[tuple[str, float]]:
    """[(first part of the groups' names, share of units kept), …], the smallest share first.

    Empty unless there are two to eight such parts.
    """
    totals: dict[str, list[int]] = {}
    for group in groups:
        total = totals.setdefault(group.name.split("/")[0], [0, 0])
        total[0] += group.kept_count
        total[1] += group.size
    shares = [(name, kept / size) for name, (kept, size) in totals.items()] if 2 <= len(totals) <= 8 else []
    return sorted(shares, key=lambda stage: stage[1])


def short_names(groups: Sequence[UnitGroup]) -> dict[str, str]:
    """{name: label} without the last parts that all names share: of "stage1/block2/conv1" that is "stage1/block2"."""
    parts = [group.name.split("/") for group in groups if not group.is_branch]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[-1 - shared] == parts[0][-1 - shared] for p in parts):
        shared += 1
    return {
        group.name: group.name.removesuffix(":branch")
        if group.is_branch
        else "/".join(group.name.split("/")[: len(group.name.split("/")) - shared])
        for group in groups
    }


def merge_groups(groups: tuple[UnitGroup, ...], limit: int = MAX_ROWS) -> tuple[UnitGroup, ...]:
    """At most `limit` groups: those whose names start alike become one, at the deepest level that is short enough.

    Groups whose names share nothing are merged with their neighbours. MACs between two groups count for both, so shares
    cannot be added; merged groups have 0.
    """
    if len(groups) <= limit:
        return groups
    parts = [group.name.split("/") for group in groups]
    for depth in range(max(map(len, parts)) - 1, 0, -1):
        keys = ["/".join(part[:depth]) for part in parts]
        if 2 <= len(set(keys)) <= limit:
            return _merge_by_key(groups, keys)
    size = -(-len(groups) // limit)
    chunks = [groups[i - i % size : i - i % size + size] for i in range(len(groups))]
    return _merge_by_key(groups, [c[0].name if len(c) == 1 else f"{c[0].name} … {c[-1].name}" for c in chunks])


def _merge_by_key(groups: tuple[UnitGroup, ...], keys: list[str]) -> tuple[UnitGroup, ...]:
    by_key: dict[str, list[UnitGroup]] = {}
    for key, group in zip(keys, groups, strict=True):
        by_key.setdefault(key, []).append(group)
    return tuple(_concatenate(key, members) for key, members in by_key.items())


def _concatenate(name: str, groups: list[UnitGroup]) -> UnitGroup:
    kept = [group.kept for group in groups if group.kept is not None]
    gates = [group.gates for group in groups if group.gates is not None]
    return UnitGroup(
        name=name,
        kind=groups[0].kind if len({group.kind for group in groups}) == 1 else "units",
        size=sum(group.size for group in groups),
        layers=tuple(dict.fromkeys(layer for group in groups for layer in group.layers)),
        macs_share=0.0,
        kept=np.concatenate(kept) if len(kept) == len(groups) else None,
        gates=np.concatenate(gates, axis=1) if len(gates) == len(groups) else None,
    )
