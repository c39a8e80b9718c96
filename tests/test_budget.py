"""Budgets and their limits, and selections on real networks: that they land where they say."""

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
from kdsearch_jax.pruning import budgets, selection
from kdsearch_jax.pruning.budgets import FLOOR, Budget, BudgetError, Limits, smallest_keep
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.selection import balance
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
    """The topology of one of NETWORKS."""
    model, arguments, shape = NETWORKS[name]
    module = registry.build(model, {"num_classes": 10, **arguments})
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    return trace(module, images, **mode_keywords(module, train=False)).topology


def limits(name: str, macs: float | None = 0.5, params: float | None = None, round_to: int = 1) -> Limits:
    return budgets.resolve(BudgetConfig(macs, params, round_to), topology(name))


def importances(name: str, seed: int) -> np.ndarray:
    """Random and skewed, as those of a search are."""
    return np.random.default_rng(seed).exponential(1.0, topology(name).units) ** 3


def flat(name: str, keep) -> np.ndarray:
    return topology(name).flatten(keep).astype(float)


# --- limits ------------------------------------------------------------------------------------------


def test_a_fraction_and_the_number_that_it_stands_for_are_the_same_budget():
    macs, params = topology("cnn").total()
    assert limits("cnn", 0.5, 0.75) == Limits(0.5 * macs, 0.75 * params, 1)
    assert limits("cnn", float(macs // 2)).macs == macs // 2
    assert limits("cnn", None, 0.5) == Limits(None, 0.5 * params)


@pytest.mark.parametrize(
    ("macs", "params", "round_to", "named"),
    [
        (0.0, None, 1, ("budget.macs", "0.0")),
        (None, -0.5, 1, ("budget.params", "-0.5")),
        (float("nan"), None, 1, ("budget.macs", "nan")),
        (1.0, None, 1, ("budget.macs", "1.0", "30,112")),
        (1e9, None, 1, ("budget.macs", "1000000000.0", "30,112")),
        (2.0, None, 1, ("budget.macs", "2.0", "0.0")),
        (0.01, None, 1, ("budget.macs", "0.01")),
        (0.9, 1e-3, 1, ("budget.params", "0.001")),
        (0.3, None, 8, ("budget.macs", "0.3", "round_to")),
        (None, None, 1, ("budget.macs", "budget.params")),
        (0.5, None, 0, ("budget.round_to", "0")),
    ],
)
def test_an_impossible_budget_is_named_in_one_line(macs, params, round_to, named):
    with pytest.raises(BudgetError) as refusal:
        budgets.resolve(BudgetConfig(macs, params, round_to), topology("cnn"))
    message = str(refusal.value)
    assert "\n" not in message and all(part in message for part in named)


def test_a_budget_for_python_has_the_limits_of_the_settings():
    found = topology("cnn")
    for macs, params, round_to in ((0.5, None, 1), (None, 0.6, 2), (10_000, 0.7, 1)):
        budget = Budget(macs, params, round_to)
        assert budget.limits(found) == budgets.resolve(BudgetConfig(macs, params, round_to), found)
    with pytest.raises(BudgetError, match="Budget"):
        Budget()
    for round_to in (0, 1.5, "tpu"):
        with pytest.raises(BudgetError, match="round_to"):
            Budget(macs=0.5, round_to=round_to)
    with pytest.raises(BudgetError, match=r"budget\.macs"):
        Budget(macs=0.5).limits(found, least={group.name: group.size for group in found.groups})


def test_the_least_that_is_accepted_is_one_unit_a_layer():
    found = topology("mlp")
    least, _ = found.cost({group.name: np.arange(group.size) < 1 for group in found.groups})
    assert budgets.resolve(BudgetConfig(float(least)), found).macs == least
    with pytest.raises(BudgetError, match="out of reach"):
        budgets.resolve(BudgetConfig(float(least - 1)), found)
    keep = selection.choose(found, Limits(least, None), np.ones(found.units)).keep
    assert {name: mask.sum() for name, mask in keep.items()} == dict.fromkeys(keep, 1)


def test_where_nothing_fits_the_error_names_the_smallest_student():
    found = topology("cnn")
    least, params = found.cost(smallest_keep(found))
    with pytest.raises(BudgetError, match="smallest student") as refusal:
        selection.choose(found, Limits(0.99 * least, 1.1 * params), np.ones(found.units))
    bounds = asked_for(str(refusal.value), found)[0]
    assert bounds.names == ("macs", "params")
    assert found.cost(selection.choose(found, bounds, np.ones(found.units)).keep) == (least, params)


def asked_for(text: str, found: Topology, **more) -> list[Limits]:
    """The budgets in a message."""
    mentioned = re.findall(r"(budget\.\w+ [\d.]+(?: with budget\.\w+ [\d.]+)*)", text)
    values = [{n: float(v) for n, v in re.findall(r"budget\.(\w+) (\d+\.\d+)", text)} for text in mentioned]
    return [budgets.resolve(BudgetConfig(**{"macs": None, **bounds, **more}), found) for bounds in values]


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


# --- the landing ----------------------------------------------------------------------------------------------------


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
        chosen = selection.choose(found, bounds, importance)
        if chosen.landed:
            check_selection(name, bounds, importance, chosen.keep)
        else:
            assert chosen.exact and name != "resnet20"
            assert chosen.pressure == max(p for p in pressures(found, bounds) if p <= 1)


def pressures(found: Topology, bounds: Limits) -> list[float]:
    """Those of all students, whatever their importance."""
    levels = []
    for group in found.groups:
        step = budgets.width_multiple(bounds.round_to, group)
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
    chosen = selection.choose(found, bounds, importance)
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
    keep = selection.choose(found, bounds, found.flatten(tree)).keep
    assert keep[branch.name].all()
    check_selection(name, bounds, found.flatten(tree), keep)


def test_an_unimportant_branch_goes_where_that_helps():
    found = topology("resnet20")
    branch = next(g for g in found.groups if g.kind == "branches")
    tree = found.unflatten(importances("resnet20", 0) + 1e-3)
    tree[branch.name] = np.zeros(1)
    keep = selection.choose(found, limits("resnet20"), found.flatten(tree)).keep
    assert not keep[branch.name].any()
    tree[branch.name] = np.full(1, 1e9)
    keep = selection.choose(found, limits("resnet20"), found.flatten(tree)).keep
    assert keep[branch.name].all()


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_what_has_no_importance_goes_first(name):
    coarse = ("conv",) if name == "resnet20" else ()  # as above
    found = topology(name).select(("channels", "neurons", "heads", "values"), exclude=coarse)
    bounds, random = budgets.resolve(BudgetConfig(), found), np.random.default_rng(0)
    worthless = random.uniform(size=found.units) < 0.15
    importance = np.where(worthless, 0.0, random.exponential(1.0, found.units) ** 3)
    keep = found.flatten(selection.choose(found, bounds, importance).keep)
    # A few are taken back at the end, where nothing better fits into what is left of the budget.
    assert (worthless & keep).sum() <= 0.05 * worthless.sum()
    assert (~worthless & ~keep).sum() > 0


def test_ranking_by_importance_alone_ignores_the_price():
    """Two layers of equal importances and unequal prices: per cost, the expensive one shrinks more."""
    found = topology("mlp")
    importance = found.flatten({g.name: np.linspace(1, 2, g.size) for g in found.groups})
    bounds = limits("mlp")
    shares = {
        per_cost: {n: m.mean() for n, m in selection.choose(found, bounds, importance, per_cost=per_cost).keep.items()}
        for per_cost in (True, False)
    }
    prices = {n: v.mean() for n, v in found.unflatten(bounds.marginal(found, np.ones(found.units))).items()}
    costly, cheap = max(prices, key=prices.__getitem__), min(prices, key=prices.__getitem__)
    assert abs(shares[False][costly] - shares[False][cheap]) < 0.05
    assert shares[True][costly] < shares[True][cheap] - 0.1


def test_more_important_units_keep_their_place_when_others_gain():
    """Monotone: raising the importance of a unit never removes it."""
    found, bounds = topology("resnet20"), limits("resnet20")
    importance = importances("resnet20", 3)
    kept = flat("resnet20", selection.choose(found, bounds, importance).keep) > 0
    for unit in np.random.default_rng(0).choice(np.flatnonzero(kept), 5, replace=False):
        raised = importance.copy()
        raised[unit] *= 10
        assert flat("resnet20", selection.choose(found, bounds, raised).keep)[unit] == 1


def test_selection_does_not_depend_on_the_scale_of_importance():
    found, bounds, importance = topology("resnet"), limits("resnet"), importances("resnet", 5)
    a, b = (selection.choose(found, bounds, scale * importance).keep for scale in (1.0, 1e-12))
    assert all((a[name] == b[name]).all() for name in a)


# --- several bounds -------------------------------------------------------------------------------------------------


def equal_weights(found: Topology, bounds: Limits, importance: np.ndarray) -> np.ndarray:
    """The flat keep of a greedy selection by the sum of the prices of all bounds that are not met yet."""
    keep = np.ones(found.units)
    stays = np.zeros(found.units, bool)
    for group, units in zip(found.groups, found.unflatten(np.arange(found.units)).values(), strict=True):
        stays[units[np.argmax(importance[units])]] = group.kind != "branches"
    while bounds.pressure(found, keep) > 1.0:
        ratio = importance / np.maximum(bounds.marginal(found, keep), 1e-30)
        keep[np.argmin(np.where((keep > 0) & (stays == 0), ratio, np.inf))] = 0.0
    return keep


@given(st.integers(0, 10**6), st.sampled_from(["resnet20", "vit", "mlp"]), st.floats(0.3, 0.8), st.floats(0.3, 0.8))
def test_with_multipliers_never_less_is_kept_than_with_equal_weights(seed, name, macs, params):
    found, random = topology(name), np.random.default_rng(seed)
    bounds = limits(name, macs, params)
    importance = random.exponential(1.0, found.units) ** random.choice([1.0, 3.0])
    keep = flat(name, selection.choose(found, bounds, importance).keep)
    assert FLOOR <= bounds.pressure(found, keep) <= 1.0 and (bounds.pressures(found, keep) <= 1.0).all()
    # A greedy choice may be lucky by one unit, or below what counts as landed.
    by_equal_weights = equal_weights(found, bounds, importance)
    if bounds.pressure(found, by_equal_weights) >= FLOOR:
        assert importance @ keep >= importance @ by_equal_weights - importance.max()


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
