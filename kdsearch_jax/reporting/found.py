"""What was found and how it got there: the sections of architecture, gates and training, and their headings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdsearch_jax.reporting import curves, deaths, markup, merging
from kdsearch_jax.reporting.markup import NONE, cell, details, escape, paragraph, table
from kdsearch_jax.reporting.record import Group, Run, stages_of
from kdsearch_jax.reporting.results import percent

_UNITS = 5000  # that are listed with their steps of death; of more, the history has them


# --- the architecture -------------------------------------------------------------------------------------------------


def architecture_title(run: Run) -> str:
    """The finding: how many units are kept, and where."""
    if not run.units:
        return "Architecture"
    kept, size = sum(g.kept_units for g in run.units), sum(g.size for g in run.units)
    title = f"Kept {percent(kept / size)} of units" if kept < size else "All units kept"
    stages = sorted(stages_of(run.units), key=lambda stage: stage[1])
    if kept < size and stages and stages[-1][1] - stages[0][1] > 0.05:
        (low, least), (high, most) = stages[0], stages[-1]
        title += f"; {high} keeps most ({percent(most)}), {low} least ({percent(least)})"
    removed = sum(branch.kept_units == 0 for branch in run.branches)
    return title + (f"; {removed} of {len(run.branches)} residual branches removed" if removed else "")


def architecture(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    """Teacher beside student: a bar a layer, to scale, and the numbers."""
    if "architecture" not in pictures:
        if run.topology is None:
            return paragraph("There is no search/topology.json: the search has not traced the network yet.")
        return paragraph("No choice of units yet: neither search/selection.json nor the gates' history is there.")
    scale = "to scale among layers of one kind" if len({g.kind for g in run.units}) > 1 else "to scale"
    caption = (
        f"A unit is what is kept or removed whole: a channel, a head, a neuron. A bar is as long as {{}}, {scale}."
    )
    share = (
        " MACs (multiply-accumulates): the share of the teacher’s that runs through these units, before and after, "
        "other layers as in the teacher."
    )
    if not run.final:
        share += " Preliminary: the gates alive at the last recorded step, not yet a selection."
    if run.front is not None and run.front.points:
        share += f" Shown is the student of the smallest budget, {run.front.points[-1].get('name')}."
    if note := (run.selection or {}).get("note"):
        share += f" {escape(note)}."
    spoken = f"Bar chart of the architecture. {architecture_title(run)}. The table below has every number."
    layer = "the teacher’s layer is wide"
    if (every := pictures.get("architecture-all")) is None:
        shown = markup.picture(pictures["architecture"], spoken, caption.format(layer) + share)
    else:
        together = caption.format("the layers of a part of the teacher are wide together")
        shown = markup.picture(pictures["architecture"], spoken, together)
        shown += details("Every layer", markup.picture(every, spoken, caption.format(layer) + share))
    return shown + details("Table of the architecture", _architecture_table(run))


def _architecture_table(run: Run) -> str:
    points = {} if run.front is None else run.front.kept
    head = ["Group", "Kind", "Kept", "Teacher", "Teacher’s MACs", *map(escape, points)]
    rows = []
    for g in run.groups:
        if g.kept is not None:
            share = "" if g.kind == "branches" else f"{100 * g.macs_share:.1f}%"
            others = [f"{kept.get(g.name, g.size)}" for kept in points.values()]
            rows.append([escape(g.name), escape(g.kind), f"{g.kept_units}", f"{g.size}", share, *others])
    return table("Units kept, by group", head, rows, "numbers")


# --- how it got there -------------------------------------------------------------------------------------------------


def gates_title(run: Run) -> str:
    """When units went."""
    steps = sorted(step for group in run.units for step in _gone(run, group))
    if run.history is None or not steps:
        return "The gates over the search"
    half = steps[(len(steps) - 1) // 2]
    return f"Half of the gates that reached zero did so by step {half} of {run.history['steps'][-1]}"


def _gone(run: Run, group: Group) -> list[int]:
    """For every unit whose gate ends at zero, the recorded step at which it was first seen so for good; sorted."""
    if run.history is None or group.path is None:
        return []
    steps = run.history["steps"]
    return sorted(int(steps[i + 1]) for i in deaths.last_alive(group) if i < len(steps) - 1)


def gates(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    """Which unit died when, and the path of every gate."""
    if not {"deaths", "gates"} & pictures.keys():
        return paragraph("There is no history of the gates (search/history.npz) to show.")
    text = paragraph("Each unit has a gate, a factor that the search shrinks; a unit whose gate reaches zero has died.")
    if "deaths" in pictures:
        spoken = (
            f"A strip for every layer, with a mark where units died. {gates_title(run)}. A table below has all steps."
        )
        caption = (
            "Steps of the search to the right; the stronger a mark, the larger the share of the layer that died there. "
            "Beside it, what became of all its units, and how many of them are kept."
        )
        text += markup.picture(pictures["deaths"], spoken, caption)
        if (every := pictures.get("deaths-all")) is not None:
            text += details("Every layer", markup.picture(every, spoken, caption))
    if "gates" in pictures:
        spoken = f"Heat-maps of every gate over the search. {gates_title(run)}."
        shown = markup.picture(pictures["gates"], spoken, _path_note(run))
        deep = len(run.units) > merging.ROWS
        text += details("The path of every gate", shown) if deep else f"<h3>The path of every gate</h3>{shown}"
    groups = [group for group in (*run.units, *run.branches) if group.path is not None]
    head = ["Group", "Kept", "Removed", "First gone", "Last gone"]
    listed = table("When units went, by group", head, [_gate_row(run, group) for group in groups], "numbers")
    return text + details("Table of when units went", listed) + _dates(run, groups)


def _path_note(run: Run) -> str:
    many = len([g for g in run.units if g.path is not None]) > merging.PANELS
    caption = (
        "One line a layer, time to the right; the stronger the colour, the more of its units are alive."
        if many
        else "One panel a layer, one line a unit, time to the right; units sorted by when they went, those that stay "
        "at the bottom. Stronger colour is a larger gate, against the largest of its layer."
    )
    alive = [(g.path, g.kept) for g in run.units if g.path is not None and g.kept is not None and g.kept_units]
    late = sum(int((path[-1] > 0)[~kept].sum()) for path, kept in alive)
    if late:
        caption += f" Of units with gates above zero to the end, the last, exact selection cut {late}."
    if len(alive) < len(run.units):
        caption += " Units of a removed branch went with it, whatever their own gates."
    return caption


def _gate_row(run: Run, group: Group) -> list[str]:
    gone = _gone(run, group)
    when = [f"step {gone[0]}", f"step {gone[-1]}"] if gone else [NONE, NONE]
    return [escape(group.name), f"{group.kept_units}", f"{group.size - group.kept_units}", *when]


def _dates(run: Run, groups: list[Group]) -> str:
    """Which unit died when, by number."""
    if sum(group.size for group in groups) > _UNITS:
        return paragraph(f"With more than {_UNITS:,} units, who died when is in search/history.npz alone.")
    rows = []
    for group in groups:
        found = deaths.of(run, group)
        if found is None:
            continue
        lots = [(f"step {step}", units) for step, units in deaths.units_by_step(found)]
        lots += [("cut at the end", cut)] if (cut := found.cut.nonzero()[0].tolist()) else []
        for when, units in lots:
            rows.append([escape(group.name), when, ranges(units)])
    listed = table(
        "Units by the step of their death, numbered as in the teacher from 0", ["Group", "When", "Units"], rows
    )
    return details("Which unit died when", listed) if rows else ""


def ranges(numbers: list[int]) -> str:
    """Sorted numbers with runs abridged: "1, 4–7"."""
    starts = [n for n in numbers if n - 1 not in (members := set(numbers))] if numbers else []
    said = []
    for start in starts:
        end = start
        while end + 1 in members:
            end += 1
        said.append(f"{start}" if end == start else f"{start}, {end}" if end == start + 1 else f"{start}–{end}")
    return ", ".join(said)


# --- the training -----------------------------------------------------------------------------------------------------


def search_title(run: Run) -> str:
    """Where the search's cost ended."""
    history = run.history or {}
    if "cost_macs" not in history:
        return "How search and training went"
    bounds = curves.budgets(run).get("macs", [])
    asked = f" (asked: at most {', '.join(f'{100 * bound:.3g}' for bound in bounds)}%)" if bounds else ""
    return f"The search brought MACs to {100 * float(history['cost_macs'][-1]):.3g}%{asked}"


