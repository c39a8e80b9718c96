"""Figures of a run's results: training curves, students of several budgets, confusion matrices, and examples.

Each function takes a `RunRecord` and a `Layout` and returns a figure, or None if the run has no data for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from kdsearch_jax.reporting.figure_style import (
    KEPT,
    MUTED,
    PRUNED,
    STAGE_COLOURS,
    TEXT,
    Canvas,
    Layout,
    clean_axes,
    new_canvas,
    new_panels,
    panel_title,
    patch_legend,
    plain_text,
    x_label,
)
from kdsearch_jax.reporting.predictions import Predictions, confusion_matrix
from kdsearch_jax.reporting.run_record import BudgetSweep, RunRecord

MAX_CONFUSION_CLASSES = 256  # above, a picture shows nothing
_NAMED_CLASSES, _NUMBERED_CLASSES = 20, 10  # that fit as names along an axis, and as numbers into cells
_OPACITY_UNDER_TEXT = 0.55
_MAX_POINTS = 200  # of one curve; more are averaged
_FEW_POINTS = 10  # of one curve, which then has markers
_STAGE_LABELS = {"search": "search", "retrain": "student (retraining)", "uniform": "uniform baseline",
                 "magnitude": "magnitude baseline"}  # fmt: skip
_SWEEP_COSTS = {"macs": "MACs", "params": "parameters", "ms_per_image": "time per example"}
_SWEEP_MARKERS = "sD^vP*X"


# --- training curves --------------------------------------------------------------------------------------------------


def stage_label(stage: str) -> str:
    """A training stage's name for readers."""
    method, dash, budget = stage.partition("-")
    return f"{'student' if method == 'at' else method} at {budget}" if dash else _STAGE_LABELS.get(stage, stage)


def training(run: RunRecord, layout: Layout) -> Canvas | None:
    """Search cost against the budget, λ2, accuracy and loss, over the steps of all stages."""
    panels = [panel for panel in (_cost, _lambda2, _accuracy, _loss) if panel(None, run)]
    if not panels:
        return None
    columns = 1 if layout.is_narrow or len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    canvas = new_canvas(layout, 2.5 * rows)
    grid = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        axes.margins(x=0.01)
        panel(clean_axes(axes, ("left", "bottom")), run)
        axes.set_xlim(left=0)
        x_label(axes, "step")
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT, handlelength=1.4, loc="best")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return canvas


def _cost(axes: Axes | None, run: RunRecord) -> bool:
    """Draws a panel. Like the others, returns whether there is anything to draw; without axes, it only returns that."""
    history = run.history or {}
    costs = [(name, history[f"cost_{name}"]) for name in ("macs", "params") if f"cost_{name}" in history]
    if axes is None or not costs:
        return bool(costs)
    budgets = run.budget_shares()
    for (name, values), colour, style in zip(costs, (KEPT, STAGE_COLOURS["uniform"]), ("-", "-."), strict=False):
        label = {"macs": "MACs", "params": "parameters"}[name]
        axes.plot(history["steps"], 100 * values, style, color=colour, linewidth=1.8, label=label)
        for budget in budgets.get(name, ()):
            axes.axhline(100 * budget, color=colour, linewidth=1, linestyle=":")
            axes.annotate(
                f"budget {100 * budget:.3g}%", (0.02, 100 * budget), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", fontsize=8.5, color=TEXT,
            )  # fmt: skip
    axes.set_ylim(0, 105)
    panel_title(axes, "Cost during the search, % of the teacher’s")
    return True


def _lambda2(axes: Axes | None, run: RunRecord) -> bool:
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
    axes.plot(history["steps"], values, color=PRUNED, linewidth=1.8)
    axes.set_xlim(right=history["steps"][-1])
    panel_title(axes, "Penalty strength λ2 during the search")
    return True


def _accuracy(axes: Axes | None, run: RunRecord) -> bool:
    has_curves = _curves(axes, run, ("validation_accuracy", "accuracy"), 100)
    if axes is not None and has_curves:
        for label, accuracy in teacher_accuracy(run).items():
            axes.axhline(100 * accuracy, color=MUTED, linewidth=1, linestyle=":", label=label)
        panel_title(axes, f"{'Validation' if _is_logged(run, 'validation_accuracy') else 'Training'} accuracy, %")
    return has_curves


