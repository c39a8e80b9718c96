"""The data of a run's page, for the template `run.html`. Sentences and headings are the template's."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.image import imsave

from kdsearch_jax import storage
from kdsearch_jax.reporting import tables
from kdsearch_jax.reporting.formatting import (
    accuracy,
    file_size,
    milliseconds,
    network_label,
)
from kdsearch_jax.reporting.intervals import times_differ
from kdsearch_jax.reporting.predictions import MAX_EXAMPLES, Predictions, outcome_counts, paired_difference
from kdsearch_jax.reporting.result_figures import MAX_CONFUSION_CLASSES, teacher_accuracy
from kdsearch_jax.reporting.run_record import RunRecord, read_optional_json
from kdsearch_jax.reporting.search_figures import MAX_PANELS
from kdsearch_jax.reporting.unit_groups import MAX_ROWS, PruneSteps, UnitGroup, kept_by_stage

_BASELINES = ("uniform", "magnitude")
_MIN_DISTANCE = 0.05  # between student and teacher, below which an example is not worth a look
_FIRST_EXAMPLES = 12  # shown without opening anything
_MAIN_VERSIONS = ("kdsearch-jax", "jax", "flax", "python")
_MAX_FROZEN = 200  # parameters listed for one reason
_STUDENT_FILES = {
    "student.safetensors": "weights under flat names, for any framework",
    "student.stablehlo": "the complete network for any batch size; needs JAX but not the model’s code",
    "architecture.json": "the architecture as plain JSON",
}


def page_data(run: RunRecord) -> dict[str, Any]:
    """The variables of `run.html`, except for the figures."""
    return {
        "name": str(run.config.get("name", run.directory.name)),
        "run": run,
        "summary": _summary(run),
        "sweep": _sweep(run),
        "results": _results(run),
        "costs": _costs(run),
        "architecture": _architecture(run),
        "pruning": _pruning(run),
        "training": _training(run),
        "predictions": None if run.predictions is None else _predictions(run.predictions),
        "usage": _usage(run),
        "frozen": None if run.topology is None else _frozen(run.topology),
        "details": details(run.environment, run.config),
    }


def _share(row: Mapping[str, Any], teacher: Mapping[str, Any], key: str) -> float | None:
    """A network's cost relative to the teacher's; None if either is not known."""
    return None if row.get(key) is None or teacher.get(key) in (None, 0) else row[key] / teacher[key]


def _lower_label(name: str) -> str:
    """A network's name within a sentence."""
    return network_label(name).lower() + (" baseline" if name in _BASELINES else "")


# --- results and costs ------------------------------------------------------------------------------------------------


def _summary(run: RunRecord) -> dict[str, Any] | None:
    """The student in a sentence and in tiles; None if it has not been evaluated."""
    teacher, student = run.row("teacher"), run.row("student")
    if not student:
        return None
    share = student.get("accuracy")
    others = {name: run.row(name).get("accuracy") for name in ("teacher", *_BASELINES)}
    return {
        "macs": _share(student, teacher, "macs"),
        "params": _share(student, teacher, "params"),
        "accuracy": share,
        "differences": [
            (_lower_label(name), share - other)
            for name, other in others.items()
            if share is not None and other is not None
        ],
        "tiles": _tiles(teacher, student),
    }


