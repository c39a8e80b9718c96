"""HTML reports of a run or of a comparison: results, costs, architecture, course of the search, and usage.

`write_report` reads the files of a directory, never a network, and writes `report/index.html`: one self-contained file
for light and dark screens, phones, desktops and screen readers. Each figure is also written as a PNG next to it. Where
a run has no data for a section, because it stopped early or has no baseline, the page says so.

    python -m kdsearch_jax.report RUN

Imports `storage` only.
"""

from __future__ import annotations

from pathlib import Path


def write_report(directory: str | Path) -> Path:
    """Writes the report of a run or of a comparison and returns the path of DIRECTORY/report/index.html.

    Everything is rendered before the first file is written. Figures of an earlier report that do not apply any more are
    removed.

    Raises:
      ValueError: in one line, if the directory is neither a run nor a comparison or one of its files is damaged. The
        message names the file if reading detected the damage, otherwise the directory.
    """
    from kdsearch_jax.reporting import rendering  # loads matplotlib and jinja2, which --help does not need

    return rendering.write_report(directory)
