"""The table of a comparison as JSON, Markdown and CSV: mean and spread over the seeds, differences paired by seed.

A difference is between the searched student and the row's student with the same seed; both saw the same batches. For n
differences with mean d and sample standard deviation s, the confidence interval is d ± t s/√n (Student's t with n − 1
degrees of freedom). A single seed has no interval.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

from kdsearch_jax.pruning import budgets
from kdsearch_jax.pruning.settings import BOUNDS, BudgetConfig
from kdsearch_jax.runs import measurement
from kdsearch_jax.runs.comparison import external
from kdsearch_jax.runs.comparison.make_rows import comparison_scores, read_results, row_setup
from kdsearch_jax.runs.comparison.rows import ROWS
from kdsearch_jax.runs.setup import RunSetup, resolve_limits
from kdsearch_jax.storage.files import available_cores, read_sealed, write_json, write_sealed, write_text
from kdsearch_jax.tracing.messages import format_distinct

LEVEL = 0.95
MEASURED = ("accuracy", "agreement", "kl")
COSTS = ("macs", "params", "bytes", "ms_per_image")
BATCH = 128  # images per timed call


def collect(setup: RunSetup, budget: BudgetConfig, match: str, *, latency: bool = True) -> dict[str, Any]:
    """The content of `comparison.json`, from all finished rows in the comparison's directory."""
    results = read_results(setup.directory)
    times = _latency(setup, results, budget) if latency else {}
    experiment, dataset = setup.experiment, setup.dataset
    rows = [_row(name, results[name], times) for name in results]
    _note_unused_budget(setup, budget, rows)
    seeds = sorted({seed for row in rows for seed in row.get("seeds", ())})
    return {
        "name": experiment.name,
        "dataset": dataset.name,
        "split": "test",
        "examples": len(dataset.test),
        "budget": dataclasses.asdict(budget),
        "match": match,
        "seeds": seeds,
        "steps": experiment.search.steps + experiment.retrain.steps,
        "search_steps": experiment.search.steps,
        "level": LEVEL,
        "command": f"python -m kdsearch_jax.compare {shlex.join(sys.argv[1:])}",
        "hardware": hardware(),
        "seconds": round(sum(sum(row.get("seconds", ())) for row in rows), 1),
        "teacher": {**_teacher(setup), "ms_per_image": times.get("teacher")},
        "rows": rows,
        "differences": differences(rows),
    }


