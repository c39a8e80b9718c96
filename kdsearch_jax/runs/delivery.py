"""What a run hands over: students in every form, the table of all networks, and the front of several budgets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from kdsearch_jax.adapters.registry import OBJECT_PREFIX
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting import evidence
from kdsearch_jax.reporting.intervals import times
from kdsearch_jax.runs import budget_points, evaluation
from kdsearch_jax.runs.fit_stage import write
from kdsearch_jax.runs.setup import RunSetup, finished, is_plain
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.files import read_sealed
from kdsearch_jax.storage.networks import save_network

log = logging.getLogger(__name__)


def deliver(setup: RunSetup, name: str, student: str) -> None:
    """RUN/student: the network of RUN/name, `.safetensors` and StableHLO, each proved equal in a fresh process."""
    directory = setup.directory / student
    if export_formats.is_whole(directory):
        return
    found = setup.load(setup.directory / name / "network")
    if not (directory / "network.json").is_file():
        save_network(directory, found.architecture, found.variables, found.info)
    if jax.process_index() == 0:
        log.info("exporting to %s", directory)
        base = setup.base if found.architecture.model.startswith(OBJECT_PREFIX) else None
        try:
            export_formats.export(directory, directory, module=base)
        except export_formats.CannotExportError as error:
            log.warning("%s: done so", error)
            export_formats.export(directory, directory, ("safetensors",), module=base)


@dataclass(frozen=True)
class Entry:
    """A student of the table.

    method: "searched" or a baseline's name; path: of its directory in the run's; delivered: of the directory that users
    get, if any; searched: steps of the search that led to it.
    """

    name: str
    method: str
    path: str
    budget: BudgetConfig
    delivered: str = ""
    searched: int = 0


def entries(setup: RunSetup) -> tuple[Entry, ...]:
    """All students of a run: the searched ones first, then the baselines, each by falling budget."""
    experiment = setup.experiment
    points = budget_points.points(experiment)
    if experiment.budgets and finished(
        setup.directory / "retrain"
    ):  # a search for one budget, to which others were added
        points = (*budget_points.points(dataclasses.replace(experiment, budgets=())), *points)
    found = [
        Entry(
            point.name if point.tail else "student", "searched", point.name, point.budget, point.student,
            _searched(setup, point),
        )
        for point in points
    ]  # fmt: skip
    for name in experiment.baselines:
        own = [f"{name}{point.tail}" for point in points]
        found += [Entry(o, name, o, point.budget) for o, point in zip(own, points, strict=True)]
    return tuple(found)


def _searched(setup: RunSetup, point: budget_points.Point) -> int:
    selection = read_sealed(point.cut(setup.search) / "selection.json")
    return selection.get("step", setup.experiment.search.steps)


def compare(setup: RunSetup) -> dict[str, Any]:
    """The table teacher / students / baselines on the test split, each example once; writes results.json.

    With several budgets, front.json as well.
    """
    experiment, dataset, students = setup.experiment, setup.dataset, entries(setup)
    places = {"teacher": setup.teacher} | {entry.name: setup.directory / entry.path / "network" for entry in students}
    networks = {name: setup.load(path) for name, path in places.items()}
    scores = _scores(setup, networks, next(e.name for e in reversed(students) if e.method == "searched"))
    batch = min(64, len(dataset.test))
    latencies = evaluation.measure_latency(
        {k: (n.module, n.variables) for k, n in networks.items()}, (), batch, call=setup.task.call
    )
    memory = evaluation.measure_memory(
        {k: (n.module, n.variables) for k, n in networks.items()}, batch, setup.task.call
    )
    rows = {}
    for name, network in networks.items():
        cost = {**network.costs, "memory": memory[name]}
        steps = {} if name == "teacher" else {"steps": experiment.search.steps + experiment.retrain.steps}
        time = dict(zip(("ms_per_image", "ms_low", "ms_high"), latencies[name], strict=True))
        rows[name] = {"name": name, **scores[name], **cost, **time, "ms_batch": batch, **steps}
    shared = {
        "dataset": dataset.name,
        "split": "test",
        "examples": len(dataset.test),
        "seed": experiment.run.seed,
        **({} if is_plain(setup.task, dataset) else {"compared": setup.task.describe()}),
    }
    results = {**shared, "budget": dataclasses.asdict(experiment.budget), "rows": list(rows.values())}
    if experiment.budgets:
        results["budgets"] = list(experiment.budgets)
        write(setup.directory / "front.json", {**shared, **_front(rows, students)})
    write(setup.directory / "results.json", results)
    return results


def _front(rows: Mapping[str, dict[str, Any]], students: tuple[Entry, ...]) -> dict[str, Any]:
    """{"teacher": row, "points": rows of searched students, "baselines": rows of the others}, with their budgets."""

    def point(entry: Entry) -> dict[str, Any]:
        own = {"budget": dataclasses.asdict(entry.budget), "method": entry.method}
        if entry.method == "searched":
            own |= {"search_steps": entry.searched, "path": entry.delivered}
        return {**rows[entry.name], **own}

    searched = [point(entry) for entry in students if entry.method == "searched"]
    others = [point(entry) for entry in students if entry.method != "searched"]
    return {"teacher": rows["teacher"], "points": searched, "baselines": others}


def _scores(setup: RunSetup, networks: Mapping[str, LoadedNetwork], student: str) -> dict[str, dict[str, float]]:
    """What each network does on the test split, compared with the teacher; the student's differences to look at."""
    dataset, size, teacher = setup.dataset, setup.experiment.run.eval_batch_size, networks["teacher"]
    if not is_plain(setup.task, dataset):
        found = {}
        for name, n in networks.items():
            other = (teacher.module, teacher.variables)
            measure = evaluation.measurer(
                setup.task, n.module, dataset.test, dataset, batch_size=size, teacher=other, alone=name == "teacher"
            )
            found[name] = measure(n.variables)
        return found
    others = len(dataset.validation)
    logits = {
        name: evaluation.predict(
            n.module,
            n.variables,
            dataset.test.images,
            dataset.mean,
            dataset.std,
            size,
            n.architecture.custom_call,
            others,
        )
        for name, n in networks.items()
    }
    if jax.process_index() == 0:
        test = dataset.test
        evidence.write(setup.directory, "test", logits, test.labels, test.images, dataset.class_names, student=student)
    return {
        name: evaluation.score(values, dataset.test.labels, None if name == "teacher" else logits["teacher"])
        for name, values in logits.items()
    }


def table(results: dict[str, Any]) -> str:
    """The rows of `results.json` as plain text: what was measured, then what it costs; a range where times scatter."""
    rows = results["rows"]
    known = {"loss", "accuracy", "accuracy_top5", "kl", *_COSTS}
    own = [name for name in dict.fromkeys(k for row in rows for k in row) if name not in {*known, *_SHARES, "distance"}]
    shown = [name for name in (*_SHARES, "distance", *own) if any(name in row for row in rows)]
    lines = [("", *(_SHARES.get(name, name) for name in shown), "MACs", "parameters", "size", "ms/example")]
    for row in rows:
        cells = [
            "–" if name not in row else f"{row[name]:.2%}" if name in _SHARES else f"{row[name]:.4g}" for name in shown
        ]
        lines.append(
            (row["name"], *cells, f"{row['macs']:,}", f"{row['params']:,}", f"{row['bytes'] / 1e3:,.0f} kB",
             "–".join(f"{ms:.3f}" for ms in times(row)))
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


_SHARES = {"accuracy": "accuracy", "agreement": "agreement"}
_COSTS = ("name", "macs", "params", "bytes", "memory", "ms_per_image", "ms_low", "ms_high", "ms_batch", "steps")
