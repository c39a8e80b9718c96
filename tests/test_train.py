"""The training loop: its parts by their definitions, and what `fit` promises of a run as a whole.

Bit-identical resumption, independence of the number of devices and of updates a call, no compilation after the first
calls, a state that keeps its structure, and a way out in every error.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdsearch_jax.adapters import apply
from kdsearch_jax.adapters.devices import data_mesh, replicate
from kdsearch_jax.data.batches import batch_indices
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import steps
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.runs import evaluation
from kdsearch_jax.training import loop, optimizer
from kdsearch_jax.training import state as training_state
from kdsearch_jax.training.settings import RunConfig, StageConfig

TASK = classification(DistillConfig())
RUN = RunConfig(steps_per_dispatch=4, checkpoint_every=8, checkpoint_share=None, evaluate_every=8)
STAGE = StageConfig(steps=12, batch_size=16, learning_rate=0.1, warmup=2, clip=5.0)


class Tiny(nn.Module):
    """All that the loop can meet, and compiled in a second: a convolution, BatchNorm, a dense layer."""

    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.width, (3, 3), strides=2, use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x))
        return nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))


class Plain(nn.Module):
    """A network without a training mode, BatchNorm or dropout."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))


class Noisy(nn.Module):
    """A network told by `deterministic` whether to drop out, that counts its calls in a collection of its own."""

    @nn.compact
    def __call__(self, x, deterministic: bool):
        calls = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing() and not deterministic:
            calls.value += 1
        x = nn.Dropout(0.5, deterministic=deterministic, name="dropout")(x.reshape(x.shape[0], -1))
        return nn.Dense(3, name="dense")(x)


