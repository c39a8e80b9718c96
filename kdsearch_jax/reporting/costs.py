"""What the networks cost: a table with bars, the budget's verdict, and the front of several budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdsearch_jax.reporting import markup
from kdsearch_jax.reporting.fronts import Front
from kdsearch_jax.reporting.intervals import apart
from kdsearch_jax.reporting.markup import NOTHING, cell, escape, notes, paragraph, table
from kdsearch_jax.reporting.record import Run, amount
from kdsearch_jax.reporting.results import (
    both,
    budget_notes,
    label,
    measured_notes,
    milliseconds,
    oriented,
    percent,
    points,
    row_of,
    size,
    took,
)

SHARE = "<small>% of teacher’s</small>"


TIME = "ms_per_image"
MEASURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("MACs", "macs", amount),
    ("Parameters", "params", amount),
    ("Weights", "bytes", size),
    ("Time an example", TIME, milliseconds),
    ("Memory", "memory", size),
)


def title(run: Run) -> str:
    """The finding: what the student needs of the teacher's."""
    teacher, student = row_of(run, "teacher"), row_of(run, "student")
    parts = [
        f"{percent(student[key] / teacher[key])} of the {name}"
        for name, key in (("MACs", "macs"), ("time", TIME))
        if both(teacher, student, key) and (key != TIME or apart(student, teacher))
    ]
    return f"It costs {' and '.join(parts)}" if parts else "What the networks cost"


def costs(run: Run) -> str:
    """The table of costs, its notes, and whether the budget was met."""
    if not run.rows:
        return paragraph("Nothing has been measured yet: there is no results.json.")
    teacher = row_of(run, "teacher")
    lines = [[name + SHARE, *(bar(r, teacher, key, text) for r in run.rows)] for name, key, text in MEASURES]
    return oriented("What the networks cost", run.rows, lines) + notes([*budget_notes(run), *_meanings(run)])


def _meanings(run: Run) -> list[str]:
    """What the measures are."""
    batch = next((row["ms_batch"] for row in run.rows if row.get("ms_batch")), None)
    said = ["MACs: multiply-accumulates of one example. Weights: all variables, in memory as in a file."]
    if batch:
        said.append(
            f"Time an example is wall-clock time at batch {batch} on the devices named below, compiled, the networks "
            "measured in turns."
        )
    if any(row.get("memory") is not None for row in run.rows):
        said.append(f"Memory: parameters and the largest activations{f' at batch {batch}' if batch else ''}.")
    return said


def bar(row: Mapping[str, Any], whole: Mapping[str, Any], key: str, text: Callable[[Any], str]) -> str:
    """A table's cell: the cost, its share of the teacher's, and that as a bar; a full bar is the teacher's cost."""
    shown = cell(row.get(key), lambda value: took(row) if key == TIME else text(value))
    if shown == NOTHING or whole.get(key) in (None, 0):
        return shown
    if key == TIME and row is not whole and not apart(row, whole):
        return f"{shown}<small>not told apart</small>"
    share = row[key] / whole[key]
    shown += "" if row is whole else f"<small>{percent(share)}</small>"
    return f'{shown}<span class="bar" aria-hidden="true"><i style="width:{100 * min(share, 1):.1f}%"></i></span>'


# --- several budgets --------------------------------------------------------------------------------------------------


def front_title(front: Front) -> str:
    """The finding: how far down one can go."""
    whole = front.teacher.get("accuracy")
    known = [p for p in front.points if p.get("accuracy") is not None and both(front.teacher, p, "macs")]
    if whole is None or not known:
        return "Students of several budgets"
    last = known[-1]
    share, gain = percent(last["macs"] / front.teacher["macs"]), points(last["accuracy"] - whole)
    return f"At {share} of the MACs, {gain} points against the teacher"


def front(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    """The front: accuracy against costs, as picture and table."""
    assert run.front is not None
    found, whole = run.front, run.front.teacher
    text = paragraph(
        "One search passed every budget on its way down; each student was cut there, and trained by itself."
    )
    if "front" in pictures:
        spoken = f"Accuracy against costs for every student. {front_title(found)}. The table has all."
        caption = "Up and to the left is better. Dotted: the teacher’s accuracy; it lies at 100% to the right."
        text += markup.picture(pictures["front"], spoken, caption)
    everyone = [whole, *found.points, *(row for rows in found.baselines.values() for row in rows)]
    rows = []
    for row in everyone:
        name = "Teacher" if row is whole else escape(label(str(row.get("name", "?"))))
        accuracy = cell(row.get("accuracy"), lambda v: f"{100 * v:.2f}%")
        rows.append(
            [name, asked(row.get("budget")), accuracy, *(bar(row, whole, key, form) for _, key, form in MEASURES)]
        )
    names = [name + SHARE for name, _, _ in MEASURES]
    head = ["Network", "Asked", "Accuracy", *names]
    known = [i for i in range(len(head)) if any(row[i] != NOTHING for row in rows)]
    listed = [[row[i] for i in known] for row in rows]
    text += table("Accuracy and costs at each budget", [head[i] for i in known], listed, "numbers", spoken=False)
    return text + notes([*measured_notes(run), *_meanings(run)])


def asked(budget: Any) -> str:
    """A budget in words: "50% of MACs"."""
    if not isinstance(budget, Mapping):
        return markup.NONE
    nouns = {"macs": "MACs", "params": "parameters", "latency": "time", "memory": "memory"}
    parts = [
        f"{100 * budget[key]:.3g}% of {noun}" if budget[key] <= 1 else f"{budget[key]:,g} {noun}"
        for key, noun in nouns.items()
        if isinstance(budget.get(key), int | float)
    ]
    return escape(", ".join(parts)) or markup.NONE
