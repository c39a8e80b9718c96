"""The figure of how it went: cost against the budget, λ2, accuracy and loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from kdsearch_jax.reporting.look import INK, KEPT, REMOVED, SOFT, STAGES, Canvas, Look, bare, blank
from kdsearch_jax.reporting.record import Run

LABELS = {"search": "search", "retrain": "student, retrained", "uniform": "uniform baseline",
          "magnitude": "magnitude baseline"}  # fmt: skip
_MAX_POINTS = 200  # points drawn of one curve; more are averaged


def label(stage: str) -> str:
    """A stage's name for readers."""
    method, dash, budget = stage.partition("-")
    return f"{'student' if method == 'at' else method} at {budget}" if dash else LABELS.get(stage, stage)


def search(run: Run, look: Look) -> Canvas | None:
    """Cost against the budget, λ2, accuracy and loss over the steps of the search and of what followed."""
    panels = [panel for panel in (_cost, _lambda2, _accuracy, _loss) if panel(None, run)]
    if not panels:
        return None
    columns = 1 if look.narrow or len(panels) == 1 else 2
    lines = math.ceil(len(panels) / columns)
    figure = blank(look, 2.5 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        axes.margins(x=0.01)
        panel(bare(axes, ("left", "bottom")), run)
        axes.set_xlim(left=0)
        axes.set_xlabel("step", fontsize=8.5, color=SOFT, loc="right")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.4, loc="best")


def _cost(axes: Axes | None, run: Run) -> bool:
    """Each panel tells, without axes, whether it has anything to draw."""
    history = run.history or {}
    costs = [(name, history[f"cost_{name}"]) for name in ("macs", "params") if f"cost_{name}" in history]
    if axes is None or not costs:
        return bool(costs)
    bounds = budgets(run)
    for (name, values), colour, style in zip(costs, (KEPT, STAGES["uniform"]), ("-", "-."), strict=False):
        label = {"macs": "MACs", "params": "parameters"}[name]
        axes.plot(history["steps"], 100 * values, style, color=colour, linewidth=1.8, label=label)
        for bound in bounds.get(name, ()):
            axes.axhline(100 * bound, color=colour, linewidth=1, linestyle=":")
            axes.annotate(
                f"budget {100 * bound:.3g}%", (0.02, 100 * bound), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", fontsize=8.5, color=INK,
            )  # fmt: skip
    axes.set_ylim(0, 105)
    _finish(axes, "Search: cost, % of the teacher’s")
    return True


def budgets(run: Run) -> dict[str, list[float]]:
    """The bounds asked for, as shares of the teacher's cost: {"macs": [0.5]}, of a front several, the largest first."""
    asked = [(run.results or {}).get("budget") or run.config.get("budget") or {}]
    if run.front is not None:
        asked = [point["budget"] for point in run.front.points if isinstance(point.get("budget"), dict)]
    shares: dict[str, list[float]] = {}
    for name in ("macs", "params"):
        values, whole = {each[name] for each in asked if each.get(name) is not None}, (run.topology or {}).get(name)
        if found := [value if value <= 1 else value / whole for value in values if value <= 1 or whole]:
            shares[name] = sorted(found, reverse=True)
    return shares


def _lambda2(axes: Axes | None, run: Run) -> bool:
    history = run.history or {}
    if axes is None or "lambda2" not in history:
        return "lambda2" in history
    values = history["lambda2"].astype(float)
    positive = values[values > 0]
    if positive.size and positive.max() > 100 * positive.min():
        values = np.where(values > 0, values, np.nan)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.plot(history["steps"], values, color=REMOVED, linewidth=1.8)
    _finish(axes, "Search: strength of the penalty, λ2")
    return True


def _accuracy(axes: Axes | None, run: Run) -> bool:
    drawn = _curves(axes, run, ("validation_accuracy", "accuracy"), 100)
    if axes is not None and drawn:
        for label, accuracy in teacher_accuracy(run).items():
            axes.axhline(100 * accuracy, color=SOFT, linewidth=1, linestyle=":", label=label)
        split = "Validation" if _has(run, "validation_accuracy") else "Training"
        _finish(axes, f"{split} accuracy, %")
    return drawn


def teacher_accuracy(run: Run) -> dict[str, float]:
    """{label: the teacher's accuracy}: on the validation split like the curves, or else on the table's, or {}."""
    validated = [row["validation_accuracy"] for row in run.metrics["teacher"] if row.get("validation_accuracy")]
    if validated:
        return {"teacher": validated[-1]}
    split = (run.results or {}).get("split", "test")
    tested = [row["accuracy"] for row in run.rows if row.get("name") == "teacher" and row.get("accuracy")]
    return {f"teacher ({split} split)": tested[0]} if tested else {}


def _loss(axes: Axes | None, run: Run) -> bool:
    drawn = _curves(axes, run, ("loss",), 1)
    if axes is not None and drawn:
        _finish(axes, "Training loss (distillation)")
    return drawn


def _has(run: Run, key: str) -> bool:
    return any(key in row for stage in ("search", "retrain") for row in run.metrics[stage])


def _curves(axes: Axes | None, run: Run, keys: Sequence[str], scale: float) -> bool:
    """Search, then retraining from where the student was cut; a baseline over the same steps from the start."""
    key = next((key for key in keys if _has(run, key)), None)
    if axes is None or key is None:
        return key is not None
    searched = max((row["step"] for row in run.metrics["search"]), default=0)
    cut = {str(point.get("name")): point.get("search_steps") for point in run.front.points} if run.front else {}
    for stage, rows in run.metrics.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        method, front = stage.partition("-")[::2]
        if points and stage != "teacher" and not (front and method != "at"):
            x, y = _thinned(np.array(points, float))
            first = (cut.get(stage) or searched) if method in ("retrain", "at") else 0
            style = {"uniform": "--", "magnitude": "-."}.get(method, "-")
            students = [name for name in run.metrics if name.startswith("at-")]
            strength = 1 - 0.75 * students.index(stage) / len(students) if front else 1.0
            axes.plot(
                first + x, scale * y, style, color=KEPT if front else STAGES[stage], alpha=strength, linewidth=1.6,
                label=label(stage),
            )  # fmt: skip
    return True


def _thinned(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points (n, 2): means of runs of neighbours."""
    parts = np.array_split(points, min(len(points), _MAX_POINTS))
    means = np.array([part.mean(0) for part in parts])
    return means[:, 0], means[:, 1]