def search(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    """Cost, penalty, accuracy and loss over the steps."""
    if "search" not in pictures:
        return paragraph("There are no metrics of a search or a training to show.")
    caption = f"Dotted: the budget asked for{', and the teacher’s accuracy' if curves.teacher_accuracy(run) else ''}. "
    retrained = [stage for stage in run.metrics if stage.startswith("at-") or stage == "retrain"]
    retrained = [stage for stage in retrained if run.metrics[stage]]
    if retrained and run.metrics["search"]:
        caption += "Retraining goes on where the student was cut; a baseline has as many steps in all."
    ends = [_end(stage, rows) for stage, rows in run.metrics.items() if stage != "teacher"]
    rows = [row for row in ends if row]
    listed = table("Last values of each stage", ["Stage", "Steps", "Loss", "Accuracy"], rows, "numbers")
    spoken = f"Line charts over steps: cost and penalty of the search, accuracy and loss. {search_title(run)}."
    missing = "" if retrained else paragraph("The student of this run has not been retrained.")
    return (
        markup.picture(pictures["search"], spoken, caption)
        + missing
        + (details("Table of last values", listed) if rows else "")
    )


def _end(stage: str, rows: list[dict[str, Any]]) -> list[str]:
    def last(*keys: str) -> Any:
        return next((row[key] for key in keys for row in reversed(rows) if row.get(key) is not None), None)

    if not rows:
        return []
    accuracy = last("validation_accuracy", "accuracy")
    return [
        escape(curves.label(stage)),
        f"{last('step'):,}",
        cell(last("loss"), lambda v: f"{v:.4g}"),
        cell(accuracy, lambda v: f"{100 * v:.2f}%"),
    ]
