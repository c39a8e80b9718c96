"""What is dead is left out of a search: the same updates result, and what is left keeps its costs and weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gated import GATES, RUN, STAGE, TASK, batch, begin, flat, teacher

from kdsearch_jax.distill import search_step, shrinking
from kdsearch_jax.distill.shrinking import Part
from kdsearch_jax.pruning import budget, budget_path, surgery
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEARN = jax.tree.map(lambda x: 1.2 * x, teacher()[1])  # a teacher that differs, or there would be nothing to learn


def random_keep(seed, share=0.6):
    """What is left of the network at random: at least one unit of a group, the branch at times."""
    random, keep = np.random.default_rng(seed), {}
    for group in teacher()[0].topology.groups:
        keep[group.name] = random.uniform(size=group.size) < share
        if group.kind != "branches":
            keep[group.name][random.integers(group.size)] = True
    return keep


@pytest.mark.parametrize("seed", range(6))
def test_the_topology_of_a_part_is_that_of_the_whole(seed):
    """Costs of any choice within the part; folding before cutting is cutting before folding, bit by bit."""
    network, variables = teacher()
    keep, random = random_keep(seed), np.random.default_rng(seed + 100)
    part = Part.of(network, keep)
    small, whole = part.network.topology, network.topology
    for _ in range(4):
        chosen = random.uniform(size=small.units) < 0.7
        everywhere = whole.flatten(keep).astype(float)
        everywhere[part.present] = chosen
        assert small.cost(chosen.astype(float)) == whole.cost(everywhere)
    gates = whole.unflatten(random.uniform(0.5, 1.5, whole.units).astype(np.float32))
    after = surgery.slice_variables(surgery.gated(variables, gates, keep, network), network, keep)
    cut = surgery.slice_variables(variables, network, keep)
    own = part.take(whole.flatten(gates))
    before = gates_lib.fold(cut, own, small)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)


def run(config, steps, share, stop=None):
    """A search by hand, one call of the hook in 4 updates: (part, state, limits, steps at which it shrank)."""
    stage = replace(STAGE, steps=steps, clip=1.0)
    network, tx, state = begin(config, stage)
    limits = budget.resolve(BudgetConfig(0.5), network.topology)
    whole = limits.pressure(network.topology, np.ones(network.topology.units))
    path = budget_path.legs([limits], [1.0], whole, stage.steps, config.ramp, config.warmup, RUN.steps_per_dispatch)
    part, shrank = Part.of(network), []
    while int(state.step) < (stop or steps):
        step = jax.jit(search_step.search_step(part.network, network.module, tx, TASK, config, RUN))
        between = search_step.controller(part, path, stage, config, RUN)
        ask = shrinking.until(part, path, share, steps)
        while int(state.step) < (stop or steps) and not ask(state):
            for _ in range(RUN.steps_per_dispatch):
                state, _ = step(state, batch(), jax.random.key(0), LEARN)
            state, _ = between(state)
        if ask(state):
            shrank.append(int(state.step))
            part, state = shrinking.shrink(part, state, tx)
    return part, state, limits, shrank


def test_a_shrunk_search_does_what_an_unshrunk_one_does(full_compilation):
    """Clipping, momentum, weight decay and BatchNorm included: same deaths, same choice, same weights to rounding."""
    config = GatesConfig(warmup=0.0, learning_rate=0.02)
    network = teacher()[0]
    whole, expected, limits, never = run(config, 24, None)
    part, state, _, shrank = run(config, 24, 0.9)
    assert never == [] and len(shrank) >= 1 and shrank[0] < 20
    assert part.network.topology.units < network.topology.units
    np.testing.assert_array_equal(part.gates(state) > 0, whole.gates(expected) > 0)
    np.testing.assert_allclose(part.gates(state), whole.gates(expected), atol=1e-5)
    params = {"params": expected.params, **expected.model_state}
    own = surgery.slice_variables(params, network, part.keep)
    for a, b in zip(jax.tree.leaves({"params": state.params, **state.model_state}), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    variables, gates, importance = shrinking.expanded(part, state, teacher()[1])
    assert {name: x.shape for name, x in gates.items()} == {g.name: (g.size,) for g in network.topology.groups}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, teacher()[1])
    keep = search_step.landing(network.topology, limits, gates, importance).keep
    other = search_step.landing(network.topology, limits, expected.extra["gates"], expected.extra["importance"]).keep
    for name, mask in other.items():
        np.testing.assert_array_equal(keep[name], mask, err_msg=name)
    found, wanted = (search_step.history(network.topology, each) for each in (state, expected))
    np.testing.assert_array_equal(found["cost_macs"], wanted["cost_macs"])


def test_it_shrinks_only_where_enough_would_be_left():
    """Not when too much has died: what went could not come back, as it may in a search that is not shrunk."""
    network, _, state = begin()
    topology = network.topology
    limits = budget.resolve(BudgetConfig(0.5), topology)
    path = budget_path.legs([limits], [1.0], 2.0, STAGE.steps, GATES.ramp, GATES.warmup, 4)
    ask = shrinking.until(Part.of(network), path, 0.9, STAGE.steps)

    def with_gates(keep, step=12):
        gates = gates_lib.mask(state.extra["gates"], topology.unflatten(keep))
        return state.replace(step=jnp.int32(step), extra={**state.extra, "gates": gates})

    order = np.random.default_rng(0).uniform(size=topology.units)
    enough = topology.flatten(budget.select(topology, limits, order)).astype(float)
    assert budget.FLOOR <= limits.pressure(topology, enough) <= 1
    assert ask(with_gates(enough)) and not ask(with_gates(enough, STAGE.steps))
    assert not ask(with_gates(np.ones(topology.units)))
    less = enough.copy()
    less[np.flatnonzero(enough)[:3]] = 0
    assert limits.pressure(topology, less) < budget.FLOOR and not ask(with_gates(less))
    never = shrinking.until(Part.of(network), path, None, STAGE.steps)
    assert not never(with_gates(enough))


def test_a_group_that_died_keeps_its_best_unit():
    network, tx, state = begin()
    topology = network.topology
    name = topology.groups[0].name
    importance = {**state.extra["importance"], name: jnp.arange(topology.groups[0].size, dtype=jnp.float32)}
    gates = {**state.extra["gates"], name: jnp.zeros(topology.groups[0].size)}
    state = state.replace(extra={**state.extra, "gates": gates, "importance": importance})
    part, small = shrinking.shrink(Part.of(network), state, tx)
    assert np.flatnonzero(part.keep[name]).tolist() == [topology.groups[0].size - 1]
    assert small.extra["gates"][name].tolist() == [0.0]
    np.testing.assert_array_equal(part.gates(small), flat(network, gates))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimiser_is_cut_with_its_parameters(optimizer):
    """Its slots hold, for what stays, what they held."""
    stage = replace(STAGE, optimizer=optimizer, clip=1.0)
    network, tx, state = begin(stage=stage)
    filled = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) if x.ndim else x, state.opt_state
    )
    keep = random_keep(3)
    gates = gates_lib.mask(state.extra["gates"], keep)
    state = state.replace(opt_state=filled, extra={**state.extra, "gates": gates})
    part, small = shrinking.shrink(Part.of(network), state, tx)
    both = {"weights": small.params, "gates": small.extra["gates"]}
    assert jax.tree.map(jnp.shape, small.opt_state) == jax.tree.map(jnp.shape, jax.eval_shape(tx.init, both))
    numbers = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), {"params": state.params})
    expected = jax.tree.leaves(surgery.slice_variables(numbers, network, part.keep))
    slots = [x for x in jax.tree.leaves(small.opt_state.inner_states["weights"]) if x.ndim]
    assert len(slots) == len(expected) * (2 if optimizer == "adamw" else 1)
    for slot, value in zip(slots, expected * 2, strict=False):
        np.testing.assert_array_equal(slot, value)
