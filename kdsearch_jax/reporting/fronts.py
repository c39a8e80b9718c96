"""The front of one search: students of several budgets, their accuracy against what they cost.

`front.json` is what the search wrote; `figure` puts its points beside the teacher and the hand-made students.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kdsearch_jax.reporting import files
from kdsearch_jax.reporting.look import INK, KEPT, SOFT, STAGES, Canvas, Look, bare, blank

FILE = "front.json"
COSTS = {"macs": "MACs", "params": "parameters", "ms_per_image": "time an example"}
_MARKS = "sD^vP*X"


@dataclass(frozen=True)
class Front:
    """What `front.json` says.

    Args:
      teacher: a row: accuracy, macs, params, bytes, ms_per_image.
      points: one row a student, the dearest first: name, budget, accuracy and the costs; None for what is not known.
      baselines: {method: rows}, of hand-made students at the same budgets.
      kept: {name of a point: {group: units kept}}, where the run has its selection.
    """

    teacher: dict[str, Any]
    points: tuple[dict[str, Any], ...]
    baselines: dict[str, tuple[dict[str, Any], ...]]
    kept: dict[str, dict[str, int]]


def read(run: Path) -> Front | None:
    """The front of a run, or None where it has none. Raises ValueError, in one line, where it is damaged."""
    path = run / FILE
    record = files.with_rows(path, "points")
    if record is None:
        return None
    teacher, points, others = record.get("teacher"), record["points"], record.get("baselines") or []
    if not isinstance(teacher, dict) or not isinstance(others, list):
        raise ValueError(f"{path} is damaged: 'teacher' must be an object and 'baselines' a list")
    for row in (teacher, *points, *others):
        numbers = [row.get(key) for key in ("accuracy", "macs", "params", "bytes", "ms_per_image")]
        if not all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in numbers):
            raise ValueError(f"{path} is damaged: accuracy and costs of {row.get('name')!r} must be numbers")
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in others:
        methods.setdefault(str(row.get("method", row.get("name", "?"))), []).append(row)
    return Front(
        teacher=teacher,
        points=tuple(sorted(points, key=lambda row: -(row.get("macs") or 0))),
        baselines={
            name: tuple(sorted(rows, key=lambda row: -(row.get("macs") or 0))) for name, rows in methods.items()
        },
        kept={str(row.get("name")): kept for row in points if (kept := _kept(run, str(row.get("name"))))},
    )


def _kept(run: Path, name: str) -> dict[str, int]:
    if Path(name).name != name:
        return {}
    selection = files.json_object(run / "search" / name / "selection.json") or {}
    kept = selection.get("kept")
    return {group: len(units) for group, units in kept.items()} if isinstance(kept, dict) else {}


def figure(run: Any, look: Look) -> Canvas | None:
    """Accuracy against MACs, parameters and time, a panel each, in % of the teacher's."""
    front: Front | None = run.front
    if front is None or front.teacher.get("accuracy") is None:
        return None
    panels = [key for key in COSTS if front.teacher.get(key) and any(_known(p, key) for p in front.points)]
    if not panels:
        return None
    body = blank(look, 2.9 * len(panels) if look.narrow else 3.4)
    lines, columns = (len(panels), 1) if look.narrow else (1, len(panels))
    grid = body.subplots(lines, columns, squeeze=False, sharey=not look.narrow).ravel()
    for number, (axes, key) in enumerate(zip(grid, panels, strict=True)):
        _panel(bare(axes, ("left", "bottom")), front, key)
        axes.set_title(f"Accuracy, %, against {COSTS[key]}", loc="left", fontsize=9.5, color=INK)
        axes.set_xlabel(f"{COSTS[key]}, % of the teacher’s", fontsize=8.5, color=SOFT, loc="right")
        if number == 0:
            axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")
    return body


def _known(row: dict[str, Any], key: str) -> bool:
    return row.get("accuracy") is not None and row.get(key) is not None


def _panel(axes: Axes, front: Front, key: str) -> None:
    """Points by cost, joined where the cost falls from budget to budget; time need not."""
    whole = front.teacher[key]
    lots = {"searched": front.points, **front.baselines}
    for number, (name, rows) in enumerate(lots.items()):
        xs = [100 * row[key] / whole for row in rows if _known(row, key)]
        ys = [100 * row["accuracy"] for row in rows if _known(row, key)]
        colour = KEPT if name == "searched" else STAGES.get(name, SOFT)
        line = "none" if key == "ms_per_image" else "-" if name == "searched" else "--"
        mark = "o" if name == "searched" else _MARKS[number - 1]
        axes.plot(xs, ys, ls=line, marker=mark, color=colour, linewidth=1.6, markersize=6, label=name)
    axes.axhline(100 * front.teacher["accuracy"], color=SOFT, linewidth=1, linestyle=":", label="teacher")
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
