"""The search: its α, its controller, and a whole tiny search that must land in the budget."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import search_step as search_step_benchmark
from kdsearch_jax.adapters import apply, registry
from kdsearch_jax.data import datasets
from kdsearch_jax.data.batches import normalise
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import losses, search_step, steps
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.shrinking import Part
from kdsearch_jax.pruning import budget, budget_path, penalty
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.training import loop, optimizer
from kdsearch_jax.training import state as training_state
from kdsearch_jax.training.settings import RunConfig, StageConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

STAGE = StageConfig(steps=20, batch_size=32, learning_rate=0.02, schedule="constant")
RUN = RunConfig(steps_per_dispatch=4)
DISTILL = DistillConfig()
TASK = classification(DISTILL)
DATA = DataConfig("digits", train_limit=256)
GATES, BUDGET = GatesConfig(), BudgetConfig()


@cache
def teacher():
    """(traced network, variables): a small CNN and its first variables; from NumPy, for `init` is slow to compile."""
    module, random = registry.build("small_cnn", {"num_classes": 10, "width": 4}), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))

    def first(path, leaf):
        scale = 1.0 if path[-1].key in ("scale", "var") else 0.0
        spread = 1.4 / np.sqrt(np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.1
        return jnp.asarray(scale + spread * random.normal(size=leaf.shape), jnp.float32)

    variables = jax.tree_util.tree_map_with_path(first, shapes)
    return trace(module, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32), train=False), variables


@cache
def digits():
    return datasets.load(DATA, 0)


def begin(config=GATES, stage=STAGE, network=None):
    """(network, optimiser, first state) of a search."""
    network = network or teacher()[0]
    tx = search_step.make_transformation(stage, config)
    return network, tx, search_step.begin(teacher()[1], network.topology, tx, stage, config.init)


def control(network, limits, config=GATES, stage=STAGE, run=RUN):
    """The hook of a search for one budget."""
    whole = limits.pressure(network.topology, np.ones(network.topology.units))
    path = budget_path.legs([limits], [1.0], whole, stage.steps, config.ramp, config.warmup, run.steps_per_dispatch)
    return search_step.controller(Part.of(network), path, stage, config, run)


def search(directory, config=GATES, bounds=BUDGET, stage=STAGE, run=RUN, network=None):
    """A whole search: (network, limits, last state)."""
    network, tx, state = begin(config, stage, network)
    limits = budget.resolve(bounds, network.topology)
    step = search_step.search_step(network, network.module, tx, TASK, config, run)
    between = control(network, limits, config, stage, run)
    state = loop.fit(
        state, step, digits(), DATA, stage, run, directory=directory, name="search", meta={},
        constants=teacher()[1], between=between, seed=1,
    )  # fmt: skip
    return network, limits, state


def flat(network, tree):
    return network.topology.flatten(jax.tree.map(np.asarray, tree))


# --- one update -----------------------------------------------------------------------------------------------------


def batch():
    images = normalise(digits().train.images[:32], np.asarray(digits().mean), np.asarray(digits().std))
    return {"images": jnp.asarray(images), "labels": jnp.asarray(digits().train.labels[:32])}


def test_importance_is_the_mean_square_of_gate_times_gradient(full_compilation):
    """Against the same quantity from scratch: the loss as a function of the gates alone, differentiated."""
    config = GatesConfig(importance_decay=0.5)
    network, tx, state = begin(config)
    assert (flat(network, state.extra["gates"]) == 1).all()
    step = jax.jit(search_step.search_step(network, network.module, tx, TASK, config, RUN))
    # The teacher's own logits as the target would give a gradient of zero at the start: ask for other ones.
    constants = jax.tree.map(lambda x: 1.2 * x, teacher()[1])

    @jax.jit
    def fisher(state, key):
        def loss(gates):
            folded = gates_lib.fold({"params": state.params}, gates, network.topology)["params"]
            logits, _ = apply.apply_train(network.module, folded, state.model_state, batch()["images"], key)
            target = apply.apply_eval(network.module, constants, batch()["images"])
            return losses.distillation(logits, target, batch()["labels"], DISTILL).mean()

        gates = state.extra["gates"]
        return jax.tree.map(lambda g, d: (g * d) ** 2, gates, jax.grad(loss)(gates))

    expected = None
    for i, rate in enumerate((0.0, 0.5, 0.5)):
        key = jax.random.key(i)
        now = flat(network, fisher(state, key))
        expected = now if expected is None else rate * expected + (1 - rate) * now
        state, metrics = step(state, batch(), key, constants)
        np.testing.assert_allclose(flat(network, state.extra["importance"]), expected, rtol=2e-3, atol=1e-9)
        assert {"loss", "accuracy", "agreement"} <= set(metrics)
    assert state.step == 3 and (expected > 0).mean() > 0.9


def test_without_a_penalty_gates_at_one_leave_the_teacher_as_it_is():
    """The first loss is that of distilling the teacher into itself, in training mode."""
    network, tx, state = begin()
    step = jax.jit(search_step.search_step(network, network.module, tx, TASK, GatesConfig(), RUN))
    _, metrics = step(state, batch(), jax.random.key(0), teacher()[1])
    plain = jax.jit(
        steps.distill_step(network.module, network.module, optimizer.make_optimizer(STAGE), STAGE, RUN, TASK)
    )
    alone = training_state.create_state(teacher()[1], optimizer.make_optimizer(STAGE))
    _, expected = plain(alone, batch(), jax.random.key(0), teacher()[1])
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)


def test_what_the_penalty_says_happens_to_the_gates_and_not_to_the_weights():
    network, tx, state = begin()
    name = network.topology.groups[0].name
    penalty = jax.tree.map(jnp.zeros_like, state.extra["penalty"])
    penalty[name] = penalty[name].at[1].set(1e6)
    step = jax.jit(search_step.search_step(network, network.module, tx, TASK, GatesConfig(), RUN))
    punished, _ = step(
        state.replace(extra={**state.extra, "penalty": penalty}), batch(), jax.random.key(0), teacher()[1]
    )
    free, _ = step(state, batch(), jax.random.key(0), teacher()[1])
    a, b = flat(network, punished.extra["gates"]), flat(network, free.extra["gates"])
    assert punished.extra["gates"][name][1] == 0 and (a != b).sum() == 1 and (b > 0).all()
    for x, y in zip(jax.tree.leaves(punished.params), jax.tree.leaves(free.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_gates_may_start_at_the_norm_of_what_they_scale():
    """1 on average in each group, as large as the kernel entries that read the unit; the network is the teacher's."""
    network, variables = teacher()
    kernel = np.array(variables["params"]["dense"]["kernel"])
    kernel[1] = 0.0  # nothing reads unit 1 of the last layer
    variables = {
        **variables,
        "params": {**variables["params"], "dense": {**variables["params"]["dense"], "kernel": kernel}},
    }
    started, gates = search_step.started(variables, network.topology, "norm")
    for group in network.topology.groups:
        np.testing.assert_allclose(gates[group.name].mean(), 1.0, rtol=1e-5)
    norms = np.linalg.norm(kernel, axis=1)
    np.testing.assert_allclose(gates["stage3/conv"], norms / norms.mean(), rtol=1e-5)
    assert gates["stage3/conv"][1] == 0 and np.ptp(gates["stage3/conv"]) > 0.1
    for a, b in zip(
        jax.tree.leaves(gates_lib.fold(started, gates, network.topology)), jax.tree.leaves(variables), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    same, ones = search_step.started(variables, network.topology, "one")
    assert same is variables and all((gate == 1).all() for gate in ones.values())


def test_frozen_statistics_stay_the_teachers_and_the_first_loss_is_zero():
    config = GatesConfig(batch_norm="frozen")
    network, tx, state = begin(config)
    step = jax.jit(search_step.search_step(network, network.module, tx, TASK, config, RUN))
    new, metrics = step(state, batch(), jax.random.key(0), teacher()[1])
    assert abs(metrics["loss"]) < 1e-6 and metrics["agreement"] == 1
    for a, b in zip(jax.tree.leaves(new.model_state), jax.tree.leaves(state.model_state), strict=True):
        np.testing.assert_array_equal(a, b)


# --- α --------------------------------------------------------------------------------------------------------------


def alphas(config, gates=None, seed=0):
    network = teacher()[0]
    found, random = network.topology, np.random.default_rng(seed)
    importance = random.exponential(1e-3, found.units)
    gates = np.ones(found.units) if gates is None else gates
    limits = budget.resolve(BudgetConfig(), found)
    alpha = penalty.weights(found, limits, config, gates, importance)
    free = ~budget.protected(found, np.where(gates > 0, importance, -1.0))
    free &= ~budget.too_large(found, limits, (gates > 0).astype(float))
    return alpha, importance, limits, free


@pytest.mark.parametrize("penalty", ["one", "macs", "params", "importance"])
def test_alpha_is_its_formula_and_the_best_unit_of_each_layer_is_free(penalty):
    config = GatesConfig(penalty=penalty, sharpness=1.5)
    alpha, importance, limits, free = alphas(config)
    found = teacher()[0].topology
    assert (alpha[~free] == 0).all() and (alpha >= 0).all() and np.isfinite(alpha).all()
    ones = np.ones(found.units)
    expected = {
        "one": ones,
        "macs": found.macs.marginal(ones),
        "params": found.params.marginal(ones),
        "importance": (limits.marginal(found, ones) / importance) ** 1.5,
    }[penalty]
    ratio = alpha[free] / expected[free]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)  # up to a common factor
    assert ratio[0] > 0


