"""Shrinking: a search that leaves out removed units does what one that computes all of them does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_search_step import GATES, OBJECTIVE, RUN, STAGE, batch, flat, searching, teacher, with_gates

from kdsearch_jax.distill import search_step, shrinking
from kdsearch_jax.distill.shrinking import Subnetwork
from kdsearch_jax.pruning import budgets, selection, surgery
from kdsearch_jax.pruning.settings import GatesConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEARN = jax.tree.map(lambda x: 1.2 * x, teacher()[1])  # a teacher that differs, or there would be nothing to learn


def random_keep(seed, share=0.6):
    """{group: (size,) bool} at random: at least one unit of each group, sometimes the branch."""
    random, keep = np.random.default_rng(seed), {}
    for group in teacher()[0].topology.groups:
        keep[group.name] = random.uniform(size=group.size) < share
        if group.kind != "branches":
            keep[group.name][random.integers(group.size)] = True
    return keep


@pytest.mark.parametrize("seed", range(6))
def test_a_subnetwork_costs_and_computes_what_the_whole_network_does(seed):
    """Costs of any choice within it; folding before cutting is cutting before folding, bit by bit."""
    search, *_ = searching()
    (network, variables), random = teacher(), np.random.default_rng(seed + 100)
    keep = random_keep(seed)
    subnetwork = Subnetwork.of(search, keep)
    small, whole = subnetwork.network.topology, network.topology
    names = {group.name for group in small.groups}
    present = np.concatenate([keep[group.name] & (group.name in names) for group in whole.groups])
    for _ in range(4):
        chosen = random.uniform(size=small.units) < 0.7
        everywhere = whole.flatten(keep).astype(float)
        everywhere[present] = chosen
        assert small.cost(chosen.astype(float)) == whole.cost(everywhere)
    gates = whole.unflatten(random.uniform(0.5, 1.5, whole.units).astype(np.float32))
    after = surgery.slice_variables(surgery.gated(variables, gates, keep, network), network, keep)
    cut = surgery.slice_variables(variables, network, keep)
    model_state = {name: leaves for name, leaves in cut.items() if name != "params"}
    before = subnetwork.fold({"params": cut["params"], "gates": gates}, model_state)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)


def run(config, steps, share):
    """A search that shrinks: (subnetwork, state, steps at which it shrank)."""
    stage = replace(STAGE, steps=steps, clip=1.0)
    search, tx, state = searching(config, stage)
    subnetwork, shrank = Subnetwork.of(search), []
    while int(state.step) < steps:
        step = jax.jit(search_step.search_step(subnetwork, search.network.module, tx, stage, OBJECTIVE, config, RUN))
        due = shrinking.shrinks(subnetwork, share)
        while int(state.step) < steps and not due(state):
            for _ in range(RUN.steps_per_dispatch):
                state, _ = step(state, batch(), jax.random.key(0), LEARN)
        if due(state):
            shrank.append(int(state.step))
            subnetwork, state = shrinking.shrink(subnetwork, state, tx)
    return subnetwork, state, shrank


def test_a_shrunk_search_does_what_an_unshrunk_one_does(full_compilation):
    """Clipping, momentum, weight decay and BatchNorm included: same units, same weights to rounding."""
    config = GatesConfig(warmup=0.0, learning_rate=0.02)
    _, expected, never = run(config, 24, None)
    small, state, shrank = run(config, 24, 0.9)
    search, network = small.search, small.whole
    assert never == [] and len(shrank) >= 1 and shrank[0] < 20
    assert small.network.topology.units < network.topology.units
    gates, wanted = (flat(search, each.params["gates"]) for each in (state, expected))
    np.testing.assert_array_equal(gates > 0, wanted > 0)
    np.testing.assert_allclose(gates, wanted, atol=1e-5)
    cut = surgery.slice_variables({"params": expected.params["params"], **expected.model_state}, network, small.keep)
    left = {"params": state.params["params"], **state.model_state}
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    variables = shrinking.expanded(small, state, teacher()[1])
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, teacher()[1])
    keep, other = (search.select(each.params, each.opt_state).keep for each in (state, expected))
    for name, mask in other.items():
        np.testing.assert_array_equal(keep[name], mask, err_msg=name)
    found, wanted = (search.history(each.params, each.opt_state) for each in (state, expected))
    np.testing.assert_array_equal(found["cost_macs"], wanted["cost_macs"])


def test_it_shrinks_only_if_enough_is_left():
    """Not after removing too many units: those left out could not return."""
    search, _, state = searching()
    topology, limits = search.topology, search.limits[0]
    due = shrinking.shrinks(Subnetwork.of(search), 0.9)

    def state_with(keep, step=12):
        return with_gates(search, state, keep, step)

    order = np.random.default_rng(0).uniform(size=topology.units)
    enough = topology.flatten(selection.choose(topology, limits, order).keep).astype(float)
    assert budgets.FLOOR <= limits.pressure(topology, enough) <= 1
    assert due(state_with(enough)) and not due(state_with(enough, STAGE.steps))
    assert not due(state_with(np.ones(topology.units)))
    less = enough.copy()
    less[np.flatnonzero(enough)[:3]] = 0
    assert limits.pressure(topology, less) < budgets.FLOOR and not due(state_with(less))
    assert not shrinking.shrinks(Subnetwork.of(search), None)(state_with(enough))


def test_a_group_without_open_gates_keeps_its_best_unit():
    search, tx, state = searching()
    topology, first = search.topology, search.topology.groups[0]
    keep = np.ones(topology.units)
    keep[: first.size] = 0
    state = with_gates(search, state, keep, 12)
    importance = jnp.arange(topology.units, dtype=jnp.float32)
    state = state.replace(opt_state=state.opt_state._replace(importance=importance))
    subnetwork, small = shrinking.shrink(Subnetwork.of(search), state, tx)
    assert np.flatnonzero(subnetwork.keep[first.name]).tolist() == [first.size - 1]
    assert subnetwork.gates(small.params["gates"])[first.name].tolist() == [0.0]
    np.testing.assert_array_equal(flat(search, small.params["gates"]), flat(search, state.params["gates"]))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimiser_is_cut_with_its_parameters(name):
    """Its slots keep their values for the units that stay."""
    stage = replace(STAGE, optimizer=name, clip=1.0)
    search, tx, state = searching(GATES, stage)
    filled = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) if x.ndim else x, state.opt_state.weights
    )
    state = with_gates(search, state, search.topology.flatten(random_keep(3)), 12)
    state = state.replace(opt_state=state.opt_state._replace(weights=filled))
    subnetwork, small = shrinking.shrink(Subnetwork.of(search), state, tx)
    assert jax.tree.map(jnp.shape, small.opt_state) == jax.tree.map(jnp.shape, jax.eval_shape(tx.init, small.params))
    weights = {"params": state.params["params"]}
    numbers = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), weights)
    expected = jax.tree.leaves(surgery.slice_variables(numbers, search.network, subnetwork.keep))
    slots = [x for x in jax.tree.leaves(small.opt_state.weights) if x.ndim]
    assert len(slots) == len(expected) * (2 if name == "adamw" else 1)
    for slot, value in zip(slots, expected * 2, strict=False):
        np.testing.assert_array_equal(slot, value)
