"""Costs on the device against the exact ones on the host, and the promises of the controller."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import traced
from random_networks import inputs_of, module_of, sample

from kdsearch_jax.adapters import registry
from kdsearch_jax.pruning import selection
from kdsearch_jax.pruning.budgets import FLOOR, Budget, width_multiple
from kdsearch_jax.pruning.control import HOLD
from kdsearch_jax.pruning.costs import Estimate, Part, Table, groups_inside_branches
from kdsearch_jax.pruning.counting import Costs
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.search import GatedSearch

pytestmark = pytest.mark.usefixtures("quick_compilation")

SEEDS = range(1, 7)
BUDGETS = {
    "macs": Budget(macs=0.5),
    "params": Budget(params=0.4),
    "both": Budget(macs=0.5, params=0.45),
    "rounded": Budget(macs=0.6, round_to=2),
}


@cache
def convolutional():
    """A network with convolutions, BatchNorm, residual branches."""
    module = registry.build("cifar_resnet", {"depth": 20, "num_classes": 10})
    return trace(module, jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32), train=False)


@cache
def attention():
    """A network with heads, values and neurons."""
    module = registry.build("vit", {"num_classes": 10, "width": 48, "depth": 3, "heads": 3, "patch": 8, "mlp_dim": 96})
    return trace(module, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32), train=False)


NETWORKS = {"convolutional": convolutional, "attention": attention}


def states(topology, seed, removed):
    """(gates, importances) with a share of gates at 0."""
    rng = np.random.default_rng(seed)
    gates = np.where(rng.uniform(size=topology.units) < removed, 0.0, rng.uniform(0.05, 1.5, topology.units))
    return gates.astype(np.float32), (rng.exponential(1e-4, topology.units) ** 2).astype(np.float32)


def check_costs(topology, measured=()):
    costs = Costs.of(topology, measured)
    total, marginal = jax.jit(costs.total), jax.jit(costs.marginal)
    host = [topology.macs, topology.params]
    for seed, share in enumerate((0.0, 0.2, 0.6, 1.0)):
        keep = (np.random.default_rng(seed).uniform(size=topology.units) >= share).astype(float)
        totals = [c.total(keep) for c in host] + [c.total(topology, keep) for c in measured]
        slopes = [c.marginal(keep) for c in host] + [c.marginal(topology, keep) for c in measured]
        whole = np.maximum(costs.whole, 1e-30)
        np.testing.assert_allclose(total(keep), totals / whole, rtol=2e-6, atol=1e-12)
        slopes = np.stack(slopes) / whole[:, None]
        np.testing.assert_allclose(marginal(keep), slopes, rtol=5e-6, atol=1e-7 * slopes.max())


@pytest.mark.parametrize("seed", SEEDS)
def test_costs_of_random_networks_are_those_of_the_host(seed):
    program = sample(seed)
    try:
        with jax.numpy_rank_promotion("allow"):
            network = traced(module_of(program), *inputs_of(program))
    except ValueError as error:
        assert "nothing in this network can be pruned" in str(error)
        pytest.skip("nothing can be pruned")
    check_costs(network.topology)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_of_large_networks_and_of_what_is_measured(name):
    topology = NETWORKS[name]().topology
    macs, params = topology.total()
    units = {group.name: 1e-3 * (i % 3) for i, group in enumerate(topology.groups)}
    estimate = Estimate("latency", 7.0, 3.0 / macs, 1.0 / params, units, groups_inside_branches(topology))
    plain = [group for group in topology.groups if group.kind != "branches"]
    branch = next(group.name for group in topology.groups if group.kind == "branches")
    table = Table(
        "memory",
        (
            Part((plain[0].name,), ((0.0, 1.5, plain[0].size),), (0.0, 1.0, 4.0)),
            Part(
                (plain[0].name, plain[1].name), ((0, plain[0].size), (0, 1.5, plain[1].size)), ((0, 1, 2), (1, 5, 9.0)),
                branch,
            ),
        ),
        2.0,
    ).on(topology)  # fmt: skip
    assert table.whole == 15.0
    check_costs(topology, (estimate, table))


# --- α ---------------------------------------------------------------------------------------------------------------


def free_units(topology, limits, gates, importance):
    """(units,) bool: with g > 0, not the best of their group, and no branch without which the cost is too low."""
    alive = gates > 0
    best = topology.unflatten(np.where(alive, importance, -1.0))
    free = topology.flatten(
        {g.name: np.argsort(np.argsort(-best[g.name], kind="stable"), kind="stable")
         >= (0 if g.kind == "branches" else width_multiple(limits.round_to, g)) for g in topology.groups}
    ).astype(bool)  # fmt: skip
    branches = np.concatenate([np.full(g.size, g.kind == "branches") for g in topology.groups])
    for unit in np.flatnonzero(branches & alive):
        less = alive.astype(float)
        less[unit] = 0.0
        free[unit] = limits.pressure(topology, less) >= limits.floor
    return free & alive


@pytest.mark.parametrize("removed", [0.0, 0.3])
@pytest.mark.parametrize("penalty", ["one", "macs", "params", "importance"])
@pytest.mark.parametrize("name", NETWORKS)
def test_alpha_is_its_formula_and_the_best_units_are_free_of_penalty(name, penalty, removed):
    """Up to a common factor, and whatever the importance of removed units."""
    network = NETWORKS[name]()
    topology = network.topology
    search = GatedSearch(network, BUDGETS["rounded"], steps=100, every=5, penalty=penalty, sharpness=1.5)
    controller, limits = search.controller.at(0), search.limits[0]

    @jax.jit
    def log_alpha(gates, importance):
        return controller.log_alpha(gates, importance, controller.cost_of(gates > 0, importance, jnp.float32(1.0)))

    gates, importance = states(topology, 0, removed)
    alive, found = gates > 0, np.asarray(log_alpha(gates, importance), float)
    keep = alive.astype(float)
    expected = {
        "one": np.ones(topology.units),
        "macs": topology.macs.marginal(keep),
        "params": topology.params.marginal(keep),
        "importance": (limits.prices(topology, keep)[0][0] / importance) ** 1.5,
    }[penalty]
    free = free_units(topology, limits, gates, importance) & (expected > 0)  # 0 inside a removed branch
    np.testing.assert_array_equal(np.isfinite(found[alive]), free[alive])
    shift = found[free] - np.log(expected[free])
    np.testing.assert_allclose(shift, np.median(shift), atol=2e-3)
    less = np.asarray(log_alpha(gates, np.where(alive, importance, importance * 1e-20)), float)
    np.testing.assert_allclose(less[free], found[free], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_two_bounds_are_complementary_to_what_is_left(name, share):
    """Removing units by importance per cost takes both bounds the same share of their way, if both are active."""
    network = NETWORKS[name]()
    network = network.select(("channels", "neurons", "heads", "values"), exclude=("conv",) * (name == "convolutional"))
    topology = network.topology
    search = GatedSearch(network, BUDGETS["both"], steps=100)
    controller, limits = search.controller.at(0), search.limits[0]
    importance = np.random.default_rng(0).exponential(1.0, topology.units).astype(np.float32)
    keep = np.ones(topology.units)
    full = limits.pressures(topology, keep)
    line = full + (1.0 - full) * share
    goal = np.float32(full.max() + (1.0 - full.max()) * share)
    cost = np.asarray(jax.jit(controller.cost_of)(keep > 0, importance, goal), float)
    prices = (limits.prices(topology, keep)[0] / line[:, None]).astype(float)
    weights = np.linalg.lstsq(prices.T, cost, rcond=None)[0]
    np.testing.assert_allclose(weights @ prices, cost, rtol=1e-3, atol=1e-5 * cost.max())
    assert (weights >= -1e-4).all() and weights.sum() == pytest.approx(1, abs=1e-3)
    best = topology.unflatten(importance)
    stays = topology.flatten({g.name: best[g.name] == best[g.name].max() for g in topology.groups}).astype(bool)
    order = np.argsort(importance / cost)
    before = after = limits.pressures(topology, keep) / line
    for unit in order[~stays[order]]:
        if after.max() <= 1:
            break
        keep[unit] = 0
        before, after = after, limits.pressures(topology, keep) / line
    assert -1e-6 <= weights @ (1 - after) <= weights @ (before - after) + 0.02


# --- λ2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [0.0, 0.3])
@pytest.mark.parametrize("bound", BUDGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_lambda2_is_the_smallest_that_brings_the_pressure_to_the_goal(name, bound, removed):
    network = NETWORKS[name]()
    topology = network.topology
    search = GatedSearch(network, BUDGETS[bound], steps=100, every=5)
    controller, limits = search.controller.at(0), search.limits[0]
    level = jax.jit(controller.log_level)
    rate = search.learning_rate / (1 - search.momentum)
    for seed in range(2):
        gates, _ = states(topology, seed, removed)
        random = np.random.default_rng(seed)
        alpha = random.exponential(1, topology.units) * (random.uniform(size=topology.units) > 0.05)

        def pressure(lambda2, gates=gates, alpha=alpha):
            """Each gate above 0 falls by rate·λ2·α in each step."""
            alive = (gates > 0) & ~((alpha > 0) & (gates <= search.every * rate * lambda2 * alpha))
            return limits.pressure(topology, alive.astype(float))

        with np.errstate(divide="ignore"):
            log_alpha = np.log(alpha).astype(np.float32)
        start = pressure(0.0)
        for goal in (1.0 + 0.5 * max(start - 1.0, 0.0), 0.9 * start, start + 0.01):
            lambda2 = np.exp(float(level(gates, log_alpha, np.float32(goal))))
            if start <= goal:
                assert lambda2 == 0
            else:
                assert pressure(lambda2 * (1 + 1e-4)) <= goal + 1e-6 or pressure(1e30) > goal
                assert pressure(lambda2 * (1 - 1e-4)) > goal - 1e-6
        ones = np.ones(topology.units, np.float32)
        assert np.isneginf(level(ones, np.full(topology.units, -np.inf, np.float32), np.float32(1.0)))


# --- recall ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["macs", "both"])
@pytest.mark.parametrize("name", NETWORKS)
def test_as_few_units_as_necessary_are_recalled_and_never_too_many(name, bound):
    network = NETWORKS[name]()
    topology = network.topology
    search = GatedSearch(network, BUDGETS[bound], steps=100)
    limits, controller = search.limits[0], search.controller.at(0)
    importance = np.random.default_rng(0).uniform(0.1, 1, topology.units).astype(np.float32)
    smaller = Budget(macs=0.4, params=0.4).limits(topology)
    keep = topology.flatten(selection.choose(topology, smaller, importance).keep).astype(float)

    @jax.jit
    def recall(alive, importance):
        cost = controller.cost_of(alive, importance, jnp.float32(1.0))
        counts = controller.costs.classes.counts(alive)
        return controller.recalled(alive, counts, importance, cost), importance / cost

    back, worth = map(np.asarray, recall(keep > 0, importance))
    after = limits.pressure(topology, np.maximum(keep, back))
    assert back.any() and not (back & (keep > 0)).any() and after <= 1 + 1e-6
    if after >= FLOOR:
        last = np.flatnonzero(back)[np.argmin(worth[back])]
        back = back & (np.arange(topology.units) != last)
        assert limits.pressure(topology, np.maximum(keep, back)) < FLOOR
    else:  # any other unit would exceed the budget
        for unit in np.flatnonzero((keep == 0) & ~back):
            more = np.maximum(keep, back)
            more[unit] = 1.0
            assert limits.pressure(topology, more) > 1


def test_a_decision_holds_the_dead_and_presses_the_living():
    network = convolutional()
    search = GatedSearch(network, Budget(macs=0.5), steps=100)
    gates, importance = states(network.topology, 0, 0.05)
    decide = jax.jit(search.controller)
    decision = decide(np.int32(50), gates, importance, np.float32(1))
    penalties = np.asarray(decision.penalty)
    assert (penalties[gates == 0] == HOLD).all() and (penalties >= 0).all() and np.isfinite(penalties).all()
    assert (penalties[gates > 0] > 0).any() and float(decision.lambda2) > 0 and float(decision.gain) > 1.0
    removed = decide(np.int32(50), np.zeros_like(gates), importance, np.float32(2))
    assert float(removed.lambda2) == 0.0 and float(removed.gain) < 2.0


def test_lambda2_grows_at_the_budget_until_the_cost_is_within_it():
    """Gates that do not follow the prediction, a little above the budget."""
    network = convolutional()
    search = GatedSearch(network, Budget(macs=0.5), steps=100)
    importance = states(network.topology, 0, 0.0)[1]
    limits = search.limits[0]
    keep = network.topology.flatten(selection.choose(network.topology, limits, importance).keep) > 0
    for unit in np.flatnonzero(~keep):
        more = keep | (np.arange(len(keep)) == unit)
        if 1 < limits.pressure(network.topology, more) < 1.02:
            break
    else:
        pytest.fail("no unit takes the cost a little above the budget")
    decide, gain, levels = jax.jit(search.controller), np.float32(1), []
    for step in (80, 90, 100):
        decision = decide(np.int32(step), more.astype(np.float32), importance, gain)
        gain = decision.gain
        levels.append(float(decision.lambda2))
    assert levels[0] < levels[1] < levels[2]
