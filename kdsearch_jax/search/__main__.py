"""The main job: `python -m kdsearch_jax.search [--config NAME] [--budget.macs 0.5] [any setting]`.

Teacher → search → cut and proof → retraining → baselines → export, table and report, in one run directory. With no
arguments it does so for the bundled digits. A model of one's own is given by `--model package.module:factory`, a
teacher from elsewhere by `--teacher`; `--stop-after search` ends early; `--search-from RUN` starts from a finished
search of another run. `--budgets 0.7 0.5 0.3` makes a student for each from one search, and `--from RUN --budgets 0.4`
one more in that run. The same command goes on with a run that was interrupted.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdsearch_jax import storage
from kdsearch_jax.runs import command_line
from kdsearch_jax.runs.config import Experiment


@dataclass(frozen=True)
class SearchOptions(command_line.RunOptions):
    """Where to begin and end."""

    search_from: Path | None = None
    """A run whose finished search (and teacher) is used."""
    front_from: Path | None = None
    """A finished run, to which the students of --budgets are added from the states that its search has kept."""
    stop_after: Literal["teacher", "search", "retrain"] | None = None
    """The last stage to run."""


def main(argv: list[str]) -> int:
    """Runs the road that the command line asks for, and prints its table."""
    options, experiment = command_line.parse(argv, SearchOptions, "kdsearch_jax.search", __doc__ or "")
    from kdsearch_jax.runs import (  # jax and all else, which --help does not need
        budget_points,
        delivery,
        directories,
        stages,
    )
    from kdsearch_jax.runs.more_budgets import added
    from kdsearch_jax.runs.setup import prepare

    assert options.workdir is not None
    experiment = dataclasses.replace(experiment, budgets=tuple(sorted(experiment.budgets, reverse=True)))
    _check_line(argv, options, experiment)
    workdir, adds = options.front_from or options.workdir, options.front_from is not None
    command = {
        "command": "search",
        "--stop-after": options.stop_after,
        "--search-from": options.search_from and storage.display_paths(str(options.search_from)),
        "--budgets": list(experiment.budgets) if adds else None,
    }
    if adds:
        resume = True
        setup = added(workdir, experiment, command)
    else:
        resume = directories.goes_on(workdir, experiment, command, options.resume)
        searches = options.stop_after != "teacher"
        start, trust = options.search_from, options.trust_code
        setup = prepare(experiment, workdir, resume=resume, search_from=start, searches=searches, trust_code=trust)
    with directories.run_directory(
        workdir, setup.experiment, command, resume=resume, data=setup.fingerprint, extends=adds
    ):
        results = stages.run(setup, resume=resume, stop_after=options.stop_after)
    if results is None:
        where = storage.display_paths(str(workdir))
        print(f"stopped after {options.stop_after}: {where}; --resume without --stop-after goes on")
        return 0
    print(delivery.table(results))
    students = [str(workdir / point.student) for point in budget_points.points(setup.experiment)]
    print(storage.display_paths(f"student: {', '.join(students)}\nreport:  {workdir / 'report' / 'index.html'}"))
    return 0


def _check_line(argv: list[str], options: SearchOptions, experiment: Experiment) -> None:
    """Raises UsageError where options contradict each other."""
    flags = {token.partition("=")[0].replace("_", "-") for token in argv}
    if "--budgets" in flags and "--budget.macs" in flags and experiment.budget.macs is not None:
        raise command_line.UsageError("--budgets and --budget.macs: both say what the MACs may be; give one of them")
    if options.front_from is None:
        return
    if "--budgets" not in flags:
        raise command_line.UsageError("--from: which budgets are to be added? Give some, as in --budgets 0.4")
    for flag in ("--workdir", "--search-from"):
        if flag in flags:
            raise command_line.UsageError(f"--from adds to the run that it names; leave out {flag}")


if __name__ == "__main__":
    command_line.run(main)
