"""Costs on the device against the exact ones on the host, and what the controller promises, on several networks."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import traced
from random_networks import inputs_of, module_of, sample

from kdsearch_jax.adapters import registry
from kdsearch_jax.pruning.budgets import FLOOR, Budget, fewest_units
from kdsearch_jax.pruning.control import HOLD, RECALLED
from kdsearch_jax.pruning.costs import Estimate, Part, Table, groups_inside_branches
from kdsearch_jax.pruning.counting import Costs
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.search import GatedSearch
from kdsearch_jax.pruning.selection import choose

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


def fine(network):
    """Without residual branches and the stem, whose units are a large part of the network."""
    stem = [group.name for group in network.topology.groups if group.name == "conv"]
    return network.select(("channels", "neurons", "heads", "values"), exclude=stem)


NETWORKS = {"convolutional": convolutional, "attention": attention}
FINE = {f"{name}, fine": lambda make=make: fine(make()) for name, make in NETWORKS.items()}


def states(topology, seed, dead):
    """(gates, importances) with a share of dead gates."""
    rng = np.random.default_rng(seed)
    gates = np.where(rng.uniform(size=topology.units) < dead, 0.0, rng.uniform(0.05, 1.5, topology.units))
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


@cache
def search(name, bound):
    """A search whose controller works with the exact limits `search.limits[0]`."""
    return GatedSearch({**NETWORKS, **FINE}[name](), BUDGETS[bound], steps=100, every=5)


@cache
def jitted(name, bound):
    """(cost_of, log_alpha, log_level, protected, too_large, recalled) of the controller, compiled."""
    controller = search(name, bound).controller.at(0)

    def recalled(alive, importance, cost):
        return controller.recalled(alive, controller.costs.classes.counts(alive), importance, cost)

    functions = (controller.cost_of, controller.log_alpha, controller.log_level, controller.protected)
    return tuple(map(jax.jit, (*functions, controller.too_large, recalled)))


CASES = pytest.mark.parametrize(("name", "bound"), [(n, b) for n in NETWORKS for b in BUDGETS])


@CASES
@pytest.mark.parametrize("dead", [0.0, 0.3])
def test_alpha_is_the_power_of_cost_over_importance(name, bound, dead):
    """With one bound the cost is the exact price on the host; the most important units of a group have no penalty."""
    topology, limits = search(name, bound).topology, search(name, bound).limits[0]
    cost_of, log_alpha, _, protected, too_large, _ = jitted(name, bound)
    gates, importance = states(topology, 0, dead)
    alive = gates > 0
    cost = np.asarray(cost_of(alive, importance, np.float32(1.0)), float)
    if len(limits.names) == 1:
        prices = limits.prices(topology, alive.astype(float))[0][0]
        np.testing.assert_allclose(cost, prices, rtol=1e-5, atol=1e-7 * prices.max())
    logs = np.asarray(log_alpha(gates, importance, cost), float)
    stays = np.asarray(protected(np.where(alive, importance, -1.0)) | too_large(alive))
    np.testing.assert_array_equal(np.isfinite(logs), ~stays & (cost > 0))
    floor = 1e-12 * importance[alive].mean()
    with np.errstate(divide="ignore"):
        expected = 8.0 * (np.log(cost) - np.log(importance + floor))
    free = alive & np.isfinite(logs) & (np.abs(logs) < 75)  # beyond, logarithms are clipped
    shift = logs[free] - expected[free]
    np.testing.assert_allclose(shift, np.median(shift), atol=2e-3)


@CASES
def test_protected_are_the_most_important_units_that_must_stay(name, bound):
    topology, importance = search(name, bound).topology, states(search(name, bound).topology, 1, 0.0)[1]
    stays = topology.unflatten(np.asarray(jitted(name, bound)[3](importance)))
    values = topology.unflatten(importance)
    for group in topology.groups:
        kept = stays[group.name]
        assert kept.sum() == fewest_units(search(name, bound).limits[0].round_to, {}, group)
        if kept.any() and not kept.all():
            assert values[group.name][kept].min() >= values[group.name][~kept].max()


@CASES
def test_branches_too_large_to_go_are_those_whose_loss_undershoots(name, bound):
    topology, limits = search(name, bound).topology, search(name, bound).limits[0]
    for seed, dead in enumerate((0.0, 0.5, 0.7)):
        alive = (states(topology, seed, dead)[0] > 0).astype(float)
        expected = np.zeros(topology.units, bool)
        for group, units in zip(topology.groups, topology.unflatten(np.arange(topology.units)).values(), strict=True):
            if group.kind == "branches" and alive[units[0]]:
                without = alive.copy()
                without[units] = 0.0
                expected[units] = limits.pressure(topology, without) < limits.floor
        np.testing.assert_array_equal(jitted(name, bound)[4](alive > 0), expected)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.95))
def test_lambda2_is_the_smallest_that_brings_the_pressure_to_the_goal(name, seed, share):
    topology, limits, random = (
        search(name, "macs").topology,
        search(name, "macs").limits[0],
        np.random.default_rng(seed),
    )
    gates = (random.uniform(0, 1, topology.units) * (random.uniform(size=topology.units) > 0.1)).astype(np.float32)
    log_alpha = np.log(random.exponential(1, topology.units)).astype(np.float32)
    log_alpha[random.uniform(size=topology.units) < 0.05] = -np.inf
    goal = 1.0 + share * (limits.pressure(topology, (gates > 0).astype(float)) - 1.0)
    found = float(jitted(name, "macs")[2](gates, log_alpha, np.float32(goal)))
    steps = search(name, "macs").every * search(name, "macs").controller.rate
    critical = np.log(np.where(gates > 0, gates, 1.0)) - np.log(steps) - log_alpha  # log λ2 from which a gate reaches 0

    def pressure(log_lambda2):
        return limits.pressure(topology, ((gates > 0) & ~(critical <= log_lambda2)).astype(float))

    if found == -np.inf:
        assert pressure(-np.inf) <= goal * (1 + 1e-5)
    else:
        reachable = pressure(1e3) <= goal
        assert (pressure(found + 1e-5) <= goal * (1 + 1e-5)) == reachable
        assert pressure(found - 1e-4) >= goal * (1 - 1e-5)


def test_lambda2_is_zero_if_no_penalty_acts():
    log_level, units = jitted("convolutional", "macs")[2], search("convolutional", "macs").topology.units
    ones, none = np.ones(units, np.float32), np.full(units, -np.inf, np.float32)
    assert log_level(ones, none, np.float32(1.0)) == log_level(0 * ones, 0 * ones, np.float32(1.0)) == -np.inf


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), gone=st.floats(0.02, 0.6))
def test_as_few_units_as_needed_are_recalled_and_never_too_many(name, seed, gone):
    topology, limits, random = (
        search(name, "both").topology,
        search(name, "both").limits[0],
        np.random.default_rng(seed),
    )
    importance = random.uniform(0.1, 1, topology.units).astype(np.float32)
    alive = topology.flatten(choose(topology, limits, importance).keep).astype(float)
    alive[random.uniform(size=topology.units) < gone] = 0.0
    cost = np.asarray(jitted(name, "both")[0](alive > 0, importance, np.float32(1.0)))
    back = np.array(jitted(name, "both")[5](alive > 0, importance, cost))
    worth = np.divide(importance, cost, out=np.zeros_like(cost), where=cost > 0)
    before, after = (limits.pressure(topology, keep) for keep in (alive, np.maximum(alive, back)))
    assert not (back & (alive > 0)).any() and before <= after <= 1 + 1e-6
    if before >= FLOOR + 1e-6:
        return  # the controller does not ask
    candidates = np.flatnonzero((alive == 0) & ~back & (worth > 0))
    if after < FLOOR - 1e-6 and len(candidates) < RECALLED:  # every other unit exceeds the budget
        for unit in candidates:
            more = np.maximum(alive, back)
            more[unit] = 1.0
            assert limits.pressure(topology, more) > 1 - 1e-6
    elif after >= FLOOR + 1e-6:  # the last one was needed
        back[np.flatnonzero(back)[np.argmin(worth[back])]] = False
        assert limits.pressure(topology, np.maximum(alive, back)) < FLOOR + 1e-6


@pytest.mark.parametrize("name", FINE)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 1.0))
def test_several_bounds_are_met_together_on_the_way_and_at_the_end(name, seed, share):
    """Complementary slackness: a bound has weight only if it binds when units go in the order of importance over cost.

    On the way each bound covers the same share of the distance to its limit.
    """
    topology, limits = search(name, "both").topology, search(name, "both").limits[0]
    importance = np.random.default_rng(seed).exponential(1.0, topology.units).astype(np.float32)
    ones = np.ones(topology.units)
    full = limits.pressures(topology, ones)
    line = full + (1.0 - full) * share
    goal = full.max() + (1.0 - full.max()) * share
    cost_of, _, _, protected, *_ = jitted(name, "both")
    cost = np.asarray(cost_of(ones > 0, importance, np.float32(goal)), float)
    prices = limits.prices(topology, ones)[0] / np.maximum(line, 1.0)[:, None]
    weights = np.linalg.lstsq(prices.T, cost, rcond=None)[0]
    np.testing.assert_allclose(weights @ prices, cost, rtol=1e-4, atol=1e-5 * cost.max())
    assert (weights >= -1e-4).all() and weights.sum() == pytest.approx(1, abs=1e-3)
    stays, keep = np.asarray(protected(importance)), ones.copy()
    before = after = full / line
    for unit in np.argsort(importance / cost):
        if stays[unit]:
            continue
        if after.max() <= 1:
            break
        keep[unit] = 0.0
        before, after = after, limits.pressures(topology, keep) / line
    last = weights @ (before - after)  # one head of a small network is a good part of it
    assert -1e-4 <= weights @ (1 - after) <= last + 0.02


def test_a_decision_holds_the_dead_and_presses_the_living():
    network = convolutional()
    search = GatedSearch(network, Budget(macs=0.5), steps=100)
    gates, importance = states(network.topology, 0, 0.05)
    decide = jax.jit(search.controller)
    decision = decide(np.int32(50), gates, importance, np.float32(1))
    penalties = np.asarray(decision.penalty)
    assert (penalties[gates == 0] == HOLD).all() and (penalties >= 0).all() and np.isfinite(penalties).all()
    assert (penalties[gates > 0] > 0).any() and float(decision.lambda2) > 0 and float(decision.gain) > 1.0
    dead = decide(np.int32(50), np.zeros_like(gates), importance, np.float32(2))
    assert float(dead.lambda2) == 0.0 and float(dead.gain) < 2.0
