"""Budgets: what can be asked for, what the closed loop asks of λ2, and that the selection lands where it says."""

import itertools
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.call_spec import mode_keywords
from kdsearch_jax.pruning import budget
from kdsearch_jax.pruning.budget import FLOOR, BudgetError, Limits, smallest
from kdsearch_jax.pruning.budget.multipliers import balance
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.tracing.topology import Topology

NETWORKS = {
    "cnn": ("small_cnn", {"width": 4}, (8, 8, 1)),
    "resnet": ("cifar_resnet", {"depth": 8, "width": 8}, (8, 8, 3)),
    "resnet20": ("cifar_resnet", {"depth": 20}, (32, 32, 3)),
    "mlp": ("mlp", {"hidden": [24, 40]}, (8, 8, 1)),
    "vit": ("vit", {"patch": 4, "width": 16, "depth": 2, "heads": 4, "mlp_dim": 32}, (8, 8, 3)),
}
BUDGETS = {"macs": (0.5, None), "params": (None, 0.6), "both": (0.5, 0.6), "little": (0.35, None)}


@cache
def topology(name: str) -> Topology:
    """What can be pruned in one of NETWORKS."""
    model, arguments, shape = NETWORKS[name]
    module = registry.build(model, {"num_classes": 10, **arguments})
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    return trace(module, images, **mode_keywords(module, train=False)).topology


def limits(name: str, macs: float | None = 0.5, params: float | None = None, round_to: int = 1) -> Limits:
    return budget.resolve(BudgetConfig(macs, params, round_to), topology(name))


def importances(name: str, seed: int) -> np.ndarray:
    """Random and skewed, as those of a search are."""
    return np.random.default_rng(seed).exponential(1.0, topology(name).units) ** 3


def flat(name: str, keep) -> np.ndarray:
    return topology(name).flatten(keep).astype(float)


# --- what can be asked for ------------------------------------------------------------------------------------------


