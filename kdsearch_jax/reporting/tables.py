"""Tables of a report as data: header and cells. The template `macros.html` turns them into HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdsearch_jax.reporting.formatting import (
    accuracy,
    amount,
    budget_label,
    file_size,
    milliseconds,
    network_label,
    number_ranges,
    percent,
    points,
    significant,
    thousands,
    time_per_example,
)
from kdsearch_jax.reporting.intervals import times_differ
from kdsearch_jax.reporting.predictions import Predictions, class_accuracy, most_common_errors, outcome_counts
from kdsearch_jax.reporting.result_figures import stage_label
from kdsearch_jax.reporting.run_record import RunRecord
from kdsearch_jax.reporting.unit_groups import PruneSteps, UnitGroup

COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "macs": ("MACs", amount),
    "params": ("Parameters", amount),
    "bytes": ("Weights", file_size),
    "ms_per_image": ("Time per example", milliseconds),
    "memory": ("Memory", file_size),
}
MAX_LISTED_UNITS = 5000  # units whose pruning steps are listed one by one
MAX_CLASS_ROWS = 20
_MAX_COLUMNS = 4  # networks that fit as columns; more become rows
_BUILT_IN = {
    "name", "accuracy", "accuracy_top5", "agreement", "kl", "loss", "distance", "ms_low", "ms_high", "ms_batch",
    "steps", "search_steps", "budget", "method", "path", *COSTS,
}  # fmt: skip


class Cell(NamedTuple):
    """A cell of a table.

    Args:
      text: what it says; None if the value was not measured, "" if there is none.
      note: a second line in small print.
      bar: a share in [0, 1] to draw as a bar.
    """

    text: str | None
    note: str = ""
    bar: float | None = None


class ReportTable(NamedTuple):
    """A table; the first cell of every row is its heading."""

    caption: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    is_numeric: bool = True


def _format(value: Any, text: Callable[[Any], str]) -> Cell:
    return Cell(None if value is None else text(value))


def _cells(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


# --- results and costs ------------------------------------------------------------------------------------------------


def results_table(run: RunRecord) -> ReportTable:
    """What was measured of every network, except for its costs."""
    teacher = run.row("teacher")
    lines: list[tuple[Cell, Callable[[dict[str, Any]], Cell]]] = [
        (Cell("Accuracy", "points vs teacher"), lambda row: _accuracy_cell(row, teacher, "accuracy")),
        (Cell("Top-5 accuracy", "points vs teacher"), lambda row: _accuracy_cell(row, teacher, "accuracy_top5")),
        (Cell("Agreement with teacher"), lambda row: _format(row.get("agreement"), accuracy)),
        (Cell("KL from teacher", "nats"), lambda row: _format(row.get("kl"), lambda v: f"{v:.3g}")),
        (Cell("Distance from teacher"), lambda row: _format(row.get("distance"), lambda v: f"{v:.3g}")),
    ]
    own_metrics = [name for name in dict.fromkeys(key for row in run.rows for key in row) if name not in _BUILT_IN]
    lines += [(Cell(name), lambda row, name=name: _format(row.get(name), significant)) for name in own_metrics]
    lines.append((Cell("Training steps"), lambda row: _format(row.get("steps"), thousands)))
    return _by_network("Teacher, student and baselines", run.rows, lines)


def _accuracy_cell(row: Mapping[str, Any], teacher: Mapping[str, Any], key: str) -> Cell:
    if row.get(key) is None:
        return Cell(None)
    has_difference = row is not teacher and teacher.get(key) is not None
    return Cell(accuracy(row[key]), points(row[key] - teacher[key]) if has_difference else "")


def cost_table(run: RunRecord) -> ReportTable:
    """What every network costs, next to its share of the teacher's costs."""
    teacher = run.row("teacher")
    lines = [(cost_header(key), lambda row, key=key: cost_cell(row, teacher, key)) for key in COSTS]
    return _by_network("Costs", run.rows, lines)


def cost_header(key: str) -> Cell:
    """The heading of a cost."""
    return Cell(COSTS[key][0], "% of teacher")


def cost_text(key: str, row: Mapping[str, Any]) -> str:
    """A cost that was measured, with its unit."""
    return time_per_example(row) if key == "ms_per_image" else COSTS[key][1](row[key])


