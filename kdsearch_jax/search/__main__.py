"""The main job: `python -m kdsearch_jax.search [--config NAME] [--budget.macs 0.5] [any setting]`.

Teacher → search → cut and proof → retraining → baselines → export, table and report, in one run directory. With no
arguments it does so for the bundled digits. A model of one's own is given by `--model package.module:factory`, a
teacher from elsewhere by `--teacher`; `--stop-after search` ends early; `--search-from RUN` starts from a finished
search of another run; `--resume` goes on.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdsearch_jax import cli, stages
from kdsearch_jax.road import prepare


@dataclass(frozen=True)
class SearchOptions(cli.RunOptions):
    """Where to begin and end."""

    search_from: Path | None = None
    """A run whose finished search (and teacher) is used."""
    stop_after: Literal["teacher", "search", "retrain"] | None = None
    """The last stage to run."""


def main(argv: list[str]) -> int:
    """Runs the road that the command line asks for, and prints its table."""
    options, experiment = cli.parse(argv, SearchOptions, "kdsearch_jax.search", __doc__ or "")
    assert options.workdir is not None
    road = prepare(
        experiment,
        options.workdir,
        resume=options.resume,
        search_from=options.search_from,
        searches=options.stop_after != "teacher",
    )
    cli.new_run_directory(options.workdir, experiment, options.resume)
    results = stages.run(road, resume=options.resume, stop_after=options.stop_after)
    if results is None:
        print(f"stopped after {options.stop_after}: {options.workdir}; --resume goes on")
        return 0
    print(stages.table(results))
    print(f"student: {options.workdir / 'student'}\nreport:  {options.workdir / 'report' / 'index.html'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
