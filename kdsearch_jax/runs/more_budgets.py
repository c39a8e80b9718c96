"""Adds budgets to a finished run, in its own directory and without another search: `--from RUN --budgets 0.4`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.runs import budget_points, cutting, directories
from kdsearch_jax.runs.config import Experiment, differences, load_experiment
from kdsearch_jax.runs.setup import RunSetup, prepare


def added(run: Path, asked: Experiment, command: Mapping[str, Any]) -> RunSetup:
    """The road of the run in `run` with the budgets of `asked` added; writes nothing.

    command: as `rundir.goes_on` takes it; who began to add by it, and was interrupted, goes on.

    Raises:
      ValueError: the run is not finished, `asked` differs in more than budgets, a budget is there already, cannot be
        met, or is above all that the search passed.
    """
    for needed in ("config.json", "results.json"):
        if not (run / needed).is_file():
            raise ValueError(
                f"front_from: {run} is no finished run ({needed} is missing); finish it by --resume --workdir {run}"
            )
    old = load_experiment(str(run / "config.json"))
    if different := differences(dataclasses.replace(asked, budgets=old.budgets), old):
        raise ValueError(f"front_from: budgets are added as the run was made; leave out {'; '.join(different)}")
    there = set(old.budgets) or {getattr(old.budget, budget_points.driver(old.budget))}
    if (again := sorted(there & set(asked.budgets))) and not directories.is_under_way(run, command):
        raise ValueError(f"budgets: {again[0]} is in {run} already; give others, or --resume --workdir {run}")
    budgets = tuple(sorted({*old.budgets, *asked.budgets}, reverse=True))
    new = dataclasses.replace(old, budgets=budgets)
    setup = prepare(new, run, resume=True)
    tails = {point.tail for point in budget_points.points(old)}
    cutting.check(setup, [point for point in budget_points.points(new) if point.tail not in tails])
    return setup