def cost_cell(row: Mapping[str, Any], teacher: Mapping[str, Any], key: str) -> Cell:
    """A cost with its share of the teacher's as text and bar, unless two times are too noisy to compare."""
    value = row.get(key)
    if value is None:
        return Cell(None)
    text = cost_text(key, row)
    if teacher.get(key) in (None, 0):
        return Cell(text)
    if key == "ms_per_image" and row is not teacher and not times_differ(row, teacher):
        return Cell(text, "no clear difference")
    share = value / teacher[key]
    return Cell(text, "" if row is teacher else percent(share), min(share, 1.0))


def _by_network(
    caption: str, rows: Sequence[dict[str, Any]], lines: Sequence[tuple[Cell, Callable[[dict[str, Any]], Cell]]]
) -> ReportTable:
    """A column per network, or a row each if there are many; measures that no network has are left out."""
    table = [[heading, *(cell(row) for row in rows)] for heading, cell in lines]
    known = [line for line in table if any(cell.text is not None for cell in line[1:])]
    names = [Cell(network_label(str(row.get("name", "?")))) for row in rows]
    if len(rows) <= _MAX_COLUMNS:
        return ReportTable(caption, [Cell("Measure"), *names], known)
    transposed = [[name, *(line[i + 1] for line in known)] for i, name in enumerate(names)]
    return ReportTable(caption, [Cell("Network"), *(line[0] for line in known)], transposed)


def sweep_table(run: RunRecord) -> ReportTable:
    """Accuracy and costs of the teacher and of every student of several budgets."""
    assert run.sweep is not None
    teacher = run.sweep.teacher
    networks = [teacher, *run.sweep.students, *(row for rows in run.sweep.baselines.values() for row in rows)]
    rows = [
        [
            Cell("Teacher" if row is teacher else network_label(str(row.get("name", "?")))),
            Cell(budget_label(row.get("budget")) or ""),
            _format(row.get("accuracy"), accuracy),
            *(cost_cell(row, teacher, key) for key in COSTS),
        ]
        for row in networks
    ]
    header = [Cell("Network"), Cell("Budget"), Cell("Accuracy"), *map(cost_header, COSTS)]
    return _drop_unmeasured(ReportTable("Accuracy and costs at each budget", header, rows))


def _drop_unmeasured(table: ReportTable) -> ReportTable:
    """The table without the columns in which nothing was measured."""
    known = [i for i in range(len(table.header)) if any(row[i].text is not None for row in table.rows)]
    return table._replace(header=[table.header[i] for i in known], rows=[[row[i] for i in known] for row in table.rows])


# --- architecture and search ------------------------------------------------------------------------------------------


def architecture_table(run: RunRecord) -> ReportTable:
    """Units kept of every group; with several budgets, also by the other students."""
    others = {} if run.sweep is None else run.sweep.kept_units
    rows = [
        _cells(
            group.name, group.kind, f"{group.kept_count}", f"{group.size}",
            "" if group.is_branch else f"{100 * group.macs_share:.1f}%",
            *(f"{kept.get(group.name, group.size)}" for kept in others.values()),
        )
        for group in run.groups
        if group.kept is not None
    ]  # fmt: skip
    header = _cells("Group", "Kind", "Kept", "Teacher", "Teacher’s MACs", *map(network_label, others))
    return ReportTable("Units kept, by group", header, rows)


def pruning_table(run: RunRecord, groups: Sequence[UnitGroup]) -> ReportTable:
    """The first and the last step at which units of every group were pruned."""
    rows = []
    for group in groups:
        steps = PruneSteps.of(group, run.history)
        ends = [f"step {steps.pruned[i]}" for i in (0, -1)] if steps is not None and len(steps.pruned) else ["", ""]
        rows.append(_cells(group.name, f"{group.kept_count}", f"{group.size - group.kept_count}", *ends))
    header = _cells("Group", "Kept", "Pruned", "First pruned", "Last pruned")
    return ReportTable("First and last pruning step, by group", header, rows)


def pruned_units_table(run: RunRecord, groups: Sequence[UnitGroup]) -> ReportTable | None:
    """Every pruned unit with its step; None if there are more than `MAX_LISTED_UNITS` units."""
    if sum(group.size for group in groups) > MAX_LISTED_UNITS:
        return None
    rows = []
    for group in groups:
        if (steps := PruneSteps.of(group, run.history)) is None:
            continue
        rows += [_cells(group.name, f"step {step}", number_ranges(units)) for step, units in steps.units_by_step()]
        if steps.at_end.any():
            rows.append(_cells(group.name, "the end", number_ranges(steps.at_end.nonzero()[0].tolist())))
    caption = "Pruned units by step; units are numbered from 0 as in the teacher"
    return ReportTable(caption, _cells("Group", "Pruned at", "Units"), rows, is_numeric=False)