def test_dead_units_are_never_the_protected_ones():
    """A layer whose most important units died protects the best of those that live."""
    found = teacher()[0].topology
    gates = np.ones(found.units)
    _, importance, _, _ = alphas(GatesConfig(), seed=3)
    best = budget.protected(found, importance)
    gates[best] = 0.0
    alpha, _, _, free = alphas(GatesConfig(), gates, seed=3)
    assert (alpha[best] > 0).any() and (gates[~free] == 1).all()
    assert np.isfinite(alpha).all()


@pytest.mark.parametrize("penalty_name", ["one", "macs", "params", "importance"])
def test_what_the_dead_were_worth_changes_nothing(penalty_name):
    """Most of the units are dead and worth less and less: α of the living stays as it was."""
    found = teacher()[0].topology
    random = np.random.default_rng(5)
    importance = random.exponential(1e-3, found.units)
    gates = (random.uniform(size=found.units) < 0.3) * 1.0
    gates[budget.protected(found, importance)] = 1.0
    limits, living = budget.resolve(BudgetConfig(), found), gates > 0
    config = GatesConfig(penalty=penalty_name)
    before = penalty.weights(found, limits, config, gates, importance)
    after = penalty.weights(found, limits, config, gates, np.where(living, importance, importance * 1e-30))
    np.testing.assert_allclose(after[living], before[living], rtol=1e-9)
    assert (before[living] > 0).any()


