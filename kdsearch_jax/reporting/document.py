"""What all pages share: head, contents, sections in order, and the policy that nothing is loaded.

Style is inline, pictures are drawn inline or data, and a content security policy forbids the rest. Whatever comes from
a file is escaped by `markup.escape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kdsearch_jax.reporting.markup import escape, section
from kdsearch_jax.reporting.style import CSS

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Section(NamedTuple):
    """A part of a page: its anchor, its name in the contents, its heading (the finding), its HTML."""

    key: str
    name: str
    title: str
    content: str


def broken(name: str) -> str:
    """An escaped name that may be broken at its underscores."""
    return escape(name).replace("_", "_<wbr>")


def document(name: str, header: str, sections: Sequence[Section]) -> str:
    """The whole page; `header` is HTML that begins with the page's only h1."""
    links = "".join(f'<li><a href="#{part.key}">{escape(part.name)}</a></li>' for part in sections)
    body = [
        f'<a class="skip" href="#{sections[0].key}">Skip to the results</a>',
        f'<header>{header}</header><nav aria-label="Contents"><ul>{links}</ul></nav><main>',
        *(section(part.key, part.title, part.content) for part in sections),
        "</main><footer><p>Written by <code>python -m kdsearch_jax.report</code> from the run’s files.</p></footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)}: report of kdsearch_jax</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
