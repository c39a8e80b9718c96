"""Everything a report knows about a run, read from the run's directory.

Reads JSON, JSON lines and NumPy archives; builds no network and opens no weights. Every file except `config.json` is
optional. A file that exists but cannot be read is an error that names it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdsearch_jax.reporting.predictions import Predictions, read_predictions
from kdsearch_jax.reporting.unit_groups import UnitGroup, make_groups
from kdsearch_jax.storage.files import parse_json, read_arrays, read_json_object, read_sealed

log = logging.getLogger(__name__)

STAGES = ("teacher", "search", "retrain", "uniform", "magnitude")
_MEASURES = ("accuracy", "macs", "params", "bytes", "ms_per_image")


@dataclass(frozen=True)
class BudgetSweep:
    """Students of several budgets from one search, as `front.json` lists them.

    Args:
      teacher: a row: accuracy, macs, params, bytes, ms_per_image.
      students: one row each with name, budget, accuracy and costs, most expensive first; None where not measured.
      baselines: {method: rows} of hand-made students at the same budgets.
      kept_units: {student: {group: number of units kept}}, where the run has its selection.
    """

    teacher: dict[str, Any]
    students: tuple[dict[str, Any], ...]
    baselines: dict[str, tuple[dict[str, Any], ...]]
    kept_units: dict[str, dict[str, int]]


@dataclass(frozen=True)
class RunRecord:
    """A run; None or empty for what it has no file of.

    Args:
      metrics: {stage: rows of its metrics.jsonl}.
      history: arrays of history.npz by name, "steps" (T,) among them.
      groups: all prunable groups, residual branches included, in natural order of their names.
      is_final: whether `kept` of the groups is the search's selection, not just the gates at the last recorded step.
      predictions: of the networks in `results.json`, on the same split.
      sweep: students of several budgets, if the run was given several.
      measured_budgets: {a student's directory: its measured time and memory (`measured.json`)}.
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
    groups: tuple[UnitGroup, ...]
    is_final: bool
    predictions: Predictions | None = None
    sweep: BudgetSweep | None = None
    measured_budgets: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def layer_groups(self) -> tuple[UnitGroup, ...]:
        """The groups within layers, once units were selected."""
        return tuple(group for group in self.groups if not group.is_branch and group.kept is not None)

    @property
    def branch_groups(self) -> tuple[UnitGroup, ...]:
        """The residual branches, once units were selected."""
        return tuple(group for group in self.groups if group.is_branch and group.kept is not None)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The networks of `results.json`, the teacher first."""
        rows = (self.results or {}).get("rows", [])
        return sorted(rows, key=lambda row: row.get("name") != "teacher")

    def row(self, name: str) -> dict[str, Any]:
        """The network of that name in `results.json`, or {}."""
        return next((row for row in self.rows if row.get("name") == name), {})

    def budget_shares(self) -> dict[str, list[float]]:
        """Budgets on MACs and parameters as shares of the teacher's: {"macs": [0.5]}, several in falling order."""
        budgets = [(self.results or {}).get("budget") or self.config.get("budget") or {}]
        if self.sweep is not None:
            budgets = [student["budget"] for student in self.sweep.students if isinstance(student.get("budget"), dict)]
        shares: dict[str, list[float]] = {}
        for name in ("macs", "params"):
            values = {budget[name] for budget in budgets if budget.get(name) is not None}
            whole = (self.topology or {}).get(name)
            known = [value if value <= 1 else value / whole for value in values if value <= 1 or whole]
            if known:
                shares[name] = sorted(known, reverse=True)
        return shares


def read_run(directory: Path) -> RunRecord:
    """Reads the run in `directory`.

    Raises:
      ValueError: in one line, if the directory is not a run (names what is missing) or a file is damaged.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a run: there is no such directory")
    config = read_optional_json(directory / "config.json")
    if config is None:
        raise ValueError(f"{directory} is not a run: it has no config.json; give the directory that a run has written")
    search = directory / "search"
    topology, selection = read_optional_json(search / "topology.json"), read_optional_json(search / "selection.json")
    history = _read_history(search / "history.npz")
    budget_stages = sorted(
        path.name for path in directory.glob("*-*") if path.name.partition("-")[0] in ("at", "uniform", "magnitude")
    )
    return RunRecord(
        directory=directory,
        config=config,
        environment=read_optional_json(directory / "environment.json"),
        results=read_rows(directory / "results.json", "rows"),
        topology=topology,
        selection=selection,
        architecture=read_optional_json(search / "architecture.json"),
        history=history,
        metrics={stage: _read_metrics(directory / stage / "metrics.jsonl") for stage in (*STAGES, *budget_stages)},
        groups=make_groups(search / "topology.json", topology, selection, history),
        is_final=selection is not None,
        predictions=read_predictions(directory),
        sweep=_read_sweep(directory),
        measured_budgets={
            path.parent.name: read_sealed(path)
            for path in sorted(directory.glob("*/measured.json"), reverse=True)
            if path.parent.name == "retrain" or path.parent.name.startswith("at-")
        },
    )


def read_search_groups(search: Path) -> tuple[UnitGroup, ...]:
    """The groups of a search's directory without their gates, or () if it has no topology."""
    topology, selection = (read_optional_json(search / f"{name}.json") for name in ("topology", "selection"))
    return make_groups(search / "topology.json", topology, selection, None)


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no such file."""
    return read_json_object(path) if path.is_file() else None


def read_rows(path: Path, key: str) -> dict[str, Any] | None:
    """The JSON object in a file, with a list of objects under `key`; None if there is no such file."""
    record = read_optional_json(path)
    if record is not None and not all(isinstance(row, dict) for row in record.get(key, [None])):
        raise ValueError(f"{path} is damaged: {key!r} must be a list of objects, not {record.get(key)!r:.80}")
    return record


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file.

    Damaged lines are skipped with a warning, because nothing else records the curves of a finished stage; a last line
    that a kill cut short is skipped silently.
    """
    if not path.is_file():
        return []
    rows, lines = [], path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            if number < len(lines):
                log.warning("%s: line %d is damaged and was skipped: %s", path, number, error)
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int | float)]