def test_a_branch_too_large_to_go_has_no_penalty():
    """The one branch has 61% of the MACs: at half of them no student lands without it, so it must not die."""
    alpha, *_ = alphas(GatesConfig())
    found = teacher()[0].topology
    branches = np.concatenate([np.full(g.size, g.kind == "branches") for g in found.groups])
    assert branches.sum() == 1 and alpha[branches] == 0
    roomy = budget.resolve(BudgetConfig(0.39), found)
    assert penalty.weights(found, roomy, GatesConfig(), np.ones(found.units), np.ones(found.units))[branches] > 0


# --- the controller -------------------------------------------------------------------------------------------------


def test_the_controller_moves_lambda_and_remembers():
    network, _, state = begin()
    limits = budget.resolve(BudgetConfig(0.5), network.topology)
    between = control(network, limits, GatesConfig(ramp=0.8))
    random = np.random.default_rng(0)
    importance = network.topology.unflatten(random.exponential(1, network.topology.units).astype(np.float32))
    state = state.replace(extra={**state.extra, "importance": jax.tree.map(jnp.asarray, importance)})
    seen = []
    for done in (4, 8, 12, 16, 20):
        state, metrics = between(state.replace(step=jnp.int32(done)))
        seen.append(metrics["lambda2"])
        assert metrics["macs"] == metrics["params"] == metrics["alive"] == 1.0
        for name, alpha in state.extra["penalty"].items():
            assert np.asarray(alpha).dtype == np.float32 and (np.asarray(alpha) >= 0).all(), name
    assert seen == sorted(seen) and seen[-1] > 0  # nothing dies here: the pressure asked for falls, so λ2 rises
    found = search_step.history(network.topology, state)
    assert found["steps"].tolist() == [4, 8, 12, 16, 20]
    np.testing.assert_allclose(found["lambda2"], seen, rtol=1e-6)
    for group in network.topology.groups:
        assert found[f"gate/{group.name}"].shape == (5, group.size)
    # At the budget there is no penalty.
    keep = budget.select(network.topology, limits, network.topology.flatten(importance))
    at_budget = gates_lib.mask(state.extra["gates"], keep)
    _, metrics = between(state.replace(extra={**state.extra, "gates": at_budget}))
    assert metrics["lambda2"] == 0 and metrics["macs"] <= 0.5


