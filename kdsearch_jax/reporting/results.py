"""What came out: the sentence and the figures on top of the page, and the table of networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdsearch_jax.reporting import curves
from kdsearch_jax.reporting.intervals import times
from kdsearch_jax.reporting.markup import NOTHING, cell, escape, notes, paragraph, table
from kdsearch_jax.reporting.record import Run, amount

NAMES = {"teacher": "Teacher", "student": "Student", "uniform": "Uniform", "magnitude": "Magnitude"}
_EXPLAINED = {
    "teacher": "the network that was searched",
    "student": "found by the search, then trained by distillation",
    "uniform": "baseline; every layer narrowed alike to the same budget, trained as long as search plus retraining",
    "magnitude": "baseline; the units with the smallest weights removed to the same budget, trained as long in all",
}
_MANY = 4  # networks; more are the rows of a table and not its columns


def row_of(run: Run, name: str) -> dict[str, Any]:
    """The row of `results.json` for the network of that name, or {}."""
    return next((row for row in run.rows if row.get("name") == name), {})


def label(name: str) -> str:
    """A network's name for readers: "at-0.5" is a student of a front, "uniform-0.5" its baseline."""
    method, dash, budget = name.partition("-")
    if name in NAMES or not dash:
        return NAMES.get(name, name)
    return f"{'Student' if method == 'at' else NAMES.get(method, method)} at {budget}"


def percent(share: float) -> str:
    """Two digits at least: 52%, 5.2%, 0.52%."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def points(difference: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * difference:+.2f}".replace("-", "−")


def both(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    """Whether the second can be told as a share of the first."""
    return one.get(key) not in (None, 0) and other.get(key) is not None


# --- on top -----------------------------------------------------------------------------------------------------------


def lead(run: Run) -> str:
    """What came out, in one or two sentences."""
    teacher, student = row_of(run, "teacher"), row_of(run, "student")
    if not student and run.front is not None and run.front.points:
        return _front_lead(run)
    if not student:
        stage = "before its search ended" if run.selection is None else "before its student was measured"
        return paragraph(f"This run stopped {stage}; the page shows what there is.")
    said = []
    if both(teacher, student, "macs"):
        said.append(f"{percent(student['macs'] / teacher['macs'])} of its teacher’s multiply-accumulates (MACs)")
    if both(teacher, student, "params"):
        said.append(f"{percent(student['params'] / teacher['params'])} of its parameters")
    text = f"The student has {' and '.join(said)}" if said else "The student is trained"
    if student.get("accuracy") is not None:
        text += f", and {100 * student['accuracy']:.2f}% accuracy"
        others = [name for name in ("teacher", "uniform", "magnitude") if row_of(run, name).get("accuracy") is not None]
        parts = [
            f"{points(student['accuracy'] - row_of(run, n)['accuracy'])} points against the {_lower(n)}" for n in others
        ]
        text += f" ({', '.join(parts)})" if parts else ""
    return f'<p class="lead">{escape(text)}.</p>' + _tiles(teacher, student)


def _lower(name: str) -> str:
    return NAMES.get(name, name).lower() + (" baseline" if name in ("uniform", "magnitude") else "")


def _front_lead(run: Run) -> str:
    assert run.front is not None
    whole, said = run.front.teacher, []
    for point in run.front.points:
        if point.get("accuracy") is not None and both(whole, point, "macs"):
            said.append(f"{100 * point['accuracy']:.2f}% at {percent(point['macs'] / whole['macs'])} of the MACs")
    number = len(run.front.points)
    text = f"One search gave {number} student{'s' if number > 1 else ''} of the teacher"
    if said:
        text += f": accuracy {', '.join(said)}"
    if whole.get("accuracy") is not None:
        text += f"; the teacher has {100 * whole['accuracy']:.2f}%"
    return f'<p class="lead">{escape(text)}. MACs are multiply-accumulates.</p>'


def _tiles(teacher: dict[str, Any], student: dict[str, Any]) -> str:
    """The student's figures, large, each beside the teacher's."""
    shown: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
        ("Accuracy", "accuracy", lambda row: f"{100 * row['accuracy']:.2f}%"),
        ("MACs", "macs", lambda row: amount(row["macs"])),
        ("Parameters", "params", lambda row: amount(row["params"])),
        ("Weights", "bytes", lambda row: size(row["bytes"])),
        ("Time an example", "ms_per_image", took),
        ("Memory", "memory", lambda row: size(row["memory"])),
    ]
    tiles = [
        f"<div><dt>{name}</dt><dd><b>{escape(text(student))}</b> teacher {escape(text(teacher))}</dd></div>"
        for name, key, text in shown
        if student.get(key) is not None and teacher.get(key) is not None
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def milliseconds(value: float) -> str:
    """A time with its unit."""
    return f"{value:.3g} ms" if value >= 0.1 else f"{1000 * value:.3g} µs"


def took(row: Mapping[str, Any]) -> str:
    """A network's time an example, or from where to where where it scatters."""
    return " to ".join(milliseconds(value) for value in times(row))


def size(value: float) -> str:
    """Bytes with their unit."""
    text = amount(value)
    return f"{text}B" if text[-1:].isalpha() else f"{text} B"


# --- the table --------------------------------------------------------------------------------------------------------


