"""Figures of a comparison: accuracy of every method, the search's lead over each, and accuracy against cost.

Each function takes a `ComparisonRecord` and a `Layout` and returns a figure, or None if there is no data for it.
"""

from __future__ import annotations

import statistics
import textwrap

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kdsearch_jax.reporting.comparison_record import SEARCHED, ComparisonRecord, MethodResults, PairedDifference
from kdsearch_jax.reporting.figure_style import (
    KEPT,
    MUTED,
    PRUNED,
    TEXT,
    Canvas,
    Layout,
    clean_axes,
    new_panels,
    panel_title,
    plain_text,
    x_label,
)

_COLOURS = (PRUNED, "#009e73", "#cc79a7", "#8a6d00", "#7a7f87")  # of other methods, which markers distinguish as well
_MARKERS = "sD^vP*X<>hdp"
_COSTS = {"macs": "MACs", "params": "parameters"}
_MIN_COST_SPAN = 4.0  # points of cost that an axis shows at least


def accuracy_floor(methods: tuple[MethodResults, ...]) -> float:
    """The accuracy, in %, below which a method is only noted at the edge, so that it does not compress the others."""
    means = [100 * method.accuracy for method in methods]
    best = max(means)
    floor = best - max(3 * (best - statistics.median(means)), 1.0)
    return min(mean for mean in means if mean >= floor)


def _is_shown(comparison: ComparisonRecord, method: MethodResults) -> bool:
    return 100 * method.accuracy >= accuracy_floor(comparison.methods)