def dataset(examples: int = 96, size: int = 8, classes: int = 3) -> Dataset:
    """Images whose class is how bright they are, and noise."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, examples, dtype=np.int32)
    images = random.integers(0, 120, (examples, size, size, 1)) + 60 * labels[:, None, None, None]
    split = Split.of(images.astype(np.uint8), labels)
    names = tuple(str(i) for i in range(classes))
    return Dataset("bright", split, split, split, classes, (0.5,), (0.25,), names)


def network(width: int = 4):
    """A small network and its first variables; from NumPy, for `init` takes seconds to compile."""
    module, random = Tiny(width), np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

    def first(path, leaf):
        scale = 1.0 if path[-1].key in ("scale", "var") else 0.0
        spread = 0.3 if path[-1].key == "kernel" else 0.0
        return jnp.asarray(random.normal(scale, spread, leaf.shape), jnp.float32)

    return module, jax.tree_util.tree_map_with_path(first, shapes)


def fit(directory, state=None, step=None, *, stage=STAGE, run=RUN, data=None, examples=None, **options):
    """`train.fit` of a small network on little data, with everything else as given."""
    if state is None:
        module, variables = network()
        tx = optimizer.make_optimizer(stage)
        state = training_state.create_state(variables, tx, ema=stage.ema)
        step = step or steps.supervised_step(module, tx, stage, run, TASK)
    data = data or DataConfig("bright", crop=1, flip=True)
    options = {"name": "test", "meta": {}, "seed": 3, **options}
    return loop.fit(state, step, examples or dataset(), data, stage, run, directory=Path(directory), **options)


def rows(directory) -> list[dict]:
    """What the run wrote to metrics.jsonl."""
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def saved(directory) -> list[int]:
    """Steps of which there is a checkpoint."""
    return sorted(int(path.name) for path in (Path(directory) / "checkpoints").iterdir() if path.name.isdigit())


def same(a, b) -> bool:
    """Whether two trees are equal in structure and bit by bit."""
    leaves = [(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in leaves
    )


# --- schedules and optimiser ----------------------------------------------------------------------------------------


def test_cosine_rises_in_the_warm_up_and_ends_at_zero():
    schedule = optimizer.make_schedule(StageConfig(steps=100, learning_rate=0.4, warmup=10))
    np.testing.assert_allclose([schedule(0), schedule(9), schedule(10)], [0.04, 0.4, 0.4], rtol=1e-6)
    np.testing.assert_allclose(schedule(55), 0.2, rtol=1e-5)  # half of the way
    assert 0 < schedule(99) < 2e-4 and schedule(100) == 0
    rates = np.array([schedule(i) for i in range(101)])
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) < 0).all()


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_steps_fall_at_shares_of_all_steps(warmup):
    stage = StageConfig(steps=100, learning_rate=1.0, schedule="step", boundaries=(0.5, 0.75), decay=0.1, warmup=warmup)
    schedule = optimizer.make_schedule(stage)
    found = [schedule(i) for i in (warmup, 49, 50, 74, 75, 99)]
    np.testing.assert_allclose(found, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)


def test_two_boundaries_in_one_step_both_count():
    stage = StageConfig(steps=2, learning_rate=1.0, schedule="step", boundaries=(0.4, 0.6), decay=0.1)
    np.testing.assert_allclose(optimizer.make_schedule(stage)(1), 0.01, rtol=1e-5)


def test_constant_stays_and_one_update_of_warm_up_is_none():
    for warmup in (0, 1):
        schedule = optimizer.make_schedule(StageConfig(steps=10, learning_rate=0.3, schedule="constant", warmup=warmup))
        np.testing.assert_allclose([schedule(i) for i in (0, 1, 9)], 0.3, rtol=1e-6)


def test_sgd_is_nesterov_with_coupled_decay_of_kernels():
    """Two updates against the textbook: g += λw on kernels, v ← μv + g, w ← w − η(g + μv)."""
    stage = StageConfig(steps=9, schedule="constant", learning_rate=0.1, momentum=0.9, weight_decay=0.2)
    tx = optimizer.make_optimizer(stage)
    params = {"layer": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2, 2), 3.0), "scale": jnp.full(2, 3.0)}}
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)
    state, found = tx.init(params), params
    for _ in range(2):
        updates, state = tx.update(gradient, state, found)
        found = optax.apply_updates(found, updates)
    for name, decay in (("kernel", 0.2), ("bias", 0.0), ("scale", 0.0)):
        w, v = 3.0, 0.0
        for _ in range(2):
            g = 0.5 + decay * w
            v = 0.9 * v + g
            w -= 0.1 * (g + 0.9 * v)
        np.testing.assert_allclose(found["layer"][name], w, rtol=1e-6, err_msg=name)


def test_adamw_decays_kernels_apart_from_the_gradient():
    stage = StageConfig(steps=9, schedule="constant", optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    tx = optimizer.make_optimizer(stage)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], 0, atol=1e-9)


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    stage = StageConfig(steps=9, schedule="constant", learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip=0.25)
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    gradient = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, -4.0)}
    updates, _ = optimizer.make_optimizer(stage).update(gradient, optimizer.make_optimizer(stage).init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.25, rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("optimizer", "sdg", "optimizer: 'sdg'.*'sgd'"),
        ("schedule", "cosin", "schedule: 'cosin'.*'cosine'"),
        ("warmup", 400, "warmup: 400.*steps, 400"),
        ("clip", 0.0, "clip: 0.0"),
        ("ema", 1.0, "ema: 1.0"),
        ("learning_rate", -1.0, "learning_rate: -1.0"),
        ("boundaries", (0.5, 1.5), "boundaries"),
    ],
)
def test_settings_out_of_range_are_named(setting, value, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make_optimizer(replace(StageConfig(), **{setting: value}))


# --- one update -----------------------------------------------------------------------------------------------------


def test_modules_of_every_kind_train_and_evaluate():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    for module, arguments, state_names in [
        (Plain(), {}, set()),
        (Noisy(), {"deterministic": True}, {"calls"}),
        (network()[0], {}, {"batch_stats"}),
    ]:
        state = training_state.create_state(
            jax.jit(partial(module.init, **arguments))(jax.random.key(0), images), optax.sgd(0.1)
        )
        assert set(state.model_state) == state_names
        trained = jax.jit(partial(apply.apply_train, module))
        logits, kept = trained(state.params, state.model_state, images, jax.random.key(2))
        assert logits.shape == (4, 3) and logits.dtype == jnp.float32
        assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, state.model_state)
        quiet = jax.jit(partial(apply.apply_eval, module))(state.variables, images)
        if state_names:
            assert not same(kept, state.model_state)  # statistics move
            assert (logits != quiet).any()


def test_dropout_follows_the_key():
    images = jnp.ones((4, 8, 8, 1))
    variables = Noisy().init(jax.random.key(0), images, deterministic=True)
    state = training_state.create_state(variables, optax.sgd(0.1))

    def logits(seed):
        return apply.apply_train(Noisy(), state.params, state.model_state, images, jax.random.key(seed))[0]

    assert (logits(1) == logits(1)).all() and (logits(1) != logits(2)).any()


def test_bf16_computes_in_bf16_and_keeps_float32():
    module, variables = network()
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    state = training_state.create_state(variables, optax.sgd(0.1))

    def loss(params, precision):
        logits, kept = apply.apply_train(module, params, state.model_state, images, jax.random.key(2), precision)
        return logits.mean(), (logits, kept)

    text = str(jax.make_jaxpr(lambda p: loss(p, "bf16"))(state.params))
    convolutions = [line for line in text.splitlines() if "convolution_product[" in line]
    assert convolutions and all(":bf16[" in line for line in convolutions)
    differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, (half, kept)), gradient = differentiated(state.params, "bf16")
    (_, (full, kept_full)), _ = differentiated(state.params, "fp32")
    assert half.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((kept, gradient))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(half, full, atol=0.03 * float(jnp.abs(full).max()))
    # Statistics are taken and averaged in float32: close to those of a float32 run, and no bfloat16 numbers.
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(kept_full), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))
        assert (a != a.astype(jnp.bfloat16).astype(jnp.float32)).any()
    assert (half != full).any()


def test_unknown_precision_is_named():
    module, variables = network()
    with pytest.raises(ValueError, match="precision: 'fp16'.*bf16"):
        apply.apply_eval(module, variables, jnp.zeros((1, 8, 8, 1)), "fp16")


def test_average_is_its_formula_and_forgets_the_first_values():
    values = [jnp.full(3, v) for v in (1.0, 2.0, 4.0)]
    average, expected = {"w": jnp.zeros(3), "n": jnp.zeros((), jnp.int32)}, 0.0
    for i, value in enumerate(values):
        average = training_state.averaged(average, {"w": value, "n": jnp.int32(i)}, 0.15, jnp.int32(i))
        rate = min(0.15, (1 + i) / (10 + i))
        expected = rate * expected + (1 - rate) * float(value[0])
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)
    assert average["n"] == 2 and average["n"].dtype == jnp.int32


def test_distillation_lowers_the_divergence_from_the_teacher(tmp_path):
    teacher, teacher_variables = network(width=8)
    teacher_variables["params"]["dense"]["kernel"] *= 5
    module, variables = network()
    stage = StageConfig(steps=40, batch_size=32, learning_rate=0.05)
    tx = optimizer.make_optimizer(stage)
    step = steps.distill_step(module, teacher, tx, stage, RUN, TASK)
    fit(tmp_path, training_state.create_state(variables, tx), step, stage=stage, constants=teacher_variables)
    found = rows(tmp_path)
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]


# --- the loop -------------------------------------------------------------------------------------------------------


def test_supervised_training_learns(tmp_path):
    stage = StageConfig(steps=60, batch_size=32, learning_rate=0.1)
    state = fit(tmp_path, stage=stage)
    assert int(state.step) == 60
    assert rows(tmp_path)[-1]["accuracy"] > 0.9


def updates(scanned: bool, lengths: tuple[int, ...]):
    """The state and the losses after calls of so many updates each, without the rest of `fit`."""
    module, variables = network()
    tx, mesh, data, examples = (
        optimizer.make_optimizer(STAGE),
        data_mesh(),
        DataConfig(crop=1, flip=True),
        dataset(),
    )
    step = steps.supervised_step(module, tx, STAGE, RUN, TASK)
    dispatch = loop.make_dispatch(step, mesh, data, 3, scanned=scanned)
    mean, std = np.asarray(examples.mean, np.float32), np.asarray(examples.std, np.float32)
    resident = {"arrays": examples.train.arrays, "mean": mean, "std": std}
    resident, state = replicate((resident, training_state.create_state(variables, tx)), mesh)
    found = []
    for length in lengths:
        indices = batch_indices(3, len(examples.train), STAGE.batch_size, int(state.step), length)
        state, metrics, finite = dispatch(state, indices, resident, None)
        assert finite and metrics["loss"].shape == (length,)
        found.extend(np.asarray(metrics["loss"]))
    return state, found


@pytest.mark.parametrize("lengths", [(1,) * 5, (5,), (4, 1)])
def test_a_scan_of_updates_is_the_loop_of_single_ones(lengths):
    """`fit` takes the one on accelerators and the other on CPUs."""
    looped, scanned = updates(False, (5,)), updates(True, lengths)
    assert jax.tree.structure(looped) == jax.tree.structure(scanned)
    for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(scanned), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_second_call_of_a_scan_compiles_nothing(caplog):
    with jax.log_compiles():
        updates(True, (3, 3, 3))
    assert caplog.text.count("Compiling jit(update_many)") == 1


def test_looking_more_often_changes_nothing(tmp_path):
    """Nor do checkpoints that are left out for what they cost: all but the first that falls due, and the last."""
    run = replace(RUN, checkpoint_every=3, keep=9)
    seldom = fit(tmp_path / "seldom", run=replace(run, evaluate_every=100, checkpoint_share=1e-9))
    often = fit(
        tmp_path / "often",
        run=replace(run, evaluate_every=1),
        evaluate=lambda state: {"validation_accuracy": float(state.step)},
    )
    assert same(seldom, often)
    assert saved(tmp_path / "seldom") == [4, 12] and saved(tmp_path / "often") == [4, 8, 12]


def test_the_state_given_stays_usable_and_structure_stays(tmp_path):
    module, variables = network()
    stage = replace(STAGE, ema=0.9)
    tx = optimizer.make_optimizer(stage)
    extra = {"gates": jnp.ones(3), "n": jnp.zeros((), jnp.int32)}
    state = training_state.create_state(variables, tx, ema=0.9, extra=extra)
    before = jax.tree.map(np.array, state)
    # The same arrays as trained parameters and as the fixed teacher: donating one must not take the other.
    step = steps.distill_step(module, module, tx, stage, RUN, TASK)
    after = fit(tmp_path, state, step, stage=stage, constants=variables)
    assert same(before, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert not same(after.params, state.params) and not same(after.ema, after.variables | {"params": after.params})


def test_nothing_compiles_after_the_first_update(tmp_path, caplog):
    """22 updates in calls of 4, the last one shorter, whatever the hook does to the state."""
    module, variables = network()
    stage = replace(STAGE, steps=22)
    tx = optimizer.make_optimizer(stage)
    state = training_state.create_state(variables, tx, extra={"scale": jnp.ones(())})
    step = steps.supervised_step(module, tx, stage, RUN, TASK)

    def between(state):
        moved = {"scale": np.float32(0.9) * np.asarray(state.extra["scale"])}  # a NumPy array, off the devices
        return state.replace(extra=moved), {"scale": float(moved["scale"])}

    with jax.log_compiles():
        fit(tmp_path, state, step, stage=stage, between=between)
    assert caplog.text.count("Compiling jit(update_once)") == 1
    np.testing.assert_allclose([row["scale"] for row in rows(tmp_path)], 0.9 ** np.arange(1, 7), rtol=1e-5)


def test_between_must_keep_shapes_and_dtypes(tmp_path):
    module, variables = network()
    tx = optimizer.make_optimizer(STAGE)
    state = training_state.create_state(variables, tx, extra={"scale": jnp.ones(2)})
    step = steps.supervised_step(module, tx, STAGE, RUN, TASK)
    with pytest.raises(ValueError, match=r"between changed extra/scale.*\(3,\).*\(2,\)"):
        fit(tmp_path, state, step, between=lambda s: (s.replace(extra={"scale": jnp.ones(3)}), {}))


def test_rows_evaluations_and_checkpoints_come_when_asked(tmp_path):
    stage, run = replace(STAGE, steps=22), replace(RUN, evaluate_every=6, checkpoint_every=10, keep=9)
    evaluated = []

    def evaluate(state):
        evaluated.append(int(state.step))
        return {"validation_accuracy": 0.5}

    fit(tmp_path, stage=stage, run=run, evaluate=evaluate)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [4, 8, 12, 16, 20, 22]
    assert evaluated == [8, 12, 20, 22] == [row["step"] for row in found if "validation_accuracy" in row]
    assert {"loss", "accuracy", "learning_rate", "gradient_norm", "time"} <= set(found[0])
    assert "images_per_second" in found[1] and "images_per_second" not in found[0]
    assert saved(tmp_path) == [12, 20, 22]


@pytest.mark.parametrize(
    ("stage", "message"),
    [({"batch_size": 97}, "batch_size: 97.*96 training examples"), ({"steps": 4, "warmup": 4}, "warmup: 4")],
)
def test_stages_that_do_not_fit_the_data_are_named(tmp_path, stage, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, stage=replace(STAGE, **stage))


def test_no_steps_train_nothing(tmp_path):
    module, variables = network()
    stage = replace(STAGE, steps=0, warmup=0)
    tx = optimizer.make_optimizer(stage)
    state = fit(
        tmp_path,
        training_state.create_state(variables, tx),
        steps.supervised_step(module, tx, stage, RUN, TASK),
        stage=stage,
    )
    assert same(state.params, variables["params"])


# --- trouble --------------------------------------------------------------------------------------------------------


def test_divergence_stops_and_says_where(tmp_path):
    """The tenth update makes one parameter NaN: it is named, with the checkpoint of step 8."""
    module, variables = network()
    tx = optimizer.make_optimizer(STAGE)
    plain = steps.supervised_step(module, tx, STAGE, RUN, TASK)

    def step(state, batch, key, constants):
        new, metrics = plain(state, batch, key, constants)
        bias = jnp.where(state.step == 9, jnp.nan, new.params["dense"]["bias"])
        new = new.replace(params={**new.params, "dense": {**new.params["dense"], "bias": bias}})
        return new, metrics

    with pytest.raises(loop.TrainingDiverged) as caught:
        fit(tmp_path, training_state.create_state(variables, tx), step)
    message = str(caught.value)
    assert "loss is nan at step 11" in message and "is not finite" in message
    assert str(tmp_path / "checkpoints" / "8") in message and "learning_rate" in message
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]


def test_a_parameter_lost_in_the_last_update_is_seen(tmp_path):
    """The loss of the last update is finite; the parameters that it leaves behind are not."""
    module, variables = network()
    tx = optimizer.make_optimizer(STAGE)
    plain = steps.supervised_step(module, tx, STAGE, RUN, TASK)

    def step(state, batch, key, constants):
        new, metrics = plain(state, batch, key, constants)
        bias = jnp.where(state.step == 11, jnp.inf, new.params["dense"]["bias"])
        return new.replace(params={**new.params, "dense": {**new.params["dense"], "bias": bias}}), metrics

    with pytest.raises(loop.TrainingDiverged, match="step 12, dense/bias is not finite"):
        fit(tmp_path, training_state.create_state(variables, tx), step)


def test_a_run_is_not_overwritten(tmp_path):
    fit(tmp_path)
    with pytest.raises(FileExistsError, match="checkpoints up to step 12; resume"):
        fit(tmp_path)


def test_resuming_what_is_finished_returns_it_at_once(tmp_path):
    finished = fit(tmp_path)

    def never(*_):
        raise AssertionError("an update was traced")

    _, variables = network()
    again = fit(tmp_path, training_state.create_state(variables, optimizer.make_optimizer(STAGE)), never, resume=True)
    assert same(finished, again)


def test_resuming_with_another_config_is_refused(tmp_path):
    fit(tmp_path, meta={"config": {"seed": 3}})
    with pytest.raises(ValueError, match="seed"):
        fit(tmp_path, meta={"config": {"seed": 4}}, resume=True)


def test_sigterm_saves_and_a_resumed_run_ends_the_same(tmp_path):
    """SIGTERM in the second call: it stops at its end and saves, memory and all, what else had been left out."""
    module, variables = network()
    tx = optimizer.make_optimizer(STAGE)
    state = training_state.create_state(variables, tx, extra={"memory": jnp.zeros(())})
    step = steps.supervised_step(module, tx, STAGE, RUN, TASK)

    def run(directory, signal_at=None, **options):
        def between(state):
            if int(state.step) == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            memory = 0.5 * state.extra["memory"] + state.params["dense"]["bias"][0]
            return state.replace(extra={"memory": memory}), {}

        often = replace(RUN, checkpoint_every=2, checkpoint_share=1e-9)
        return fit(directory, state, step, between=between, run=often, **options)

    straight = run(tmp_path / "straight")
    with pytest.raises(loop.Preempted, match="step 8 of 12; the same command") as caught:
        run(tmp_path / "stopped", signal_at=8)
    assert caught.value.exit_status == 143
    resumed = run(tmp_path / "stopped", resume=True)
    assert same(straight, resumed)
    assert [row["step"] for row in rows(tmp_path / "stopped")] == [4, 8, 12]


@pytest.mark.parametrize("at", [4, 12])
def test_sigterm_in_an_evaluation_ends_it_at_once(tmp_path, at):
    """The state of this update is saved; what was to be measured of it is when the run goes on."""
    module, variables = network()
    tx = optimizer.make_optimizer(STAGE)
    state = training_state.create_state(variables, tx)
    step = steps.supervised_step(module, tx, STAGE, RUN, TASK)

    def run(directory, signal_at=None, **options):
        def evaluate(state):
            if int(state.step) == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
                raise AssertionError("the evaluation went on")
            return {"validation_accuracy": float(state.params["dense"]["bias"][0])}

        return fit(directory, state, step, evaluate=evaluate, run=replace(RUN, evaluate_every=4), **options)

    straight = run(tmp_path / "straight")
    with pytest.raises(loop.Preempted, match=f"saved at step {at} of 12"):
        run(tmp_path / "stopped", signal_at=at)
    assert same(straight, run(tmp_path / "stopped", resume=True))
    found, expected = (
        [{k: v for k, v in row.items() if k not in ("time", "images_per_second")} for row in rows(tmp_path / name)]
        for name in ("stopped", "straight")
    )
    assert found == expected and all("validation_accuracy" in row for row in found)


KILLED = """
import sys, time
from pathlib import Path
import jax, numpy as np
sys.path.insert(0, {tests!r})
import test_train as t
from kdsearch_jax.distill import steps
from kdsearch_jax.training import optimizer
from kdsearch_jax.training import state as training_state
from test_train import TASK
from kdsearch_jax.runs.config import RunConfig, StageConfig

