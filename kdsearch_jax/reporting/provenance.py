"""What stayed as in the teacher and why, and what the run was: command, versions, devices, settings."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from kdsearch_jax.reporting.markup import NONE, code, details, escape, paragraph, table
from kdsearch_jax.reporting.record import Run

_LISTED = 200  # parameters listed for one reason


def frozen(run: Run) -> str:
    """The section of what the tracer has refused."""
    if run.topology is None:
        return paragraph("Not known: there is no search/topology.json.")
    kept = run.topology.get("frozen", [])
    unknown = ", ".join(map(str, run.topology.get("unknown", [])))
    note = f"Operations that the tracer does not know, so it froze what they touch: {unknown}."
    text = paragraph(note) if unknown else ""
    if not kept:
        return text + paragraph("Nothing: every axis of every layer was a candidate.")
    reasons = Counter(entry.get("reason", "no reason given") for entry in kept)
    text += paragraph(
        f"{len(kept)} parameter axes or branches stay as in the teacher, for {len(reasons)} "
        f"{'reason' if len(reasons) == 1 else 'reasons'}. Open one to see which."
    )
    for reason, count in reasons.most_common():
        every = [f for f in kept if f.get("reason", "no reason given") == reason]
        rows = [_row(entry) for entry in every[:_LISTED]]
        listed = table(f"Stays: {reason}", ["Parameter", "Axis", "Size"], rows, "numbers")
        more = paragraph(f"And {count - _LISTED} more, in search/topology.json.") if count > _LISTED else ""
        text += details(f"{reason} ({count})", listed + more)
    return text


def _row(entry: Mapping[str, Any]) -> list[str]:
    axis = entry.get("axis", -1)
    return [escape(entry.get("name", "?")), NONE if axis < 0 else f"{axis}", escape(entry.get("size", "?"))]


def the_run(environment: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> str:
    """The section of command, environment and settings."""
    known = {key: value for key, value in (environment or {}).items() if value not in (None, [])}
    command = known.pop("command", None)
    parts = []
    if command:
        line = command if isinstance(command, str) else shlex.join(map(str, command))
        parts.append("<h3>Command</h3>" + code(line))
    if known:
        parts.append("<h3>Environment</h3>" + settings("Environment of the run", known))
    else:
        parts.append(paragraph("There is no environment.json: versions and devices are not known."))
    if config:
        parts.append(details("Every setting (config.json)", settings("Settings of the run", config)))
    return "".join(parts)


def settings(caption: str, record: Mapping[str, Any]) -> str:
    """A table of names and values, those within others by their path."""
    rows = [[escape(key), f"<code>{escape(value)}</code>"] for key, value in _flat(record)]
    return table(caption, ["Setting", "Value"], rows, spoken=False)


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
