"""A run as one page: what was found, how well it does, how it came about, and how to use it.

`write` reads a run directory's files, never a network, and writes `report/index.html` (one file that loads nothing, for
light and dark, phone and desk, eyes and screen readers) with the figures as PNG beside it. What a run lacks, since it
was stopped or had no baseline, is left out with a sentence that says so.

    python -m kdsearch_jax.report RUN
"""

from __future__ import annotations

from pathlib import Path

from kdsearch_jax.report import curves, figures, look, markup, page, record

WIDE, NARROW = 9.6, 3.7  # inches: a desk's and a phone's text width


def write(run_dir: str | Path) -> Path:
    """Writes the report of a run and returns the path of its page, RUN/report/index.html.

    Figures of an earlier report that this one cannot draw are removed.

    Raises:
      ValueError: where `run_dir` is not a run, or one of its files is damaged; one line that names the file.
    """
    run = record.read(Path(run_dir))
    out = run.directory / "report"
    out.mkdir(exist_ok=True)
    drawings: dict[str, tuple[look.Draw, str]] = {
        "architecture": (figures.architecture, page.architecture_title(run)),
        "gates": (figures.gates, page.gates_title(run)),
        "search": (curves.search, page.search_title(run)),
    }
    pictures = {}
    for name, (draw, title) in drawings.items():
        alone = draw(run, look.Look(WIDE, title=title))
        if alone is None:
            (out / f"{name}.png").unlink(missing_ok=True)
            continue
        (out / f"{name}.png").write_bytes(look.png(alone))
        wide, narrow = (look.svg(_drawn(draw, run, look.Look(width))) for width in (WIDE, NARROW))
        pictures[name] = markup.Pictures(wide, look.dark(wide), narrow, look.dark(narrow))
    index = out / "index.html"
    index.write_text(page.page(run, pictures), "utf-8")
    return index


def _drawn(draw: look.Draw, run: record.Run, how: look.Look) -> look.Canvas:
    figure = draw(run, how)
    assert figure is not None  # whether there is a figure depends on the run alone
    return figure
