"""Pieces of HTML: escaped text, tables that scroll by themselves, figures for every width and colour scheme."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Pictures(NamedTuple):
    """One figure as SVG (`look.svg`), for desks and for phones; without `wide`, a long one that is narrow anywhere."""

    wide: str
    narrow: str


def escape(value: Any) -> str:
    """Text that HTML shows as it is, in an attribute too."""
    return html.escape(str(value), quote=True)


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def section(key: str, title: str, content: str) -> str:
    """A section of the page, `key` its anchor, `content` HTML."""
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(title)}</h2>\n{content}</section>'


def code(lines: str) -> str:
    """Code, which scrolls by itself where a line is too long."""
    return f'<pre tabindex="0"><code>{escape(lines)}</code></pre>'


def table(
    caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "", *, spoken: bool = True
) -> str:
    """A table of escaped cells, the first of each row its heading; scrolls by itself, by keyboard too, if too wide.

    spoken: the caption is for who hears the page, since a heading just above says the same; else it is shown.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    hidden = ' class="hidden"' if spoken else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption{hidden}>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def notes(texts: Iterable[str]) -> str:
    """A list of remarks, empty ones left out."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts if text)
    return f'<ul class="notes">{items}</ul>' if items else ""


def details(summary: str, content: str) -> str:
    """HTML that opens on a click or a key."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def picture(pictures: Pictures, spoken: str, caption: str) -> str:
    """One figure, two drawings, of which the style sheet shows the one for the page's width; `spoken` for who hears."""
    drawings = "".join(
        drawing.replace(
            "{attributes}", f' class="{width if pictures.wide else "long"}" role="img" aria-label="{escape(spoken)}"', 1
        )
        for width, drawing in pictures._asdict().items()
    )
    return f"<figure>{drawings}<figcaption>{escape(caption)}</figcaption></figure>"


NOTHING = '<span aria-hidden="true">–</span><span class="hidden">not measured</span>'


NONE = '<span aria-hidden="true">–</span><span class="hidden">none</span>'


def cell(value: Any, text: Callable[[Any], str]) -> str:
    """A table's cell: the value's text, or that there is none."""
    return NOTHING if value is None else escape(text(value))