def _tiles(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, student, teacher) for what was measured of both."""
    measures = {"accuracy": ("Accuracy", lambda row: accuracy(row["accuracy"]))}
    measures |= {key: (noun, partial(tables.cost_text, key)) for key, (noun, _) in tables.COSTS.items()}
    return [
        (noun, text(student), text(teacher))
        for key, (noun, text) in measures.items()
        if student.get(key) is not None and teacher.get(key) is not None
    ]


def _sweep(run: RunRecord) -> dict[str, Any] | None:
    if run.sweep is None:
        return None
    shares = [(_share(row, run.sweep.teacher, "macs"), row.get("accuracy")) for row in run.sweep.students]
    return {
        "table": tables.sweep_table(run),
        "points": [(macs, share) for macs, share in shares if macs is not None and share is not None],
        "teacher_accuracy": run.sweep.teacher.get("accuracy"),
        "smallest": str(run.sweep.students[-1].get("name")) if run.sweep.students else None,
    }


def _results(run: RunRecord) -> dict[str, Any] | None:
    if not run.rows:
        return None
    results, share = run.results or {}, run.row("student").get("accuracy")
    count = results.get("examples")
    methods = {str(row.get("name")).partition("-")[0] for row in run.rows}
    return {
        "table": tables.results_table(run),
        "split": results.get("split", "test"),
        "dataset": results.get("dataset", "the data set"),
        "examples": count,
        "seed": results.get("seed"),
        "compared": results.get("compared"),
        "has_kl": any(row.get("kl") is not None for row in run.rows),
        "standard_error": (share * (1 - share) / count) ** 0.5 if count and share is not None else None,
        "methods": methods,
        "has_baseline": not methods.isdisjoint(_BASELINES),
    }


def _costs(run: RunRecord) -> dict[str, Any] | None:
    if not run.rows:
        return None
    teacher, student = run.row("teacher"), run.row("student")
    time = _share(student, teacher, "ms_per_image")
    return {
        "table": tables.cost_table(run),
        "macs": _share(student, teacher, "macs"),
        "time": time if time is not None and times_differ(student, teacher) else None,
        "budgets": [*_counted_budgets(run), *_measured_budgets(run)],
        "batch": next((row["ms_batch"] for row in run.rows if row.get("ms_batch")), None),
        "has_memory": any(row.get("memory") is not None for row in run.rows),
    }


class BudgetCheck(NamedTuple):
    """Whether a student is within a budget; `teacher` and `student` only of measured ones."""

    limit: str
    reached: str
    is_met: bool
    teacher: str = ""
    student: str = ""


def _counted_budgets(run: RunRecord) -> list[BudgetCheck]:
    """Of budgets on MACs and parameters."""
    checks = []
    for key, noun in (("macs", "MACs"), ("params", "parameters")):
        share = _share(run.row("student"), run.row("teacher"), key)
        if share is not None:
            checks += [
                BudgetCheck(
                    f"{100 * budget:.3g}% of the teacher’s {noun}", f"{100 * share:.3g}%", share <= budget * (1 + 1e-9)
                )
                for budget in run.budget_shares().get(key, ())
            ]
    return checks


def _measured_budgets(run: RunRecord) -> list[BudgetCheck]:
    """Of budgets on time and memory, for every trained student."""
    checks = []
    for stage, record in run.measured_budgets.items():
        where = f" on {record['target']}, estimated by the compiler" if "target" in record else ""
        for key, noun, text in (("latency", "time", milliseconds), ("memory", "memory", file_size)):
            if (measured := record.get(key)) is None:
                continue
            limit = measured["budget"] * (measured["teacher"] if measured["budget"] <= 1 else 1)
            checks.append(
                BudgetCheck(
                    f"{text(limit)} of {noun} per call with {record['batch_size']} examples{where}",
                    text(measured["student"]),
                    measured["within"],
                    text(measured["teacher"]),
                    network_label(stage) if stage.startswith("at-") else "",
                )
            )
    return checks


# --- architecture, search and training --------------------------------------------------------------------------------


def _architecture(run: RunRecord) -> dict[str, Any]:
    kept, size = sum(group.kept_count for group in run.layer_groups), sum(group.size for group in run.layer_groups)
    stages = kept_by_stage(run.layer_groups)
    return {
        "kept": kept / size if size else None,
        "stages": (stages[0], stages[-1]) if stages and stages[-1][1] - stages[0][1] > 0.05 else None,
        "branches": len(run.branch_groups),
        "removed_branches": sum(branch.kept_count == 0 for branch in run.branch_groups),
        "kinds": len({group.kind for group in run.layer_groups}),
        "note": (run.selection or {}).get("note"),
        "table": tables.architecture_table(run),
    }


def _pruning(run: RunRecord) -> dict[str, Any]:
    steps = [s for group in run.layer_groups if (s := PruneSteps.of(group, run.history)) is not None]
    pruned = np.sort(np.concatenate([s.pruned for s in steps])) if steps else np.array([])
    groups = [group for group in (*run.layer_groups, *run.branch_groups) if group.gates is not None]
    recorded = [group for group in run.layer_groups if group.gates is not None]
    return {
        "half": int(pruned[(len(pruned) - 1) // 2]) if len(pruned) else None,
        "last": None if run.history is None else int(run.history["steps"][-1]),
        "at_end": sum(_late(group) for group in recorded if group.kept_count),
        "has_empty_groups": any(group.kept_count == 0 for group in recorded),
        "is_deep": len(run.layer_groups) > MAX_ROWS,
        "shares_panel": len(recorded) > MAX_PANELS,
        "table": tables.pruning_table(run, groups),
        "units": tables.pruned_units_table(run, groups),
        "listed_limit": tables.MAX_LISTED_UNITS,
    }


def _late(group: UnitGroup) -> int:
    """Number of units that were removed although their gates were above zero to the end."""
    assert group.gates is not None and group.kept is not None
    return int((group.gates[-1] > 0)[~group.kept].sum())


def _training(run: RunRecord) -> dict[str, Any]:
    macs = (run.history or {}).get("cost_macs")
    return {
        "macs": None if macs is None else float(macs[-1]),
        "budgets": run.budget_shares().get("macs", []),
        "has_teacher": bool(teacher_accuracy(run)),
        "is_searched": bool(run.metrics["search"]),
        "is_retrained": any(
            rows for stage, rows in run.metrics.items() if stage == "retrain" or stage.startswith("at-")
        ),
        "table": tables.final_metrics_table(run),
    }


# --- predictions ------------------------------------------------------------------------------------------------------


def _predictions(predictions: Predictions) -> dict[str, Any]:
    teacher, student = (predictions.predicted[name] for name in ("teacher", predictions.student))
    wrong = ~predictions.correct("teacher") & ~predictions.correct(predictions.student)
    examples = [
        _example(predictions, i)
        for i in range(len(predictions.selected))
        if predictions.distance[i] >= _MIN_DISTANCE or i < 4
    ]
    return {
        "agreement": float((teacher == student).mean()),
        "student": None if predictions.student == "student" else network_label(predictions.student),
        "split": predictions.split,
        "total": predictions.examples,
        "counted": len(predictions.labels),
        "is_sample": predictions.examples > MAX_EXAMPLES,
        "outcomes": tables.outcome_table(predictions),
        "differences": [
            (_lower_label(name), *paired_difference(predictions, name))
            for name in predictions.predicted
            if name != predictions.student and not name.startswith("at-")
        ],
        "both_wrong": int(outcome_counts(predictions)[1, 1]),
        "same_error": int((teacher == student)[wrong].sum()),
        "classes": len(predictions.class_names),
        "has_matrix": len(predictions.class_names) <= MAX_CONFUSION_CLASSES,
        "class_accuracy": tables.class_accuracy_table(predictions),
        "max_class_rows": tables.MAX_CLASS_ROWS,
        "errors": tables.common_errors_table(predictions),
        "examples": examples[:_FIRST_EXAMPLES],
        "more_examples": examples[_FIRST_EXAMPLES:],
    }


def _example(predictions: Predictions, i: int) -> dict[str, Any]:
    """An example with its image and what both networks say of it."""
    names, label = predictions.class_names, predictions.selected_labels[i]
    opinions = []
    for network in ("teacher", "student"):
        top, probabilities = predictions.top_classes[network][i], predictions.top_probabilities[network][i]
        is_correct = bool(top[0] == label)
        second = None
        if not is_correct:
            second = (names[label], float(predictions.label_probability[network][i]))
        elif len(top) > 1 and probabilities[1] >= 0.005:
            second = (names[top[1]], float(probabilities[1]))
        opinions.append(
            {
                "network": network.capitalize(),
                "is_correct": is_correct,
                "top": (names[top[0]], float(probabilities[0])),
                "second": second,
            }
        )
    return {
        "label": names[label],
        "index": int(predictions.selected[i]),
        "distance": float(predictions.distance[i]),
        "image": None if predictions.images is None else _data_url(predictions.images[i]),
        "opinions": opinions,
    }


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    imsave(buffer, np.repeat(image, 3, -1) if image.shape[-1] == 1 else image, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- usage ------------------------------------------------------------------------------------------------------------


def _usage(run: RunRecord) -> dict[str, Any]:
    path = _student_path(run)
    architecture = run.architecture or {}
    call = architecture.get("call")
    shown = storage.display_paths(str(path))
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        shown = str(path.relative_to(Path.cwd()))
    usage = _image_usage(architecture, _training_info(path)) if call is None else _call_usage(call)
    model = str(architecture.get("model", ""))
    is_own_module = model.startswith("given:")  # a module object of the user's
    may_be_nnx = ":" in model  # not one of this package's models, which are Linen modules
    option = ", module=net" if is_own_module else ", trust_code=True" if may_be_nnx else ""
    return {
        **usage,
        "path": shown,
        "load_arguments": repr(shown) + option,
        "exists": path.is_dir(),
        "is_own_module": is_own_module,
        "may_be_nnx": may_be_nnx,
        "other_students": sorted(p.name for p in run.directory.glob("student-*") if p.is_dir() and p != path),
        "files": [
            (name, file_size((path / name).stat().st_size), purpose)
            for name, purpose in _STUDENT_FILES.items()
            if (path / name).is_file()
        ],
    }


def _student_path(run: RunRecord) -> Path:
    """The directory of the student; with several budgets, of the smallest."""
    path = run.directory / "student"
    if path.is_dir() or run.sweep is None or not run.sweep.students:
        return path
    name = str(run.sweep.students[-1].get("name", ""))
    return run.directory / name.replace("at-", "student-", 1) if Path(name).name == name else path


def _training_info(path: Path) -> dict[str, Any]:
    info = ((read_optional_json(path / "network.json") or {}).get("payload") or {}).get("info")
    return info if isinstance(info, dict) else {}


def _image_usage(architecture: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    names = info.get("class_names") or []
    shape = ", ".join(map(str, ("batch", *(architecture.get("input_shape") or ["height", "width", "channels"]))))
    usage = {"arguments": "images", "shape": f"({shape})", "class_names": names if len(names) <= 20 else []}
    if info.get("mean") and info.get("std"):
        scale = info.get("scale") if isinstance(info.get("scale"), int | float) else 255
        mean, std = (", ".join(f"{value:.6g}" for value in info[key]) for key in ("mean", "std"))
        usage |= {"scale": f"{scale:g}", "mean": f"[{mean}]", "std": f"[{std}]"}
    return usage


def _call_usage(call: Mapping[str, Any]) -> dict[str, Any]:
    """For a network that is not called with one batch of images."""
    static = [f"{name}={value!r}" for name, value in call.get("eval", {}).items()]
    return {
        "arguments": ", ".join([*call.get("arguments", []), *static]),
        "inputs": [(name, json.dumps(spec)) for name, spec in call.get("inputs", {}).items()],
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def _frozen(topology: Mapping[str, Any]) -> dict[str, Any]:
    """What was not pruned, by reason, the most frequent first."""
    frozen = topology.get("frozen", [])
    reasons = Counter(entry.get("reason", "no reason given") for entry in frozen)
    tables_by_reason = []
    for reason, count in reasons.most_common():
        entries = [entry for entry in frozen if entry.get("reason", "no reason given") == reason]
        listed = tables.frozen_table(reason, entries[:_MAX_FROZEN])
        tables_by_reason.append((reason, count, listed, max(count - _MAX_FROZEN, 0)))
    unknown = ", ".join(map(str, topology.get("unknown", [])))
    return {"count": len(frozen), "reasons": tables_by_reason, "unknown": unknown}


def details(environment: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Command, environment and settings, for `details.html`."""
    known = {key: value for key, value in (environment or {}).items() if value not in (None, [], {})}
    command = known.pop("command", None)
    if command is not None and not isinstance(command, str):
        command = shlex.join(map(str, command))
    return {
        "command": command,
        "devices": ", ".join(map(str, known.get("devices", []))),
        "versions": [(name, version) for name, version in known.get("versions", {}).items() if name in _MAIN_VERSIONS],
        "environment": tables.settings_table("Environment of the run", known) if known else None,
        "settings": tables.settings_table("Settings of the run", config) if config else None,
    }
