"""The results of a run: exported students and the table that compares all networks on the test split."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from kdsearch_jax.adapters.registry import OBJECT_PREFIX
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting.intervals import time_range
from kdsearch_jax.reporting.predictions import write_predictions
from kdsearch_jax.runs import budget_points, measurement
from kdsearch_jax.runs.evaluation import evaluate
from kdsearch_jax.runs.setup import RunSetup, is_finished
from kdsearch_jax.runs.stage_training import write_run_json
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.files import read_sealed
from kdsearch_jax.storage.networks import save_network

log = logging.getLogger(__name__)


def export_student(setup: RunSetup, name: str, student: str) -> None:
    """Writes RUN/student: the network of RUN/name, with safetensors and StableHLO verified in a new process."""
    directory = setup.directory / student
    if export_formats.is_complete_export(directory):
        return
    network = setup.load(setup.directory / name / "network")
    if not (directory / "network.json").is_file():
        save_network(directory, network.architecture, network.variables, network.info)
    if jax.process_index() == 0:
        log.info("exporting to %s", directory)
        base = setup.base_module if network.architecture.model.startswith(OBJECT_PREFIX) else None
        try:
            export_formats.export(directory, directory, module=base)
        except export_formats.CannotExportError as error:
            log.warning("%s: done so", error)
            export_formats.export(directory, directory, ("safetensors",), module=base)


@dataclass(frozen=True)
class StudentRow:
    """A student in the table of results.

    Attributes:
      method: "searched" or the name of a baseline.
      directory: of its retraining, within the run.
      exported: the directory of the exported student within the run, if any.
      search_steps: steps of the search that led to it.
    """

    name: str
    method: str
    directory: str
    budget: BudgetConfig
    exported: str = ""
    search_steps: int = 0


def student_rows(setup: RunSetup) -> tuple[StudentRow, ...]:
    """All students of a run: the searched ones, then the baselines, each by falling budget."""
    experiment = setup.experiment
    points = budget_points.points(experiment)
    if experiment.budgets and is_finished(setup.directory / "retrain"):  # began with one budget; others were added
        points = (*budget_points.points(dataclasses.replace(experiment, budgets=())), *points)
    rows = []
    for point in points:
        selection = read_sealed(point.cut_directory(setup.search_directory) / "selection.json")
        steps = selection.get("step", experiment.search.steps)
        name = point.name if point.suffix else "student"
        rows.append(StudentRow(name, "searched", point.name, point.budget, point.student, steps))
    for method in experiment.baselines:
        names = [f"{method}{point.suffix}" for point in points]
        rows += [StudentRow(name, method, name, point.budget) for name, point in zip(names, points, strict=True)]
    return tuple(rows)


def write_results(setup: RunSetup) -> dict[str, Any]:
    """Evaluates all networks on the test split and writes results.json; with several budgets also front.json."""
    experiment, dataset, students = setup.experiment, setup.dataset, student_rows(setup)
    directories = {"teacher": setup.teacher_directory}
    directories |= {row.name: setup.directory / row.directory / "network" for row in students}
    networks = {name: setup.load(path) for name, path in directories.items()}
    main_student = next(row.name for row in reversed(students) if row.method == "searched")
    scores = _test_scores(setup, networks, main_student)
    pairs = {name: (network.module, network.variables) for name, network in networks.items()}
    batch_size, call = min(64, len(dataset.test)), setup.objective.call
    latency = measurement.measure_latency(pairs, batch_size, call)
    memory = measurement.measure_memory(pairs, batch_size, call)
    rows = {}
    for name, network in networks.items():
        cost = {**network.costs, "memory": memory[name]}
        steps = {} if name == "teacher" else {"steps": experiment.search.steps + experiment.retrain.steps}
        time = dict(zip(("ms_per_image", "ms_low", "ms_high"), latency[name], strict=True))
        rows[name] = {"name": name, **scores[name], **cost, **time, "ms_batch": batch_size, **steps}
    shared = {
        "dataset": dataset.name,
        "split": "test",
        "examples": len(dataset.test),
        "seed": experiment.run.seed,
        **({} if setup.classifies_images else {"compared": setup.objective.describe()}),
    }
    results = {**shared, "budget": dataclasses.asdict(experiment.budget), "rows": list(rows.values())}
    if experiment.budgets:
        results["budgets"] = list(experiment.budgets)
        write_run_json(setup.directory / "front.json", {**shared, **_budget_front(rows, students)})
    write_run_json(setup.directory / "results.json", results)
    return results


def _budget_front(rows: Mapping[str, dict[str, Any]], students: Sequence[StudentRow]) -> dict[str, Any]:
    """The content of front.json: the rows of teacher, searched students ("points") and baselines, with budgets."""

    def with_budget(row: StudentRow) -> dict[str, Any]:
        more = {"budget": dataclasses.asdict(row.budget), "method": row.method}
        if row.method == "searched":
            more |= {"search_steps": row.search_steps, "path": row.exported}
        return {**rows[row.name], **more}

    searched = [with_budget(row) for row in students if row.method == "searched"]
    others = [with_budget(row) for row in students if row.method != "searched"]
    return {"teacher": rows["teacher"], "points": searched, "baselines": others}


def _test_scores(
    setup: RunSetup, networks: Mapping[str, LoadedNetwork], main_student: str
) -> dict[str, dict[str, float]]:
    """The metrics of each network on the test split; stores predictions on images for the report."""
    dataset, keep_logits = setup.dataset, setup.classifies_images
    evaluations = evaluate(
        setup.objective, {name: setup.evaluated(n.module, n.variables) for name, n in networks.items()}, dataset,
        batch_size=setup.experiment.run.eval_batch_size, teacher="teacher", keep_logits=keep_logits,
    )  # fmt: skip
    if keep_logits and jax.process_index() == 0:
        logits = {name: e.logits for name, e in evaluations.items() if e.logits is not None}
        test = dataset.test
        write_predictions(
            setup.directory, "test", logits, test.labels, test.images, dataset.class_names, student=main_student
        )
    left_out = {"distance"} if keep_logits else set()  # tables of classifiers show agreement and KL instead
    return {
        name: {metric: value for metric, value in evaluation.means.items() if metric not in left_out}
        for name, evaluation in evaluations.items()
    }


_PERCENTAGES = ("accuracy", "agreement")
_NO_COLUMN = {
    "name", "loss", "accuracy_top5", "kl", "macs", "params", "bytes", "memory", "ms_per_image", "ms_low", "ms_high",
    "ms_batch", "steps",
}  # fmt: skip


def format_table(results: dict[str, Any]) -> str:
    """The rows of `results.json` as plain text: metrics, then costs; a range where times scatter."""
    rows = results["rows"]
    first = (*_PERCENTAGES, "distance")
    names = [*first, *dict.fromkeys(key for row in rows for key in row if key not in _NO_COLUMN and key not in first)]
    shown = [name for name in names if any(name in row for row in rows)]
    lines = [("", *shown, "MACs", "parameters", "size", "ms/example")]
    for row in rows:
        cells = [
            "–" if name not in row else f"{row[name]:.2%}" if name in _PERCENTAGES else f"{row[name]:.4g}"
            for name in shown
        ]
        lines.append(
            (row["name"], *cells, f"{row['macs']:,}", f"{row['params']:,}", f"{row['bytes'] / 1e3:,.0f} kB",
             "–".join(f"{ms:.3f}" for ms in time_range(row)))
        )  # fmt: skip
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