def test_what_is_dead_stays_dead_at_the_budget_too():
    """There λ2 is 0, and the loss pulls at every gate; a gate that came back would undo the search."""
    network, tx, state = begin()
    limits = budget.resolve(BudgetConfig(0.5), network.topology)
    between = control(network, limits)
    keep = budget.select(network.topology, limits, np.random.default_rng(0).uniform(size=network.topology.units))
    gates = gates_lib.mask(state.extra["gates"], keep)
    state, metrics = between(state.replace(step=jnp.int32(20), extra={**state.extra, "gates": gates}))
    assert metrics["lambda2"] == 0
    step = jax.jit(search_step.search_step(network, network.module, tx, TASK, GatesConfig(), RUN))
    for i in range(5):
        state, _ = step(state, batch(), jax.random.key(i), teacher()[1])
    np.testing.assert_array_equal(flat(network, state.extra["gates"]) > 0, flat(network, keep))


def test_where_too_many_have_died_only_some_may_return():
    """All at once would undo the search: below the budget there is no penalty, and the loss lifts every gate."""
    network, tx, state = begin()
    limits = budget.resolve(BudgetConfig(0.5), network.topology)
    between = control(network, limits)
    importance = np.random.default_rng(0).uniform(0.5, 1, network.topology.units)
    keep = budget.select(network.topology, budget.resolve(BudgetConfig(0.3), network.topology), importance)
    few = network.topology.unflatten(importance.astype(np.float32))
    extra = {**state.extra, "gates": gates_lib.mask(state.extra["gates"], keep), "importance": few}
    state, metrics = between(state.replace(step=jnp.int32(20), extra=extra))
    assert metrics["lambda2"] == 0 and metrics["macs"] < 0.5 * budget.FLOOR
    step = jax.jit(search_step.search_step(network, network.module, tx, TASK, GatesConfig(), RUN))
    for i in range(20):
        state, _ = step(state, batch(), jax.random.key(i), teacher()[1])
        state, _ = between(state)
    alive = (flat(network, state.extra["gates"]) > 0).astype(float)
    assert (alive >= flat(network, keep)).all() and alive.sum() > flat(network, keep).sum()
    assert limits.pressure(network.topology, alive) <= 1


def test_a_lambda_of_the_users_stays_until_the_budget_is_met():
    network, _, state = begin()
    limits = budget.resolve(BudgetConfig(0.5), network.topology)
    between = control(network, limits, GatesConfig(lambda2=0.125))
    state, metrics = between(state.replace(step=jnp.int32(4)))
    assert metrics["lambda2"] == 0.125
    dead = jax.tree.map(jnp.zeros_like, state.extra["gates"])
    _, metrics = between(state.replace(extra={**state.extra, "gates": dead}))
    assert metrics["lambda2"] == 0.0


