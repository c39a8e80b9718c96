"""The figures of what was found: the architecture, and the gates' paths to it.

Each function takes a `Run` and a `Look` and returns a matplotlib figure, or None where the run has nothing to show.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.ticker import MaxNLocator

from kdsearch_jax.reporting import deaths
from kdsearch_jax.reporting.look import GONE, INK, KEPT, REMOVED, SOFT, Canvas, Look, bare, blank, legend, plain
from kdsearch_jax.reporting.merging import PANELS, merged
from kdsearch_jax.reporting.record import Group, Run, short_names

_MAX_COLUMNS = 240  # recorded steps drawn across one panel of gates


# --- the architecture -------------------------------------------------------------------------------------------------


def architecture(run: Run, look: Look) -> Canvas | None:
    """A bar per group: as long as the teacher's units, filled as far as they are kept.

    Lengths are to scale among groups of one kind. Beside it, how much of the teacher's MACs runs through the group.
    """
    return bars(look, merged(architecture_rows(run)))


def every(run: Run, look: Look) -> Canvas | None:
    """The same with a bar for each group, where `architecture` has merged some."""
    rows = architecture_rows(run)
    return None if merged(rows) == rows else bars(look, rows)


def bars(look: Look, rows: tuple[Group, ...]) -> Canvas | None:
    """The figure for these groups, without MACs where none has a share of its own; None where there are none."""
    if not rows:
        return None
    height = 0.24 if len(rows) <= 24 else 0.17
    font = 9 if len(rows) <= 24 else 8
    figure = blank(look, 1.0 + height * len(rows))
    costed = any(group.macs_share for group in rows)
    ratios = ((2.3 if look.narrow else 2.6), 1)[: 1 + costed]
    left, *beside = figure.subplots(1, len(ratios), width_ratios=ratios, sharey=True, squeeze=False).ravel()
    names = short_names(rows)
    longest = {kind: max(g.size for g in rows if g.kind == kind) for kind in {g.kind for g in rows}}
    for y, group in enumerate(rows):
        _bar(left, y, group, group.size / longest[group.kind], font)
        for right in beside if group.kind != "branches" else ():
            share = 100 * group.macs_share
            right.barh(y, share, 0.68, color=GONE)
            right.barh(y, share * group.kept_units / group.size, 0.68, color=KEPT)
    left.set_yticks(range(len(rows)), [plain(names[group.name], 18 if look.narrow else 40) for group in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(0, 1.24 if look.narrow else 1.14)
    left.set_xticks([])
    bare(left).set_title("Units kept / in the teacher", loc="left", fontsize=9.5, color=SOFT)
    left.tick_params(labelsize=font, labelcolor=INK)
    for right in beside:
        title = "MACs, %" if look.narrow else "% of teacher’s MACs"
        bare(right).set_title(title, loc="left", fontsize=9.5, color=SOFT)
        right.tick_params(left=False, labelleft=False)
        right.xaxis.set_major_locator(MaxNLocator(3))
    entries = [("kept", {"color": KEPT}), ("removed", {"color": GONE})]
    if any(group.kept_units == 0 for group in rows):
        entries.append(("nothing left: branch removed", {"facecolor": "none", "edgecolor": SOFT, "linestyle": "--"}))
    legend(figure, look, entries)
    return figure


def architecture_rows(run: Run) -> tuple[Group, ...]:
    """The groups that are drawn: all with units, and removed branches of which no emptied group tells already."""
    emptied = {layer for group in run.units if group.kept_units == 0 for layer in group.layers}
    removed = {b.name for b in run.branches if b.kept_units == 0 and not emptied.intersection(b.layers)}
    return tuple(g for g in run.groups if g.kept is not None and (g.kind != "branches" or g.name in removed))


def _bar(axes: Axes, y: int, group: Group, width: float, font: float) -> None:
    if group.kept_units == 0:
        axes.barh(y, width, 0.62, facecolor="none", edgecolor=SOFT, linestyle="--", linewidth=0.9)
    else:
        axes.barh(y, width, 0.68, color=GONE)
        axes.barh(y, width * group.kept_units / group.size, 0.68, color=KEPT)
    label = "branch" if group.kind == "branches" else f"{group.kept_units}/{group.size}"
    axes.text(width + 0.015, y, label, va="center", fontsize=font, color=INK)


# --- the gates --------------------------------------------------------------------------------------------------------


def gates(run: Run, look: Look) -> Canvas | None:
    """The gate of every unit over the search: a row a unit, the last to stay at the bottom.

    Colour tells kept from removed, its strength the gate's size against the largest of its group; no colour is a zero.
    """
    groups = [group for group in run.units if group.path is not None]
    branches = [group for group in run.branches if group.path is not None]
    if run.history is None or len(run.history["steps"]) < 2 or not groups + branches:
        return None
    if len(groups) > PANELS:
        return _alive(run, look, groups)
    images = [_image(group) for group in groups]
    names = short_names(groups)
    titles = [names[group.name] for group in groups]
    if branches:
        images.append(np.concatenate([_image(branch) for branch in branches]))
        titles.append("residual branches")
    long = max(map(len, titles)) > (17 if look.narrow else 20)
    columns = min(len(images), 3 - long if look.narrow else 3 if len(images) <= 12 else 6 - 2 * long)
    lines = math.ceil(len(images) / columns)
    figure = blank(look, 0.6 + lines * (1.5 if columns * lines <= 12 and not look.narrow else 1.05))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    steps = run.history["steps"]
    letters = (52 if look.narrow else 120) // columns  # that fit above a panel
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=(steps[0], steps[-1], len(image), 0))
        bare(axes).set_title(plain(title, letters), loc="left", fontsize=7.5 if look.narrow else 8.5, color=INK)
        axes.set_yticks([])
        axes.set_xticks([])
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    _step_axis(grid[(lines - 1) * columns], steps)
    entries = {"gate of a kept unit": KEPT, "of a unit removed in the end": REMOVED, "gate is zero": GONE}
    legend(figure, look, [(label, {"color": colour}) for label, colour in entries.items()])
    return figure


def _step_axis(axes: Axes, steps: np.ndarray) -> None:
    axes.set_xticks([steps[0], steps[-1]], [f"step {steps[0]}", f"{steps[-1]}"])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.tick_params(labelsize=8, length=2, colors=SOFT)


def _image(group: Group) -> np.ndarray:
    """Gates as colours, units sorted by when they went: (size, columns, 4) in [0, 1]."""
    assert group.path is not None and group.kept is not None
    order = np.lexsort((group.path[-1], deaths.last_alive(group), group.kept))
    columns = np.unique(np.linspace(0, len(group.path) - 1, _MAX_COLUMNS).round().astype(int))
    values = np.maximum(group.path[columns][:, order].T, 0)
    image = np.empty((*values.shape, 4))
    image[..., :3] = np.where(group.kept[order][:, None], to_rgb(KEPT), to_rgb(REMOVED))[:, None]
    image[..., 3] = 0.4 + 0.6 * np.sqrt(values / max(float(values.max()), 1e-12))
    image[values == 0] = GONE
    return image


def _alive(run: Run, look: Look, groups: list[Group]) -> Canvas:
    """For a network of very many groups: a row a group, colour is the share of its units that are alive."""
    assert run.history is not None
    steps = run.history["steps"]
    columns = np.unique(np.linspace(0, len(steps) - 1, _MAX_COLUMNS).round().astype(int))
    share = np.stack([(group.path[columns] > 0).mean(1) for group in groups if group.path is not None])
    gone, kept = np.array(GONE), np.array(to_rgba(KEPT))
    figure = blank(look, 1.0 + 0.11 * len(groups))
    axes = bare(figure.subplots())
    image = gone + share[..., None] * (kept - gone)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(steps[0], steps[-1], len(groups), 0))
    names = short_names(groups)
    axes.set_yticks(
        np.arange(len(groups)) + 0.5, [plain(names[group.name], 18 if look.narrow else 40) for group in groups]
    )
    _step_axis(axes, steps)
    axes.tick_params(axis="y", labelsize=6.5, labelcolor=INK)
    legend(figure, look, [("all units alive", {"color": KEPT}), ("none", {"color": GONE})])
    return figure
