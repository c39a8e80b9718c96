"""The figures of a comparison: who is how good, by how much the search leads, and at what cost."""

from __future__ import annotations

import statistics
import textwrap

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kdsearch_jax.reporting.comparison import OURS, Comparison, Row
from kdsearch_jax.reporting.look import INK, KEPT, REMOVED, SOFT, Canvas, Look, bare, blank, plain

_OTHERS = (REMOVED, "#009e73", "#cc79a7", "#8a6d00", "#7a7f87")  # told apart by the marker as well
_MARKS = "sD^vP*X<>hdp"
_SPAN = 4.0  # points of cost that an axis shows at least


def floor(rows: tuple[Row, ...]) -> float:
    """The accuracy, in %, below which a row is told at the margin, so that one far off does not squash the others."""
    means = [100 * mean for row in rows if (mean := row.mean("accuracy")) is not None]
    best = max(means)
    low = best - max(3 * (best - statistics.median(means)), 1.0)
    return min((mean for mean in means if mean >= low), default=best)


def ranking(comparison: Comparison, look: Look) -> Canvas | None:
    """Accuracy of every row with its seeds, and the searched row minus it with the interval."""
    rows = comparison.rows
    if not rows:
        return None
    differences = bool(comparison.differences)
    height = 0.55 + (0.42 if look.narrow else 0.36) * len(rows)
    parts = 1 + differences
    body = blank(look, height * parts + 0.2 if look.narrow else height + 0.3)
    lines, columns = (parts, 1) if look.narrow else (1, parts)
    grid = body.subplots(lines, columns, squeeze=False, sharey=not look.narrow).ravel()
    names = ["\n".join(textwrap.wrap(plain(row.label), 19 if look.narrow else 34)) for row in rows]
    for axes in grid:
        bare(axes, ("bottom",)).set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(axis="y", labelsize=8.5, labelcolor=INK, length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    _accuracies(grid[0], comparison)
    if differences:
        _leads(grid[1], comparison, None if look.narrow else grid[0])
    return body


def _accuracies(axes: Axes, comparison: Comparison) -> None:
    rows = comparison.rows
    low = floor(rows)
    shown = [
        100 * v
        for row in rows
        for v in row.values["accuracy"]
        if v is not None and 100 * (row.mean("accuracy") or 0) >= low
    ]
    teacher = comparison.teacher.get("accuracy")
    ends = [*shown, 100 * teacher] if teacher is not None else shown
    start, high = min(ends), max(ends)
    span = max(high - start, 0.5)
    axes.set_xlim(start - 0.12 * span, high + 0.06 * span)
    for y, row in enumerate(rows):
        colour = KEPT if row.name == OURS else SOFT
        mean, std = 100 * (row.mean("accuracy") or 0), row.std("accuracy")
        if mean < low:
            axes.annotate(
                f"◂ {mean:.1f}", (0, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK
            )
            continue
        if std is not None:
            axes.plot(
                [mean - 100 * std, mean + 100 * std],
                [y, y],
                color=colour,
                linewidth=3,
                alpha=0.35,
                solid_capstyle="butt",
            )
        values = [100 * v for v in row.values["accuracy"] if v is not None]
        axes.plot(values, [y] * len(values), "o", color=colour, markersize=4, alpha=0.7, linestyle="")
        axes.plot([mean], [y], "|", color=colour, markersize=13, markeredgewidth=2.5)
    if teacher is not None:
        axes.axvline(100 * teacher, color=SOFT, linewidth=1, linestyle=":")
        axes.annotate(
            " teacher ",
            (100 * teacher, 1),
            xycoords=("data", "axes fraction"),
            ha="left" if 100 * teacher < start + 0.5 * span else "right",
            va="top",
            fontsize=8,
            color=SOFT,
        )
    axes.set_title("Accuracy, %", loc="left", fontsize=9.5, color=INK)


def _leads(axes: Axes, comparison: Comparison, beside: Axes | None) -> None:
    known = {y: d for y, row in enumerate(comparison.rows) if (d := comparison.differences.get(row.name)) is not None}
    low = floor(comparison.rows)
    near = {y: d for y, d in known.items() if 100 * (comparison.rows[y].mean("accuracy") or 0) >= low} or known
    ends = [100 * v for d in near.values() for v in (*d.each, d.mean) if v is not None]
    ends += [100 * v for d in near.values() for v in (d.low, d.high) if v is not None]
    span = max(max([*ends, 0]) - min([*ends, 0]), 0.5)
    axes.set_xlim(min([*ends, 0]) - 0.06 * span, max([*ends, 0]) + 0.12 * span)
    axes.axvline(0, color=SOFT, linewidth=1)
    for y, d in known.items():
        if y not in near:
            axes.annotate(
                f"{100 * d.mean:+.1f} ▸",
                (1, y),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=8.5,
                color=INK,
            )
            continue
        sure = d.low is not None and d.high is not None and (d.low > 0 or d.high < 0)
        colour = KEPT if d.mean > 0 else REMOVED
        if d.low is not None and d.high is not None:
            axes.plot(
                [100 * d.low, 100 * d.high], [y, y], color=colour, linewidth=2, linestyle="-" if sure else (0, (2, 1.5))
            )
        axes.plot([100 * v for v in d.each], [y] * len(d.each), "o", color=colour, markersize=4, alpha=0.6)
        axes.plot([100 * d.mean], [y], "|", color=colour, markersize=13, markeredgewidth=2.5)
    axes.set_title("Searched minus this row, points", loc="left", fontsize=9.5, color=INK)
    if beside is not None:
        axes.tick_params(labelleft=False)


def _cost(comparison: Comparison, row: Row, key: str) -> float | None:
    mean, whole = row.mean(key), comparison.teacher.get(key)
    return 100 * mean / whole if mean is not None and whole else None


def tradeoff(comparison: Comparison, look: Look) -> Canvas | None:
    """Accuracy against MACs and against parameters: mean and standard deviation of each row."""
    keys = [key for key in ("macs", "params") if any(_cost(comparison, row, key) for row in comparison.rows)]
    if not keys:
        return None
    low = floor(comparison.rows)
    near = [row for row in comparison.rows if 100 * (row.mean("accuracy") or 0) >= low]
    legend = 0.2 * -(-len(near) // (1 if look.narrow else 3))
    body = blank(look, (2.7 * len(keys) if look.narrow else 3.1) + legend)
    lines, columns = (len(keys), 1) if look.narrow else (1, len(keys))
    grid = body.subplots(lines, columns, squeeze=False, sharey=not look.narrow).ravel()
    others = iter([(mark, _OTHERS[i % len(_OTHERS)]) for i, mark in enumerate(_MARKS * 3)])
    handles = []
    for row in near:
        mark, colour = ("o", KEPT) if row.name == OURS else next(others)
        size = 9 if row.name == OURS else 6.5
        for axes, key in zip(grid, keys, strict=True):
            if (x := _cost(comparison, row, key)) is not None:
                mean, std = 100 * (row.mean("accuracy") or 0), 100 * (row.std("accuracy") or 0)
                axes.errorbar(
                    x,
                    mean,
                    std,
                    fmt=mark,
                    color=colour,
                    markersize=size,
                    elinewidth=1.2,
                    zorder=3 if row.name == OURS else 2,
                )
        handles.append(
            Line2D([], [], marker=mark, linestyle="", color=colour, markersize=size, label=plain(row.label, 44))
        )
    for axes, key in zip(grid, keys, strict=True):
        bare(axes, ("left", "bottom")).set_title("Accuracy, %, of the students", loc="left", fontsize=9.5, color=INK)
        noun = {"macs": "MACs", "params": "parameters"}[key]
        axes.set_xlabel(f"{noun}, % of the teacher’s", fontsize=8.5, color=SOFT, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(0.12, 0.15)
        low, high = axes.get_xlim()
        if high - low < _SPAN:  # costs that are equal but for rounding must not look different
            axes.set_xlim((low + high - _SPAN) / 2, (low + high + _SPAN) / 2)
    body.legend(
        handles=handles,
        loc="outside upper left",
        ncols=1 if look.narrow else 3,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderpad=0.4,
        handletextpad=0.4,
    )
    return body
