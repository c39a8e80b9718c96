"""How every figure of a report is drawn: colours, sizes, legends, PNG and SVG.

Figures are created directly, never through pyplot, so that no global state or display is involved. The same code draws
for wide and narrow pages. The data colours (after Okabe and Ito) are distinguishable with any colour vision and have a
contrast of at least 3:1 on light and dark backgrounds. Text and lines take the page's own colours.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

TEXT, MUTED = "#1c1e21", "#5a6068"
_CSS_COLOURS = {TEXT: "var(--text)", MUTED: "var(--muted)"}  # an SVG follows the page's colour scheme
KEPT, PRUNED = "#1f83c0", "#d55e00"
PRUNED_AT_END = "#cc79a7"
EMPTY = (0.47, 0.51, 0.55, 0.28)  # transparent, so that it is faint on any background
STAGE_COLOURS = {"search": PRUNED, "retrain": KEPT, "uniform": "#009e73", "magnitude": "#cc79a7"}
WIDE, NARROW = 9.6, 3.7  # inches: text widths of a desktop and a phone
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")


@dataclass(frozen=True)
class Layout:
    """What a figure is drawn for: a width in inches, and a title if it stands alone."""

    width: float = WIDE
    title: str | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether this is for a phone."""
        return self.width < 6


class Drawing(NamedTuple):
    """An SVG for a page: its view box and the elements within it."""

    view_box: str
    body: str


Canvas = Figure | SubFigure  # a figure, or the part of one below its title; `.figure` is the whole
DrawFunction = Callable[[Any, Layout], Canvas | None]  # draws a record; None if the record lacks the data


def to_png(canvas: Canvas) -> bytes:
    """The figure as PNG on white, two pixels per CSS pixel."""
    figure, buffer = canvas.figure, io.BytesIO()
    figure.set_facecolor("white")
    figure.set_dpi(192)
    FigureCanvasAgg(figure).print_png(buffer)  # `savefig` would draw it twice
    return buffer.getvalue()


def to_svg(canvas: Canvas, prefix: str) -> Drawing:
    """The figure for a page: deterministic, with text as outlines; `prefix` keeps its identifiers apart from others."""
    figure, buffer = canvas.figure, io.BytesIO()
    figure.set_facecolor("none")
    with matplotlib.rc_context({"svg.hashsalt": "kdsearch_jax"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    opening = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', svg)
    assert opening is not None
    body = svg[opening.end() :].rpartition("</svg>")[0]
    body = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]+)', body))
    renamed = {name: f"{prefix}-{number}" for number, name in enumerate(used)}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{renamed[m[1]]}"' if m[1] in renamed else "", body)
    body = re.sub(r'(?:xlink:)?(href="|url\()#([^")]+)', lambda m: f"{m[1]}#{renamed[m[2]]}", body)
    body = re.sub(r' d="[^"]*"|translate\([^)]*\)', lambda m: _DECIMALS.sub(_two_decimals, m[0]), body)
    for colour, variable in _CSS_COLOURS.items():
        body = body.replace(colour, variable)
    return Drawing(opening[1], re.sub(r"\s*\n\s*", " ", body).strip())


def _two_decimals(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def plain_text(text: str, limit: int = 200) -> str:
    """Text that matplotlib does not read as mathematics; long text keeps both ends, which tell layers apart."""
    if len(text) > limit:
        text = f"{text[: (limit - 1) // 2]}…{text[-(limit // 2) :]}"
    return text.replace("$", r"\$")


def new_canvas(layout: Layout, height: float) -> Canvas:
    """An empty figure, `height` inches high below its title."""
    if not layout.title:
        return Figure((layout.width, height), layout="constrained")
    # A subfigure of its own: constrained layout would put the title and the legend on top of each other.
    lines = textwrap.wrap(layout.title, 42 if layout.is_narrow else 95)
    title_height = 0.1 + 0.22 * len(lines)
    figure = Figure((layout.width, height + title_height), layout="constrained")
    top, body = figure.subfigures(2, 1, height_ratios=(title_height, height), squeeze=False).ravel()
    top.text(0.01, 0.5, plain_text("\n".join(lines)), va="center", fontsize=12, fontweight="bold", color=TEXT)
    return body


def new_panels(layout: Layout, count: int, height: float, *, share_y: bool = False) -> tuple[Canvas, list[Axes]]:
    """A figure with `count` panels of this height, side by side, or one below the other on a phone."""
    canvas = new_canvas(layout, height * count if layout.is_narrow else height)
    rows, columns = (count, 1) if layout.is_narrow else (1, count)
    return canvas, list(canvas.subplots(rows, columns, squeeze=False, sharey=share_y and not layout.is_narrow).ravel())


def clean_axes(axes: Axes, visible: Sequence[str] = ()) -> Axes:
    """The axes without a frame, except for the `visible` sides ("left", "bottom")."""
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.spines[list(visible)].set_visible(True) if visible else None
    axes.spines[:].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3 if visible else 0)
    return axes


def panel_title(axes: Axes, title: str, colour: str = TEXT) -> None:
    """A panel's title, at its left."""
    axes.set_title(title, loc="left", fontsize=9.5, color=colour)


def x_label(axes: Axes, label: str) -> None:
    """The name of the horizontal axis, at its end."""
    axes.set_xlabel(label, fontsize=8.5, color=MUTED, loc="right")


def step_ticks(axes: Axes, first: int, last: int) -> None:
    """Ticks at the first and the last step only."""
    axes.set_xticks([first, last], [f"step {first}", f"{last}"])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.tick_params(axis="x", labelsize=8, length=2, labelcolor=MUTED, colors=MUTED)


def patch_legend(canvas: Canvas, layout: Layout, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend of coloured patches above the figure: (label, patch properties) each."""
    handles = [Patch(label=label, **style) for label, style in entries]
    canvas.legend(
        handles=handles, loc="outside upper left", ncols=1 if layout.is_narrow else len(handles), frameon=False,
        fontsize=9, labelcolor=TEXT, handlelength=1.4, borderpad=0.4, columnspacing=2,
    )  # fmt: skip


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, limit).round().astype(int))
