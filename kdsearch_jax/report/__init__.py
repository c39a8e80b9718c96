"""A run, or a comparison of methods, as one page: what was found, how well it does, how it came about, how to use it.

`write` reads a directory's files, never a network, and writes `report/index.html` (one file that loads nothing, for
light and dark, phone and desk, eyes and screen readers) with the figures as PNG beside it. What a run lacks, since it
was stopped or had no baseline, is left out with a sentence that says so.

    python -m kdsearch_jax.report RUN
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax import storage
from kdsearch_jax.files import write_bytes, write_text
from kdsearch_jax.report import (
    agreement,
    comparison,
    comparison_page,
    confusion,
    curves,
    deaths,
    figures,
    fronts,
    look,
    markup,
    page,
    record,
    versus,
)
from kdsearch_jax.report import (
    found as found_lib,
)

WIDE, NARROW = 9.6, 3.7  # inches: a desk's and a phone's text width


def write(directory: str | Path) -> Path:
    """Writes the report of a run or of a comparison and returns the path of its page, DIRECTORY/report/index.html.

    Figures of an earlier report that this one cannot draw are removed.

    Raises:
      ValueError: where `directory` is neither, or one of its files is damaged; one line that names the file.
    """
    place = storage.local(directory)
    index = _comparison(place) if (place / comparison.FILE).is_file() else _run(place)
    storage.publish()
    return index


def _comparison(directory: Path) -> Path:
    found = comparison.read(directory)
    drawings: dict[str, tuple[look.Draw, str]] = {
        "ranking": (versus.ranking, comparison_page.title(found)),
        "tradeoff": (versus.tradeoff, "Accuracy of the students against what they cost"),
    }
    out = directory / "report"
    out.mkdir(exist_ok=True)
    index = out / "index.html"
    write_text(index, comparison_page.page(found, _draw(drawings, found, out)))
    return index


def _run(directory: Path) -> Path:
    run = record.read(directory)
    architecture, gates = found_lib.architecture_title(run), found_lib.gates_title(run)
    drawings: dict[str, tuple[look.Draw, str]] = {
        "architecture": (figures.architecture, architecture),
        "architecture-all": (figures.every, architecture),
        "deaths": (deaths.figure, gates),
        "deaths-all": (deaths.every, gates),
        "gates": (figures.gates, gates),
        "search": (curves.search, found_lib.search_title(run)),
        "front": (fronts.figure, "Accuracy against costs, one search"),
        "confusion": (confusion.figure, agreement.title(run)),
    }
    out = run.directory / "report"
    out.mkdir(exist_ok=True)
    pictures = _draw(drawings, run, out)
    _alone(out / "examples.png", agreement.sheet(run, look.Look(WIDE, title="Where student and teacher differ most")))
    index = out / "index.html"
    write_text(index, page.page(run, pictures))
    return index


def _draw(drawings: Mapping[str, tuple[look.Draw, str]], of: Any, out: Path) -> dict[str, markup.Pictures]:
    """Each figure as OUT/NAME.png, and for the page; those that cannot be drawn are left out."""
    pictures = {}
    for number, (name, (draw, title)) in enumerate(drawings.items()):
        if _alone(out / f"{name}.png", draw(of, look.Look(WIDE, title=title))):
            narrow = look.svg(_drawn(draw, of, look.Look(NARROW)), f"n{number}")
            wide = "" if name.endswith("-all") else look.svg(_drawn(draw, of, look.Look(WIDE)), f"w{number}")
            pictures[name] = markup.Pictures(wide, narrow)
    return pictures


def _alone(path: Path, figure: look.Canvas | None) -> bool:
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    write_bytes(path, look.png(figure))
    return True


def _drawn(draw: look.Draw, of: Any, how: look.Look) -> look.Canvas:
    figure = draw(of, how)
    assert figure is not None  # whether there is a figure depends on the record alone
    return figure
