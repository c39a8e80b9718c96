"""A front from one search: its path, and the settings that ask for it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from kdsearch_jax.pruning import budget_path
from kdsearch_jax.pruning.budget import Limits
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.runs import budget_points
from kdsearch_jax.runs.config import Experiment, changed

GATES = GatesConfig(ramp=0.5, warmup=0.2)


def legs(values, steps=400, dispatch=10, config=GATES):
    limits = [Limits(value * 1000, None) for value in values]
    falls = [1.0, *(b / a for a, b in itertools.pairwise(values))]
    return budget_path.legs(limits, falls, 1 / values[0], steps, config.ramp, config.warmup, dispatch)


def test_one_budget_is_the_path_of_a_single_search():
    """From the whole network's pressure at the end of the warm-up in a straight line to 1, then it stays."""
    (leg,) = legs([0.5])
    assert (leg.begin, leg.arrive, leg.end) == (40, 200, 400)
    assert [leg.goal(step) for step in (0, 40, 120, 200, 399)] == [2.0, 2.0, 1.5, 1.0, 1.0]


@pytest.mark.parametrize("values", [[0.7, 0.5, 0.3], [0.9, 0.2], [0.8, 0.7, 0.6, 0.5, 0.4]], ids=str)
def test_the_path_falls_and_stays_at_each_budget(values):
    path = legs(values)
    cost = [
        budget_path.at(path, step).goal(step) * budget_path.at(path, step).limits.macs / 1000 for step in range(400)
    ]
    assert cost[0] == pytest.approx(1) and cost[-1] == pytest.approx(values[-1])
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(cost))
    stay = 200 / len(values)
    for leg, value in zip(path, values, strict=True):
        assert leg.limits.macs == value * 1000
        assert stay - 10 <= leg.end - leg.arrive <= stay + 10 and leg.end % 10 == 0
        assert cost[leg.end - 1] == pytest.approx(value)
    falling = -np.diff(cost)
    steep = falling[falling > 1e-9]
    assert path[-1].end == 400 and np.median(steep) == pytest.approx((1 - values[-1]) / 160, rel=0.15)


def test_too_few_steps_for_the_budgets():
    with pytest.raises(
        ValueError, match=r"budgets: search.steps 20, in calls of .* 10, are too few to stay at 3 of them"
    ):
        legs([0.7, 0.5, 0.3], steps=20)
    with pytest.raises(ValueError, match="give more steps, or fewer budgets"):
        legs([0.7, 0.5], steps=0)


def test_points_are_named_by_their_budgets():
    experiment = replace(Experiment(), budgets=(0.3, 0.7), budget=BudgetConfig(macs=0.5, params=0.6))
    large, small = budget_points.points(experiment)
    assert (large.name, large.student, large.tail) == ("at-0.7", "student-0.7", "-0.7")
    assert (small.budget.macs, small.budget.params) == (0.3, 0.6)
    only = replace(experiment, budget=BudgetConfig(macs=None, params=0.6), budgets=(2e6, 1e6))
    assert [(p.name, p.budget.macs, p.budget.params) for p in budget_points.points(only)] == [
        ("at-2000000", None, 2e6),
        ("at-1000000", None, 1e6),
    ]
    (single,) = budget_points.points(Experiment())
    assert (single.name, single.student, single.budget) == ("retrain", "student", Experiment().budget)


@pytest.mark.parametrize("budgets", [(0.5, 0.5), (0.5, 0.0), (0.5, -1.0), (0.5, 2e6)], ids=str)
def test_budgets_that_are_none_are_refused(budgets):
    with pytest.raises(ValueError, match="budgets: .* is not possible; give each once, all in"):
        changed(Experiment(), {"budgets": budgets})
