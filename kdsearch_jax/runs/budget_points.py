"""The budgets of an experiment. One search yields a student for each of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdsearch_jax.pruning.budget_path import BudgetPath, budget_path
from kdsearch_jax.pruning.budgets import Limits
from kdsearch_jax.pruning.settings import BOUNDS, BudgetConfig
from kdsearch_jax.runs.config import Experiment, check
from kdsearch_jax.tracing.topology import Topology


@dataclass(frozen=True)
class BudgetPoint:
    """One budget and the names of what belongs to it.

    Attributes:
      name: directory of the student's retraining, within the run.
      student: directory of the exported student, within the run.
      suffix: appended to the names of baselines; empty if the experiment has a single budget.
    """

    name: str
    student: str
    budget: BudgetConfig
    suffix: str = ""

    def cut_directory(self, search: Path) -> Path:
        """Where the search stage's directory holds the student cut for this budget."""
        return search / self.name if self.suffix else search


def points(experiment: Experiment) -> tuple[BudgetPoint, ...]:
    """The budgets of an experiment, largest first; a single one if `budgets` is empty.

    Each of `budgets` replaces the first of budget.macs, params, latency and memory that is not None. The other bounds
    apply to every student.

    Raises:
      ValueError: one of the budgets is invalid.
    """
    if not experiment.budgets:
        return (BudgetPoint("retrain", "student", experiment.budget),)
    bound, found = varied_bound(experiment.budget), []
    for value in sorted(experiment.budgets, reverse=True):
        budget = dataclasses.replace(experiment.budget, **{bound: value})
        check(dataclasses.replace(experiment, budget=budget, budgets=()))
        suffix = f"-{int(value) if value > 1 and value == int(value) else value!r}"
        found.append(BudgetPoint(f"at{suffix}", f"student{suffix}", budget, suffix))
    return tuple(found)


def varied_bound(budget: BudgetConfig) -> str:
    """The name of the bound that `budgets` are values of."""
    return next((name for name in BOUNDS if getattr(budget, name) is not None), "macs")


def search_path(experiment: Experiment, limits: Sequence[Limits], topology: Topology) -> BudgetPath:
    """The schedule of an experiment's search through its `points`, which may be measured later."""
    values = sorted(experiment.budgets, reverse=True)
    falls = [1.0, *(low / high for high, low in itertools.pairwise(values))]
    pressure = limits[0].pressure(topology, np.ones(topology.units))
    gates, steps = experiment.gates, experiment.search.steps
    return budget_path(falls, pressure, steps, gates.ramp, gates.warmup, experiment.run.steps_per_dispatch)
