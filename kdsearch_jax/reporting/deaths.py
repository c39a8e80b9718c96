"""When each unit died: for every layer the steps at which its units went, and the figure of it, a strip a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from kdsearch_jax.reporting.look import GONE, INK, KEPT, REMOVED, SOFT, Canvas, Look, bare, blank, legend, plain
from kdsearch_jax.reporting.merging import merged
from kdsearch_jax.reporting.record import Group, Run, short_names

CUT = "#cc79a7"  # what the last, exact selection took
_MAX_COLUMNS = 120


@dataclass(frozen=True, eq=False)
class Deaths:
    """What became of a group's units.

    Args:
      step: (size,) int, the recorded step at which a unit's gate was first seen at zero for good; −1 of all others.
      cut: (size,) bool, units whose gate was above zero to the end and that are not kept all the same.
    """

    step: NDArray[np.integer]
    cut: NDArray[np.bool_]


def of(run: Run, group: Group) -> Deaths | None:
    """When the units of a group went; None where that was not recorded."""
    if run.history is None or group.path is None or group.kept is None:
        return None
    steps, last = run.history["steps"], last_alive(group)
    dead = last < len(steps) - 1
    step = np.where(dead & ~group.kept, steps[np.minimum(last + 1, len(steps) - 1)], -1)
    return Deaths(step, ~group.kept & ~dead)


def last_alive(group: Group) -> NDArray[np.integer]:
    """For each unit the index of the last recorded row with a gate above zero; −1 for never: (size,)."""
    assert group.path is not None
    alive = group.path > 0
    return np.where(alive.any(0), len(alive) - 1 - np.argmax(alive[::-1], axis=0), -1)


def units_by_step(deaths: Deaths) -> list[tuple[int, list[int]]]:
    """[(step, numbers of the units that died then), …] in order."""
    return [(int(s), np.flatnonzero(deaths.step == s).tolist()) for s in np.unique(deaths.step[deaths.step >= 0])]


def figure(run: Run, look: Look) -> Canvas | None:
    """A strip a layer, steps to the right: the stronger a mark, the larger the share of the layer that died there."""
    return strips(run, look, merged(tuple(g for g in run.units if g.path is not None)))


def every(run: Run, look: Look) -> Canvas | None:
    """The same with a strip for each group, where `figure` has merged some."""
    groups = tuple(g for g in run.units if g.path is not None)
    return None if merged(groups) == groups else strips(run, look, groups)


def strips(run: Run, look: Look, groups: tuple[Group, ...]) -> Canvas | None:
    """The figure for these groups; None where no history tells of them."""
    found = [(group, deaths) for group in groups if (deaths := of(run, group)) is not None]
    if run.history is None or len(run.history["steps"]) < 2 or not found:
        return None
    few = len(found) <= 24
    body = blank(look, 0.9 + (0.25 if few else 0.16) * len(found))
    left, right = body.subplots(1, 2, width_ratios=(1.9, 1) if look.narrow else (4.2, 1), sharey=True)
    first, last = run.history["steps"][[0, -1]]
    first = 0 if first < 0.2 * last else first
    bins = np.linspace(first, last, _MAX_COLUMNS + 1)
    left.imshow(
        np.stack([_strip(deaths, bins, group.size) for group, deaths in found]),
        aspect="auto", interpolation="nearest", extent=(first, last, len(found) - 0.5, -0.5),
    )  # fmt: skip
    names = short_names([group for group, _ in found])
    font = 9 if few else 6.5
    for y, (group, deaths) in enumerate(found):
        _ends(right, y, group, deaths, font, look)
        left.axhline(y + 0.5, color=SOFT, linewidth=0.3)
    bare(left).set_title("Units that died, by step", loc="left", fontsize=9.5, color=SOFT)
    bare(right).set_title("In the end", loc="left", fontsize=9.5, color=SOFT)
    longest = 15 if look.narrow else 40
    left.set_yticks(range(len(found)), [plain(names[group.name], longest) for group, _ in found])
    left.set_xticks([first, last], [f"step {first}", f"{last}"])
    for label, side in zip(left.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    left.tick_params(labelsize=font, labelcolor=INK)
    left.tick_params(axis="x", labelsize=8, length=2, labelcolor=SOFT)
    right.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    right.set_xlim(0, 1.75 if look.narrow else 1.45)
    left.set_ylim(len(found) - 0.5, -0.5)
    entries: list[tuple[str, dict[str, Any]]] = [("kept", {"facecolor": KEPT})]
    entries.append(("died during the search", {"facecolor": REMOVED}))
    if any(deaths.cut.any() for _, deaths in found):
        entries.append(
            ("alive, but cut at the end", {"facecolor": CUT, "hatch": "////", "edgecolor": "white", "lw": 0})
        )
    legend(body, look, entries)
    return body


def _strip(deaths: Deaths, bins: np.ndarray, size: int) -> NDArray[np.floating]:
    """(columns, 4) colours."""
    counts = np.histogram(deaths.step[deaths.step >= 0], bins)[0]
    row = np.empty((len(counts), 4))
    row[:] = GONE[:3] + (0.1,)
    row[counts > 0, :3] = to_rgb(REMOVED)
    row[counts > 0, 3] = 0.5 + 0.5 * np.sqrt(counts[counts > 0] / size)
    return row


def _ends(axes: Axes, y: int, group: Group, deaths: Deaths, font: float, look: Look) -> None:
    """How many stay, died and were cut, as one bar."""
    kept, cut = group.kept_units / group.size, int(deaths.cut.sum()) / group.size
    axes.barh(y, kept, 0.62, color=KEPT)
    axes.barh(y, 1 - kept - cut, 0.62, left=kept, color=REMOVED)
    if cut:
        axes.barh(y, cut, 0.62, left=1 - cut, facecolor=CUT, hatch="////", edgecolor="white", linewidth=0)
    axes.text(1.04, y, f"{group.kept_units}/{group.size}", va="center", fontsize=font, color=INK)
