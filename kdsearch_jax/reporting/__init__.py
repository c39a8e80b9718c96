"""A run, or a comparison of methods, as one page: what was found, how well it does, how it came about, how to use it.

`write` reads a directory's files, never a network, and writes `report/index.html` (one file that loads nothing, for
light and dark, phone and desk, eyes and screen readers) with the figures as PNG beside it. What a run lacks, since it
was stopped or had no baseline, is left out with a sentence that says so.

    python -m kdsearch_jax.report RUN
"""

from __future__ import annotations

from pathlib import Path


def write(directory: str | Path) -> Path:
    """Writes the report of a run or of a comparison and returns the path of its page, DIRECTORY/report/index.html.

    Figures of an earlier report that this one cannot draw are removed. All is drawn before anything is written.

    Raises:
      ValueError: where `directory` is neither, or one of its files is damaged; one line that names the file, if reading
        it has shown it, and else the directory.
    """
    from kdsearch_jax.reporting import drawing  # matplotlib, which --help does not need

    return drawing.write(directory)
