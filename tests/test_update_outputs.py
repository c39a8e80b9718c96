"""Teacher outputs cached under augmentation: the same training, without the teacher, and never from a wrong file."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.devices import data_mesh
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.device_feed import IndexedBatches, training_feed
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import teacher_cache, update_outputs
from kdsearch_jax.distill.distiller import Teacher, make_distillation
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.output_store import OutputStore
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.steps import distill_step
from kdsearch_jax.distill.update_outputs import UpdateCache
from kdsearch_jax.training import loop
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import create_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE = CallSpec.of_image((8, 8, 1))
DATA = DataConfig("digits", train_limit=40, crop=1, flip=True)
STAGE = StageConfig(steps=6, batch_size=20, learning_rate=0.05)
RUN = RunConfig(steps_per_dispatch=3, checkpoint_every=3, checkpoint_share=None, evaluate_every=10)
ORIGIN = {"teacher": "a", "seed": 1}
SHAPE = (4, 3)


def network(seed: int = 0):
    module = registry.build("small_cnn", {"width": 4, "num_classes": 10})
    return module, jax.jit(module.init)(jax.random.key(seed), jnp.zeros((2, 8, 8, 1)))


def distillation(directory=None, seed: int = 3, teacher: str = "a", run: RunConfig = RUN, teachers: int = 1, **distill):
    dataset, config = load(DATA, 0), DistillConfig(**distill)
    cache = None if directory is None else UpdateCache(directory, seed, {"teacher": teacher, "data": "digits"})
    every = [Teacher(*network(n), IMAGE) for n in range(teachers)]
    return make_distillation(
        classification(config, IMAGE), every, dataset, config, DATA, run, STAGE, *network(9), retraining=True,
        update_cache=cache,
    )  # fmt: skip


def train(made, directory, until=None):
    """The trained state, from checkpoints in `directory` if there are any; a cached teacher is not run by the step."""
    (module, variables), tx = network(9), make_optimizer(STAGE)
    step = distill_step(module, None, tx, STAGE, RUN, made.objective, made.distiller)
    return loop.fit(
        create_state(variables, tx), step, made.dataset, DATA, STAGE, RUN, directory=directory, name="test", meta={},
        constants=made.constants, entries=made.entries, seed=3, resume=True, until=until,
    )  # fmt: skip


def same_bits(a, b) -> bool:
    return all(np.array_equal(*leaves) for leaves in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_training_is_the_same_with_stored_outputs(tmp_path):
    """Filled by the first, read by the second, and equal to rounding to one that runs the teacher in every step."""
    first = train(distillation(tmp_path / "cache"), tmp_path / "first")
    made = distillation(tmp_path / "cache")
    assert made.constants is None and made.entries.store.count(STAGE.steps) == STAGE.steps
    made.entries.outputs = None  # cannot be computed
    assert same_bits(train(made, tmp_path / "second").params, first.params)
    without = train(distillation(), tmp_path / "without")
    learned = optax.tree.sub(without.params, network(9)[1]["params"])
    rounding = optax.tree.norm(optax.tree.sub(first.params, without.params)) / optax.tree.norm(learned)
    assert 0 < rounding < 1e-3


def test_an_interrupted_training_ends_in_the_same_bits(tmp_path):
    """Killed after 3 of 6 updates, while the outputs of the next one were half written."""
    whole = train(distillation(tmp_path / "whole" / "cache"), tmp_path / "whole")
    directory = tmp_path / "killed" / "cache"
    train(distillation(directory), tmp_path / "killed", until=lambda state: int(state.step) >= 3)
    with (directory / "outputs.bin").open("r+b") as file:
        file.seek(3 * 2 * 20 * 10)
        file.write(b"\x17" * 99)
    made = distillation(directory)
    assert made.entries.store.count(STAGE.steps) == 3
    assert same_bits(train(made, tmp_path / "killed").params, whole.params)


def test_an_update_with_stored_outputs_runs_no_teacher(tmp_path):
    """Counted in the compiled program: the student's convolutions alone."""

    def convolutions(lowered) -> int:
        return len(re.findall(r" convolution\(|custom_call_target=\"kdsearch_", lowered.compile().as_text()))

    def in_update(made) -> int:
        (module, variables), tx = network(9), make_optimizer(STAGE)
        step = distill_step(module, network()[0], tx, STAGE, RUN, made.objective, made.distiller)
        feed = training_feed(made.dataset, 20, data_mesh(), STAGE.steps, entries=made.entries)
        (batch, *_), state = feed.take(0, 1, 3), create_state(variables, tx)
        update = loop.make_update(step, data_mesh(), DATA, 3, scanned=False)
        return convolutions(update.lower(state, batch, feed.resident, made.constants))

    module, variables = network()
    teacher = convolutions(jax.jit(partial(apply_eval, module)).lower(variables, jnp.zeros((20, 8, 8, 1))))
    assert teacher > 0 and in_update(distillation()) - in_update(distillation(tmp_path)) == teacher


