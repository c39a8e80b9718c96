"""Pieces of HTML: escaped text, tables that scroll by themselves, figures for every width and colour scheme."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Pictures(NamedTuple):
    """One figure as SVG, for every page."""

    wide: bytes
    wide_dark: bytes
    narrow: bytes
    narrow_dark: bytes


def escape(value: Any) -> str:
    """Text that HTML shows as it is, in an attribute too."""
    return html.escape(str(value), quote=True)


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def section(key: str, title: str, content: str) -> str:
    """A section of the page, `key` its anchor, `content` HTML."""
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(title)}</h2>\n{content}</section>'


def table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of escaped cells, the first of each row its heading; scrolls by itself, by keyboard too, if too wide."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="{kind}">'
        f'<caption class="hidden">{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """HTML that opens on a click or a key."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def picture(pictures: Pictures, spoken: str, caption: str) -> str:
    """One figure, four drawings: the browser takes the one for its width and colours."""
    phone, night = "screen and (max-width: 40rem)", "(prefers-color-scheme: dark)"
    choices = {
        f"{phone} and {night}": pictures.narrow_dark,
        phone: pictures.narrow,
        f"screen and {night}": pictures.wide_dark,
    }
    sources = "".join(f'<source media="{media}" srcset="{_data(svg)}">' for media, svg in choices.items())
    image = f'<img src="{_data(pictures.wide)}" alt="{escape(spoken)}">'
    return f"<figure><picture>{sources}{image}</picture><figcaption>{escape(caption)}</figcaption></figure>"


def _data(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


NOTHING = '<span aria-hidden="true">–</span><span class="hidden">not measured</span>'


def cell(value: Any, text: Callable[[Any], str]) -> str:
    """A table's cell: the value's text, or that there is none."""
    return NOTHING if value is None else escape(text(value))
