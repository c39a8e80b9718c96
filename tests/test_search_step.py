"""The search of the commands: one update, the controller in the training loop, and whole tiny searches."""

import json
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
from kdsearch_jax.distill.shrinking import Subnetwork
from kdsearch_jax.pruning import budgets, selection
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.landing import land
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.search import search_state
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.training import loop, optimizer
from kdsearch_jax.training import state as training_state
from kdsearch_jax.training.settings import RunConfig, StageConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

STAGE = StageConfig(steps=20, batch_size=32, learning_rate=0.02, schedule="constant")
RUN = RunConfig(steps_per_dispatch=4)
DISTILL = DistillConfig()
OBJECTIVE = classification(DISTILL)
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


def searching(config=GATES, stage=STAGE, bounds=BUDGET, run=RUN, network=None):
    """(search, optimiser, first state) of a search for one budget."""
    network = network or teacher()[0]
    limits = budgets.resolve(bounds, network.topology)
    search = search_step.gated_search(network, [limits], stage, config, run)
    tx = search.optimizer(optimizer.make_optimizer(stage))
    return search, tx, search_step.begin(search, teacher()[1], tx)


def step_of(search, tx, config=GATES, stage=STAGE, run=RUN):
    """The compiled step of a search."""
    network = Subnetwork.of(search)
    return jax.jit(search_step.search_step(network, network.module, tx, stage, OBJECTIVE, config, run))


def run_search(directory, config=GATES, bounds=BUDGET, stage=STAGE, run=RUN, network=None):
    """A whole search in the training loop: (search, last state)."""
    search, tx, state = searching(config, stage, bounds, run, network)
    subnetwork = Subnetwork.of(search)
    step = search_step.search_step(subnetwork, subnetwork.module, tx, stage, OBJECTIVE, config, run)
    state = loop.fit(
        state, step, digits(), DATA, stage, run, directory=directory, name="search", meta={},
        constants=teacher()[1], between=lambda state: (state, search_step.progress(search, state)), seed=1,
    )  # fmt: skip
    return search, state


def flat(search, tree):
    return search.topology.flatten(jax.tree.map(np.asarray, tree))


def with_gates(search, state, keep, step):
    """The state after `step` updates with the gates outside the flat `keep` at 0."""
    gates = gates_lib.mask(state.params["gates"], search.topology.unflatten(np.asarray(keep) > 0))
    opt_state = state.opt_state._replace(gates=state.opt_state.gates._replace(count=jnp.int32(step)))
    return state.replace(step=jnp.int32(step), params={**state.params, "gates": gates}, opt_state=opt_state)


# --- one update -----------------------------------------------------------------------------------------------------


def batch():
    images = normalise(digits().train.images[:32], np.asarray(digits().mean), np.asarray(digits().std))
    return {"images": jnp.asarray(images), "labels": jnp.asarray(digits().train.labels[:32])}


def test_importance_is_the_mean_square_of_gate_times_gradient(full_compilation):
    """Against the same quantity from scratch: the loss as a function of the gates alone, differentiated."""
    config = GatesConfig(importance_decay=0.5)
    search, tx, state = searching(config)
    module, topology = search.network.module, search.topology
    assert (flat(search, state.params["gates"]) == 1).all()
    step = step_of(search, tx, config)
    # The teacher's own logits as the target would give a gradient of zero at the start: ask for other ones.
    constants = jax.tree.map(lambda x: 1.2 * x, teacher()[1])

    @jax.jit
    def fisher(state, key):
        def loss(gates):
            folded = gates_lib.fold({"params": state.params["params"]}, gates, topology)["params"]
            logits, _ = apply.apply_train(module, folded, state.model_state, batch()["images"], key)
            target = apply.apply_eval(module, constants, batch()["images"])
            return losses.distillation(logits, target, batch()["labels"], DISTILL).mean()

        gates = state.params["gates"]
        return jax.tree.map(lambda g, d: (g * d) ** 2, gates, jax.grad(loss)(gates))

    expected = None
    for i, rate in enumerate((0.0, 0.5, 0.5)):
        key = jax.random.key(i)
        now = flat(search, fisher(state, key))
        expected = now if expected is None else rate * expected + (1 - rate) * now
        state, metrics = step(state, batch(), key, constants)
        np.testing.assert_allclose(state.opt_state.importance, expected, rtol=2e-3, atol=1e-9)
        assert {"loss", "accuracy", "agreement"} <= set(metrics)
    assert state.step == state.opt_state.count == 3 and (expected > 0).mean() > 0.9


