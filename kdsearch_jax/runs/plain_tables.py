"""Tables of commands as aligned text, and names that differ only in numbers as one."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

Table = list[tuple[str, ...]]


def pattern(name: str) -> str:
    """A name with # in place of each number."""
    return re.sub(r"\d+", "#", name)


def common(names: Sequence[str]) -> str:
    """Names that differ only in numbers as one: # where the numbers differ."""
    parts = [re.split(r"(\d+)", name) for name in names]
    return "".join(part[0] if len(set(part)) == 1 else "#" for part in zip(*parts, strict=True))


def print_table(titles: Sequence[str], lines: Table) -> None:
    """Prints a table: with rich on a terminal, as aligned text into a file or pipe."""
    if not lines:
        return
    numbers = [all(re.fullmatch(r"[\d,.%]*", line[i]) for line in lines) for i in range(len(titles))]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(box=None, header_style="bold")
        for title, number in zip(titles, numbers, strict=True):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for line in lines:
            table.add_row(*(cell.replace("[", r"\[") for cell in line))
        Console().print()
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    for line in [("",) * len(titles), tuple(titles), *lines]:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numbers, strict=True)]
        print("  ".join(cells).rstrip())