stage = StageConfig(steps=60, batch_size=16, learning_rate=0.1, ema=0.9)
run = RunConfig(steps_per_dispatch=3, checkpoint_every=4, checkpoint_share=None)
module, variables = t.network()
tx = optimizer.make_optimizer(stage)
state = training_state.create_state(variables, tx, ema=stage.ema, extra={{"memory": np.zeros(2, np.float32)}})
plain = steps.supervised_step(module, tx, stage, run, TASK)

def step(state, batch, key, constants):
    "The hook's memory scales the images, so that a lost memory is a different run."
    return plain(state, {{**batch, "images": batch["images"] * (1 + state.extra["memory"][0])}}, key, constants)

def fit(directory, pause, resume):
    def between(state):
        time.sleep(pause)
        memory = 0.9 * state.extra["memory"] + 0.01 * np.asarray(state.params["dense"]["bias"])[:2]
        return state.replace(extra={{"memory": memory.astype(np.float32)}}), {{}}
    return t.fit(directory, state, step, stage=stage, run=run, between=between, resume=resume)
"""


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """A Python process that runs the code with PYTHONPATH as in this session."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output(process: subprocess.Popen) -> str:
    """All that the process printed, once it has ended well."""
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text


def test_a_killed_run_ends_bit_by_bit_as_an_undisturbed_one(tmp_path):
    """kill -9 at some moment after the first checkpoint, then resume; parameters, momentum, average, memory: all."""
    code = KILLED.format(tests=str(Path(__file__).parent))
    killed = start(code + "fit(sys.argv[1], 0.1, False)", tmp_path / "killed")
    deadline, wanted = time.monotonic() + 90, int(np.random.default_rng().integers(3, 12))
    metrics, checkpoints = tmp_path / "killed" / "metrics.jsonl", tmp_path / "killed" / "checkpoints"
    while not (metrics.exists() and metrics.read_text().count("\n") >= wanted and list(checkpoints.glob("[0-9]*"))):
        assert time.monotonic() < deadline and killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    compare = """
resumed, straight = fit(sys.argv[1], 0, True), fit(sys.argv[2], 0, False)
assert int(straight.step) == 60 and t.same(resumed, straight)
assert float(np.abs(straight.extra["memory"]).max()) > 1e-4
a, b = ([(row["step"], row["loss"]) for row in t.rows(directory)] for directory in sys.argv[1:3])
assert a == b and len(a) == 20
"""
    output(start(code + compare, tmp_path / "killed", tmp_path / "straight"))


