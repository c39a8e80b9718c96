"""A run directory as one record: what its files say, and which of them are not there.

Reads JSON, JSON lines and NumPy archives only; no network is built, no array of weights is opened. Every file but
`config.json` is optional: what a missing one leaves out is for the page to say. A file that is there and cannot be read
is an error that names it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdsearch_jax.reporting import evidence, files, fronts
from kdsearch_jax.reporting.evidence import Evidence
from kdsearch_jax.reporting.fronts import Front
from kdsearch_jax.storage.files import read_arrays, read_sealed

_COLLECTION = re.compile("^(params|batch_stats)/")  # what a unit's layers may be prefixed with
STAGES = ("teacher", "search", "retrain", "uniform", "magnitude")


@dataclass(frozen=True)
class Group:
    """Units of the teacher that can go one by one: the channels of a layer, heads, whole residual branches.

    Args:
      name, kind, size: as in `topology.json`.
      layers: paths of the layers that the units run through.
      macs_share: share of the teacher's MACs that would go with the whole group, in [0, 1].
      kept: (size,) bool, or None where the search has not come to a choice.
      path: (T, size) float32 gates over the recorded steps, or None.
    """

    name: str
    kind: str
    size: int
    layers: tuple[str, ...]
    macs_share: float
    kept: np.ndarray | None
    path: np.ndarray | None

    @property
    def kept_units(self) -> int:
        """How many units stay; all of them where no choice was made."""
        return self.size if self.kept is None else int(self.kept.sum())


@dataclass(frozen=True)
class Run:
    """All that a report is made of; `None` or empty stands for a file that is not there.

    Args:
      metrics: {stage: rows of its metrics.jsonl}.
      history: arrays of history.npz other than gates, by name; "steps" (T,) is always one of them.
      groups: every prunable group by name, numbers in order, residual branches among them.
      evidence: predictions of the networks on the split of `results.json`.
      measured: {a student's directory: what was measured of it for bounds on time and memory (`measured.json`)}.
      front: the students of several budgets, of a run that was asked for them.
      final: whether `kept` of the groups is the search's selection (else: the gates alive at the last recorded step).
    """

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any] | None
    results: dict[str, Any] | None
    topology: dict[str, Any] | None
    selection: dict[str, Any] | None
    architecture: dict[str, Any] | None
    history: dict[str, np.ndarray] | None
    metrics: dict[str, list[dict[str, Any]]]
    groups: tuple[Group, ...]
    final: bool
    evidence: Evidence | None = None
    front: Front | None = None
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def units(self) -> tuple[Group, ...]:
        """The groups that are not residual branches, where a choice was made."""
        return tuple(g for g in self.groups if g.kind != "branches" and g.kept is not None)

    @property
    def branches(self) -> tuple[Group, ...]:
        """The residual branches, where a choice was made."""
        return tuple(g for g in self.groups if g.kind == "branches" and g.kept is not None)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The networks of `results.json`, the teacher first."""
        rows = (self.results or {}).get("rows", [])
        return sorted(rows, key=lambda row: row.get("name") != "teacher")


def read(directory: Path) -> Run:
    """The record of the run in `directory`.

    Raises:
      ValueError: in one line, where the directory is not a run (names what is missing) or a file is damaged.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a run: there is no such directory")
    config = files.json_object(directory / "config.json")
    if config is None:
        raise ValueError(f"{directory} is not a run: it has no config.json (give the directory that a run has written)")
    search = directory / "search"
    topology, selection = files.json_object(search / "topology.json"), files.json_object(search / "selection.json")
    history = _history(search / "history.npz")
    budgets = sorted(
        p.name for p in directory.glob("*-*") if p.name.partition("-")[0] in ("at", "uniform", "magnitude")
    )
    return Run(
        directory=directory,
        config=config,
        environment=files.json_object(directory / "environment.json"),
        results=files.with_rows(directory / "results.json", "rows"),
        topology=topology,
        selection=selection,
        architecture=files.json_object(search / "architecture.json"),
        history=history,
        metrics={stage: files.json_lines(directory / stage / "metrics.jsonl") for stage in (*STAGES, *budgets)},
        groups=_groups(search / "topology.json", topology, selection, history),
        final=selection is not None,
        evidence=evidence.read(directory / evidence.FILE),
        front=fronts.read(directory),
        measured={
            path.parent.name: read_sealed(path)
            for path in sorted(directory.glob("*/measured.json"), reverse=True)
            if path.parent.name == "retrain" or path.parent.name.startswith("at-")
        },
    )


def read_groups(search: Path) -> tuple[Group, ...]:
    """The groups of a search's directory, or () where it has no topology."""
    topology, selection = (files.json_object(search / f"{name}.json") for name in ("topology", "selection"))
    return _groups(search / "topology.json", topology, selection, None)


def _history(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    history = read_arrays(path)
    lengths = {name: len(array) for name, array in history.items()}
    if "steps" not in history or len(set(lengths.values())) != 1:
        raise ValueError(f"{path} is damaged: 'steps' and as many rows in every array are expected, not {lengths}")
    return {**history, "steps": history["steps"].astype(int)} if len(history["steps"]) else None


def _groups(path: Path, topology: Any, selection: Any, history: Any) -> tuple[Group, ...]:
    if topology is None:
        return ()
    try:
        groups = [_group(record, selection, history) for record in topology["groups"]]
        return _without_branches(sorted(groups, key=lambda group: natural(group.name)))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} and its neighbours do not fit together: {type(error).__name__} {error}") from None


def _group(record: dict[str, Any], selection: Any, history: Any) -> Group:
    name, size = record["name"], int(record["size"])
    path = None if history is None else history.get(f"gate/{name}")
    if path is not None and path.shape[1:] != (size,):
        raise ValueError(f"gate {name!r} has {path.shape[1:]} units, the topology {size}")
    kept = None
    if selection is not None:
        kept = np.zeros(size, bool)
        kept[np.asarray(selection["kept"].get(name, range(size)), int)] = True  # not listed: never a candidate
    elif path is not None:
        kept = path[-1] > 0
    layers = tuple(dict.fromkeys(_COLLECTION.sub("", layer) for layer in record.get("layers", ())))
    return Group(name, record["kind"], size, layers, record.get("macs_share", 0.0), kept, path)


def natural(name: str) -> list[Any]:
    """A key that sorts block2 before block10, which a tree of parameters does not."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _without_branches(groups: list[Group]) -> tuple[Group, ...]:
    """The groups, with no units left in those that lie inside a removed branch."""
    removed = {layer for g in groups if g.kind == "branches" and g.kept_units == 0 for layer in g.layers}
    inside = [g.kept is not None and bool(g.layers) and removed.issuperset(g.layers) for g in groups]
    return tuple(
        dataclasses.replace(g, kept=np.zeros(g.size, bool)) if gone else g
        for g, gone in zip(groups, inside, strict=True)
    )


def stages_of(groups: tuple[Group, ...]) -> list[tuple[str, float]]:
    """Share of units kept by the first part of the groups' names: [("stage1", 0.3), …].

    Empty where that part says little: fewer than two or more than eight different ones.
    """
    totals: dict[str, list[int]] = {}
    for group in groups:
        total = totals.setdefault(group.name.split("/")[0], [0, 0])
        total[0] += group.kept_units
        total[1] += group.size
    return [(name, kept / size) for name, (kept, size) in totals.items()] if 2 <= len(totals) <= 8 else []


def short_names(groups: Sequence[Group]) -> dict[str, str]:
    """{name: label}, without the last parts that all units share: "stage1/block2/conv1" is "stage1/block2" there."""
    parts = [group.name.split("/") for group in groups if group.kind != "branches"]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[-1 - shared] == parts[0][-1 - shared] for p in parts):
        shared += 1
    return {
        group.name: group.name.removesuffix(":branch")
        if group.kind == "branches"
        else "/".join(group.name.split("/")[: len(group.name.split("/")) - shared])
        for group in groups
    }


def amount(value: float) -> str:
    """A count with three digits and a prefix: 40813184 is "40.8 M"."""
    value = float(f"{value:.3g}")  # first, so that 999,999 is "1 M" and not "1000 k"
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f}"