@pytest.mark.parametrize("steps", [3, 199, 200, 201, 1000])
def test_history_is_bounded_and_in_order(steps):
    stage = replace(STAGE, steps=steps)
    network, _, state = begin(stage=stage)
    limits = budget.resolve(BudgetConfig(), network.topology)
    between = control(network, limits, GATES, stage, RunConfig(steps_per_dispatch=1))
    for done in sorted({1, 2, steps // 2, steps - 1, steps}):
        state, _ = between(state.replace(step=jnp.int32(done)))
    found = search_step.history(network.topology, state)
    assert len(state.extra["history"]["rows"]) <= search_step.SNAPSHOTS + 1
    assert (np.diff(found["steps"]) > 0).all() and found["steps"][-1] == steps


# --- whole searches -------------------------------------------------------------------------------------------------


def check_landing(network, limits, state):
    keep = search_step.landing(network.topology, limits, state.extra["gates"], state.extra["importance"]).keep
    pressure = limits.pressure(network.topology, flat(network, keep).astype(float))
    assert budget.FLOOR <= pressure <= 1
    assert all(keep[g.name].any() for g in network.topology.groups if g.kind != "branches")
    return keep


def test_a_search_brings_the_gates_to_the_budget_and_compiles_once(tmp_path, caplog):
    with jax.log_compiles():
        network, limits, state = search(tmp_path, stage=replace(STAGE, steps=22))
    assert caplog.text.count("Compiling jit(update_once)") == 1
    gates = flat(network, state.extra["gates"])
    assert (gates >= 0).all() and (gates == 0).any() and np.isfinite(gates).all()
    found = search_step.history(network.topology, state)
    assert found["cost_macs"][0] > 0.9 and found["cost_macs"][-1] <= 0.55
    assert (found["lambda2"] > 0).any()
    np.testing.assert_allclose(
        np.concatenate([found[f"gate/{g.name}"][-1] for g in network.topology.groups]), gates, atol=1e-6
    )
    keep = check_landing(network, limits, state)
    dead_but_kept = (flat(network, keep) > 0) & (gates == 0)
    assert dead_but_kept.mean() < 0.2
    assert not np.array_equal(state.params["dense"]["kernel"], teacher()[1]["params"]["dense"]["kernel"])


@pytest.mark.parametrize(
    "changes",
    [{"penalty": "one"}, {"penalty": "macs"}, {"penalty": "params"}, {"lambda2": 0.05}, {"lambda2": 0.0},
     {"penalty": "one", "lambda2": 1e4}],
    ids=str,
)  # fmt: skip
def test_every_kind_of_penalty_lands(tmp_path, changes):
    check_landing(*search(tmp_path, GatesConfig(**changes), stage=replace(STAGE, steps=8)))


@pytest.mark.parametrize(
    "bounds", [BudgetConfig(None, 0.5), BudgetConfig(0.6, 0.6), BudgetConfig(0.5, None, 2)], ids=str
)
def test_every_kind_of_budget_lands(tmp_path, bounds):
    found = search(tmp_path, bounds=bounds, stage=replace(STAGE, steps=8))
    keep = check_landing(*found)
    if bounds.round_to > 1:
        assert all(
            keep[g.name].all() or keep[g.name].sum() % 2 == 0 for g in found[0].topology.groups if g.kind != "branches"
        )


@pytest.mark.parametrize(
    "chosen", [{"kinds": ("channels",)}, {"exclude": ("block/conv1", "*branch")}, {"include": ("stage*",)}], ids=str
)
def test_gates_that_are_excluded_do_not_exist(tmp_path, chosen):
    config = GatesConfig(**chosen)
    network = teacher()[0].select(config.kinds, config.include, config.exclude)
    names = {group.name for group in network.topology.groups}
    network, limits, state = search(tmp_path, config, BudgetConfig(0.7), replace(STAGE, steps=8), network=network)
    everything = {group.name for group in teacher()[0].topology.groups}
    assert set(state.extra["gates"]) == names and names < everything
    check_landing(network, limits, state)


def test_gates_to_exclude_everything_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="nothing in this network can be pruned.*excluded by the pattern"):
        teacher()[0].select(GatesConfig().kinds, ("*",), ("*",))
    with pytest.raises(ValueError, match="'convolution' matches no group; groups are"):
        teacher()[0].select(GatesConfig().kinds, ("*",), ("convolution",))


def test_the_benchmark_of_the_search_step_runs():
    """At a size that says nothing of speed."""
    found = search_step_benchmark.measure(depth=8, batch=4, rounds=2, steps=1)
    assert all(np.isfinite(found[name]) and found[name] > 0 for name in ("search_ms", "distill_ms", "ratio"))