# --- many devices ---------------------------------------------------------------------------------------------------

MANY = """
import sys
import jax, numpy as np, pytest
sys.path.insert(0, {tests!r})
if len(sys.argv) > 2:
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import test_train as t
from kdsearch_jax.runs import evaluation

assert jax.device_count() == {devices}
if {devices} == 8:
    with pytest.raises(ValueError, match="batch_size: 12 is not a multiple of the 8 devices; give 8"):
        t.fit(sys.argv[1] + "-refused", stage=t.replace(t.STAGE, batch_size=12))
    scanned, looped = t.updates(True, (4,))[0], t.updates(False, (4,))[0]
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
run = t.replace(t.RUN, checkpoint_every=4, checkpoint_share=1e-9, keep=9)
state = t.fit(sys.argv[1], stage=t.replace(t.STAGE, ema=0.9), run=run)
images = t.dataset().train.images[:21]
logits = evaluation.predict(t.network()[0], state.variables, images, (0.5,), (0.25,), batch_size=8)
if jax.process_index() == 0:
    np.savez(sys.argv[1] + "/all.npz", *map(np.asarray, jax.tree.leaves(state)), logits)
"""


def as_one_device(tmp_path):
    """Asserts that a run of several devices left what one device leaves: state, predictions, metrics, checkpoints."""
    state = fit(tmp_path / "one", stage=replace(STAGE, ema=0.9))
    logits = evaluation.predict(network()[0], state.variables, dataset().train.images[:21], (0.5,), (0.25,))
    expected = [*map(np.asarray, jax.tree.leaves(state)), logits]
    with np.load(tmp_path / "many" / "all.npz") as found:
        assert len(found) == len(expected)
        for a, b in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(rows(tmp_path / "many"), rows(tmp_path / "one"), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert saved(tmp_path / "many") == [4, 12]  # the one in between was left out by all


def test_eight_devices_train_as_one(tmp_path):
    code = MANY.format(tests=str(Path(__file__).parent), devices=8)
    output(start(code, tmp_path / "many", JAX_NUM_CPU_DEVICES="8"))
    as_one_device(tmp_path)


def test_two_processes_train_as_one_device(tmp_path):
    """Two processes that share one batch; the first of them writes."""
    code = MANY.format(tests=str(Path(__file__).parent), devices=2)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    processes = [start(code, tmp_path / "many", address, rank, JAX_NUM_CPU_DEVICES="1") for rank in range(2)]
    for process in processes:
        output(process)
    as_one_device(tmp_path)
