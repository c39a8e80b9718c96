"""The search as an optax transformation: in any loop, with promises that hold whatever the loop is."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import kdsearch_jax as kd
from kdsearch_jax.adapters import registry
from kdsearch_jax.distill import distiller, search_step
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.shrinking import Part
from kdsearch_jax.pruning import budget, budget_path, prox
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.rules import apply_rules
from kdsearch_jax.pruning.settings import GatesConfig
from kdsearch_jax.pruning.transform import flatten
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::kdsearch_jax.pruning.budget.BudgetWarning"),
]

STEPS, EVERY = 40, 4


@cache
def teacher():
    """(module, traced network, variables, (inputs, outputs)): a small CNN with BatchNorm and a residual branch."""
    module, random = registry.build("small_cnn", {"num_classes": 10, "width": 4}), np.random.default_rng(0)
    x = random.normal(size=(16, 8, 8, 1)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)

    def first(path, leaf):
        scale = 1.0 if path[-1].key in ("scale", "var") else 0.0
        spread = 1.4 / np.sqrt(np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.1
        return jnp.asarray(scale + spread * random.normal(size=leaf.shape), jnp.float32)

    variables = jax.tree_util.tree_map_with_path(first, shapes)
    network = kd.trace(module, x, train=False)
    return module, network, variables, (x, module.apply(variables, x, train=False))


def search_of(**settings):
    return kd.GatedSearch(teacher()[1], kd.Budget(macs=0.5), **{"steps": STEPS, "every": EVERY, **settings})


def loop(search, tx):
    """(first carry, update): carry → carry, with statistics beside the parameters."""
    module, _, variables, (x, target) = teacher()
    params = search.init(variables)

    def update(carry):
        params, stats, state = carry

        def loss(params):
            variables = search.fold(params, batch_stats=stats)
            outputs, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(outputs - target)), new["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), stats, state

    return (params, jax.tree.map(jnp.copy, variables["batch_stats"]), tx.init(params)), update


@cache
def searched():
    """(search, last carry) of a whole search, with the pressures on its way."""
    search = search_of()
    carry, update = loop(search, search.optimizer(optax.adamw(1e-3)))
    update, seen = jax.jit(update), []
    for _ in range(STEPS):
        carry = update(carry)
        seen.append((flat(search, carry[0]), search.progress(carry[2])))
    return search, carry, seen


def flat(search, params):
    return np.asarray(flatten(params["gates"], search.topology))


def same(a, b):
    """Whether two trees are equal bit for bit."""
    a, b = jax.device_get((a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- what is searched -----------------------------------------------------------------------------------------------


def test_the_first_gated_network_is_the_network_and_a_student_is_the_last():
    module, network, variables, (x, _) = teacher()
    search, (params, stats, state), _ = searched()
    first = search.fold(search.init(variables), batch_stats=variables["batch_stats"])
    assert same(first, variables)
    student = search.finish(params, state, x, batch_stats=stats)
    gated_outputs = module.apply(search.fold(params, batch_stats=stats), x, train=False)
    outputs = student.module.apply(student.variables, x, train=False)
    np.testing.assert_allclose(outputs, gated_outputs, atol=1e-5 * np.abs(gated_outputs).max())
    assert student.difference <= 1e-5 and student.macs <= 0.5 * network.topology.total()[0]
    assert student.params == sum(leaf.size for leaf in jax.tree.leaves(student.variables["params"]))
    assert kd.verify(network, {**params, "batch_stats": stats}, student, x) <= 1e-5


def test_the_cost_follows_its_path_and_the_dead_stay_dead():
    search, _, seen = searched()
    path = search.controller.path
    for (before, _), (after, _) in pairwise(seen):
        assert (after >= 0).all() and np.isfinite(after).all()
        assert not ((before == 0) & (after > 0)).any() or search.limits[0].pressure(search.topology, before > 0) < 1
    for step, (gates, progress) in enumerate(seen, start=1):
        pressure = search.limits[0].pressure(search.topology, gates > 0)
        goal = float(path.goal(np.int32(max(step - 3 * EVERY, 0)), np.int32(0)))
        assert pressure <= 1.1 * goal, f"update {step}: {pressure} is behind {goal}"
        assert progress["step"] == step
    assert search.limits[0].pressure(search.topology, seen[-1][0] > 0) <= 1.0


def test_it_is_the_search_of_the_built_in_loop():
    """The same gates and importances, update by update, as the search that a host drives."""
    module, network, variables, (x, _) = teacher()
    stage, config = StageConfig(learning_rate=0.02, schedule="constant"), GatesConfig(batch_norm="frozen")
    stage, run = replace(stage, steps=STEPS), RunConfig(steps_per_dispatch=EVERY)
    task, batch = classification(DistillConfig()), {"images": x, "labels": np.zeros(len(x), np.int32)}
    other = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), variables)

    limits = budget.resolve(kd.Budget(macs=0.5), network.topology)
    host_tx = search_step.make_transformation(stage, config)
    host = search_step.begin(variables, network.topology, host_tx, stage)
    host_step = jax.jit(search_step.search_step(network, module, host_tx, task, config, run))
    whole = limits.pressure(network.topology, np.ones(network.topology.units))
    way = budget_path.legs([limits], [1.0], whole, stage.steps, config.ramp, config.warmup, EVERY)
    between = search_step.controller(Part.of(network), way, stage, config, run)

    search = search_of()
    tx = search.optimizer(make_optimizer(stage))
    by, stats = distiller.Distiller.of(task, module, run), {"batch_stats": variables["batch_stats"]}
    params = search.init(variables)
    state = tx.init(params)

    @jax.jit
    def update(params, state):
        def loss(params):
            folded = search.fold(params)["params"]
            shown, _ = by.train(module, folded, stats, batch, jax.random.key(0), None, frozen=True)
            return by.distance(None, shown, by.target(other, batch), batch).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    metrics = {}
    for done in range(1, STEPS + 1):
        host, _ = host_step(host, batch, jax.random.key(0), other)
        params, state = update(params, state)
        gates = network.topology.flatten(jax.device_get(host.extra["gates"]))
        importance = network.topology.flatten(jax.device_get(host.extra["importance"]))
        np.testing.assert_array_equal(flat(search, params) > 0, gates > 0, err_msg=f"update {done}")
        np.testing.assert_allclose(flat(search, params), gates, atol=2e-4)
        np.testing.assert_allclose(state.importance, importance, rtol=0.02, atol=1e-4 * importance.max())
        if done % EVERY == 0:
            host, metrics = between(host)
    assert metrics["macs"] < 0.6


def test_one_search_has_a_student_for_each_of_several_budgets():
    _, network, _, (x, _) = teacher()
    budgets = [kd.Budget(macs=0.7), kd.Budget(macs=0.45)]
    search = kd.GatedSearch(network, budgets, steps=60, every=3)
    (params, stats, state), update = loop(search, search.optimizer(optax.adamw(1e-3)))
    update, found = jax.jit(update), []
    for number in range(1, 61):
        params, stats, state = update((params, stats, state))
        if number in search.ends:
            found.append(search.finish(params, state, x, batch_stats=stats))
    shares = [student.macs / network.topology.total()[0] for student in found]
    assert len(found) == 2 and 0.45 < shares[0] <= 0.7 and shares[1] <= 0.45
    with pytest.raises(ValueError, match="below the one before"):
        kd.GatedSearch(network, budgets[::-1], steps=60)
    with pytest.raises(ValueError, match="same costs"):
        kd.GatedSearch(network, [kd.Budget(macs=0.7), kd.Budget(params=0.5)], steps=60)


def test_at_a_fixed_penalty_gates_reach_the_optimum_of_the_objective():
    """KKT of  ½ Σ (g − t)² + λ Σ α |g|,  g ≥ 0: g > 0 has slope −λα, g = 0 has a slope of at least −λα."""
    search = search_of(steps=10_000, every=1000, lambda2=0.3, penalty="one", learning_rate=0.05)
    topology, tx = search.topology, search.optimizer(optax.sgd(0.0))
    target = np.random.default_rng(0).uniform(0, 1, topology.units).astype(np.float32)
    params = {"params": {}, "gates": gates_lib.init(topology)}
    state = tx.init(params)

    @jax.jit
    def many(params, state):
        def one(carry, _):
            params, state = carry
            gradients = {"params": {}, "gates": jax.tree.map(jnp.subtract, params["gates"], wanted)}
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, state), length=1500)[0]

    wanted = {name: jnp.asarray(part) for name, part in topology.unflatten(target).items()}
    params, state = many(params, state)
    gates, weights = flat(search, params), np.asarray(state.penalty)
    assert (weights[gates > 0] <= 0.3 + 1e-6).all()
    slope = gates - target
    np.testing.assert_allclose(slope[gates > 0], -weights[gates > 0], atol=1e-3)
    assert (slope[gates == 0] >= -weights[gates == 0] - 1e-6).all() and (gates == 0).any()


# --- in any loop ----------------------------------------------------------------------------------------------------


def test_a_scan_is_a_loop_bit_for_bit():
    """Given the same gradients; what a network computes is fused otherwise inside of a loop."""
    search = search_of()
    params, tx = search.init(teacher()[2]), search.optimizer(optax.adamw(1e-3))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(key, (STEPS, *leaf.shape)) for key, leaf in zip(keys, leaves, strict=True)]
    gradients = jax.tree.unflatten(structure, drawn)

    def update(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned = jax.jit(lambda carry: jax.lax.scan(update, carry, gradients)[0])((params, tx.init(params)))
    carry, once = (params, tx.init(params)), jax.jit(update)
    for i in range(STEPS):
        carry, _ = once(carry, jax.tree.map(lambda leaf, i=i: leaf[i], gradients))
    assert same(carry, scanned)
    assert (flat(search, carry[0]) == 0).any() and np.isfinite(np.asarray(carry[1].history.rows[:, 0])).any()


def test_a_scan_and_a_donated_loop_search_alike():
    search = search_of()
    carry, update = loop(search, search.optimizer(optax.adamw(1e-3)))
    scanned = jax.jit(lambda carry: jax.lax.scan(lambda carry, _: (update(carry), None), carry, length=12)[0])(carry)
    compiled = jax.jit(update, donate_argnums=0).lower(carry).compile()
    for _ in range(12):
        carry = compiled(carry)
    np.testing.assert_allclose(flat(search, carry[0]), flat(search, scanned[0]), atol=1e-4)
    assert compiled.memory_analysis().alias_size_in_bytes > 0


def test_an_update_compiles_once_and_calls_no_host():
    search = search_of()
    carry, update = loop(search, search.optimizer(optax.sgd(1e-2)))
    text = jax.jit(update).lower(carry).as_text()
    assert "callback" not in text
    update = jax.jit(update)
    for _ in range(2 * EVERY + 1):
        carry = update(carry)
    assert update._cache_size() == 1


def test_a_state_saved_by_orbax_goes_on_bit_for_bit(tmp_path):
    search = search_of()
    carry, update = loop(search, search.optimizer(optax.adamw(1e-3)))
    update = jax.jit(update)
    for _ in range(7):
        carry = update(carry)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, carry))
    assert same(restored, carry)
    for _ in range(6):
        carry, restored = update(carry), update(restored)
    assert same(restored, carry)


def test_it_lives_in_other_transformations():
    """Chained behind clipping, accumulating gradients, and on a part of the parameters."""
    search = search_of()
    module, _, variables, (x, target) = teacher()
    inner = optax.chain(optax.clip_by_global_norm(1.0), search.optimizer(optax.adam(1e-3)))
    tx = optax.MultiSteps(inner, 2)
    params = {"net": search.init(variables), "own": jnp.zeros(3)}
    tx = optax.partition({"net": tx, "own": optax.sgd(0.1)}, {"net": "net", "own": "own"})

    def loss(params):
        folded = search.fold(params["net"], batch_stats=variables["batch_stats"])
        return jnp.mean(jnp.square(module.apply(folded, x, train=False) - target)) + (params["own"] ** 2).sum()

    state = tx.init(params)
    update = jax.jit(lambda params, state: tx.update(jax.grad(loss)(params), state, params))
    for _ in range(4):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
    assert search.progress(state)["step"] == 2


def test_the_users_optimizer_sees_the_weights_alone():
    search = search_of()
    params = search.init(teacher()[2])
    seen = []

    def mask(tree):
        seen.append(jax.tree.structure(tree))
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    tx = search.optimizer(optax.adamw(1e-3, mask=mask))
    state = tx.init(params)
    assert set(seen) == {jax.tree.structure({"params": params["params"]})}
    plain = optax.adamw(1e-3, mask=mask)
    weights = {"params": params["params"]}
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradients, state, params)
    expected, _ = plain.update({"params": gradients["params"]}, plain.init(weights), weights)
    assert same({"params": updates["params"]}, expected)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda s, p, t: s.optimizer(optax.sgd(0.1)).init(teacher()[2]), "search.init"),
        (lambda s, p, t: s.optimizer(optax.sgd(0.1)).update(p, t, None), "params"),
        (lambda s, p, t: s.fold({"params": p["params"]}), "search.init"),
        (lambda s, p, t: s.fold({**p, "gates": {"other": jnp.ones(3)}}), "another network"),
        (lambda s, p, t: s.fold({**p, "gates": {name: jnp.ones(3) for name in p["gates"]}}), "another"),
        (lambda s, p, t: s.finish(p, t, teacher()[3][0], batch_stats=teacher()[2]["batch_stats"]), "updates; train on"),
        (lambda s, p, t: s.finish(jax.tree.map(jnp.zeros_like, p), t, teacher()[3][0]), "batch_stats="),
        (lambda s, p, t: s.finish(p, optax.EmptyState()), "search.optimizer"),
        (lambda s, p, t: s.init({"params": {}}), "traced"),
        (lambda s, p, t: s.init(teacher()[2]["params"]), "'params'"),
        (lambda s, p, t: search_of(every=0), "every"),
        (lambda s, p, t: kd.GatedSearch(teacher()[0], kd.Budget(macs=0.5), 10), "kd.trace"),
        (lambda s, p, t: kd.GatedSearch(teacher()[1], 0.5, 10), "Budget"),
        (lambda s, p, t: kd.GatedSearch(teacher()[1], kd.Budget(macs=0.001), 10), "out of reach"),
        (lambda s, p, t: kd.GatedSearch(teacher()[1], kd.Budget(macs=2e12), 10), "not below"),
        (lambda s, p, t: kd.Budget(), "macs=0.5"),
        (lambda s, p, t: search_of(rules=[kd.Rule("dence/.*", freeze=True)]), "'dense"),
        (lambda s, p, t: search_of(rules=[kd.Rule(".*", freeze=True)]), "nothing in this network"),
        (lambda s, p, t: search_of(rules=[kd.Rule(".*", least=0.99)]), "out of reach"),
        (lambda s, p, t: kd.Rule("(", freeze=True), "regular expression"),
        (lambda s, p, t: kd.Rule("dense"), "freeze"),
        (lambda s, p, t: kd.Rule("dense", kinds=("filters",)), "channels"),
        (lambda s, p, t: prox.accelerated_proximal_l1(0.1).update(p, t, p), "penalty"),
    ],
)
def test_bad_input_is_one_line_that_names_the_way_out(wrong, named):
    search = search_of()
    params = search.init(teacher()[2])
    state = search.optimizer(optax.sgd(0.1)).init(params)
    with pytest.raises(ValueError, match=r"^[^\n]+\Z") as error:
        wrong(search, params, state)
    assert named in str(error.value)


# --- rules ----------------------------------------------------------------------------------------------------------


def test_rules_say_what_may_go():
    _, network, variables, (x, _) = teacher()
    rules = [
        kd.Rule("dense/.*", freeze=True),
        kd.Rule("block/conv1/.*", least=5, round_to=2),
        kd.Rule(".*", kinds=("channels",)),
        kd.Rule("stage1/conv", least=0.75),
    ]
    student = kd.prune(network, variables, kd.random(3), kd.Budget(macs=0.5605), x, rules=rules)
    before, after = variables["params"], student.variables["params"]
    assert after["dense"]["kernel"].shape == before["dense"]["kernel"].shape
    kept = {name: int(mask.sum()) for name, mask in student.keep.items()}
    groups = {group.name: group for group in network.topology.groups}
    assert all(groups[name].kind == "channels" for name in kept) and "stage3/conv" not in kept
    assert kept["block/conv1"] in (6, 8)
    assert kept["stage1/conv"] >= 3 and sum(kept.values()) < sum(groups[name].size for name in kept)


def test_an_exception_comes_before_its_rule():
    ruled = apply_rules(teacher()[1], [kd.Rule("stage1/conv", freeze=False), kd.Rule(".*", freeze=True)])
    assert [group.name for group in ruled.network.topology.groups] == ["stage1/conv"]


# --- pruning without a search ---------------------------------------------------------------------------------------


def mean_square(variables, batch):
    x, target = batch
    return jnp.mean(jnp.square(teacher()[0].apply(variables, x, train=False) - target - 0.1))


@pytest.mark.parametrize("name", ["magnitude", "random", "batch_norm_scale", "taylor", "fisher"])
def test_pruning_at_once_lands_in_the_budget_and_is_proved(name, tmp_path):
    _, network, variables, (x, target) = teacher()
    criterion = getattr(kd, name)
    criterion = criterion(mean_square, [(x, target)]) if name in ("taylor", "fisher") else criterion()
    student = kd.prune(network, variables, criterion, kd.Budget(macs=0.6), x)
    assert 0.98 * 0.6 <= student.macs / network.topology.total()[0] <= 0.6 and student.difference <= 1e-5
    kd.save(student, tmp_path / "student")
    again, read = kd.load(tmp_path / "student")
    assert same(read, student.variables)
    outputs = student.module.apply(student.variables, x, train=False)
    np.testing.assert_allclose(again.apply(read, x, train=False), outputs, atol=1e-6)


def test_a_measured_budget_is_met_by_its_table():
    _, network, variables, (x, _) = teacher()
    sizes = {group.name: group.size for group in network.topology.groups}
    first, second = "block/conv1", "stage3/conv"
    table = kd.Table(
        "latency",
        (
            kd.Part((first,), ((0, 3, sizes[first]),), (0.0, 1.0, 4.0)),
            kd.Part((first, second), ((0, sizes[first]), (0, sizes[second])), ((0.0, 1.0), (1.0, 4.0)), "block:branch"),
        ),
        1.0,
    )
    budget, rules = kd.Budget(measured=((table, 0.6),)), [kd.Rule("stage3/conv", least=0.4)]
    student = kd.prune(network, variables, kd.magnitude(), budget, x, rules=rules)
    flat_keep = network.topology.flatten(student.keep).astype(float)
    assert 0.98 * 5.4 <= table.total(network.topology, flat_keep) <= 0.6 * 9.0
    assert student.keep[second].sum() >= 0.4 * sizes[second]
    assert kd.GatedSearch(network, budget, 10).controller.costs.names == ("macs", "params", "latency")
    with pytest.raises(ValueError, match="no group 'other'"):
        kd.GatedSearch(
            network, kd.Budget(measured=((kd.Table("t", (kd.Part(("other",), ((0, 1),), (0, 1)),)), 0.5),)), 10
        )


def test_what_is_exported_is_there():
    for name in kd.__all__:
        assert getattr(kd, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        kd.prunes  # noqa: B018
