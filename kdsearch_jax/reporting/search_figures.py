"""Figures of a search: the architecture it found, when units were pruned, and the course of every gate.

Each function takes a `RunRecord` and a `Layout` and returns a figure, or None if the run has no data for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kdsearch_jax.reporting.figure_style import (
    EMPTY,
    KEPT,
    MUTED,
    PRUNED,
    PRUNED_AT_END,
    TEXT,
    Canvas,
    Layout,
    clean_axes,
    evenly_spaced,
    new_canvas,
    panel_title,
    patch_legend,
    plain_text,
    step_ticks,
)
from kdsearch_jax.reporting.run_record import RunRecord
from kdsearch_jax.reporting.unit_groups import PruneSteps, UnitGroup, merge_groups, short_names

MAX_PANELS = 60  # of gates; more groups share one heat map
_MAX_COLUMNS = 240  # recorded steps drawn across one panel of gates
_TIMELINE_COLUMNS = 120
_HATCHED = {"facecolor": PRUNED_AT_END, "hatch": "////", "edgecolor": "white", "linewidth": 0}


# --- the architecture -------------------------------------------------------------------------------------------------


def architecture(run: RunRecord, layout: Layout) -> Canvas | None:
    """A bar per group, as long as the teacher's layer is wide and filled as far as it is kept; deep networks merged.

    Lengths are to scale among groups of one kind. Next to it, the share of the teacher's MACs that runs through each.
    """
    return _architecture_bars(layout, merge_groups(architecture_groups(run)))


def architecture_by_layer(run: RunRecord, layout: Layout) -> Canvas | None:
    """The same with a bar for every group, if `architecture` merged some."""
    groups = architecture_groups(run)
    return None if merge_groups(groups) == groups else _architecture_bars(layout, groups)


def architecture_groups(run: RunRecord) -> tuple[UnitGroup, ...]:
    """The groups to draw: all within layers, and removed branches unless a group without units stands for them."""
    emptied = {layer for group in run.layer_groups if group.kept_count == 0 for layer in group.layers}
    return tuple(
        group
        for group in run.groups
        if group.kept is not None
        and (not group.is_branch or (group.kept_count == 0 and not emptied.intersection(group.layers)))
    )


def _architecture_bars(layout: Layout, groups: tuple[UnitGroup, ...]) -> Canvas | None:
    if not groups:
        return None
    height, font = (0.24, 9) if len(groups) <= 24 else (0.17, 8)
    canvas = new_canvas(layout, 1.0 + height * len(groups))
    has_macs = any(group.macs_share for group in groups)  # merged groups have none
    ratios = ((2.3 if layout.is_narrow else 2.6), 1)[: 1 + has_macs]
    left, *macs_axes = canvas.subplots(1, len(ratios), width_ratios=ratios, sharey=True, squeeze=False).ravel()
    names = short_names(groups)
    widest = {kind: max(g.size for g in groups if g.kind == kind) for kind in {g.kind for g in groups}}
    for y, group in enumerate(groups):
        _unit_bar(left, y, group, group.size / widest[group.kind], font)
        for axes in macs_axes if not group.is_branch else ():
            share = 100 * group.macs_share
            axes.barh(y, share, 0.68, color=EMPTY)
            axes.barh(y, share * group.kept_count / group.size, 0.68, color=KEPT)
    left.set_yticks(range(len(groups)), [plain_text(names[g.name], 18 if layout.is_narrow else 40) for g in groups])
    left.set_ylim(len(groups) - 0.4, -0.6)
    left.set_xlim(0, 1.24 if layout.is_narrow else 1.14)
    left.set_xticks([])
    panel_title(clean_axes(left), "Units kept / in the teacher", MUTED)
    left.tick_params(labelsize=font, labelcolor=TEXT)
    for axes in macs_axes:
        panel_title(clean_axes(axes), "MACs, %" if layout.is_narrow else "% of the teacher’s MACs", MUTED)
        axes.tick_params(left=False, labelleft=False)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    entries: list[tuple[str, dict[str, Any]]] = [("kept", {"color": KEPT}), ("pruned", {"color": EMPTY})]
    if any(group.kept_count == 0 for group in groups):
        entries.append(("whole branch pruned", {"facecolor": "none", "edgecolor": MUTED, "linestyle": "--"}))
    patch_legend(canvas, layout, entries)
    return canvas


def _unit_bar(axes: Axes, y: int, group: UnitGroup, width: float, font: float) -> None:
    if group.kept_count == 0:
        axes.barh(y, width, 0.62, facecolor="none", edgecolor=MUTED, linestyle="--", linewidth=0.9)
    else:
        axes.barh(y, width, 0.68, color=EMPTY)
        axes.barh(y, width * group.kept_count / group.size, 0.68, color=KEPT)
    label = "branch" if group.is_branch else f"{group.kept_count}/{group.size}"
    axes.text(width + 0.015, y, label, va="center", fontsize=font, color=TEXT)


# --- when units were pruned -------------------------------------------------------------------------------------------


def timeline(run: RunRecord, layout: Layout) -> Canvas | None:
    """A strip per group over the steps: the stronger a mark, the larger the share of the group pruned there."""
    return _timeline_strips(run, layout, merge_groups(_recorded(run)))


def timeline_by_layer(run: RunRecord, layout: Layout) -> Canvas | None:
    """The same with a strip for every group, if `timeline` merged some."""
    groups = _recorded(run)
    return None if merge_groups(groups) == groups else _timeline_strips(run, layout, groups)


def _recorded(run: RunRecord) -> tuple[UnitGroup, ...]:
    return tuple(group for group in run.layer_groups if group.gates is not None)


def _timeline_strips(run: RunRecord, layout: Layout, groups: tuple[UnitGroup, ...]) -> Canvas | None:
    pruned = [(group, steps) for group in groups if (steps := PruneSteps.of(group, run.history)) is not None]
    if run.history is None or len(run.history["steps"]) < 2 or not pruned:
        return None
    height, font = (0.25, 9) if len(pruned) <= 24 else (0.16, 6.5)
    canvas = new_canvas(layout, 0.9 + height * len(pruned))
    left, right = canvas.subplots(1, 2, width_ratios=(1.9, 1) if layout.is_narrow else (4.2, 1), sharey=True)
    first, last = run.history["steps"][[0, -1]]
    first = 0 if first < 0.2 * last else first
    bins = np.linspace(first, last, _TIMELINE_COLUMNS + 1)
    left.imshow(
        np.stack([_strip(steps, bins, group.size) for group, steps in pruned]),
        aspect="auto", interpolation="nearest", extent=(first, last, len(pruned) - 0.5, -0.5),
    )  # fmt: skip
    for y, (group, steps) in enumerate(pruned):
        _outcome_bar(right, y, group, steps, font)
        left.axhline(y + 0.5, color=MUTED, linewidth=0.3)
    panel_title(clean_axes(left), "Units pruned, by step", MUTED)
    panel_title(clean_axes(right), "Outcome", MUTED)
    names, limit = short_names([group for group, _ in pruned]), 15 if layout.is_narrow else 40
    left.set_yticks(range(len(pruned)), [plain_text(names[group.name], limit) for group, _ in pruned])
    left.tick_params(labelsize=font, labelcolor=TEXT)
    step_ticks(left, first, last)
    right.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    right.set_xlim(0, 1.75 if layout.is_narrow else 1.45)
    left.set_ylim(len(pruned) - 0.5, -0.5)
    entries: list[tuple[str, dict[str, Any]]] = [("kept", {"facecolor": KEPT})]
    entries.append(("pruned during the search", {"facecolor": PRUNED}))
    if any(steps.at_end.any() for _, steps in pruned):
        entries.append(("pruned at the end", _HATCHED))
    patch_legend(canvas, layout, entries)
    return canvas


def _strip(steps: PruneSteps, bins: np.ndarray, size: int) -> NDArray[np.floating]:
    """(columns, 4) RGBA colours."""
    counts = np.histogram(steps.pruned, bins)[0]
    strip = np.empty((len(counts), 4))
    strip[:] = EMPTY[:3] + (0.1,)
    strip[counts > 0, :3] = to_rgb(PRUNED)
    strip[counts > 0, 3] = 0.5 + 0.5 * np.sqrt(counts[counts > 0] / size)
    return strip


def _outcome_bar(axes: Axes, y: int, group: UnitGroup, steps: PruneSteps, font: float) -> None:
    kept, at_end = group.kept_count / group.size, int(steps.at_end.sum()) / group.size
    axes.barh(y, kept, 0.62, color=KEPT)
    axes.barh(y, 1 - kept - at_end, 0.62, left=kept, color=PRUNED)
    if at_end:
        axes.barh(y, at_end, 0.62, left=1 - at_end, **_HATCHED)
    axes.text(1.04, y, f"{group.kept_count}/{group.size}", va="center", fontsize=font, color=TEXT)


# --- the gates --------------------------------------------------------------------------------------------------------


def gates(run: RunRecord, layout: Layout) -> Canvas | None:
    """The gate of every unit over the search: a row per unit, kept ones at the bottom.

    Hue distinguishes kept from pruned units, opacity is the gate relative to the largest of its group, zero is grey.
    """
    groups = list(_recorded(run))
    branches = [group for group in run.branch_groups if group.gates is not None]
    if run.history is None or len(run.history["steps"]) < 2 or not groups + branches:
        return None
    if len(groups) > MAX_PANELS:
        return _share_of_positive_gates(run, layout, groups)
    names = short_names(groups)
    images = [_gate_image(group) for group in groups]
    titles = [names[group.name] for group in groups]
    if branches:
        images.append(np.concatenate([_gate_image(branch) for branch in branches]))
        titles.append("residual branches")
    columns = _panel_columns(layout, titles)
    rows = math.ceil(len(images) / columns)
    canvas = new_canvas(layout, 0.6 + rows * (1.5 if columns * rows <= 12 and not layout.is_narrow else 1.05))
    grid = canvas.subplots(rows, columns, squeeze=False).ravel()
    steps = run.history["steps"]
    letters = (52 if layout.is_narrow else 120) // columns  # that fit above a panel
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=(steps[0], steps[-1], len(image), 0))
        clean_axes(axes).set_title(
            plain_text(title, letters), loc="left", fontsize=7.5 if layout.is_narrow else 8.5, color=TEXT
        )
        axes.set_yticks([])
        axes.set_xticks([])
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    step_ticks(grid[(rows - 1) * columns], steps[0], steps[-1])
    entries = {"gate of a kept unit": KEPT, "gate of a pruned unit": PRUNED, "zero": EMPTY}
    patch_legend(canvas, layout, [(label, {"color": colour}) for label, colour in entries.items()])
    return canvas


def _panel_columns(layout: Layout, titles: list[str]) -> int:
    is_long = max(map(len, titles)) > (17 if layout.is_narrow else 20)
    limit = 3 - is_long if layout.is_narrow else 3 if len(titles) <= 12 else 6 - 2 * is_long
    return min(len(titles), limit)


def _gate_image(group: UnitGroup) -> np.ndarray:
    """Gates as colours, units sorted by when they were pruned: (size, columns, 4) in [0, 1]."""
    assert group.gates is not None and group.kept is not None
    order = np.lexsort((group.gates[-1], group.last_positive(), group.kept))
    values = np.maximum(group.gates[evenly_spaced(len(group.gates), _MAX_COLUMNS)][:, order].T, 0)
    image = np.empty((*values.shape, 4))
    image[..., :3] = np.where(group.kept[order][:, None], to_rgb(KEPT), to_rgb(PRUNED))[:, None]
    image[..., 3] = 0.4 + 0.6 * np.sqrt(values / max(float(values.max()), 1e-12))
    image[values == 0] = EMPTY
    return image


def _share_of_positive_gates(run: RunRecord, layout: Layout, groups: list[UnitGroup]) -> Canvas:
    """For networks with very many groups: a row per group, coloured by the share of its gates above zero."""
    assert run.history is not None
    steps = run.history["steps"]
    columns = evenly_spaced(len(steps), _MAX_COLUMNS)
    share = np.stack([(group.gates[columns] > 0).mean(1) for group in groups if group.gates is not None])
    empty, kept = np.array(EMPTY), np.array(to_rgba(KEPT))
    canvas = new_canvas(layout, 1.0 + 0.11 * len(groups))
    axes = clean_axes(canvas.subplots())
    image = empty + share[..., None] * (kept - empty)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(steps[0], steps[-1], len(groups), 0))
    names, limit = short_names(groups), 18 if layout.is_narrow else 40
    axes.set_yticks(np.arange(len(groups)) + 0.5, [plain_text(names[group.name], limit) for group in groups])
    step_ticks(axes, steps[0], steps[-1])
    axes.tick_params(axis="y", labelsize=6.5, labelcolor=TEXT)
    patch_legend(canvas, layout, [("all gates above zero", {"color": KEPT}), ("none", {"color": EMPTY})])
    return canvas