def final_metrics_table(run: RunRecord) -> ReportTable:
    """The last logged values of every training stage."""
    rows = []
    for stage, logged in run.metrics.items():
        if logged and stage != "teacher":
            loss, share = _last(logged, "loss"), _last(logged, "validation_accuracy", "accuracy")
            rows.append(
                [Cell(stage_label(stage)), Cell(f"{_last(logged, 'step'):,}"), _format(loss, significant),
                 _format(share, accuracy)]
            )  # fmt: skip
    return ReportTable("Last values of each stage", _cells("Stage", "Steps", "Loss", "Accuracy"), rows)


def _last(rows: Sequence[Mapping[str, Any]], *keys: str) -> Any:
    return next((row[key] for key in keys for row in reversed(rows) if row.get(key) is not None), None)


# --- predictions ------------------------------------------------------------------------------------------------------


def outcome_table(predictions: Predictions) -> ReportTable:
    """How many examples both networks, one of them, or neither get right."""
    counts = outcome_counts(predictions)
    total = int(counts.sum())
    rows = [
        [Cell(f"Teacher {outcome}"), *(Cell(f"{n:,}", accuracy(n / total)) for n in line)]
        for outcome, line in zip(("correct", "wrong"), counts, strict=True)
    ]
    return ReportTable("Examples by outcome", _cells("Outcome", "Student correct", "Student wrong"), rows)


def class_accuracy_table(predictions: Predictions) -> ReportTable:
    """Accuracy of each class; with many classes, only those that lost and gained most."""
    teacher, student = (class_accuracy(predictions, name) for name in ("teacher", predictions.student))
    counts = np.bincount(predictions.labels, minlength=len(teacher))
    change = student - teacher
    order = np.argsort(change, kind="stable")  # classes without examples, which have no accuracy, come last
    if len(order) > MAX_CLASS_ROWS:
        ranked = order[: np.count_nonzero(counts)]
        order = dict.fromkeys([*ranked[: MAX_CLASS_ROWS // 2], *ranked[-MAX_CLASS_ROWS // 2 :]])
    rows = [
        [
            Cell(predictions.class_names[i]),
            Cell(f"{counts[i]:,}"),
            *(_format(None if np.isnan(share) else share, lambda v: f"{100 * v:.1f}%")
              for share in (teacher[i], student[i])),
            _format(None if np.isnan(change[i]) else change[i], points),
        ]
        for i in order
    ]  # fmt: skip
    header = _cells("Class", "Examples", "Teacher", "Student", "Difference in points")
    return ReportTable("Accuracy by class", header, rows)


def common_errors_table(predictions: Predictions, limit: int = 10) -> ReportTable:
    """The student's most common errors, and how often the teacher makes the same."""
    rows = []
    for label, prediction, count in most_common_errors(predictions, predictions.student, limit):
        of_class = predictions.labels == label
        teacher = int((predictions.predicted["teacher"][of_class] == prediction).sum())
        names = " → ".join(predictions.class_names[i] for i in (label, prediction))
        rows.append(_cells(names, f"{count:,}", f"{teacher:,}", f"{int(of_class.sum()):,}"))
    header = _cells("Label → prediction", "Student", "Teacher", "Examples of the class")
    return ReportTable("The student’s most common errors", header, rows)


# --- the run ----------------------------------------------------------------------------------------------------------


def frozen_table(reason: str, frozen: Sequence[Mapping[str, Any]]) -> ReportTable:
    """The parameter axes that were not pruned for one reason."""
    rows = [
        _cells(
            str(entry.get("name", "?")), "" if entry.get("axis", -1) < 0 else f"{entry['axis']}",
            str(entry.get("size", "?")),
        )
        for entry in frozen
    ]  # fmt: skip
    return ReportTable(f"Not pruned: {reason}", _cells("Parameter", "Axis", "Size"), rows)


def settings_table(caption: str, record: Mapping[str, Any]) -> ReportTable:
    """Names and values, nested ones by their path."""
    rows = [_cells(key, value) for key, value in _flatten(record)]
    return ReportTable(caption, _cells("Setting", "Value"), rows, is_numeric=False)


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