def ranking(comparison: ComparisonRecord, layout: Layout) -> Canvas | None:
    """Accuracy of every method with its seeds, and the lead of the search over it with an interval."""
    methods = comparison.methods
    if not methods:
        return None
    height = 0.7 + (0.42 if layout.is_narrow else 0.36) * len(methods)
    canvas, panels = new_panels(layout, 1 + bool(comparison.differences), height, share_y=True)
    names = ["\n".join(textwrap.wrap(plain_text(m.label), 19 if layout.is_narrow else 34)) for m in methods]
    for axes in panels:
        clean_axes(axes, ("bottom",)).set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticks(range(len(methods)), names)
        axes.tick_params(axis="y", labelsize=8.5, labelcolor=TEXT, length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    _draw_accuracies(panels[0], comparison)
    if comparison.differences:
        _draw_leads(panels[1], comparison)
        panels[1].tick_params(labelleft=layout.is_narrow)
    return canvas


def _draw_accuracies(axes: Axes, comparison: ComparisonRecord) -> None:
    shown = [method for method in comparison.methods if _is_shown(comparison, method)]
    ends = [100 * value for method in shown for value in method.values["accuracy"] if value is not None]
    teacher = comparison.teacher.get("accuracy")
    if teacher is not None:
        ends.append(100 * teacher)
    low, high = min(ends), max(ends)
    span = max(high - low, 0.5)
    axes.set_xlim(low - 0.12 * span, high + 0.06 * span)
    for y, method in enumerate(comparison.methods):
        mean, std = 100 * method.accuracy, method.std("accuracy")
        if method not in shown:
            _note_at_edge(axes, y, 0, f"◂ {mean:.1f}")
            continue
        colour = KEPT if method.name == SEARCHED else MUTED
        if std is not None:
            band = [mean - 100 * std, mean + 100 * std]
            axes.plot(band, [y, y], color=colour, linewidth=3, alpha=0.35, solid_capstyle="butt")
        _draw_seeds(axes, y, [v for v in method.values["accuracy"] if v is not None], method.accuracy, colour)
    if teacher is not None:
        axes.axvline(100 * teacher, color=MUTED, linewidth=1, linestyle=":")
        axes.annotate(
            " teacher ", (100 * teacher, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color=MUTED,
            ha="left" if 100 * teacher < low + 0.5 * span else "right",
        )  # fmt: skip
    panel_title(axes, "Accuracy, %")


def _draw_leads(axes: Axes, comparison: ComparisonRecord) -> None:
    leads = {
        y: (comparison.differences[method.name], _is_shown(comparison, method))
        for y, method in enumerate(comparison.methods)
        if method.name in comparison.differences
    }
    shown = [lead for lead, is_shown in leads.values() if is_shown] or [lead for lead, _ in leads.values()]
    ends = [100 * v for lead in shown for v in (*lead.per_seed, lead.mean, *(lead.interval or ()))]
    low, high = min([*ends, 0]), max([*ends, 0])
    span = max(high - low, 0.5)
    axes.set_xlim(low - 0.06 * span, high + 0.12 * span)
    axes.axvline(0, color=MUTED, linewidth=1)
    for y, (lead, _) in leads.items():
        if lead in shown:
            _draw_lead(axes, y, lead)
        else:
            _note_at_edge(axes, y, 1, f"{100 * lead.mean:+.1f} ▸")
    panel_title(axes, "Lead of the search, points")


def _draw_lead(axes: Axes, y: int, lead: PairedDifference) -> None:
    colour = KEPT if lead.mean > 0 else PRUNED
    if lead.interval is not None:
        style = "-" if lead.is_significant else (0, (2, 1.5))
        axes.plot([100 * end for end in lead.interval], [y, y], color=colour, linewidth=2, linestyle=style)
    _draw_seeds(axes, y, lead.per_seed, lead.mean, colour)


def _draw_seeds(axes: Axes, y: int, shares: tuple[float, ...] | list[float], mean: float, colour: str) -> None:
    axes.plot([100 * v for v in shares], [y] * len(shares), "o", color=colour, markersize=4, alpha=0.65)
    axes.plot([100 * mean], [y], "|", color=colour, markersize=13, markeredgewidth=2.5)


def _note_at_edge(axes: Axes, y: int, side: int, text: str) -> None:
    axes.annotate(
        text, (side, y), xycoords=("axes fraction", "data"), ha="right" if side else "left", va="center", fontsize=8.5,
        color=TEXT,
    )  # fmt: skip


def cost_tradeoff(comparison: ComparisonRecord, layout: Layout) -> Canvas | None:
    """Accuracy against MACs and against parameters: mean and standard deviation of each method."""
    methods = [method for method in comparison.methods if _is_shown(comparison, method)] if comparison.methods else []
    costs = [cost for cost in _COSTS if any(_cost(comparison, method, cost) for method in methods)]
    if not costs:
        return None
    columns = 1 if layout.is_narrow else 3
    legend = 0.2 * -(-len(methods) // columns)
    height = 2.7 + legend / len(costs) if layout.is_narrow else 3.1 + legend
    canvas, panels = new_panels(layout, len(costs), height, share_y=True)
    styles = iter([(marker, _COLOURS[i % len(_COLOURS)]) for i, marker in enumerate(_MARKERS * 3)])
    handles = []
    for method in methods:
        is_searched = method.name == SEARCHED
        marker, colour = ("o", KEPT) if is_searched else next(styles)
        size = 9 if is_searched else 6.5
        for axes, cost in zip(panels, costs, strict=True):
            if (x := _cost(comparison, method, cost)) is not None:
                axes.errorbar(
                    x, 100 * method.accuracy, 100 * (method.std("accuracy") or 0), fmt=marker, color=colour,
                    markersize=size, elinewidth=1.2, zorder=3 if is_searched else 2,
                )  # fmt: skip
        label = plain_text(method.label, 44)
        handles.append(Line2D([], [], marker=marker, linestyle="", color=colour, markersize=size, label=label))
    for axes, cost in zip(panels, costs, strict=True):
        _finish_cost_panel(axes, cost)
    canvas.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5, labelcolor=TEXT,
        borderpad=0.4, handletextpad=0.4,
    )  # fmt: skip
    return canvas


def _cost(comparison: ComparisonRecord, method: MethodResults, cost: str) -> float | None:
    mean, whole = method.mean(cost), comparison.teacher.get(cost)
    return 100 * mean / whole if mean is not None and whole else None


def _finish_cost_panel(axes: Axes, cost: str) -> None:
    panel_title(clean_axes(axes, ("left", "bottom")), "Accuracy of the students, %")
    x_label(axes, f"{_COSTS[cost]}, % of the teacher’s")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(0.12, 0.15)
    low, high = axes.get_xlim()
    if high - low < _MIN_COST_SPAN:  # costs that differ only by rounding must not look different
        axes.set_xlim((low + high - _MIN_COST_SPAN) / 2, (low + high + _MIN_COST_SPAN) / 2)
