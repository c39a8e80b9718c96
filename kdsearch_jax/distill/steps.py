"""One update of a network by labels or by a teacher: a `Step` each for the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdsearch_jax.adapters.apply import apply_train, dtype_of
from kdsearch_jax.distill.distiller import Distiller
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.training.optimizer import make_schedule
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import Batch, Metrics, Step, TrainState, update


def supervised_step(
    module: Any, tx: optax.GradientTransformation, stage: StageConfig, run: RunConfig, task: Objective
) -> Step:
    """One update on the cross-entropy with the labels; takes no constants."""

    def loss(params: Any, _: Any, state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[Array, Any]:
        inputs = task.call.bind(batch)
        outputs, kept = apply_train(module, params, state.model_state, inputs, key, run.precision, task.call)
        return task.supervised(outputs, batch).mean(), (outputs, kept)

    return _gradient_step(tx, stage, run, task, loss)


def distill_step(
    module: Any,
    teacher: Any,
    tx: optax.GradientTransformation,
    stage: StageConfig,
    run: RunConfig,
    task: Objective,
    distiller: Distiller | None = None,
) -> Step:
    """One update on the distance from a fixed teacher; constants: its variables, or those that the distiller wants.

    distiller: what teaches, and by which losses; None: `teacher`, by the task's distance.
    """
    by = distiller or Distiller.of(task, teacher, run)

    def loss(params: Any, maps: Any, state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[Array, Any]:
        shown, kept = by.train(module, params, state.model_state, batch, key)
        return by.distance(maps, shown, by.target(constants, batch), batch).mean(), (shown.outputs, kept)

    return _gradient_step(tx, stage, run, task, loss, by)


def _gradient_step(
    tx: optax.GradientTransformation,
    stage: StageConfig,
    run: RunConfig,
    task: Objective,
    loss: Callable[..., tuple[Array, Any]],
    distiller: Distiller | None = None,
) -> Step:
    """An update by the gradient of `loss`, (params, maps, state, batch, key, constants) → (value, (outputs, kept))."""
    schedule = make_schedule(stage)
    dtype_of(run.precision)

    def step(state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[TrainState, Metrics]:
        maps = None if distiller is None else distiller.learned(state.extra)
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, (outputs, kept)), (gradient, slope) = both(state.params, maps, state, batch, key, constants)
        metrics = {
            "loss": value,
            **{name: each.mean() for name, each in task.right(outputs, batch).items()},
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        new = update(state, gradient, kept, tx, stage.ema)
        if maps is not None and distiller is not None:
            new = new.replace(extra={**state.extra, **distiller.advance(state.extra, slope)})
        return new, metrics

    return step