def test_a_scanned_call_takes_the_entries_of_each_update(tmp_path):
    made, mesh = distillation(tmp_path), data_mesh()
    module, tx = network(9)[0], make_optimizer(STAGE)
    step = distill_step(module, None, tx, STAGE, RUN, made.objective, made.distiller)
    losses = []
    for scanned in (True, False):
        feed = training_feed(made.dataset, 20, mesh, STAGE.steps, entries=made.entries)
        dispatch, batches = loop.make_dispatch(step, mesh, DATA, 3, scanned=scanned), feed.take(0, 3, 3)
        assert isinstance(batches, IndexedBatches) and batches.entries[teacher_cache.KEY].shape == (3, 20, 10)
        losses.append(dispatch(create_state(network(9)[1], tx), batches, feed.resident, None)[1]["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cache": False}, "distill.cache is off"),
        ({"run": dataclasses.replace(RUN, spike=3.0)}, "run.spike"),
        ({"teachers": 2}, "several teachers"),
        ({"losses": ("hint:0.5", "kl")}, "hint compares features"),
    ],
)
def test_where_outputs_are_not_cached(tmp_path, caplog, change, why):
    with caplog.at_level("INFO", "kdsearch_jax"):
        made = distillation(tmp_path / "cache", **change)
    assert made.entries is None and made.constants is not None and not (tmp_path / "cache").exists()
    assert re.search(f"not cached: .*{why}", caplog.text)


def test_outputs_beyond_float16_are_refused(tmp_path):
    made = distillation(tmp_path)
    made.entries.outputs = lambda variables, batch: jnp.full((20, 10), 1e5)
    with pytest.raises(ValueError, match="distill.cache: .*float16"):
        train(made, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"teacher": "b"}, "teacher a, not b"), ({"seed": 4}, "seed 3, not 4")],
)
def test_outputs_of_something_else_are_refused(tmp_path, change, named):
    distillation(tmp_path)
    with pytest.raises(ValueError, match=f"distill.cache: .* for {named}; remove it"):
        distillation(tmp_path, **change)


def test_other_augmentation_is_refused(tmp_path):
    made = distillation(tmp_path)
    for name, stored in (("crop", 1), ("flip", True)):
        data = dataclasses.replace(DATA, **{name: 2 if name == "crop" else False})
        cache = UpdateCache(tmp_path, 3, {"teacher": "a", "data": "digits"})
        with pytest.raises(ValueError, match=f"distill.cache: .* for {name} {stored}, not"):
            update_outputs.open_outputs(cache, None, None, (20, 10), made.dataset, data, RUN, STAGE)


# --- files ----------------------------------------------------------------------------------------------------------


def outputs(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float16)


def test_the_first_to_store_an_update_wins(tmp_path):
    one, other = OutputStore(tmp_path, ORIGIN, SHAPE, 5), OutputStore(tmp_path, ORIGIN, SHAPE, 5)
    assert one.read(2) is None and other.read(2) is None
    np.testing.assert_array_equal(one.write(2, outputs(0)), outputs(0))
    np.testing.assert_array_equal(other.write(2, outputs(1)), outputs(0))
    np.testing.assert_array_equal(other.read(2), outputs(0))
    assert one.count(5) == 1 and one.read(3) is None


def test_a_longer_stage_adds_room_and_keeps_what_there_is(tmp_path):
    OutputStore(tmp_path, ORIGIN, SHAPE, 3).write(2, outputs(2))
    longer = OutputStore(tmp_path, ORIGIN, SHAPE, 9)
    longer.write(8, outputs(8))
    shorter = OutputStore(tmp_path, ORIGIN, SHAPE, 1)
    assert shorter.updates == 9
    for update in (2, 8):
        np.testing.assert_array_equal(shorter.read(update), outputs(update))


@pytest.mark.parametrize("file", ["outputs.bin", "digests.bin"])
def test_a_changed_byte_is_noticed_and_computed_again(tmp_path, caplog, file):
    store = OutputStore(tmp_path, ORIGIN, SHAPE, 3)
    store.write(1, outputs(1))
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 3 + 5] ^= 1
    (tmp_path / file).write_bytes(content)
    again = OutputStore(tmp_path, ORIGIN, SHAPE, 3)
    assert again.read(1) is None and "update 1 does not match its digest" in caplog.text
    again.write(1, outputs(1))
    np.testing.assert_array_equal(again.read(1), outputs(1))


def test_a_damaged_header_starts_again(tmp_path, caplog):
    OutputStore(tmp_path, ORIGIN, SHAPE, 3).write(1, outputs(1))
    (tmp_path / "header.json").write_text("{")
    assert OutputStore(tmp_path, ORIGIN, SHAPE, 3).read(1) is None
    assert "header.json is damaged" in caplog.text


def test_a_disk_that_cannot_be_written_costs_time_only(tmp_path, caplog):
    store = OutputStore(tmp_path, ORIGIN, SHAPE, 3)
    (tmp_path / "digests.bin").unlink()
    for update in (0, 1):
        np.testing.assert_array_equal(store.write(update, outputs(update)), outputs(update))
    assert caplog.text.count("outputs are not stored") == 1
