"""The main command: `python -m kdsearch_jax.search [--config NAME] [--budget.macs 0.5] [any setting]`.

Trains a teacher, searches, cuts and verifies the student, retrains it, trains baselines, and writes exports, table and
report, all in one run directory. Without arguments it does so for the bundled digits. `--model package.module:factory`
takes your own model and `--teacher` a trained teacher. `--stop-after search` stops early, `--search-from RUN` starts
from another run's finished search. `--budgets 0.7 0.5 0.3` makes a student for each from one search, and `--from RUN
--budgets 0.4` adds one to a finished run. An interrupted run is resumed by the same command.
"""

# No `from __future__ import annotations` here: tyro reads the types at run time.

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kdsearch_jax import storage
from kdsearch_jax.runs import command_line
from kdsearch_jax.runs.config import Experiment


@dataclass(frozen=True)
class SearchOptions(command_line.RunOptions):
    """Where to begin and end."""

    search_from: Path | None = None
    """A run with a finished search, whose teacher and search are used."""
    front_from: Annotated[Path | None, tyro.conf.arg(aliases=["--from"])] = None
    """A finished run to add students of --budgets to, from the states that its search kept."""
    stop_after: Literal["teacher", "search", "retrain"] | None = None
    """The last stage to run."""


def main(argv: list[str]) -> int:
    """Runs the stages that the command line asks for and prints the table."""
    options, experiment = command_line.parse(argv, SearchOptions, "kdsearch_jax.search", __doc__ or "")
    from kdsearch_jax.runs import budget_points  # imports JAX, which --help does not need
    from kdsearch_jax.runs.execution import execute
    from kdsearch_jax.runs.results import format_table

    experiment = dataclasses.replace(experiment, budgets=tuple(sorted(experiment.budgets, reverse=True)))
    _check_flags(argv, options, experiment)
    command = {
        "command": "search",
        "--stop-after": options.stop_after,
        "--search-from": options.search_from and storage.display_paths(str(options.search_from)),
        "--budgets": None if options.front_from is None else list(experiment.budgets),
    }
    if options.front_from is not None:
        setup, results = _add_budgets(options.front_from, experiment, command, options.stop_after)
    else:
        setup, results = execute(
            options, experiment, command, search_from=options.search_from, stop_after=options.stop_after
        )
    if results is None:
        where = storage.display_paths(str(setup.directory))
        print(f"stopped after {options.stop_after}: {where}; use --resume without --stop-after to continue")
        return 0
    print(format_table(results))
    students = [str(setup.directory / point.student) for point in budget_points.points(setup.experiment)]
    print(
        storage.display_paths(f"student: {', '.join(students)}\nreport:  {setup.directory / 'report' / 'index.html'}")
    )
    return 0


def _add_budgets(run: Path, experiment: Experiment, command: dict[str, Any], stop_after: str | None) -> tuple[Any, Any]:
    """Adds the experiment's budgets to a finished run; returns its setup and results."""
    from kdsearch_jax.runs import directories, stages
    from kdsearch_jax.runs.more_budgets import extend_run

    setup = extend_run(run, experiment, command)
    with directories.run_directory(run, setup.experiment, command, resume=True, data=setup.fingerprint, extends=True):
        return setup, stages.run(setup, resume=True, stop_after=stop_after)


def _check_flags(argv: list[str], options: SearchOptions, experiment: Experiment) -> None:
    """Raises UsageError if options contradict each other."""
    flags = {token.partition("=")[0].replace("_", "-") for token in argv}
    if "--budgets" in flags and "--budget.macs" in flags and experiment.budget.macs is not None:
        raise command_line.UsageError("--budgets and --budget.macs both bound the MACs; give one of them")
    if options.front_from is None:
        return
    if "--budgets" not in flags:
        raise command_line.UsageError("--from: give the budgets to add, as in --budgets 0.4")
    for flag in ("--workdir", "--search-from"):
        if flag in flags:
            raise command_line.UsageError(f"--from adds to the run that it names; leave out {flag}")


if __name__ == "__main__":
    command_line.run(main)
