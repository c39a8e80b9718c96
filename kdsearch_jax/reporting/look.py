"""How every figure of a report is drawn: colours, sizes, legends, files.

Figures are made directly, never through pyplot: no global state, any thread, no display. One piece of code draws for
wide and narrow pages. Colours of data are the same on light and dark paper (after Okabe and Ito, told apart with any
colour vision, and at least 3:1 against both); what differs is the ink, which in a page is the page's own.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

INK, SOFT = "#1c1e21", "#5a6068"  # text and lines; those of second rank
_INKS = {INK: "var(--ink)", SOFT: "var(--soft)"}  # so that a page's colour scheme is its figures' too
_LONG = re.compile(r"-?\d+\.\d{3,}")
KEPT, REMOVED = "#1f83c0", "#d55e00"
GONE = (0.47, 0.51, 0.55, 0.28)  # where something was: see-through, so it is faint on any paper
STAGES = {"search": REMOVED, "retrain": KEPT, "uniform": "#009e73", "magnitude": "#cc79a7"}


@dataclass(frozen=True)
class Look:
    """For what a figure is drawn: a width in inches, and a title where it stands alone."""

    width: float = 9.6
    title: str | None = None

    @property
    def narrow(self) -> bool:
        """Whether this is for a phone."""
        return self.width < 6


Canvas = Figure | SubFigure  # a figure, or the part of one below its title; `.figure` is the whole
Draw = Callable[[Any, Look], Canvas | None]  # of a record (a run, a comparison) that may lack what it needs


def png(figure: Canvas) -> bytes:
    """The figure as PNG on white, 2 pixels a CSS pixel."""
    whole, buffer = figure.figure, io.BytesIO()
    whole.set_facecolor("white")
    whole.set_dpi(192)
    FigureCanvasAgg(whole).print_png(buffer)  # `savefig` would draw it twice
    return buffer.getvalue()


def svg(figure: Canvas, key: str) -> str:
    """The figure as an element of a page, text as outlines, in the page's own ink; `key` keeps its identifiers apart.

    The same figure gives the same text.
    """
    whole, buffer = figure.figure, io.BytesIO()
    whole.set_facecolor("none")
    with matplotlib.rc_context({"svg.hashsalt": "kdsearch_jax"}):
        FigureCanvasSVG(whole).print_svg(buffer, metadata={"Date": None})
    drawing = buffer.getvalue().decode()
    opening = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', drawing)
    assert opening is not None
    body = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", drawing[opening.end() :], flags=re.DOTALL)
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]+)', body))
    short = {name: f"{key}-{number}" for number, name in enumerate(used)}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", body)
    body = re.sub(r'(?:xlink:)?(href="|url\()#([^")]+)', lambda m: f"{m[1]}#{short[m[2]]}", body)
    body = re.sub(r' d="[^"]*"|translate\([^)]*\)', lambda m: _LONG.sub(_short, m[0]), body)
    for ink, variable in _INKS.items():
        body = body.replace(ink, variable)
    body = re.sub(r"\s*\n\s*", " ", body)
    return f'<svg viewBox="{opening[1]}"{{attributes}}>{body}'.strip()


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def plain(text: str, longest: int = 200) -> str:
    """Text in which matplotlib finds no mathematics; of a longer one both ends, which tell layers apart."""
    if len(text) > longest:
        text = f"{text[: (longest - 1) // 2]}…{text[-(longest // 2) :]}"
    return text.replace("$", r"\$")


def blank(look: Look, height: float) -> Canvas:
    """An empty figure, `height` inches high below its title."""
    if not look.title:
        return Figure((look.width, height), layout="constrained")
    # A part of its own: constrained layout would put a figure's title and its legend on top of each other.
    lines = textwrap.wrap(look.title, 42 if look.narrow else 95)
    above = 0.1 + 0.22 * len(lines)
    figure = Figure((look.width, height + above), layout="constrained")
    top, body = figure.subfigures(2, 1, height_ratios=(above, height), squeeze=False).ravel()
    top.text(0.01, 0.5, plain("\n".join(lines)), va="center", fontsize=12, fontweight="bold", color=INK)
    return body


def bare(axes: Axes, keep: Sequence[str] = ()) -> Axes:
    """The axes without frame, `keep` names the sides ("left", "bottom") that stay."""
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.spines[list(keep)].set_visible(True) if keep else None
    axes.spines[:].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelsize=8.5, length=3 if keep else 0)
    return axes


def legend(figure: Canvas, look: Look, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend of coloured patches above the figure: (label, patch properties) each."""
    handles = [Patch(label=label, **style) for label, style in entries]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=1 if look.narrow else len(handles), frameon=False,
        fontsize=9, labelcolor=INK, handlelength=1.4, borderpad=0.4, columnspacing=2,
    )  # fmt: skip
