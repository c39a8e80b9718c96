"""Adds budgets to a finished run without another search: `--from RUN --budgets 0.4`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.runs import budget_points, cutting, directories
from kdsearch_jax.runs.config import Experiment, differences, load_experiment
from kdsearch_jax.runs.setup import RunSetup, prepare_run


def extend_run(run: Path, requested: Experiment, command: Mapping[str, Any]) -> RunSetup:
    """Sets up the run in `run` with the budgets of `requested` added. Writes nothing.

    Args:
      command: as in `directories.should_resume`; the same command resumes an interrupted addition.

    Raises:
      ValueError: the run is not finished; `requested` differs in more than its budgets; a budget exists already, cannot
        be met, or is above every state that the search kept.
    """
    for name in ("config.json", "results.json"):
        if not (run / name).is_file():
            raise ValueError(
                f"front_from: {run} is not a finished run ({name} is missing); finish it with --resume --workdir {run}"
            )
    old = load_experiment(str(run / "config.json"))
    if different := differences(dataclasses.replace(requested, budgets=old.budgets), old):
        raise ValueError(f"front_from: only budgets can be added to a run; leave out {'; '.join(different)}")
    existing = set(old.budgets) or {getattr(old.budget, budget_points.varied_bound(old.budget))}
    repeated = sorted(existing & set(requested.budgets))
    if repeated and not directories.is_under_way(run, command):
        raise ValueError(f"budgets: {repeated[0]} is in {run} already; give others, or --resume --workdir {run}")
    new = dataclasses.replace(old, budgets=tuple(sorted({*old.budgets, *requested.budgets}, reverse=True)))
    setup = prepare_run(new, run, resume=True)
    old_suffixes = {point.suffix for point in budget_points.points(old)}
    cutting.check(setup, [point for point in budget_points.points(new) if point.suffix not in old_suffixes])
    return setup
