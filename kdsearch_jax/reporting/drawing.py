"""What a report is made of: the page, and each figure for it and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax import storage
from kdsearch_jax.reporting import (
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
from kdsearch_jax.reporting import found as found_lib
from kdsearch_jax.storage.files import one_line, write_bytes

Files = dict[str, bytes | None]  # content by name; None: there shall be none of this name
INDEX = "index.html"
WIDE, NARROW = 9.6, 3.7  # inches: a desk's and a phone's text width


def write(directory: str | Path) -> Path:
    """As `kdsearch_jax.report.write`."""
    place = storage.local_copy(directory)
    try:
        files = _comparison(place) if (place / comparison.FILE).is_file() else _run(place)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"{place}: no report can be made of what its files say ({type(error).__name__}: {one_line(error)}); one is "
            "damaged, or of another version; --traceback shows where it is read"
        ) from error
    out = place / "report"
    out.mkdir(exist_ok=True)
    for name, content in files.items():
        if content is None:
            (out / name).unlink(missing_ok=True)
        else:
            write_bytes(out / name, content)
    storage.publish()
    return out / INDEX


def _comparison(directory: Path) -> Files:
    found = comparison.read(directory)
    drawings: dict[str, tuple[look.Draw, str]] = {
        "ranking": (versus.ranking, comparison_page.title(found)),
        "tradeoff": (versus.tradeoff, "Accuracy of the students against what they cost"),
    }
    pictures, files = _draw(drawings, found)
    return {**files, INDEX: comparison_page.page(found, pictures).encode()}


def _run(directory: Path) -> Files:
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
    pictures, files = _draw(drawings, run)
    sheet = agreement.sheet(run, look.Look(WIDE, title="Where student and teacher differ most"))
    files["examples.png"] = None if sheet is None else look.png(sheet)
    return {**files, INDEX: page.page(run, pictures).encode()}


def _draw(drawings: Mapping[str, tuple[look.Draw, str]], of: Any) -> tuple[dict[str, markup.Pictures], Files]:
    """Each figure for the page, and as NAME.png; those that cannot be drawn are left out."""
    pictures: dict[str, markup.Pictures] = {}
    files: Files = {}
    for number, (name, (draw, title)) in enumerate(drawings.items()):
        figure = draw(of, look.Look(WIDE, title=title))
        files[f"{name}.png"] = None if figure is None else look.png(figure)
        if figure is not None:
            narrow = look.svg(_drawn(draw, of, look.Look(NARROW)), f"n{number}")
            wide = "" if name.endswith("-all") else look.svg(_drawn(draw, of, look.Look(WIDE)), f"w{number}")
            pictures[name] = markup.Pictures(wide, narrow)
    return pictures, files


def _drawn(draw: look.Draw, of: Any, how: look.Look) -> look.Canvas:
    figure = draw(of, how)
    assert figure is not None  # whether there is a figure depends on the record alone
    return figure