def _read_history(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    history = read_arrays(path)
    lengths = {name: len(array) for name, array in history.items()}
    if "steps" not in history or len(set(lengths.values())) != 1:
        raise ValueError(f"{path} is damaged: it needs 'steps' and as many rows in every array, not {lengths}")
    return {**history, "steps": history["steps"].astype(int)} if len(history["steps"]) else None


def _read_sweep(directory: Path) -> BudgetSweep | None:
    path = directory / "front.json"
    record = read_rows(path, "points")
    if record is None:
        return None
    teacher, students, baselines = record.get("teacher"), record["points"], record.get("baselines") or []
    if not isinstance(teacher, dict) or not isinstance(baselines, list):
        raise ValueError(f"{path} is damaged: 'teacher' must be an object and 'baselines' a list")
    for row in (teacher, *students, *baselines):
        numbers = [row.get(key) for key in _MEASURES]
        if not all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in numbers):
            raise ValueError(f"{path} is damaged: accuracy and costs of {row.get('name')!r} must be numbers")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in baselines:
        by_method.setdefault(str(row.get("method", row.get("name", "?"))), []).append(row)
    names = [str(row.get("name")) for row in students]
    return BudgetSweep(
        teacher=teacher,
        students=_by_cost(students),
        baselines={method: _by_cost(rows) for method, rows in by_method.items()},
        kept_units={name: kept for name in names if (kept := _kept_units(directory, name))},
    )


def _by_cost(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(sorted(rows, key=lambda row: -(row.get("macs") or 0)))


def _kept_units(directory: Path, student: str) -> dict[str, int]:
    if Path(student).name != student:
        return {}
    selection = read_optional_json(directory / "search" / student / "selection.json") or {}
    kept = selection.get("kept")
    return {group: len(units) for group, units in kept.items()} if isinstance(kept, dict) else {}
