"""Values that are not finite stop a run and are named; rollbacks after loss spikes are reproducible."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train as t
from test_train import RUN, STAGE, TASK

from kdsearch_jax.distill import steps
from kdsearch_jax.training import checkpoints, loop, optimizer, rollback
from kdsearch_jax.training import state as training_state

pytestmark = pytest.mark.usefixtures("quick_compilation")
# What it goes back to must not depend on what a checkpoint costs.
GUARDED = replace(RUN, steps_per_dispatch=2, checkpoint_every=4, checkpoint_share=1e-9, spike=3.0, rollbacks=2)
LONG = replace(STAGE, steps=24)


@pytest.fixture(scope="module")
def plain():
    """(first state, step) of a small network."""
    module, variables = t.network()
    tx = optimizer.make_optimizer(STAGE)
    return training_state.create_state(variables, tx, ema=0.9), steps.supervised_step(module, tx, STAGE, RUN, TASK)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("model_state", r"model_state/batch_stats/bn/mean"),
        ("opt_state", r"opt_state/.*bn/bias"),
        ("extra", r"extra/gates"),
    ],
)
def test_whatever_is_not_finite_any_more_is_named(tmp_path, plain, part, name):
    """The loss of the last update is finite, and so are the parameters."""
    state, update = plain
    # A history of what is still to come is not finite from the beginning, and does no harm.
    state = state.replace(extra={"gates": jnp.ones(3), "history": jnp.full(2, jnp.nan)})

    def step(state, batch, key, constants):
        def broken(path, leaf):
            last = str(getattr(path[-1], "key", ""))
            spoilt = last in ("bias", "mean", "gates") and jnp.issubdtype(leaf.dtype, jnp.floating)
            return jnp.where(state.step == 11, jnp.nan, leaf) if spoilt else leaf

        new, metrics = update(state, batch, key, constants)
        return new.replace(**{part: jax.tree_util.tree_map_with_path(broken, getattr(new, part))}), metrics

    with pytest.raises(loop.TrainingDiverged, match=f"step 12, {name} is not finite; the last good .*checkpoints/8"):
        t.fit(tmp_path, state, step)


def test_what_a_hook_breaks_is_never_saved(tmp_path, plain):
    """Nor is it taken for the way things are where a checkpoint has it all the same."""
    state, update = plain
    state = state.replace(extra={"memory": jnp.ones(2)})

    def between(state):
        broken = jnp.where(state.step == 8, jnp.nan, state.extra["memory"])
        return state.replace(extra={"memory": broken}), {}

    with pytest.raises(
        loop.TrainingDiverged, match=r"step 8, extra/memory is not finite; the last good .*checkpoints/4"
    ):
        t.fit(tmp_path / "hook", state, update, between=between, run=replace(RUN, checkpoint_every=4))
    with checkpoints.Checkpointer(tmp_path / "hook" / "checkpoints") as stored:
        assert stored.steps() == [4]
    with checkpoints.Checkpointer(tmp_path / "old" / "checkpoints") as stored:
        stored.save(
            4, jax.device_get(state.replace(step=np.int32(4), extra={"memory": np.full(2, np.nan, np.float32)})), {}
        )
    with pytest.raises(loop.TrainingDiverged, match="extra/memory is not finite"):
        t.fit(tmp_path / "old", state, update, resume=True)


def test_a_broken_teacher_is_named(tmp_path, plain):
    state, update = plain

    def step(state, batch, key, constants):
        new, metrics = update(state, batch, key, None)
        return new, {**metrics, "loss": metrics["loss"] + constants["params"]["kernel"].sum()}

    constants = {"params": {"kernel": np.array([1.0, np.inf], np.float32)}}
    with pytest.raises(loop.TrainingDiverged, match="step 1, nor is the teacher's params/kernel"):
        t.fit(tmp_path, state, step, constants=constants)


# Going back


def mark(batch):
    """A number by which a batch is known, exact in float32."""
    return (batch["labels"] * 2 ** jnp.arange(batch["labels"].shape[0])).sum().astype(jnp.float32)


def jumping(update, worst: float, hits: dict[int, float]):
    """A step whose loss is `worst` at certain updates, where a batch comes in its first order."""

    def step(state, batch, key, constants):
        new, metrics = update(state, batch, key, constants)
        hit = sum(((state.step == at) & (mark(batch) == value)).astype(jnp.float32) for at, value in hits.items())
        params = jax.tree.map(lambda x: jnp.where(hit > 0, x * 1e3, x), new.params)
        return new.replace(params=params), {**metrics, "loss": jnp.where(hit > 0, worst, metrics["loss"])}

    return step


def marks(update, state, directory, ats) -> dict[int, float]:
    """{update: the mark of its batch}, as the first order has them."""

    def step(state, batch, key, constants):
        new, metrics = update(state, batch, key, constants)
        return new, {**metrics, "mark": mark(batch)}

    t.fit(directory, state, step, run=replace(RUN, steps_per_dispatch=1), stage=LONG)
    return {at: t.rows(directory)[at]["mark"] for at in ats}


@pytest.mark.parametrize("worst", [1e4, float("nan")])
def test_a_jump_goes_back_and_on_by_other_batches(tmp_path, plain, caplog, worst):
    """At update 14: back to step 12, updates 12 and 13 to 16 by another shuffle; and the same after an interruption."""
    state, update = plain
    step = jumping(update, worst, marks(update, state, tmp_path / "first", [14]))
    options = {"run": GUARDED, "stage": LONG}
    with caplog.at_level(logging.WARNING):
        straight = t.fit(tmp_path / "straight", state, step, **options)
    assert "going back to step 12" in caplog.text and "(1 of 2)" in caplog.text
    found = t.rows(tmp_path / "straight")
    assert [row["step"] for row in found] == list(range(2, 26, 2))  # the lost rows are gone
    (row,) = [row for row in found if "rollbacks" in row]
    assert (row["step"], row["rollbacks"], row["rollback_from"]) == (14, 1, 16)
    assert max(row["loss"] for row in found) < 10

    class StopError(Exception):
        pass

    for at in (14, 20) if np.isfinite(worst) else ():  # before the jump's second half, and after it

        def between(state, at=at):
            if int(state.step) == at:
                raise StopError
            return state, {}

        directory = tmp_path / f"stopped-{at}"
        with pytest.raises(StopError):
            t.fit(directory, state, step, between=between, **options)
        assert t.same(t.fit(directory, state, step, resume=True, **options), straight)
        assert [(r["step"], r["loss"]) for r in t.rows(directory)] == [(r["step"], r["loss"]) for r in found]


def test_without_the_setting_nothing_goes_back(tmp_path, plain):
    state, update = plain
    hits = marks(update, state, tmp_path / "first", [10])
    with pytest.raises(loop.TrainingDiverged, match="loss is nan at step 11"):
        t.fit(tmp_path / "off", state, jumping(update, float("nan"), hits), stage=LONG)
    # A jump that is finite is only a jump.
    assert int(t.fit(tmp_path / "on", state, jumping(update, 1e4, hits), stage=LONG).step) == 24


def test_it_goes_back_so_often_and_no_more(tmp_path, plain):
    state, update = plain

    def step(state, batch, key, constants):
        new, metrics = update(state, batch, key, constants)
        return new, {**metrics, "loss": jnp.where(state.step >= 6, jnp.nan, metrics["loss"])}

    with pytest.raises(loop.TrainingDiverged, match=r"loss is nan at step 7; the last good checkpoint .*checkpoints/4"):
        t.fit(tmp_path, state, step, run=GUARDED, stage=LONG)


def test_a_jump_that_is_let_pass_is_told_once(tmp_path, plain, caplog):
    state, update = plain

    def step(state, batch, key, constants):
        new, metrics = update(state, batch, key, constants)
        return new, {**metrics, "loss": jnp.where(state.step >= 12, 1e4, metrics["loss"])}

    with caplog.at_level(logging.WARNING):
        assert int(t.fit(tmp_path, state, step, run=GUARDED, stage=LONG).step) == 24
    assert caplog.text.count("going back to step") == 2
    assert caplog.text.count("run.rollbacks (2)") == 1


def test_detours_of_detours():
    guard = rollback.LossSpikeGuard(GUARDED)
    assert not any(guard.is_spike(1.0 + 0.1 * i) for i in range(9)) and guard.is_spike(4.9) and guard.is_spike(np.nan)
    stored = guard.to_meta()
    guard.roll_back(stored, 4, 10)
    again = rollback.LossSpikeGuard(GUARDED, guard.to_meta()[rollback.META_KEY])
    again.roll_back(again.to_meta(), 6, 8)
    seeds = [again.batch_seed(5, step) for step in range(3, 12)]
    assert seeds[0] == seeds[7] == seeds[8] == 5 and len({*seeds}) == 3
    assert seeds[1] == seeds[2] == seeds[5] == seeds[6] != seeds[3] == seeds[4]
    assert again.exhausted and not guard.exhausted


def test_a_loss_below_zero_has_its_spikes_too():
    guard = rollback.LossSpikeGuard(GUARDED)
    assert not any(guard.is_spike(-1.0 - 0.1 * i) for i in range(9)) and not guard.is_spike(0.5) and guard.is_spike(3.0)
