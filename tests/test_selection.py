"""Selections of coarse pieces on random costs, compared with all possible students."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse

from kdsearch_jax.pruning import budgets, selection
from kdsearch_jax.pruning.budgets import FLOOR, BudgetError, Limits
from kdsearch_jax.pruning.costs import Estimate
from kdsearch_jax.pruning.exact_selection import best_selection
from kdsearch_jax.pruning.pieces import Pieces
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.messages import format_distinct, round_up
from kdsearch_jax.tracing.topology import Group, Topology

SEEDS = st.integers(0, 10**6)


def random_topology(random: np.random.Generator, groups: int | None = None, largest: int = 6) -> Topology:
    """Groups of random sizes, with costs that are random sums of products of widths; some terms end with a branch."""
    kinds = random.choice(["channels", "neurons", "branches"], groups or random.integers(1, 5))
    sizes = np.where(kinds == "branches", 1, random.integers(1, largest + 1, len(kinds)))
    made = tuple(Group(f"g{i}", k, int(n), ()) for i, (k, n) in enumerate(zip(kinds, sizes, strict=True)))
    return Topology(made, (), random_cost(random, made), random_cost(random, made), 0.0, {})


def random_cost(random: np.random.Generator, groups: tuple[Group, ...]) -> Cost:
    starts = np.cumsum([0] + [g.size for g in groups])
    branches = [int(start) for start, g in zip(starts, groups, strict=False) if g.kind == "branches"]
    rows = 1 + 2 * len(groups)
    counts = np.zeros((rows, int(starts[-1])))
    for row in range(1, rows):  # a size is what always stays, and units of one group or two
        for number in random.choice(len(groups), min(len(groups), random.integers(1, 3)), replace=False):
            if groups[number].kind != "branches":
                counts[row, starts[number] : starts[number + 1]] = random.integers(1, 4)
    base = np.where(np.arange(rows) > 0, random.integers(0, 3, rows), 1).astype(float)
    terms = int(random.integers(1, 9))
    factors = random.integers(0, rows, (terms, 2))
    alive = random.choice([-1, -1, *branches], (terms, 2))
    factors[0], alive[0] = 0, -1  # something always stays
    return Cost(random.integers(1, 100, terms).astype(float), factors, alive, base, sparse.csr_matrix(counts))


def random_limits(random: np.random.Generator, topology: Topology) -> Limits:
    """One or more bounds between the cost of the smallest student and the network's, also on a modelled cost."""
    round_to = int(random.choice([1, 1, 2, 3]))
    ends = zip(topology.cost(budgets.smallest_keep(topology, round_to)), topology.total(), strict=True)
    macs, params = (low + random.uniform(0, 1) * (high - low) for low, high in ends)
    units = {g.name: float(random.uniform(0, 3)) for g in topology.groups if random.random() < 0.7}
    names = [g.name for g in topology.groups]
    branch = next((g.name for g in topology.groups if g.kind == "branches"), None)
    inside = {branch: tuple(n for n in names if n != branch and random.random() < 0.5)} if branch else {}
    scale = [float(random.choice([0.0, 0.01])) for _ in range(2)]
    saved = sum(g.size * units.get(g.name, 0.0) for g in topology.groups) + 0.01 * sum(topology.total())
    estimate = Estimate("latency", 1.0 + saved, *scale, units, inside)
    high, low = (
        estimate.total(topology, k) for k in (np.ones(topology.units), budgets.smallest_keep(topology, round_to))
    )
    measured = ((estimate, low + random.uniform(0.01, 1) * (high - low) + 1e-6),)
    which = random.integers(0, 5)
    bounds = [(macs, None, ()), (None, params, ()), (macs, params, ()), (None, None, measured), (macs, None, measured)]
    counted = [max(b, 1.0) if isinstance(b, float) else b for b in bounds[which][:2]]
    return Limits(*counted, round_to=round_to, measured=bounds[which][2])


def students(topology: Topology, limits: Limits, importance: np.ndarray) -> list[np.ndarray]:
    """All students, each with the most important units of its widths."""
    choices = []
    for group, values in zip(topology.groups, topology.unflatten(importance).values(), strict=True):
        step = budgets.width_multiple(limits.round_to, group)
        widths = (0, 1) if group.kind == "branches" else {group.size, *range(step, group.size, step)}
        place = np.argsort(np.argsort(values, kind="stable"), kind="stable")
        choices.append([(place >= group.size - width).astype(float) for width in sorted(widths)])
    return [np.concatenate(each) for each in itertools.product(*choices)]