def test_without_a_penalty_gates_at_one_do_not_change_the_teacher():
    """The first loss is that of distilling the teacher into itself, in training mode."""
    search, tx, state = searching()
    module = search.network.module
    _, metrics = step_of(search, tx)(state, batch(), jax.random.key(0), teacher()[1])
    plain = jax.jit(steps.distill_step(module, module, optimizer.make_optimizer(STAGE), STAGE, RUN, OBJECTIVE))
    alone = training_state.create_state(teacher()[1], optimizer.make_optimizer(STAGE))
    _, expected = plain(alone, batch(), jax.random.key(0), teacher()[1])
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)


def test_the_penalty_acts_on_gates_and_not_on_weights():
    search, tx, state = searching()
    penalty = jnp.zeros(search.topology.units).at[1].set(1e6)
    step = step_of(search, tx)
    punished = state.replace(opt_state=state.opt_state._replace(penalty=penalty))
    (punished, _), (free, _) = (step(each, batch(), jax.random.key(0), teacher()[1]) for each in (punished, state))
    a, b = flat(search, punished.params["gates"]), flat(search, free.params["gates"])
    assert a[1] == 0 and (a != b).sum() == 1 and (b > 0).all()
    for x, y in zip(jax.tree.leaves(punished.params["params"]), jax.tree.leaves(free.params["params"]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_frozen_statistics_stay_the_teachers_and_the_first_loss_is_zero():
    config = GatesConfig(batch_norm="frozen")
    search, tx, state = searching(config)
    new, metrics = step_of(search, tx, config)(state, batch(), jax.random.key(0), teacher()[1])
    assert abs(metrics["loss"]) < 1e-6 and metrics["agreement"] == 1
    for a, b in zip(jax.tree.leaves(new.model_state), jax.tree.leaves(state.model_state), strict=True):
        np.testing.assert_array_equal(a, b)


# --- the controller -------------------------------------------------------------------------------------------------


def test_removed_units_stay_removed_at_the_budget():
    """There λ2 is 0, and the loss pulls at every gate; a gate that came back would undo the search."""
    search, tx, state = searching()
    importance = np.random.default_rng(0).uniform(size=search.topology.units)
    keep = search.topology.flatten(selection.choose(search.topology, search.limits[0], importance).keep)
    state, step = with_gates(search, state, keep, 20), step_of(search, tx)
    for i in range(6):
        state, _ = step(state, batch(), jax.random.key(i), teacher()[1])
        assert state.opt_state.lambda2 == 0
    np.testing.assert_array_equal(flat(search, state.params["gates"]) > 0, keep)


def test_after_removing_too_many_only_some_may_return():
    """All at once would undo the search: below the budget there is no penalty, and the loss lifts every gate."""
    search, tx, state = searching()
    topology, importance = search.topology, np.random.default_rng(0).uniform(0.5, 1, search.topology.units)
    smaller = budgets.resolve(BudgetConfig(0.3), topology)
    keep = topology.flatten(selection.choose(topology, smaller, importance).keep)
    state, step = with_gates(search, state, keep, 20), step_of(search, tx)
    state = state.replace(opt_state=state.opt_state._replace(importance=jnp.asarray(importance, jnp.float32)))
    assert search_step.progress(search, state)["macs"] < 0.5 * budgets.FLOOR
    for i in range(60):
        state, _ = step(state, batch(), jax.random.key(i), teacher()[1])
    alive = (flat(search, state.params["gates"]) > 0).astype(float)
    assert (alive >= keep).all() and alive.sum() > keep.sum()
    assert search.limits[0].pressure(topology, alive) <= 1


def test_a_fixed_lambda_holds_until_the_budget_is_met():
    config = GatesConfig(lambda2=0.125)
    search, tx, state = searching(config)
    step = step_of(search, tx, config)
    for gates, expected in ((np.ones(search.topology.units), 0.125), (np.zeros(search.topology.units), 0.0)):
        new, _ = step(with_gates(search, state, gates, 4), batch(), jax.random.key(0), teacher()[1])
        assert search_step.progress(search, new)["lambda2"] == expected


@pytest.mark.parametrize("steps", [3, 199, 200, 201, 1000])
def test_the_history_is_bounded_and_in_order(steps):
    stage, run = replace(STAGE, steps=steps), RunConfig(steps_per_dispatch=1)
    search, tx, state = searching(stage=stage, run=run)
    update, zeros = jax.jit(tx.update), jax.tree.map(jnp.zeros_like, state.params)
    for done in sorted({1, 2, steps // 2, steps - 1}):
        state = with_gates(search, state, np.ones(search.topology.units), done)
        state = state.replace(opt_state=update(zeros, state.opt_state, state.params)[1])
    found = search.history(state.params, state.opt_state)
    assert len(state.opt_state.history.rows) <= 201
    assert (np.diff(found["steps"]) > 0).all() and found["steps"][-1] == steps
    assert all(
        found[f"gate/{group.name}"].shape == (len(found["steps"]), group.size) for group in search.topology.groups
    )


# --- whole searches -------------------------------------------------------------------------------------------------


def check_selection(search, state):
    """Within the budget; below 0.98 of it only with a note, and only if that keeps all units with open gates."""
    selection = search.select(state.params, state.opt_state)
    keep, opened = selection.keep, flat(search, state.params["gates"]) > 0
    pressure = search.limits[0].pressure(search.topology, flat(search, keep).astype(float))
    assert pressure <= 1
    assert pressure >= budgets.FLOOR or (selection.note and flat(search, keep)[opened].all())
    # What the built-in run cuts lands between 0.98 and 1 of the budget, without exception.
    gates = flat(search, state.params["gates"]).astype(float)
    importance = np.asarray(search_state(state.opt_state).importance, float)
    filled = land(search.topology, search.limits[0], gates, importance, search.least, fill=True)
    assert budgets.FLOOR <= filled.pressure <= 1
    assert all(keep[g.name].any() for g in search.topology.groups if g.kind != "branches")
    return keep


def test_a_search_meets_the_budget_and_compiles_once(tmp_path, caplog):
    with jax.log_compiles():
        search, state = run_search(tmp_path, stage=replace(STAGE, steps=22))
    assert caplog.text.count("Compiling jit(update_once)") == 1
    gates = flat(search, state.params["gates"])
    assert (gates >= 0).all() and (gates == 0).any() and np.isfinite(gates).all()
    found = search.history(state.params, state.opt_state)
    assert found["steps"].tolist() == [4, 8, 12, 16, 20, 22]
    assert found["cost_macs"][0] > 0.9 and found["cost_macs"][-1] <= 0.55
    assert (found["lambda2"] > 0).any()
    np.testing.assert_array_equal(np.concatenate([found[f"gate/{g.name}"][-1] for g in search.topology.groups]), gates)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["macs"] == pytest.approx(found["cost_macs"][-1]) and rows[-1]["alive"] == (gates > 0).mean()
    keep = check_selection(search, state)
    removed_but_kept = (flat(search, keep) > 0) & (gates == 0)
    assert removed_but_kept.mean() < 0.2
    trained = state.params["params"]["dense"]["kernel"]
    assert not np.array_equal(trained, teacher()[1]["params"]["dense"]["kernel"])


@pytest.mark.parametrize(
    "changes",
    [{"penalty": "one"}, {"penalty": "macs"}, {"penalty": "params"}, {"lambda2": 0.05}, {"lambda2": 0.0},
     {"penalty": "one", "lambda2": 1e4}, {"init": "norm"}],
    ids=str,
)  # fmt: skip
def test_every_setting_of_the_penalty_meets_the_budget(tmp_path, changes):
    check_selection(*run_search(tmp_path, GatesConfig(**changes), stage=replace(STAGE, steps=8)))


@pytest.mark.parametrize(
    "bounds", [BudgetConfig(None, 0.5), BudgetConfig(0.6, 0.6), BudgetConfig(0.5, None, 2)], ids=str
)
def test_every_kind_of_budget_is_met(tmp_path, bounds):
    search, state = run_search(tmp_path, bounds=bounds, stage=replace(STAGE, steps=8))
    keep = check_selection(search, state)
    if bounds.round_to > 1:
        plain = [group.name for group in search.topology.groups if group.kind != "branches"]
        assert all(keep[name].all() or keep[name].sum() % 2 == 0 for name in plain)


@pytest.mark.parametrize(
    "chosen", [{"kinds": ("channels",)}, {"exclude": ("block/conv1", "*branch")}, {"include": ("stage*",)}], ids=str
)
def test_excluded_groups_have_no_gates(tmp_path, chosen):
    config = GatesConfig(**chosen)
    network = teacher()[0].select(config.kinds, config.include, config.exclude)
    names = {group.name for group in network.topology.groups}
    search, state = run_search(tmp_path, config, BudgetConfig(0.7), replace(STAGE, steps=8), network=network)
    everything = {group.name for group in teacher()[0].topology.groups}
    assert set(state.params["gates"]) == names and names < everything
    check_selection(search, state)


def test_excluding_every_group_is_an_error():
    with pytest.raises(ValueError, match="nothing in this network can be pruned.*excluded by the pattern"):
        teacher()[0].select(GatesConfig().kinds, ("*",), ("*",))
    with pytest.raises(ValueError, match="'convolution' matches no group; groups are"):
        teacher()[0].select(GatesConfig().kinds, ("*",), ("convolution",))


def test_the_benchmark_of_the_search_step_runs():
    """At a size that says nothing about speed."""
    found = search_step_benchmark.measure(depth=8, batch=4, rounds=2, steps=1)
    assert all(np.isfinite(found[name]) and found[name] > 0 for name in ("search_ms", "distill_ms", "ratio"))
