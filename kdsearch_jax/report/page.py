"""The report as one HTML page: tables and sentences; the figures come in as images.

The page loads nothing: style is inline, images are data, and a content security policy forbids the rest. Whatever comes
from a file is escaped by `markup.escape`.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.report import curves, figures, markup
from kdsearch_jax.report.markup import cell, details, escape, paragraph, section, table
from kdsearch_jax.report.record import Group, Run, stages_of
from kdsearch_jax.report.results import lead, networks, percent, row_of
from kdsearch_jax.report.style import CSS

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    """The whole page; `pictures` by name of the figure, those that could be drawn."""
    name = str(run.config.get("name", run.directory.name))
    body = [
        f"<header><h1>Student of the {escape(name)} teacher</h1>{lead(run)}</header><main>",
        section("results", "Results", networks(run)),
        section("use", "Use the student", _use(run)),
        section("architecture", architecture_title(run), _architecture(run, pictures)),
        section("gates", gates_title(run), _gates(run, pictures)),
        section("search", search_title(run), _search(run, pictures)),
        section("frozen", "What could not be pruned, and why", _frozen(run)),
        section("run", "The run", _provenance(run)),
        "</main><footer><p>Written by <code>python -m kdsearch_jax.report</code> from the run’s files.</p></footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)}: report of kdsearch_jax</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _use(run: Run) -> str:
    path = run.directory
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    call = (run.architecture or {}).get("call")
    shape = (run.architecture or {}).get("input_shape") or ["height", "width", "channels"]
    if call is not None:
        code, text = _call(str(path / "student"), run.architecture or {}, call)
        return f"<pre tabindex='0'><code>{escape(code)}</code></pre><p>{escape(text)}</p>"
    code = (
        f"import kdsearch_jax\n\nmodule, variables = kdsearch_jax.load({str(path / 'student')!r})\n"
        "logits = module.apply(variables, images)"
    )
    sizes = ", ".join(map(str, ("batch", *shape)))
    text = f"<code>images</code>: float32 ({escape(sizes)}), normalised as the training images were."
    if not row_of(run, "student"):
        text += " This works once the run has written its student."
    return f"<pre tabindex='0'><code>{escape(code)}</code></pre><p>{text}</p>"


def _call(student: str, architecture: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[str, str]:
    """(code, sentence) for a network that is not fed one image."""
    given = str(architecture.get("model", "")).startswith("given:")
    static = [f"{name}={value!r}" for name, value in call.get("eval", {}).items()]
    arguments = ", ".join(["variables", *call.get("arguments", []), *static])
    code = (
        f"import kdsearch_jax\n\nmodule, variables = kdsearch_jax.load({student!r}{', module=net' if given else ''})\n"
        f"outputs = module.apply({arguments})"
    )
    taken = "; ".join(f"{name}: {json.dumps(spec)} an example" for name, spec in call.get("inputs", {}).items())
    return code, f"It takes {taken}." + (" net is the module that was searched." if given else "")


# --- the figures' sections --------------------------------------------------------------------------------------------


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
    return sorted(int(steps[i + 1]) for i in figures.last_alive(group) if i < len(steps) - 1)


def search_title(run: Run) -> str:
    """Where the search's cost ended."""
    history = run.history or {}
    if "cost_macs" not in history:
        return "How search and training went"
    bound = curves.budget(run).get("macs")
    asked = f" (asked: at most {100 * bound:.3g}%)" if bound else ""
    return f"The search brought MACs to {100 * float(history['cost_macs'][-1]):.3g}%{asked}"


