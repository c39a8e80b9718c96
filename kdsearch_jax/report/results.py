"""What came out: the sentence on top of the page and the table of networks."""

from __future__ import annotations

from typing import Any

from kdsearch_jax.report import curves
from kdsearch_jax.report.markup import NOTHING, cell, escape, paragraph, table
from kdsearch_jax.report.record import Run, amount

NAMES = {"teacher": "Teacher", "student": "Student", "uniform": "Uniform", "magnitude": "Magnitude"}
_EXPLAINED = {
    "teacher": "the network that was searched",
    "student": "found by the search, then trained by distillation",
    "uniform": "baseline; every layer narrowed alike to the same budget, trained as long as search plus retraining",
    "magnitude": "baseline; the units with the smallest weights removed to the same budget, trained as long in all",
}


def row_of(run: Run, name: str) -> dict[str, Any]:
    """The row of `results.json` for the network of that name, or {}."""
    return next((row for row in run.rows if row.get("name") == name), {})


def percent(share: float) -> str:
    """Two digits at least: 52%, 5.2%, 0.52%."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}".replace("-", "−")


def lead(run: Run) -> str:
    """What came out, in one or two sentences."""
    teacher, student = row_of(run, "teacher"), row_of(run, "student")
    if not student:
        stage = "before its search ended" if run.selection is None else "before its student was measured"
        return paragraph(f"This run stopped {stage}; the page shows what there is.")
    said = []
    if _both(teacher, student, "macs"):
        said.append(f"{percent(student['macs'] / teacher['macs'])} of its teacher’s multiply-accumulates (MACs)")
    if _both(teacher, student, "params"):
        said.append(f"{percent(student['params'] / teacher['params'])} of its parameters")
    text = f"The student has {' and '.join(said)}" if said else "The student is trained"
    if student.get("accuracy") is not None:
        text += f", and {100 * student['accuracy']:.2f}% accuracy"
        others = [name for name in ("teacher", "uniform", "magnitude") if row_of(run, name).get("accuracy") is not None]
        parts = [
            f"{_points(student['accuracy'] - row_of(run, n)['accuracy'])} points against the {_lower(n)}"
            for n in others
        ]
        text += f" ({', '.join(parts)})" if parts else ""
    return f'<p class="lead">{escape(text)}.</p>'


def _lower(name: str) -> str:
    return NAMES.get(name, name).lower() + (" baseline" if name in ("uniform", "magnitude") else "")


def _both(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    return one.get(key) not in (None, 0) and other.get(key) is not None


def networks(run: Run) -> str:
    """The table of all networks that were measured, and the notes that belong to it."""
    if not run.rows:
        return paragraph("There is no results.json yet: no network of this run has been measured.")
    teacher = row_of(run, "teacher")
    share = "<small>% of teacher’s</small>"
    lines = [
        ["Accuracy<small>points to teacher</small>", *(_accuracy_cell(r, teacher, "accuracy") for r in run.rows)],
        ["Top-5 accuracy", *(_accuracy_cell(r, teacher, "accuracy_top5") for r in run.rows)],
        ["Agrees with teacher", *(cell(r.get("agreement"), lambda v: f"{100 * v:.2f}%") for r in run.rows)],
        ["KL to teacher", *(cell(r.get("kl"), lambda v: f"{v:.3g}") for r in run.rows)],
        ["Distance to teacher", *(cell(r.get("distance"), lambda v: f"{v:.3g}") for r in run.rows)],
        *([escape(name), *(cell(r.get(name), lambda v: f"{v:.4g}") for r in run.rows)] for name in _own(run)),
        [f"MACs{share}", *(_cost_cell(r, teacher, "macs", amount) for r in run.rows)],
        [f"Parameters{share}", *(_cost_cell(r, teacher, "params", amount) for r in run.rows)],
        [f"File size{share}", *(_cost_cell(r, teacher, "bytes", lambda v: amount(v) + "B") for r in run.rows)],
        [f"Time an example{share}", *(_cost_cell(r, teacher, "ms_per_image", _milliseconds) for r in run.rows)],
        ["Training steps", *(cell(r.get("steps"), lambda v: f"{v:,}") for r in run.rows)],
    ]
    known = [line for line in lines if any(text != NOTHING for text in line[1:])]
    head = [
        '<span class="hidden">Measure</span>',
        *(escape(NAMES.get(r.get("name", ""), r.get("name", "?"))) for r in run.rows),
    ]
    return table("Teacher, student and baselines", head, known, "numbers") + _notes(run)


_KNOWN = {"name", "accuracy", "accuracy_top5", "agreement", "kl", "loss", "distance", "macs", "params", "bytes",
          "ms_per_image", "ms_batch", "steps"}  # fmt: skip


def _own(run: Run) -> list[str]:
    """Names of what a user's own metrics measured."""
    return [name for name in dict.fromkeys(key for row in run.rows for key in row) if name not in _KNOWN]


def _accuracy_cell(row: dict[str, Any], teacher: dict[str, Any], key: str) -> str:
    shown = cell(row.get(key), lambda v: f"{100 * v:.2f}%")
    if row is not teacher and row.get(key) is not None and teacher.get(key) is not None:
        shown += f"<small>{_points(row[key] - teacher[key])}</small>"
    return shown


def _cost_cell(row: dict[str, Any], teacher: dict[str, Any], key: str, text: Any) -> str:
    shown = cell(row.get(key), text)
    if row is not teacher and _both(teacher, row, key):
        shown += f"<small>{percent(row[key] / teacher[key])}</small>"
    return shown


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value >= 0.1 else f"{1000 * value:.3g} µs"


def _notes(run: Run) -> str:
    results, notes = run.results or {}, []
    where = f"the {results.get('split', 'test')} split of {results.get('dataset', 'the data set')}"
    count = results.get("examples")
    notes.append(
        f"Measured on {where}{f' ({count:,} examples)' if count else ''}, one seed ({results.get('seed', '?')})."
    )
    if results.get("compared"):
        notes.append(f"Here {results['compared']}; the distance is the mean of that.")
    accuracy = row_of(run, "student").get("accuracy")
    if count and accuracy is not None:
        error = (accuracy * (1 - accuracy) / count) ** 0.5
        notes.append(f"The examples alone leave ± {100 * error:.2f} points (one standard error) to every accuracy.")
    batch = next((row["ms_batch"] for row in run.rows if row.get("ms_batch")), None)
    if batch:
        notes.append(f"Time an example is wall-clock time at batch {batch} on the devices named below.")
    for name, share in curves.budget(run).items():
        notes.append(_budget_note(run, name, share))
    others = [f"{NAMES[r['name']]}: {_EXPLAINED[r['name']]}." for r in run.rows if r.get("name") in _EXPLAINED]
    if not {"uniform", "magnitude"} & {row.get("name") for row in run.rows}:
        notes.append("No hand-made baseline was trained, so this table cannot tell what the search itself was worth.")
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in (*notes, *others) if note)}</ul>"


def _budget_note(run: Run, name: str, share: float) -> str:
    teacher, student = row_of(run, "teacher"), row_of(run, "student")
    if not _both(teacher, student, name):
        return ""
    got, noun = student[name] / teacher[name], {"macs": "MACs", "params": "parameters"}[name]
    verdict = "met" if got <= share * (1 + 1e-9) else "NOT met"
    return f"Asked: at most {100 * share:.3g}% of the {noun}; got {100 * got:.3g}%: {verdict}."