def scaled(limits: Limits, factors: dict[str, float]) -> Limits:
    """Every bound times its factor."""
    counted = {name: bound * factors[name] for name in ("macs", "params") if (bound := getattr(limits, name))}
    measured = tuple((cost, bound * factors[cost.name]) for cost, bound in limits.measured)
    return replace(limits, **counted, measured=measured)


def pieces_of(topology: Topology, limits: Limits, importance: np.ndarray) -> Pieces:
    least = [budgets.fewest_units(limits.round_to, {}, group) for group in topology.groups]
    return Pieces.of(topology, importance, limits.round_to, least)


def drawn(seed: int, **more) -> tuple[Topology, Limits, np.ndarray, np.random.Generator]:
    random = np.random.default_rng(seed)
    topology = random_topology(random, **more)
    limits = random_limits(random, topology)
    importance = random.exponential(1.0, topology.units) ** random.choice([1, 3])
    return topology, limits, importance * (random.random(topology.units) > 0.1), random


def flat(topology: Topology, chosen: selection.Selection) -> np.ndarray:
    return topology.flatten(chosen.keep).astype(float)


@settings(max_examples=150)
@given(SEEDS, st.booleans())
def test_of_few_pieces_the_best_is_found_or_the_nearest_below(seed, per_cost):
    topology, limits, importance, _ = drawn(seed)
    every = students(topology, limits, importance)
    costs = np.array([limits.pressure(topology, keep) for keep in every])
    chosen = selection.choose(topology, limits, importance, per_cost=per_cost)
    keep = flat(topology, chosen)
    assert any((keep == each).all() for each in every)
    assert chosen.pressure == limits.pressure(topology, keep) <= 1.0
    landing = (costs >= FLOOR) & (costs <= 1.0)
    assert chosen.landed == landing.any()
    if not chosen.landed:
        assert chosen.exact and chosen.pressure == pytest.approx(costs[costs <= 1.0].max(), rel=1e-9)
        nearest = np.abs(costs - chosen.pressure) < 1e-9
        assert importance @ keep == pytest.approx(max(importance @ each for each in np.array(every)[nearest]))
    elif per_cost:
        assert importance @ keep == pytest.approx(max(importance @ each for each in np.array(every)[landing]))


@settings(max_examples=100)
@given(SEEDS)
def test_what_would_be_met_is_met_and_nothing_lies_between(seed):
    topology, limits, importance, _ = drawn(seed)
    chosen = selection.choose(topology, limits, importance)
    if chosen.landed or limits.pressure(topology, np.ones(topology.units)) <= 1.0:
        return
    every = students(topology, limits, importance)
    costs = [limits.pressure(topology, keep) for keep in every]
    mentioned = re.findall(
        r"(budget\.\w+ [\d.]+(?: with budget\.\w+ [\d.]+)*)(?: would be met|, the closest)", chosen.note
    )
    next_above = min((p for p in costs if p > 1.0), default=None)
    whole = dict(zip(limits.names, limits.pressures(topology, np.ones(topology.units)), strict=True))
    for text, wanted in zip(mentioned, (chosen.pressure, next_above), strict=False):
        shares = dict(re.findall(r"budget\.(\w+) ([\d.]+)", text))
        asked = scaled(limits, {name: float(share) * whole[name] * (1 + 1e-12) for name, share in shares.items()})
        nearest = [keep for keep, cost in zip(every, costs, strict=True) if cost == pytest.approx(wanted, rel=1e-9)]
        assert any(min(asked.pressures(topology, keep)) > 0.998 >= FLOOR for keep in nearest)
        assert any(asked.pressure(topology, keep) <= 1.0 for keep in nearest)
        assert selection.choose(topology, asked, importance).landed
    only_whole = next_above == limits.pressure(topology, np.ones(topology.units))
    assert len(mentioned) == 1 + (next_above is not None and not only_whole)
    assert "\n" not in chosen.note


@settings(max_examples=60)
@example(382)  # a branch twice in one term of a cost
@given(SEEDS)
def test_no_addition_and_no_exchange_is_better(seed):
    """Of networks of many pieces, where the best is not looked for among all."""
    topology, limits, importance, _ = drawn(seed, groups=6, largest=40)
    pieces = pieces_of(topology, limits, importance)
    chosen = selection.choose(topology, limits, importance)
    keep = flat(topology, chosen)
    assert chosen.pressure <= 1.0

    def merit(keep):
        return min(limits.pressure(topology, keep), FLOOR), importance @ keep

    leaving, back = pieces.ends(keep)
    for other in back:
        assert limits.pressure(topology, pieces.with_piece(keep, other)) > 1.0
        for piece in leaving:
            trial = pieces.with_piece(pieces.without(keep, [piece]), other)
            if pieces.chain[piece] != pieces.chain[other] and limits.pressure(topology, trial) <= 1.0:
                cost, worth = merit(trial)
                assert cost <= merit(keep)[0] + 1e-9 and (cost < merit(keep)[0] or worth <= merit(keep)[1] * (1 + 1e-9))


