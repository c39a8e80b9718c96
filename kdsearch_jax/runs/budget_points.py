"""The budgets of an experiment: a student for each, from one search."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdsearch_jax.pruning.budget_path import BudgetPath, budget_path
from kdsearch_jax.pruning.budgets import Limits
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs.config import Experiment, check
from kdsearch_jax.tracing.topology import Topology


@dataclass(frozen=True)
class Point:
    """A budget on the way. name: of the directory of its retraining; student: of the delivered network's; tail: what
    its baselines' names end in.
    """

    name: str
    student: str
    budget: BudgetConfig
    tail: str = ""

    def cut(self, search: Path) -> Path:
        """Where a search stage's directory has the student cut for it."""
        return search / self.name if self.tail else search


def points(experiment: Experiment) -> tuple[Point, ...]:
    """The budgets of an experiment, the largest first; one, named as ever, where it has no `budgets`.

    Each of `budgets` stands for the first of budget.macs, params, latency and memory that is not None; other bounds
    hold for every student as they are.

    Raises:
      ValueError: a budget that is none.
    """
    if not experiment.budgets:
        return (Point("retrain", "student", experiment.budget),)
    bound, found = driver(experiment.budget), []
    for value in sorted(experiment.budgets, reverse=True):
        budget = dataclasses.replace(experiment.budget, **{bound: value})
        check(dataclasses.replace(experiment, budget=budget, budgets=()))
        tail = f"-{int(value) if value > 1 and value == int(value) else value!r}"
        found.append(Point(f"at{tail}", f"student{tail}", budget, tail))
    return tuple(found)


def driver(budget: BudgetConfig) -> str:
    """The bound that `budgets` are values of."""
    bounds = [name for name in ("macs", "params", "latency", "memory") if getattr(budget, name, None) is not None]
    return bounds[0] if bounds else "macs"


def path(experiment: Experiment, limits: Sequence[Limits], topology: Topology) -> BudgetPath:
    """The schedule of an experiment's search through its `points`, which may be measured later."""
    values = sorted(experiment.budgets, reverse=True)
    falls = [1.0, *(low / high for high, low in itertools.pairwise(values))]
    pressure = limits[0].pressure(topology, np.ones(topology.units))
    gates, steps = experiment.gates, experiment.search.steps
    return budget_path(falls, pressure, steps, gates.ramp, gates.warmup, experiment.run.steps_per_dispatch)