def _architecture(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    if "architecture" not in pictures:
        if run.topology is None:
            return paragraph("There is no search/topology.json: the search has not traced the network yet.")
        return paragraph("No choice of units yet: neither search/selection.json nor the gates' history is there.")
    scale = "to scale among layers of one kind" if len({g.kind for g in run.units}) > 1 else "to scale"
    caption = (
        f"A bar is as long as the teacher’s layer is wide, {scale}. MACs: the "
        "share of the teacher’s that runs through these units, before and after, other layers as in the teacher."
    )
    if not run.final:
        caption += " Preliminary: the gates alive at the last recorded step, not yet a selection."
    rows = [
        [
            escape(g.name),
            escape(g.kind),
            f"{g.kept_units}",
            f"{g.size}",
            "" if g.kind == "branches" else f"{100 * g.macs_share:.1f}%",
        ]
        for g in run.groups
        if g.kept is not None
    ]
    listed = table("Units kept, by group", ["Group", "Kind", "Kept", "Teacher", "Teacher’s MACs"], rows, "numbers")
    spoken = f"Bar chart of the architecture. {architecture_title(run)}. The table below has every number."
    return markup.picture(pictures["architecture"], spoken, caption) + details("Table of the architecture", listed)


def _gates(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    if "gates" not in pictures:
        return paragraph("There is no history of the gates (search/history.npz) to show.")
    caption = (
        "One panel a layer, one line a unit, time to the right; units sorted by when they went, those that stay at the "
        "bottom. Stronger colour is a larger gate, against the largest of its layer."
    )
    alive = [(g.path, g.kept) for g in run.units if g.path is not None and g.kept is not None and g.kept_units]
    late = sum(int((path[-1] > 0)[~kept].sum()) for path, kept in alive)
    if late:
        caption += f" {late} units with gates above zero to the end were cut by the last, exact selection."
    if len(alive) < len(run.units):
        caption += " Units of a removed branch went with it, whatever their own gates."
    spoken = f"Heat-maps of every gate over the search. {gates_title(run)}. The table below lists when units went."
    rows = [_gate_row(run, group) for group in (*run.units, *run.branches) if group.path is not None]
    listed = table(
        "When units went, by group", ["Group", "Kept", "Removed", "First gone", "Last gone"], rows, "numbers"
    )
    return markup.picture(pictures["gates"], spoken, caption) + details("Table of when units went", listed)


def _gate_row(run: Run, group: Group) -> list[str]:
    gone = _gone(run, group)
    when = [f"step {gone[0]}", f"step {gone[-1]}"] if gone else [_NEVER, _NEVER]
    return [escape(group.name), f"{group.kept_units}", f"{group.size - group.kept_units}", *when]


_NEVER = '<span aria-hidden="true">–</span><span class="hidden">none</span>'


def _search(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    if "search" not in pictures:
        return paragraph("There are no metrics of a search or a training to show.")
    caption = "Dotted lines: the budget asked for, and the teacher’s accuracy. "
    if run.metrics["retrain"] and run.metrics["search"]:
        caption += "Retraining goes on where the search ended; a baseline has as many steps in all."
    ends = [_end(stage, run.metrics[stage]) for stage in ("search", "retrain", "uniform", "magnitude")]
    rows = [row for row in ends if row]
    listed = table("Last values of each stage", ["Stage", "Steps", "Loss", "Accuracy"], rows, "numbers")
    spoken = f"Line charts over steps: cost and penalty of the search, accuracy and loss. {search_title(run)}."
    missing = "" if run.metrics["retrain"] else paragraph("The student of this run has not been retrained.")
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
        escape(curves.LABELS[stage]),
        f"{last('step'):,}",
        cell(last("loss"), lambda v: f"{v:.4g}"),
        cell(accuracy, lambda v: f"{100 * v:.2f}%"),
    ]


# --- what stayed, and what the run was --------------------------------------------------------------------------------


def _frozen(run: Run) -> str:
    if run.topology is None:
        return paragraph("Not known: there is no search/topology.json.")
    frozen = run.topology.get("frozen", [])
    unknown = ", ".join(map(str, run.topology.get("unknown", [])))
    note = (
        paragraph(f"Operations that the tracer does not know, so it froze what they touch: {unknown}.")
        if unknown
        else ""
    )
    if not frozen:
        return note + paragraph("Nothing: every axis of every layer was a candidate.")
    reasons = Counter(entry.get("reason", "no reason given") for entry in frozen)
    text = note + paragraph(
        f"{len(frozen)} parameter axes or branches stay as in the teacher, for {len(reasons)} "
        f"{'reason' if len(reasons) == 1 else 'reasons'}. Open one to see which."
    )
    for reason, count in reasons.most_common():
        rows = [
            [
                escape(f.get("name", "?")),
                _NEVER if f.get("axis", -1) < 0 else f"{f['axis']}",
                escape(f.get("size", "?")),
            ]
            for f in frozen
            if f.get("reason", "no reason given") == reason
        ]
        text += details(
            f"{reason} ({count})", table(f"Stays: {reason}", ["Parameter", "Axis", "Size"], rows, "numbers")
        )
    return text


def _provenance(run: Run) -> str:
    environment = {key: value for key, value in (run.environment or {}).items() if value not in (None, [])}
    command = environment.pop("command", None)
    parts = []
    if command:
        line = command if isinstance(command, str) else shlex.join(map(str, command))
        parts.append(f"<h3>Command</h3><pre tabindex='0'><code>{escape(line)}</code></pre>")
    if environment:
        parts.append("<h3>Environment</h3>" + _settings("Environment of the run", environment))
    else:
        parts.append(paragraph("There is no environment.json: versions and devices are not known."))
    parts.append(details("Every setting (config.json)", _settings("Settings of the run", run.config)))
    return "".join(parts)


def _settings(caption: str, record: Mapping[str, Any]) -> str:
    rows = [[escape(key), f"<code>{escape(value)}</code>"] for key, value in _flat(record)]
    return table(caption, ["Setting", "Value"], rows)


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