@settings(max_examples=60)
@given(SEEDS)
def test_the_exact_search_is_within_the_limits_however_little_it_may_look_at(seed):
    topology, limits, importance, random = drawn(seed)
    pieces = pieces_of(topology, limits, importance)
    if not len(pieces):
        return
    few = best_selection(topology, limits, pieces, work=int(random.integers(1, 30)))
    every = best_selection(topology, limits, pieces)
    assert every is not None and every.complete and limits.pressure(topology, every.best) <= 1.0
    if few is not None:
        reached = [min(limits.pressure(topology, outcome.best), FLOOR) for outcome in (few, every)]
        assert reached[0] <= reached[1] + 1e-9 and limits.pressure(topology, few.best) <= 1.0


def test_blocks_that_are_alike_are_counted_and_not_enumerated():
    """40 branches of equal cost: 2^40 students of 41 costs."""
    branches = tuple(Group(f"b{i}", "branches", 1, ()) for i in range(40))
    alive = np.append(np.arange(40), -1)[:, None]
    cost = Cost(
        np.append(np.full(40, 50.0), 100.0), np.zeros((41, 1), int), alive, np.ones(1), sparse.csr_matrix((1, 40))
    )
    topology = Topology(branches, (), cost, cost, 0.0, {})
    importance = np.random.default_rng(0).permutation(40).astype(float)
    chosen = selection.choose(topology, Limits(399.0, None), importance)  # 100 and 5 branches: 350
    assert chosen.exact and chosen.pressure == 350 / 399
    assert sorted(importance[flat(topology, chosen) > 0]) == [35, 36, 37, 38, 39]


def test_a_note_is_given_if_no_student_lands_and_an_error_if_none_fits():
    topology = random_topology(np.random.default_rng(2), groups=3)
    total, least = topology.total()[0], topology.cost(budgets.smallest_keep(topology, 3))[0]
    ones = np.ones(topology.units)
    notes = 0
    for bound in np.linspace(least, total - 1, 23):
        limits = Limits(float(bound), None, 3)
        chosen = selection.choose(topology, limits, ones)
        pressure = limits.pressure(topology, flat(topology, chosen))
        assert bool(chosen.note) == (pressure < FLOOR) and "\n" not in chosen.note
        notes += bool(chosen.note)
    assert notes
    with pytest.raises(BudgetError, match=r"budget\.macs 0\.\d+"):
        selection.choose(topology, Limits(least - 0.5, None, 3), ones)


@given(SEEDS)
def test_no_group_keeps_fewer_units_than_it_must(seed):
    topology, limits, importance, random = drawn(seed)
    asked = {g.name: int(random.integers(0, g.size + 1)) for g in topology.groups}
    least = [budgets.fewest_units(limits.round_to, asked, group) for group in topology.groups]
    try:
        chosen = selection.choose(topology, limits, importance, least)
    except BudgetError:
        smallest = budgets.smallest_keep(topology, limits.round_to, asked)
        assert limits.pressure(topology, smallest) > 1.0
        return
    assert chosen.pressure <= 1.0
    for group, fewest in zip(topology.groups, least, strict=True):
        width = chosen.keep[group.name].sum()
        step = budgets.width_multiple(limits.round_to, group)
        assert width >= fewest and (width in (0, group.size) or width % step == 0)


@given(st.lists(st.floats(1e-6, 10), min_size=2, max_size=4))
def test_numbers_that_differ_are_told_apart_in_their_order(values):
    texts = format_distinct(*values)
    for (a, x), (b, y) in itertools.combinations(zip(values, texts, strict=True), 2):
        assert (a == b) == (x == y) and (a < b) == (float(x) < float(y))
    up = round_up(values[0])
    assert values[0] <= float(up) * (1 + 1e-15) and float(up) <= values[0] * 1.0011


def test_a_setting_that_lands_nowhere_is_reported_by_its_own_name():
    neurons = (Group("dense", "neurons", 9, ()),)
    cost = Cost(
        np.full(1, 10.0),
        np.ones((1, 1), int),
        np.full((1, 1), -1),
        np.eye(1, 2)[0],
        sparse.csr_matrix(np.eye(2, 9, -1)[:, :1] * np.ones(9)),
    )
    topology = Topology(neurons, (), cost, cost, 0.0, {})
    chosen = selection.choose(topology, budgets.resolve(BudgetConfig(None, 0.6, 4), topology), np.ones(9))
    assert "budget.params 0.4445" in chosen.note and "budget.round_to" in chosen.note
    assert chosen.keep["dense"].sum() == 4