def teacher_accuracy(run: RunRecord) -> dict[str, float]:
    """{label: accuracy} of the teacher, on the validation split like the curves, or else as in the results; or {}."""
    validated = [row["validation_accuracy"] for row in run.metrics["teacher"] if row.get("validation_accuracy")]
    if validated:
        return {"teacher": validated[-1]}
    accuracy = run.row("teacher").get("accuracy")
    return {f"teacher ({(run.results or {}).get('split', 'test')} split)": accuracy} if accuracy else {}


def _loss(axes: Axes | None, run: RunRecord) -> bool:
    has_curves = _curves(axes, run, ("loss",), 1)
    if axes is not None and has_curves:
        panel_title(axes, "Training loss (distillation)")
    return has_curves


def _is_logged(run: RunRecord, key: str) -> bool:
    return any(key in row for stage in ("search", "retrain") for row in run.metrics[stage])


def _curves(axes: Axes | None, run: RunRecord, keys: Sequence[str], scale: float) -> bool:
    """The search, each student's retraining from the step it was cut at, and the baselines from the start."""
    key = next((key for key in keys if _is_logged(run, key)), None)
    if axes is None or key is None:
        return key is not None
    search_end = max((row["step"] for row in run.metrics["search"]), default=0)
    cut_at = {str(row.get("name")): row.get("search_steps") for row in run.sweep.students} if run.sweep else {}
    sweep_stages = [name for name in run.metrics if name.startswith("at-")]
    for stage, rows in run.metrics.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        method, budget = stage.partition("-")[::2]
        if not points or stage == "teacher" or (budget and method != "at"):
            continue
        x, y = _thin_out(np.array(points, float))
        start = (cut_at.get(stage) or search_end) if method in ("retrain", "at") else 0
        axes.plot(
            start + x, scale * y, {"uniform": "--", "magnitude": "-."}.get(method, "-"),
            color=KEPT if budget else STAGE_COLOURS[stage], linewidth=1.6, label=stage_label(stage),
            alpha=1 - 0.75 * sweep_stages.index(stage) / len(sweep_stages) if budget else 1.0,
            marker="o" if len(x) <= _FEW_POINTS else None, markersize=4,
        )  # fmt: skip
    return True


def _thin_out(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of at most `_MAX_POINTS` points out of (n, 2): means of neighbours."""
    chunks = np.array_split(points, min(len(points), _MAX_POINTS))
    means = np.array([chunk.mean(0) for chunk in chunks])
    return means[:, 0], means[:, 1]


# --- several budgets --------------------------------------------------------------------------------------------------


def budget_sweep(run: RunRecord, layout: Layout) -> Canvas | None:
    """Accuracy of the students of several budgets against MACs, parameters and time, in % of the teacher's."""
    sweep = run.sweep
    if sweep is None or sweep.teacher.get("accuracy") is None:
        return None
    costs = [key for key in _SWEEP_COSTS if sweep.teacher.get(key) and any(_has(row, key) for row in sweep.students)]
    if not costs:
        return None
    canvas, panels = new_panels(layout, len(costs), 2.9 if layout.is_narrow else 3.4, share_y=True)
    for axes, cost in zip(panels, costs, strict=True):
        _sweep_panel(clean_axes(axes, ("left", "bottom")), sweep, cost)
        panel_title(axes, f"Accuracy, %, against {_SWEEP_COSTS[cost]}")
        x_label(axes, f"{_SWEEP_COSTS[cost]}, % of the teacher’s")
    panels[0].legend(frameon=False, fontsize=8.5, labelcolor=TEXT, loc="lower right")
    return canvas


def _has(row: dict[str, Any], cost: str) -> bool:
    return row.get("accuracy") is not None and row.get(cost) is not None


def _sweep_panel(axes: Axes, sweep: BudgetSweep, cost: str) -> None:
    """Points are joined if the cost falls from budget to budget, which time need not do."""
    whole = sweep.teacher[cost]
    for number, (method, rows) in enumerate({"searched": sweep.students, **sweep.baselines}.items()):
        is_searched = number == 0
        known = [row for row in rows if _has(row, cost)]
        axes.plot(
            [100 * row[cost] / whole for row in known],
            [100 * row["accuracy"] for row in known],
            linestyle="none" if cost == "ms_per_image" else "-" if is_searched else "--",
            marker="o" if is_searched else _SWEEP_MARKERS[number - 1],
            color=KEPT if is_searched else STAGE_COLOURS.get(method, MUTED),
            linewidth=1.6,
            markersize=6,
            label=method,
        )
    axes.axhline(100 * sweep.teacher["accuracy"], color=MUTED, linewidth=1, linestyle=":", label="teacher")
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))


