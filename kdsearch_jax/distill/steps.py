"""Training steps: one update of a network by labels, or by a teacher."""

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
    module: Any, tx: optax.GradientTransformation, stage: StageConfig, run: RunConfig, objective: Objective
) -> Step:
    """One update on the cross-entropy with the labels; takes no constants."""

    def loss(params: Any, _: Any, state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[Array, Any]:
        inputs = objective.call.bind(batch)
        outputs, model_state = apply_train(
            module, params, state.model_state, inputs, key, run.precision, objective.call
        )
        return objective.supervised(outputs, batch).mean(), (objective.accuracy(outputs, batch), model_state)

    return gradient_step(tx, stage, run, loss)


def distill_step(
    module: Any,
    teacher: Any,
    tx: optax.GradientTransformation,
    stage: StageConfig,
    run: RunConfig,
    objective: Objective,
    distiller: Distiller | None = None,
) -> Step:
    """One update on the distance from fixed teachers.

    Args:
      module, teacher: modules of student and teacher.
      distiller: teachers and losses; None: `teacher` alone, compared by the objective's distance. The step's constants
        are those that it needs, for one teacher its variables.
    """
    distiller = distiller or Distiller.of(objective, teacher, run)

    def loss(params: Any, maps: Any, state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[Array, Any]:
        student, model_state = distiller.train(module, params, state.model_state, batch, key)
        distance = distiller.distance(maps, student, distiller.target(constants, batch), batch)
        return distance.mean(), (objective.accuracy(student.outputs, batch), model_state)

    return gradient_step(tx, stage, run, loss, distiller)


def gradient_step(
    tx: optax.GradientTransformation,
    stage: StageConfig,
    run: RunConfig,
    loss: Callable[..., tuple[Array, Any]],
    distiller: Distiller | None = None,
) -> Step:
    """An update by the gradient of a loss.

    Args:
      tx: updates the state's parameters.
      loss: (params, maps, state, batch, key, constants) → (loss, (metrics per example, new model_state)).
      distiller: owner of the maps that losses of features learn, if any.
    """
    schedule = make_schedule(stage)
    dtype_of(run.precision)

    def step(state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[TrainState, Metrics]:
        maps = None if distiller is None else distiller.learned(state.extra)
        differentiated = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, aux), (gradient, maps_gradient) = differentiated(state.params, maps, state, batch, key, constants)
        metrics, model_state = aux
        new = update(state, gradient, model_state, tx, stage.ema)
        if maps is not None and distiller is not None:
            new = new.replace(extra={**state.extra, **distiller.advance(state.extra, maps_gradient)})
        return new, {
            "loss": value,
            **{name: values.mean() for name, values in metrics.items()},
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }

    return step
