"""Writes a report: reads the record, draws every figure, renders the page, and only then writes the files."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from kdsearch_jax import storage
from kdsearch_jax.reporting import (
    comparison_figures,
    comparison_page,
    comparison_record,
    formatting,
    result_figures,
    run_page,
    search_figures,
)
from kdsearch_jax.reporting.comparison_record import ComparisonRecord, read_comparison
from kdsearch_jax.reporting.figure_style import NARROW, DrawFunction, Drawing, Layout, to_png, to_svg
from kdsearch_jax.reporting.run_record import RunRecord, read_run
from kdsearch_jax.storage.files import one_line, write_bytes

INDEX = "index.html"
_FILTERS = (
    "percent", "accuracy", "points", "amount", "file_size", "milliseconds", "thousands", "network_label",
)  # fmt: skip
_RUN_FIGURES: dict[str, tuple[DrawFunction, str]] = {
    "architecture": (search_figures.architecture, "Architecture of the student"),
    "architecture-all": (search_figures.architecture_by_layer, "Architecture of the student, layer by layer"),
    "timeline": (search_figures.timeline, "When units were pruned"),
    "timeline-all": (search_figures.timeline_by_layer, "When units were pruned, layer by layer"),
    "gates": (search_figures.gates, "Gates during the search"),
    "training": (result_figures.training, "Search and training"),
    "budgets": (result_figures.budget_sweep, "Accuracy against cost: students of one search"),
    "confusion": (result_figures.confusion, "Confusion of classes: teacher, student and their difference"),
    "examples": (result_figures.examples, "Examples on which student and teacher differ most"),
}
_COMPARISON_FIGURES: dict[str, tuple[DrawFunction, str]] = {
    "ranking": (comparison_figures.ranking, "Accuracy of the students"),
    "tradeoff": (comparison_figures.cost_tradeoff, "Accuracy of the students against their cost"),
}
_ONLY_PNG = ("examples",)  # the page has these images as HTML


class PageFigure(NamedTuple):
    """A figure on a page, drawn for desktops and phones; without `wide`, the narrow one serves both."""

    wide: Drawing | None
    narrow: Drawing


def write_report(directory: str | Path) -> Path:
    """As `kdsearch_jax.reporting.write_report`."""
    path = storage.local_copy(directory)
    is_comparison = (path / comparison_record.FILE).is_file()
    with _naming_directory(path):
        record = read_comparison(path) if is_comparison else read_run(path)
    with _naming_directory(path, ValueError):
        figures, pngs = _draw(_COMPARISON_FIGURES if is_comparison else _RUN_FIGURES, record)
        page = render_page(record, figures).encode()
    out = path / "report"
    out.mkdir(exist_ok=True)
    for name, png in pngs.items():
        if png is None:
            (out / f"{name}.png").unlink(missing_ok=True)
        else:
            write_bytes(out / f"{name}.png", png)
    write_bytes(out / INDEX, page)
    storage.publish()
    return out / INDEX


@contextlib.contextmanager
def _naming_directory(directory: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns whatever unexpected content of a file causes into a ValueError of one line."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, jinja2.TemplateError, *errors) as error:
        raise ValueError(
            f"{directory}: its files do not make a report ({type(error).__name__}: {one_line(error)}); one of them is "
            "damaged or from another version; --traceback shows where"
        ) from error


def render_page(record: RunRecord | ComparisonRecord, figures: Mapping[str, PageFigure]) -> str:
    """The page of a run or of a comparison as HTML; `figures` are those that could be drawn, by name."""
    if isinstance(record, ComparisonRecord):
        template, data = "comparison.html", comparison_page.page_data(record)
    else:
        template, data = "run.html", run_page.page_data(record)
    return _environment().get_template(template).render(**data, figures=figures)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdsearch_jax.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(formatting, name) for name in _FILTERS}
    return environment


def _draw(
    drawings: Mapping[str, tuple[DrawFunction, str]], record: Any
) -> tuple[dict[str, PageFigure], dict[str, bytes | None]]:
    """The figures for the page, and each as PNG; None where the record lacks the data."""
    figures: dict[str, PageFigure] = {}
    pngs: dict[str, bytes | None] = {}
    for number, (name, (draw, title)) in enumerate(drawings.items()):
        canvas = draw(record, Layout(title=title))
        pngs[name] = None if canvas is None else to_png(canvas)
        if canvas is not None and name not in _ONLY_PNG:
            narrow = _svg(draw, record, Layout(NARROW), f"n{number}")
            wide = None if name.endswith("-all") else _svg(draw, record, Layout(), f"w{number}")
            figures[name] = PageFigure(wide, narrow)
    return figures, pngs


def _svg(draw: DrawFunction, record: Any, layout: Layout, prefix: str) -> Drawing:
    canvas = draw(record, layout)
    assert canvas is not None  # whether there is a figure depends on the record alone
    return to_svg(canvas, prefix)