# --- confusion --------------------------------------------------------------------------------------------------------


def confusion(run: RunRecord, layout: Layout) -> Canvas | None:
    """Confusion matrices of the teacher and of the student, and their difference."""
    predictions = run.predictions
    if predictions is None or len(predictions.class_names) > MAX_CONFUSION_CLASSES:
        return None
    teacher, student = (_row_shares(confusion_matrix(predictions, name)) for name in ("teacher", predictions.student))
    canvas, panels = new_panels(layout, 3, 3.53 if layout.is_narrow else 3.7)
    classes = len(predictions.class_names)
    diagonal = np.eye(classes, dtype=bool)
    sign = np.where(diagonal, 1, -1)
    opacity = _OPACITY_UNDER_TEXT if classes <= _NUMBERED_CLASSES else 1.0
    largest_error = max(float((shares * ~diagonal).max()) for shares in (teacher, student)) or 1.0
    for axes, shares, name in zip(panels, (teacher, student), ("Teacher", "Student"), strict=False):
        _matrix(axes, shares * sign, np.where(diagonal, 1.0, largest_error), opacity)
        _label_matrix(axes, predictions, f"{name}, % of each class", shares, "{:.0f}")
    change = student - teacher
    _matrix(panels[2], change * sign, np.full_like(change, np.abs(change).max() or 1.0), opacity)
    _label_matrix(panels[2], predictions, "Student minus teacher, points", change, "{:+.0f}")
    patch_legend(canvas, layout, [("correct, or better than the teacher", {"color": KEPT}),
                                  ("wrong, or worse than the teacher", {"color": PRUNED})])  # fmt: skip
    return canvas


def _row_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _matrix(axes: Axes, signed: np.ndarray, largest: np.ndarray, opacity: float) -> None:
    """Cells coloured blue above zero and orange below; opacity grows with the root of the share of `largest`."""
    image = np.empty((*signed.shape, 4))
    image[..., :3] = np.where(signed[..., None] > 0, to_rgb(KEPT), to_rgb(PRUNED))
    image[..., 3] = opacity * np.sqrt(np.minimum(np.abs(signed) / largest, 1))
    clean_axes(axes).imshow(image, interpolation="nearest")
    axes.spines[:].set_visible(True)
    axes.spines[:].set_linewidth(0.6)


def _label_matrix(axes: Axes, predictions: Predictions, title: str, values: np.ndarray, form: str) -> None:
    classes = len(predictions.class_names)
    panel_title(axes, title)
    axes.set_xlabel("predicted class", fontsize=8.5, color=MUTED)
    axes.set_ylabel("label", fontsize=8.5, color=MUTED)
    if classes <= _NAMED_CLASSES:
        names = [plain_text(name, 11) for name in predictions.class_names]
        axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(classes), names)
        axes.tick_params(labelsize=7.5 if classes <= 12 else 6.5, labelcolor=TEXT)
    if classes <= _NUMBERED_CLASSES:
        for (row, column), value in np.ndenumerate(values):
            if abs(100 * value) >= 0.5:
                text = form.format(100 * value).replace("-", "−")
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=TEXT)


# --- examples ---------------------------------------------------------------------------------------------------------


def examples(run: RunRecord, layout: Layout) -> Canvas | None:
    """The examples on which student and teacher differ most, as one picture for slides; None without images."""
    predictions = run.predictions
    if predictions is None or predictions.images is None or not len(predictions.selected):
        return None
    columns = 3 if layout.is_narrow else 6
    count = min(len(predictions.selected), 4 * columns)
    rows = -(-count // columns)
    canvas = new_canvas(layout, 2.15 * rows)
    for i, axes in enumerate(canvas.subplots(rows, columns, squeeze=False).ravel()):
        axes.set_axis_off()
        if i >= count:
            continue
        image = predictions.images[i]
        label = predictions.selected_labels[i]
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(plain_text(predictions.class_names[label], 18), fontsize=9, color=TEXT, fontweight="bold")
        for line, network in enumerate(("teacher", "student")):
            top, probability = predictions.top_classes[network][i][0], predictions.top_probabilities[network][i][0]
            mark, name = "✓" if top == label else "✗", plain_text(predictions.class_names[top], 12)
            axes.text(0.5, -0.03 - 0.13 * line, f"{network} {mark} {name} {probability:.0%}",
                      transform=axes.transAxes, ha="center", va="top", fontsize=8, color=TEXT)  # fmt: skip
    return canvas