def test_a_fraction_and_the_number_that_it_stands_for_are_the_same_budget():
    macs, params = topology("cnn").total()
    assert limits("cnn", 0.5, 0.75) == Limits(0.5 * macs, 0.75 * params, 1)
    assert limits("cnn", float(macs // 2)).macs == macs // 2
    assert limits("cnn", None, 0.5) == Limits(None, 0.5 * params)


@pytest.mark.parametrize(
    ("macs", "params", "round_to", "message"),
    [
        (0.0, None, 1, r"budget\.macs: 0\.0 must be above 0"),
        (None, -0.5, 1, r"budget\.params: -0\.5 must be above 0"),
        (float("nan"), None, 1, r"budget\.macs: nan must be above 0"),
        (1.0, None, 1, r"budget\.macs: 1\.0 is not below the teacher's 30,112; nothing"),
        (1e9, None, 1, r"budget\.macs: 1000000000\.0 is not below the teacher's"),
        (
            2.0,
            None,
            1,
            r"budget\.macs: 2\.0 is out of reach: with 1 unit a layer the student still costs [\d,]+ of .*least 0\.0",
        ),
        (0.01, None, 1, r"budget\.macs: 0\.01 is out of reach"),
        (0.9, 1e-3, 1, r"budget\.params: 0\.001 is out of reach"),
        (0.3, None, 8, r"budget\.macs: 0\.3 is out of reach: with 8 units a layer"),
        (None, None, 1, r"give budget\.macs or budget\.params"),
        (0.5, None, 0, r"budget\.round_to: 0 must be at least 1"),
    ],
)
def test_an_impossible_budget_is_named_with_the_way_out(macs, params, round_to, message):
    with pytest.raises(BudgetError, match=message) as refusal:
        budget.resolve(BudgetConfig(macs, params, round_to), topology("cnn"))
    assert isinstance(refusal.value, ValueError) and "\n" not in str(refusal.value)


def test_the_least_that_is_accepted_is_one_unit_a_layer():
    found = topology("mlp")
    least, _ = found.cost({group.name: np.arange(group.size) < 1 for group in found.groups})
    assert budget.resolve(BudgetConfig(float(least)), found).macs == least
    with pytest.raises(BudgetError, match="out of reach"):
        budget.resolve(BudgetConfig(float(least - 1)), found)
    keep = budget.select(found, Limits(least, None), np.ones(found.units))
    assert {name: mask.sum() for name, mask in keep.items()} == dict.fromkeys(keep, 1)


def test_where_nothing_fits_the_error_names_the_smallest_student():
    found = topology("cnn")
    least, params = found.cost(smallest(found))
    with pytest.raises(BudgetError, match="even the smallest student costs") as refusal:
        budget.select(found, Limits(0.99 * least, 1.1 * params), np.ones(found.units))
    bounds = asked_for(str(refusal.value), found)[0]
    assert bounds.names == ("macs", "params")
    assert found.cost(budget.select(found, bounds, np.ones(found.units))) == (least, params)


def asked_for(text: str, found: Topology, **more) -> list[Limits]:
    """The budgets that a message says would be met."""
    told = re.findall(r"(budget\.\w+ [\d.]+(?: with budget\.\w+ [\d.]+)*)", text)
    values = [{n: float(v) for n, v in re.findall(r"budget\.(\w+) (\d+\.\d+)", each)} for each in told]
    return [budget.resolve(BudgetConfig(**{"macs": None, **each, **more}), found) for each in values]


def test_pressure_is_the_worse_of_the_two_bounds():
    found = topology("cnn")
    keep = np.ones(found.units)
    macs, params = found.total()
    assert limits("cnn", 0.5, 0.25).pressure(found, keep) == pytest.approx(4)
    assert Limits(macs, None).pressure(found, keep) == pytest.approx(1)
    assert Limits(None, 2 * params).pressure(found, keep) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_marginal_is_what_the_next_unit_costs_of_the_bounds_that_are_not_met(name):
    found, keep = topology(name), np.ones(topology(name).units)
    for bounds, count in ((limits(name, 0.5, None), "macs"), (limits(name, 0.99, 0.3), "params")):
        if count == "params":  # MACs are met after one group has lost half of its units, parameters are not
            largest = max(found.groups, key=lambda g: (g.kind != "branches") * found.shares()[g.name][0]).name
            tree = found.unflatten(keep.copy())
            tree[largest] = np.arange(len(tree[largest])) % 2 * 1.0
            keep = found.flatten(tree)
            assert found.cost(keep)[0] < bounds.macs and found.cost(keep)[1] > bounds.params
        marginal = bounds.marginal(found, keep)
        chosen = np.random.default_rng(0).choice(np.flatnonzero(keep), 8, replace=False)
        for unit in chosen:
            less = keep.copy()
            less[unit] = 0
            cost = getattr(found, count)
            difference = (cost.total(keep) - cost.total(less)) / getattr(bounds, count)
            assert difference - 1e-9 <= marginal[unit] <= 1.2 * difference + 1e-9


# --- the closed loop ------------------------------------------------------------------------------------------------


def test_the_target_falls_from_the_whole_network_to_the_budget():
    path = [budget.target(2.0, step, 10, 110) for step in range(200)]
    assert path[:11] == [2.0] * 11 and path[110:] == [1.0] * 90
    np.testing.assert_allclose(path[60], 1.5)
    assert (np.diff(path) <= 0).all()
    assert budget.target(2.0, 0, 0, 0) == 2.0 and budget.target(2.0, 1, 0, 0) == 1.0


@given(st.integers(0, 10_000), st.sampled_from(["cnn", "vit"]), st.floats(1.0, 1.9))
def test_lambda2_is_the_smallest_that_brings_the_pressure_to_the_goal(seed, name, goal):
    found, bounds, random = topology(name), limits(name), np.random.default_rng(seed)
    gates = random.uniform(0, 1, found.units) * (random.uniform(size=found.units) > 0.1)
    alpha = random.exponential(1, found.units) * (random.uniform(size=found.units) > 0.05)
    rate, steps = 0.1, 7

    def pressure(lambda2):
        """Where each alive gate falls by rate·λ2·α in each step."""
        alive = (gates > 0) & ~((alpha > 0) & (gates <= steps * rate * lambda2 * alpha * (1 + 1e-9)))
        return bounds.pressure(found, alive.astype(float))

    lambda2 = budget.level(found, bounds, gates, alpha, rate, steps, goal)
    if lambda2 == 0:
        assert pressure(0.0) <= goal
    else:
        assert pressure(0.0) > goal
        reachable = pressure(1e30) <= goal
        assert (pressure(lambda2) <= goal) == reachable
        assert pressure(0.999999 * lambda2) > goal


def test_lambda2_is_zero_where_no_penalty_acts():
    found, bounds = topology("cnn"), limits("cnn")
    ones, zeros = np.ones(found.units), np.zeros(found.units)
    assert budget.level(found, bounds, ones, zeros, 0.1, 10, 1.0) == 0.0
    assert budget.level(found, bounds, zeros, ones, 0.1, 10, 1.0) == 0.0


def test_protected_are_the_most_important_of_each_group_and_no_branch():
    found, importance = topology("resnet"), importances("resnet", 0)
    for round_to in (1, 3):
        tree = found.unflatten(budget.protected(found, importance, round_to))
        for group, values in zip(found.groups, found.unflatten(importance).values(), strict=True):
            assert tree[group.name].sum() == (0 if group.kind == "branches" else round_to)
            if group.kind != "branches":
                assert values[tree[group.name]].min() >= values[~tree[group.name]].max()


def test_branches_too_large_to_go_are_those_whose_loss_undershoots():
    found, ones = topology("resnet"), np.ones(topology("resnet").units)
    total = found.cost(ones)[0]
    branches = np.concatenate([np.full(g.size, g.kind == "branches") for g in found.groups])
    left = {}
    for unit in np.flatnonzero(branches):
        less = ones.copy()
        less[unit] = 0
        left[unit] = found.cost(less)[0]
    assert len(set(left.values())) > 1
    bound = sorted(left.values())[1] + 1  # one or two branches are above it, one or two below
    large = budget.too_large(found, Limits(bound / FLOOR, None), ones)
    assert {unit for unit in left if large[unit]} == {unit for unit, cost in left.items() if cost < bound}
    assert not large[~branches].any()
    assert not budget.too_large(found, Limits(bound, None), np.where(branches, 0.0, 1.0)).any()  # dead ones are gone
    assert not budget.too_large(found, Limits(1.0, None), ones).any()
    assert budget.too_large(found, Limits(total, None), ones)[branches].all()


# --- the landing ----------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["cnn", "resnet20", "vit"]),
    share=st.floats(0.2, 0.8),
    gone=st.floats(0.02, 0.6),
)
def test_as_few_as_bring_the_cost_back_are_recalled_and_never_too_many(seed, name, share, gone):
    found, bounds, worth = topology(name), limits(name, share), importances(name, seed)
    alive = flat(name, budget.select(found, bounds, worth)).astype(float)
    alive[np.random.default_rng(seed).uniform(size=found.units) < gone] = 0.0
    back = budget.recalled(found, bounds, alive, worth)
    before, after = bounds.pressure(found, alive), bounds.pressure(found, np.maximum(alive, back))
    assert not (back & (alive > 0)).any() and before <= after <= 1
    if before >= FLOOR:
        assert not back.any()
    elif after < FLOOR:  # whoever is still dead would be too much
        for unit in np.flatnonzero((alive == 0) & ~back & (worth > 0)):
            more = np.maximum(alive, back)
            more[unit] = 1.0
            assert bounds.pressure(found, more) > 1
    else:
        least = np.flatnonzero(back)[np.argmin(worth[back])]  # called last, and needed
        back[least] = False
        assert bounds.pressure(found, np.maximum(alive, back)) < FLOOR


def check_selection(name, bounds, importance, keep):
    """In the budget, no layer empty, widths allowed, and within a group always the more important stay."""
    found = topology(name)
    assert FLOOR <= bounds.pressure(found, flat(name, keep)) <= 1.0
    for group, values in zip(found.groups, found.unflatten(importance).values(), strict=True):
        mask = keep[group.name]
        assert mask.shape == (group.size,) and mask.dtype == bool
        if group.kind == "branches":
            continue
        assert mask.any()
        assert mask.all() or mask.sum() % bounds.round_to == 0
        if not mask.all():
            assert values[mask].min() >= values[~mask].max()


@pytest.mark.parametrize("round_to", [1, 2, 4, 8])
@pytest.mark.parametrize("asked", BUDGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_selection_lands_in_the_budget_or_there_is_no_such_student(name, asked, round_to):
    found = topology(name)
    try:
        bounds = limits(name, *BUDGETS[asked], round_to)
    except BudgetError as error:
        assert "out of reach" in str(error) and name in ("cnn", "resnet", "vit")
        return
    for seed in range(3):
        importance = importances(name, seed)
        chosen = budget.choose(found, bounds, importance)
        if chosen.landed:
            check_selection(name, bounds, importance, chosen.keep)
        else:
            assert chosen.exact and name != "resnet20"
            assert chosen.pressure == max(p for p in pressures(found, bounds) if p <= 1)


def pressures(found: Topology, bounds: Limits) -> list[float]:
    """Those of all students, whatever their importance."""
    levels = []
    for group in found.groups:
        step = budget.multiple(bounds.round_to, group)
        levels.append([0, 1] if group.kind == "branches" else sorted({group.size, *range(step, group.size, step)}))
    assert np.prod([len(level) for level in levels]) < 20_000, "too many to look at"
    return [
        bounds.pressure(
            found, np.concatenate([np.arange(g.size) < w for g, w in zip(found.groups, widths, strict=True)]) * 1.0
        )
        for widths in itertools.product(*levels)
    ]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(["cnn", "resnet"]), st.floats(0.25, 0.95), st.sampled_from([1, 2, 4]))
def test_selection_finds_a_landing_wherever_there_is_one(seed, name, share, round_to):
    found, importance = topology(name), importances(name, seed)
    try:
        bounds = limits(name, share, None, round_to)
    except BudgetError as error:
        assert "out of reach" in str(error)
        return
    chosen = budget.choose(found, bounds, importance)
    assert chosen.exact or chosen.landed
    if chosen.landed:
        check_selection(name, bounds, importance, chosen.keep)
    elif name == "cnn":
        assert chosen.pressure == max(p for p in pressures(found, bounds) if p <= 1) < FLOOR


@pytest.mark.parametrize("name", ["cnn", "resnet", "vit"])
def test_a_branch_that_would_overshoot_stays_whatever_its_importance(name):
    """With its branch gone, and everything else kept, the network is far below the budget: no way to land there."""
    found = topology(name)
    branch = next(g for g in found.groups if g.kind == "branches")
    rest = found.unflatten(np.ones(found.units))
    rest[branch.name] = np.zeros(1)
    total, without = found.cost(np.ones(found.units))[0], found.cost(rest)[0]
    bounds = Limits(0.5 * (without / FLOOR + total), None)  # above what is left without the branch
    tree = found.unflatten(importances(name, 0))
    tree[branch.name] = np.zeros(1)
    keep = budget.select(found, bounds, found.flatten(tree))
    assert keep[branch.name].all()
    check_selection(name, bounds, found.flatten(tree), keep)


def test_an_unimportant_branch_goes_where_that_helps():
    found = topology("resnet20")
    branch = next(g for g in found.groups if g.kind == "branches")
    tree = found.unflatten(importances("resnet20", 0) + 1e-3)
    tree[branch.name] = np.zeros(1)
    keep = budget.select(found, limits("resnet20"), found.flatten(tree))
    assert not keep[branch.name].any()
    tree[branch.name] = np.full(1, 1e9)
    keep = budget.select(found, limits("resnet20"), found.flatten(tree))
    assert keep[branch.name].all()


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_what_has_no_importance_goes_first(name):
    coarse = ("conv",) if name == "resnet20" else ()  # as above
    found = topology(name).select(("channels", "neurons", "heads", "values"), exclude=coarse)
    bounds, random = budget.resolve(BudgetConfig(), found), np.random.default_rng(0)
    worthless = random.uniform(size=found.units) < 0.15
    importance = np.where(worthless, 0.0, random.exponential(1.0, found.units) ** 3)
    keep = found.flatten(budget.select(found, bounds, importance))
    # A few are taken back at the end, where nothing better fits into what is left of the budget.
    assert (worthless & keep).sum() <= 0.05 * worthless.sum()
    assert (~worthless & ~keep).sum() > 0


def test_ranking_by_importance_alone_ignores_the_price():
    """Two layers of equal importances and unequal prices: per cost, the dear one goes; by importance, both alike."""
    found = topology("mlp")
    importance = found.flatten({g.name: np.linspace(1, 2, g.size) for g in found.groups})
    bounds = limits("mlp")
    shares = {
        per_cost: {
            n: m.mean() for n, m in budget.select(found, bounds, importance, per_cost=per_cost, rounds=1).items()
        }
        for per_cost in (True, False)
    }
    prices = {n: v.mean() for n, v in found.unflatten(bounds.marginal(found, np.ones(found.units))).items()}
    dear, cheap = max(prices, key=prices.__getitem__), min(prices, key=prices.__getitem__)
    assert abs(shares[False][dear] - shares[False][cheap]) < 0.05
    assert shares[True][dear] < shares[True][cheap] - 0.1


def test_more_important_units_keep_their_place_when_others_gain():
    """Monotone: raising a unit's importance never makes it go."""
    found, bounds = topology("resnet20"), limits("resnet20")
    importance = importances("resnet20", 3)
    kept = flat("resnet20", budget.select(found, bounds, importance)) > 0
    for unit in np.random.default_rng(0).choice(np.flatnonzero(kept), 5, replace=False):
        raised = importance.copy()
        raised[unit] *= 10
        assert flat("resnet20", budget.select(found, bounds, raised))[unit] == 1


def test_selection_does_not_depend_on_the_scale_of_importance():
    found, bounds, importance = topology("resnet"), limits("resnet"), importances("resnet", 5)
    a, b = (budget.select(found, bounds, scale * importance) for scale in (1.0, 1e-12))
    assert all((a[name] == b[name]).all() for name in a)


# --- several bounds -------------------------------------------------------------------------------------------------


def equal_weights(found: Topology, bounds: Limits, importance: np.ndarray) -> np.ndarray:
    """What a greedy choice by the prices of the unmet bounds, added up, keeps."""
    keep = np.ones(found.units)
    stays = budget.protected(found, importance)
    while bounds.pressure(found, keep) > 1.0:
        ratio = importance / np.maximum(bounds.marginal(found, keep), 1e-30)
        keep[np.argmin(np.where((keep > 0) & ~stays, ratio, np.inf))] = 0.0
    return keep


@given(st.integers(0, 10**6), st.sampled_from(["resnet20", "vit", "mlp"]), st.floats(0.3, 0.8), st.floats(0.3, 0.8))
def test_with_multipliers_never_less_is_kept_than_with_equal_weights(seed, name, macs, params):
    found, random = topology(name), np.random.default_rng(seed)
    bounds = limits(name, macs, params)
    importance = random.exponential(1.0, found.units) ** random.choice([1.0, 3.0])
    keep = flat(name, budget.select(found, bounds, importance))
    assert FLOOR <= bounds.pressure(found, keep) <= 1.0 and (bounds.pressures(found, keep) <= 1.0).all()
    # A greedy choice may be lucky by one unit, or below what counts as landed.
    by_equal_weights = equal_weights(found, bounds, importance)
    if bounds.pressure(found, by_equal_weights) >= FLOOR:
        assert importance @ keep >= importance @ by_equal_weights - importance.max()


@settings(max_examples=6)
@given(st.integers(0, 10**6), st.floats(0.4, 0.6), st.floats(0.4, 0.6), st.floats(0.2, 0.9))
def test_on_the_way_each_bound_goes_the_same_share_of_what_is_left(seed, macs, params, share):
    """Prices for a goal are those for limits on the line to the budget: what has weight arrives there together."""
    found = topology("resnet20").select(("channels",), exclude=("conv",))
    bounds = budget.resolve(BudgetConfig(macs, params), found)
    importance, keep = np.random.default_rng(seed).exponential(1.0, found.units), np.ones(found.units)
    full = bounds.pressures(found, keep)
    goal = full.max() + (1.0 - full.max()) * share
    line = full + (1.0 - full) * share
    cost = budget.cost_of(found, bounds, keep, importance, goal)
    for unit in np.argsort(importance / cost):
        if (bounds.pressures(found, keep) <= line).all():
            break
        keep[unit] = 0.0
    weights = budget.multipliers(found, bounds.times(line), np.ones(found.units), importance)
    assert -1e-9 <= weights @ (1.0 - bounds.pressures(found, keep) / line) <= 0.02
    np.testing.assert_allclose(bounds.times(line).pressures(found, keep) * line, bounds.pressures(found, keep))


@given(st.integers(0, 10**6), st.sampled_from(["resnet20", "vit"]), st.floats(0.35, 0.9), st.floats(0.35, 0.9))
def test_multipliers_are_complementary_to_what_is_left(seed, name, macs, params):
    """μ ≥ 0, Σμ = 1, and a bound has weight only if it binds; checked on the linearised way that they are made for."""
    coarse = ("conv",) if name == "resnet20" else ()  # as above
    found = topology(name).select(("channels", "neurons", "heads", "values"), exclude=coarse)
    bounds = budget.resolve(BudgetConfig(macs, params), found)
    importance = np.random.default_rng(seed).exponential(1.0, found.units)
    ones = np.ones(found.units)
    weights = budget.multipliers(found, bounds, ones, importance)
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1)
    price = weights @ bounds.prices(found, ones)[0]
    np.testing.assert_allclose(budget.cost_of(found, bounds, ones, importance), price)
    order = np.argsort(importance / price)
    order = order[~budget.protected(found, importance)[order]]
    keep = ones.copy()
    before = after = bounds.pressures(found, keep)
    for unit in order:
        if after.max() <= 1:
            break
        keep[unit] = 0
        before, after = after, bounds.pressures(found, keep)
    last = weights @ (before - after)  # one head of a small network is a good part of it
    assert -1e-9 <= weights @ (1 - after) <= last + 0.01


@pytest.mark.parametrize("seed", range(3))
def test_three_bounds_are_weighed_too(seed):
    """Random convex resources with a common optimum: the gap of complementary slackness closes."""
    random = np.random.default_rng(seed)
    prices, importance = random.exponential(1.0, (3, 4000)), random.exponential(1.0, 4000)
    room = np.array([0.5, 0.45, 0.6]) * prices.sum(1)

    def outcome(weights):
        order = np.argsort(-importance / (weights @ prices))
        spent = np.cumsum(prices[:, order], axis=1) / room[:, None]
        return spent[:, np.searchsorted(spent.max(0), 1.0) - 1]

    weights = balance(outcome, 3)
    pressures = outcome(weights)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert weights @ (1 - pressures) < 0.005
    assert pressures[weights > 0.05].min() > 0.98


def test_one_bound_has_all_the_weight():
    found = topology("mlp")
    assert budget.multipliers(found, limits("mlp"), np.ones(found.units), np.ones(found.units)).tolist() == [1.0]
    np.testing.assert_array_equal(
        budget.cost_of(found, limits("mlp"), np.ones(found.units), np.ones(found.units)),
        limits("mlp").marginal(found, np.ones(found.units)),
    )