def networks(run: Run) -> str:
    """The table of all networks that were measured, and the notes that belong to it."""
    if not run.rows:
        return paragraph("There is no results.json yet: no network of this run has been measured.")
    teacher = row_of(run, "teacher")
    lines = [
        ["Accuracy<small>points to teacher</small>", *(_accuracy_cell(r, teacher, "accuracy") for r in run.rows)],
        ["Top-5 accuracy", *(_accuracy_cell(r, teacher, "accuracy_top5") for r in run.rows)],
        ["Agrees with teacher", *(cell(r.get("agreement"), lambda v: f"{100 * v:.2f}%") for r in run.rows)],
        ["KL to teacher<small>nats</small>", *(cell(r.get("kl"), lambda v: f"{v:.3g}") for r in run.rows)],
        ["Distance to teacher", *(cell(r.get("distance"), lambda v: f"{v:.3g}") for r in run.rows)],
        *([escape(name), *(cell(r.get(name), _number) for r in run.rows)] for name in _own(run)),
        ["Training steps", *(cell(r.get("steps"), lambda v: f"{v:,}") for r in run.rows)],
    ]
    return oriented("Teacher, student and baselines", run.rows, lines) + _notes(run)


def oriented(caption: str, rows: Sequence[dict[str, Any]], lines: list[list[str]]) -> str:
    """A table of networks: a column each, or of many a row each; measures of which nothing is known are left out."""
    known = [line for line in lines if any(text != NOTHING for text in line[1:])]
    names = [escape(label(str(row.get("name", "?")))) for row in rows]
    if len(rows) <= _MANY:
        return table(caption, ['<span class="hidden">Measure</span>', *names], known, "numbers")
    turned = [[name, *(line[i + 1] for line in known)] for i, name in enumerate(names)]
    return table(caption, ['<span class="hidden">Network</span>', *(line[0] for line in known)], turned, "numbers")


_KNOWN = {"name", "accuracy", "accuracy_top5", "agreement", "kl", "loss", "distance", "macs", "params", "bytes",
          "ms_per_image", "ms_low", "ms_high", "ms_batch", "steps", "search_steps", "memory",
          "budget", "method", "path"}  # fmt: skip


def _own(run: Run) -> list[str]:
    """Names of what a user's own metrics measured."""
    return [name for name in dict.fromkeys(key for row in run.rows for key in row) if name not in _KNOWN]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _accuracy_cell(row: dict[str, Any], teacher: dict[str, Any], key: str) -> str:
    shown = cell(row.get(key), lambda v: f"{100 * v:.2f}%")
    if row is not teacher and row.get(key) is not None and teacher.get(key) is not None:
        shown += f"<small>{points(row[key] - teacher[key])}</small>"
    return shown


def _notes(run: Run) -> str:
    results, said = run.results or {}, []
    where = f"the {results.get('split', 'test')} split of {results.get('dataset', 'the data set')}"
    count = results.get("examples")
    said.append(
        f"Measured on {where}{f' ({count:,} examples)' if count else ''}, one seed ({results.get('seed', '?')})."
    )
    if results.get("compared"):
        said.append(f"Here {results['compared']}; the distance is the mean of that.")
    elif any(row.get("kl") is not None for row in run.rows):
        said.append(
            "KL is the mean divergence KL(teacher ‖ network) of the predicted probabilities: 0 where they agree."
        )
    accuracy = row_of(run, "student").get("accuracy")
    if count and accuracy is not None:
        error = (accuracy * (1 - accuracy) / count) ** 0.5
        said.append(f"The examples alone leave ± {100 * error:.2f} points (one standard error) to every accuracy.")
    said += [f"{NAMES[r['name']]}: {_EXPLAINED[r['name']]}." for r in run.rows if r.get("name") in _EXPLAINED]
    if not any(str(row.get("name")).partition("-")[0] in ("uniform", "magnitude") for row in run.rows):
        said.append("No hand-made baseline was trained, so this table cannot tell what the search itself was worth.")
    return notes(said)


def budget_notes(run: Run) -> list[str]:
    """For each bound asked for, what the student got."""
    counted = [_budget_note(run, name, share) for name, shares in curves.budgets(run).items() for share in shares]
    return [*counted, *measured_notes(run)]


def measured_notes(run: Run) -> list[str]:
    """For each bound on time or memory, what was measured of the trained students."""
    said = []
    for place, record in run.measured.items():
        who = f"{label(place)}, asked" if place.startswith("at-") else "Asked"
        for name, noun in (("latency", "time"), ("memory", "memory")):
            if (found := record.get(name)) is not None:
                bound = found["budget"] * (found["teacher"] if found["budget"] <= 1 else 1)
                form = milliseconds if name == "latency" else size
                limit, whole, got = (form(value) for value in (bound, found["teacher"], found["student"]))
                said.append(
                    f"{who}: at most {limit} of {noun} a call of {record['batch_size']} examples "
                    f"(the teacher: {whole}); got {got}: {'met' if found['within'] else 'NOT met'}."
                )
    return said


def _budget_note(run: Run, name: str, share: float) -> str:
    teacher, student = row_of(run, "teacher"), row_of(run, "student")
    if not both(teacher, student, name):
        return ""
    got, noun = student[name] / teacher[name], {"macs": "MACs", "params": "parameters"}[name]
    verdict = "met" if got <= share * (1 + 1e-9) else "NOT met"
    return f"Asked: at most {100 * share:.3g}% of the {noun}; got {100 * got:.3g}%: {verdict}."
