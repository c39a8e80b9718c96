"""What a run hands over: students in every form, the table of all networks, and the front of several budgets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from kdsearch_jax import evaluate, export, front
from kdsearch_jax.checkpoint import save_network
from kdsearch_jax.config import BudgetConfig
from kdsearch_jax.files import read_sealed
from kdsearch_jax.fitting import write
from kdsearch_jax.given import Loaded
from kdsearch_jax.models import GIVEN
from kdsearch_jax.report import evidence
from kdsearch_jax.road import Road, finished, is_plain
from kdsearch_jax.spread import times

log = logging.getLogger(__name__)


def deliver(road: Road, name: str, student: str) -> None:
    """RUN/student: the network of RUN/name, `.safetensors` and StableHLO, each proved equal in a fresh process."""
    directory = road.directory / student
    if export.is_whole(directory):
        return
    found = road.load(road.directory / name / "network")
    if not (directory / "network.json").is_file():
        save_network(directory, found.architecture, found.variables, found.info)
    if jax.process_index() == 0:
        log.info("exporting to %s", directory)
        base = road.base if found.architecture.model.startswith(GIVEN) else None
        try:
            export.export(directory, directory, module=base)
        except export.CannotExportError as error:
            log.warning("%s: done so", error)
            export.export(directory, directory, ("safetensors",), module=base)


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


def entries(road: Road) -> tuple[Entry, ...]:
    """All students of a run: the searched ones first, then the baselines, each by falling budget."""
    experiment = road.experiment
    points = front.points(experiment)
    if experiment.budgets and finished(
        road.directory / "retrain"
    ):  # a search for one budget, to which others were added
        points = (*front.points(dataclasses.replace(experiment, budgets=())), *points)
    found = [
        Entry(
            point.name if point.tail else "student", "searched", point.name, point.budget, point.student,
            _searched(road, point),
        )
        for point in points
    ]  # fmt: skip
    for name in experiment.baselines:
        own = [f"{name}{point.tail}" for point in points]
        found += [Entry(o, name, o, point.budget) for o, point in zip(own, points, strict=True)]
    return tuple(found)


def _searched(road: Road, point: front.Point) -> int:
    selection = read_sealed(point.cut(road.search) / "selection.json")
    return selection.get("step", road.experiment.search.steps)


def compare(road: Road) -> dict[str, Any]:
    """The table teacher / students / baselines on the test split, each example once; writes results.json.

    With several budgets, front.json as well.
    """
    experiment, dataset, students = road.experiment, road.dataset, entries(road)
    places = {"teacher": road.teacher} | {entry.name: road.directory / entry.path / "network" for entry in students}
    networks = {name: road.load(path) for name, path in places.items()}
    scores = _scores(road, networks, next(e.name for e in reversed(students) if e.method == "searched"))
    batch = min(64, len(dataset.test))
    latencies = evaluate.measure_latency(
        {k: (n.module, n.variables) for k, n in networks.items()}, (), batch, call=road.task.call
    )
    memory = evaluate.measure_memory({k: (n.module, n.variables) for k, n in networks.items()}, batch, road.task.call)
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
        **({} if is_plain(road.task, dataset) else {"compared": road.task.describe()}),
    }
    results = {**shared, "budget": dataclasses.asdict(experiment.budget), "rows": list(rows.values())}
    if experiment.budgets:
        results["budgets"] = list(experiment.budgets)
        write(road.directory / "front.json", {**shared, **_front(rows, students)})
    write(road.directory / "results.json", results)
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


def _scores(road: Road, networks: Mapping[str, Loaded], student: str) -> dict[str, dict[str, float]]:
    """What each network does on the test split, compared with the teacher; the student's differences to look at."""
    dataset, size, teacher = road.dataset, road.experiment.run.eval_batch_size, networks["teacher"]
    if not is_plain(road.task, dataset):
        found = {}
        for name, n in networks.items():
            other = None if name == "teacher" else (teacher.module, teacher.variables)
            measure = evaluate.measurer(road.task, n.module, dataset.test, dataset, batch_size=size, teacher=other)
            found[name] = measure(n.variables)
        return found
    logits = {
        name: evaluate.predict(
            n.module, n.variables, dataset.test.images, dataset.mean, dataset.std, size, n.architecture.call
        )
        for name, n in networks.items()
    }
    if jax.process_index() == 0:
        test = dataset.test
        evidence.write(road.directory, "test", logits, test.labels, test.images, dataset.class_names, student=student)
    return {
        name: evaluate.score(values, dataset.test.labels, None if name == "teacher" else logits["teacher"])
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