def _row(name: str, by_seed: Mapping[int, dict[str, Any]], times: Mapping[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, **_about_row(name, by_seed)}
    done = {seed: result for seed, result in by_seed.items() if "why" not in result}
    why = {str(seed): result["why"] for seed, result in by_seed.items() if "why" in result}
    if not done:
        return {**row, "why": next(iter(why.values()))}
    row["seeds"] = list(done)
    for key in (*MEASURED, "macs", "params", "bytes", "seconds"):
        row[key] = [result[key] for result in done.values()]
    row["ms_per_image"] = [times.get(f"seed-{seed}/{name}") for seed in done]
    row["steps"] = next(iter(done.values()))["steps"]
    row["made_by"] = [result.get("made_by") for result in done.values()]
    return {**row, **({"failed": why} if why else {})}


def _about_row(name: str, by_seed: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """{"label"}; of an external student also its origin, and a note with it."""
    if name in ROWS:
        return {"label": ROWS[name].label}
    result = next(iter(by_seed.values()))
    origin = result[external.KEY]
    note = f"made elsewhere, read from {origin['source']}, SHA-256 {origin['digest']}"
    return {"label": result["label"], external.KEY: origin, "note": note}


def _note_unused_budget(setup: RunSetup, budget: BudgetConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Adds a note to rows whose students stay well below the budget."""
    experiment = dataclasses.replace(setup.experiment, budget=budget)
    limits = resolve_limits(experiment, setup.trace_teacher())[0]
    bounds = {name: value for name in ("macs", "params") if (value := getattr(limits, name))}
    for row in rows:
        if "why" not in row and bounds:
            share = min(max(row[name][i] / bound for name, bound in bounds.items()) for i in range(len(row["seeds"])))
            if share < budgets.FLOOR:
                percent = format_distinct(100 * share, 100 * budgets.FLOOR, digits=1)[0]
                closest = "" if external.KEY in row else ", the closest that this row can get"
                note = f"costs {percent}% of the budget{closest}"
                row["note"] = "; ".join(filter(None, (note, row.get("note"))))


def _teacher(setup: RunSetup) -> dict[str, Any]:
    """Accuracy and cost of the teacher, measured once."""
    path = setup.directory / "teacher" / "result.json"
    if not path.is_file():
        teacher = setup.load(setup.teacher_directory)
        write_sealed(path, {"accuracy": comparison_scores(setup, teacher)["accuracy"], **teacher.costs})
    return read_sealed(path)


def _latency(setup: RunSetup, results: Mapping[str, Mapping[int, Any]], budget: BudgetConfig) -> dict[str, float]:
    """{"teacher" or "seed-S/ROW": milliseconds per image}; measured again if the set of students has changed."""
    path = setup.directory / "latency.json"
    places = {"teacher": setup.teacher_directory}
    for name, by_seed in results.items():
        for seed, result in by_seed.items():
            if "why" not in result:
                places[f"seed-{seed}/{name}"] = row_setup(setup, name, seed, budget).directory / "retrain" / "network"
    if path.is_file() and (known := read_sealed(path)).keys() == places.keys():
        return known
    networks = {key: setup.load(place) for key, place in places.items()}
    pairs = {key: (n.module, n.variables) for key, n in networks.items()}
    times = measurement.measure_latency(pairs, min(BATCH, len(setup.dataset.test)), setup.objective.call)
    medians = {key: times[key][0] for key in networks}
    write_sealed(path, medians)
    return medians


def differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy of the searched student minus that of each other row, paired by common seeds."""
    whole = {row["name"]: dict(zip(row["seeds"], row["accuracy"], strict=True)) for row in rows if "why" not in row}
    ours = whole.pop("searched", {})
    paired = []
    for name, theirs in whole.items():
        seeds = [seed for seed in ours if seed in theirs]
        if seeds:
            values = [ours[seed] - theirs[seed] for seed in seeds]
            paired.append({"name": name, "metric": "accuracy", "seeds": seeds, "each": values, **interval(values)})
    return paired


def interval(values: Sequence[float], level: float = LEVEL) -> dict[str, float | None]:
    """{"mean", "std", "low", "high", "level"} of a sample; all but the mean and level are None for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return {"mean": mean, "std": None, "low": None, "high": None, "level": level}
    std = statistics.stdev(values)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * std / np.sqrt(n)
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half, "level": level}


def hardware() -> str:
    """A short description of devices, CPU cores and JAX's version."""
    kinds = [device.device_kind for device in jax.devices()]
    devices = f"{len(kinds)} × {kinds[0]}" if jax.default_backend() != "cpu" else "no accelerator"
    return f"{devices}, {available_cores()} CPU cores, jax {jax.__version__}"


# --- files ----------------------------------------------------------------------------------------------------------


def write(directory: Path, comparison: dict[str, Any]) -> None:
    """Writes comparison.json, comparison.md and comparison.csv."""
    write_json(directory / "comparison.json", comparison)
    for name, text in (("comparison.md", markdown(comparison)), ("comparison.csv", as_csv(comparison))):
        write_text(directory / name, text)


def as_csv(comparison: Mapping[str, Any]) -> str:
    """A line for each student: row, seed, metrics, costs and steps."""
    keys = (*MEASURED, *COSTS, "seconds")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("row", "seed", *keys, "steps"))
    for row in comparison["rows"]:
        for i, seed in enumerate(row.get("seeds", ())):
            writer.writerow(
                (row["name"], seed, *("" if (v := row[key][i]) is None else v for key in keys), row["steps"])
            )
    return text.getvalue()


def markdown(comparison: Mapping[str, Any]) -> str:
    """The table, best row first, with the command that reproduces it."""
    teacher, level = comparison["teacher"], f"{comparison['level']:.0%}"
    head = ("", "accuracy, %", f"searched better by, points ({level} interval)", "agrees with teacher, %", "KL",
            "MACs", "parameters", "kB", "ms/image (× as fast as the teacher)")  # fmt: skip
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    cost = (f"{teacher['macs']:,}", f"{teacher['params']:,}", f"{teacher['bytes'] / 1e3:,.0f}")
    lines.append(
        ("teacher", f"{100 * teacher['accuracy']:.2f}", "", "", "", *cost, _time([teacher["ms_per_image"]], None))
    )
    by_name = {each["name"]: each for each in comparison["differences"]}
    finished = [row for row in comparison["rows"] if "why" not in row]
    notes = []
    for row in sorted(finished, key=lambda row: -statistics.fmean(row["accuracy"])):
        label = f"**{row['label']}**" if row["name"] == "searched" else row["label"]
        if "note" in row or len(row["seeds"]) < len(comparison["seeds"]):
            seeds = "" if row["seeds"] == comparison["seeds"] else f"seeds {' '.join(map(str, row['seeds']))} only"
            notes.append(f"{row['label']}: {'; '.join(filter(None, (row.get('note', ''), seeds)))}")
            label += f" [{len(notes)}]"
        lines.append(
            (label, _spread(row["accuracy"], 100, 2), _difference(by_name.get(row["name"])),
             _spread(row["agreement"], 100, 2), _spread(row["kl"], 1, 3), _mean(row["macs"]), _mean(row["params"]),
             f"{statistics.fmean(row['bytes']) / 1e3:,.0f}", _time(row["ms_per_image"], teacher["ms_per_image"]))
        )  # fmt: skip
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    absent = [f"{row['label']}: not made: {row['why']}" for row in comparison["rows"] if "why" in row]
    footnotes = [f"[{i}] {note}" for i, note in enumerate(notes, 1)] + absent + _versions(finished)
    return f"{table}\n\n{_about(comparison)}\n" + "".join(f"\n{line}\n" for line in footnotes)


def _versions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line if the rows were not all made by the same versions of the code, as far as they say."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        for version in dict.fromkeys(row.get("made_by") or ()):
            if version is not None:
                labels.setdefault(version, []).append(row["label"])
    if len(labels) < 2:
        return []
    return ["made by different versions: " + "; ".join(f"{', '.join(names)} by {v}" for v, names in labels.items())]


def _about(comparison: Mapping[str, Any]) -> str:
    budget = {name: value for name in BOUNDS if (value := comparison["budget"].get(name)) is not None}
    bounds = ", ".join(f"{name} {value:,g}" if value <= 1 else f"{name} {value:,.0f}" for name, value in budget.items())
    seeds = " ".join(map(str, comparison["seeds"]))
    minutes = comparison["seconds"] / 60
    examples = f"{comparison['dataset']}, {comparison['examples']:,} images of the {comparison['split']} split"
    spread = f"mean ± standard deviation over seeds {seeds}, differences paired by seed"
    steps = f"Each student: {comparison['steps']:,} updates, including those of the search"
    effort = f"{comparison['hardware']}; {minutes:,.1f} minutes in total."
    return f"{examples}; {spread}. {steps}. Budget: {bounds}.\n\n    {comparison['command']}\n\n{effort}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):,.0f}"


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    mean = f"{100 * difference['mean']:+.2f}"
    if difference["low"] is None:
        return mean
    return f"{mean} ({100 * difference['low']:+.2f} to {100 * difference['high']:+.2f})"


def _time(values: Sequence[float | None], teacher: float | None) -> str:
    """The mean of the measured times, and the speed-up over the teacher."""
    known = [value for value in values if value]
    if not known:
        return "–"
    mean = statistics.fmean(known)
    return f"{mean:.3f} ({teacher / mean:.2f}×)" if teacher else f"{mean:.3f}"
