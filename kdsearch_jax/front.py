"""A front from one search: the budgets that its path passes, and when.

The path of the search goes down to the largest budget, stays there for a while, goes on to the next, and so on; at the
end of each stay the state is kept, and a student is cut from it. With K budgets, the `ramp` share of the steps is spent
on the way down, each stretch as long as it is steep, so that the cost falls as fast as in a search for the smallest
budget alone; the rest is shared evenly among the K stays. A stay is needed: λ2 falls to 0 in it, so that the loop lands
on the budget, and importances settle, by which the landing chooses. One budget is the path of a single search.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdsearch_jax import budget as budget_lib
from kdsearch_jax.budget import Limits
from kdsearch_jax.config import BudgetConfig, Experiment, GatesConfig, StageConfig, check
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


@dataclass(frozen=True)
class Leg:
    """A stretch of the path, in updates: the pressure asked for is `start` at `begin`, and 1 from `arrive` to `end`."""

    limits: Limits
    start: float
    begin: int
    arrive: int
    end: int

    def goal(self, step: int) -> float:
        """The pressure asked for at `step`."""
        return budget_lib.target(self.start, step, self.begin, self.arrive)


def legs(
    limits: Sequence[Limits],
    falls: Sequence[float],
    pressure: float,
    stage: StageConfig,
    config: GatesConfig,
    dispatch: int,
) -> tuple[Leg, ...]:
    """The path through the limits, the largest first.

    Args:
      falls: by what factor each budget is below the one before; the first is not looked at.
      pressure: of the whole network under the first limits; at most 1 where its bounds are to be measured yet.
      dispatch: updates a call; legs end with a call.

    Raises:
      ValueError: there are too few steps to stay at each.
    """
    count, ramp = len(limits), int(config.ramp * stage.steps)
    warmup, stay = int(config.warmup * ramp), (stage.steps - ramp) / len(limits)
    starts = [max(pressure, 1.0), *(1.0 / fall for fall in falls[1:])]
    shares = [1.0]
    for start in starts:
        shares.append(shares[-1] / start)
    drop = 1.0 - shares[-1]
    found: list[Leg] = []
    begin = warmup
    for k in range(count):
        way = [(1.0 - share) / drop if drop > 0 else 1.0 for share in shares[k : k + 2]]
        arrive = begin + (ramp - warmup) * (way[1] - (way[0] if k else 0.0))
        left = warmup + (ramp - warmup) * way[1] + stay * (k + 1)  # by the schedule, which rounding does not move
        end = stage.steps if k == count - 1 else min(stage.steps, dispatch * math.ceil(left / dispatch))
        found.append(Leg(limits[k], starts[k], begin, int(arrive), end))
        begin = end
    if count > 1 and any(leg.arrive >= leg.end for leg in found):
        raise ValueError(
            f"budgets: search.steps {stage.steps}, in calls of run.steps_per_dispatch {dispatch}, are too few to stay "
            f"at {count} of them; give more steps, or fewer budgets"
        )
    return tuple(found)


def at(way: Sequence[Leg], step: int) -> Leg:
    """The leg that the update after `step` belongs to."""
    return next((leg for leg in way if step < leg.end), way[-1])


def path(experiment: Experiment, limits: Sequence[Limits], topology: Topology) -> tuple[Leg, ...]:
    """The path of an experiment's search through the limits of its `points`."""
    values = sorted(experiment.budgets, reverse=True)
    falls = [1.0, *(low / high for high, low in itertools.pairwise(values))]
    pressure = limits[0].pressure(topology, np.ones(topology.units))
    return legs(limits, falls, pressure, experiment.search, experiment.gates, experiment.run.steps_per_dispatch)
