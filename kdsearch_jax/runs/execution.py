"""Runs the stages of an experiment for a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.runs import directories, stages
from kdsearch_jax.runs.command_line import RunOptions
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.runs.setup import RunSetup, prepare_run


def execute(
    options: RunOptions,
    experiment: Experiment,
    command: Mapping[str, Any],
    *,
    search_from: Path | None = None,
    stop_after: str | None = None,
) -> tuple[RunSetup, dict[str, Any] | None]:
    """Runs an experiment in `options.workdir`, or resumes it there.

    Args:
      command: what the command line asks for besides the experiment, see `directories.should_resume`.
      search_from: a run with a finished search to start from.
      stop_after: the last stage to run.

    Returns:
      The setup of the run, and its results unless it stops earlier.
    """
    assert options.workdir is not None
    resume = directories.should_resume(options.workdir, experiment, command, options.resume)
    setup = prepare_run(
        experiment, options.workdir, resume=resume, search_from=search_from, searches=stop_after != "teacher",
        trust_code=options.trust_code,
    )  # fmt: skip
    with directories.run_directory(options.workdir, experiment, command, resume=resume, data=setup.fingerprint):
        return setup, stages.run(setup, resume=resume, stop_after=stop_after)
