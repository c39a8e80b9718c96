"""`python -m kdsearch_jax.report RUN` writes RUN/report/index.html and prints its path."""

# No `from __future__ import annotations` here: tyro reads the types at run time.

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from kdsearch_jax import reporting, storage
from kdsearch_jax.runs import command_line


@dataclass(frozen=True)
class ReportOptions(command_line.Options):
    """The run to report on."""

    run: tyro.conf.Positional[Path] = field(kw_only=True)
    """The run's directory."""


def main(argv: list[str]) -> int:
    """Writes a run's report and prints its path."""
    options = command_line.parse_options(
        argv, ReportOptions, "kdsearch_jax.report", "Writes a run's report as one web page."
    )
    print(storage.display_paths(str(reporting.write_report(options.run))))
    return 0


if __name__ == "__main__":
    command_line.run(main)
