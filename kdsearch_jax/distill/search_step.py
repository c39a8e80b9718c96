"""The search of the commands: distillation into the gated network, with `GatedSearch` as the optimiser.

    min over w, g ≥ 0 of   E KL(teacher, student(w, g))  +  λ1 ‖w‖²  +  λ2 Σ_j α_j |g_j|

The step is a distillation step like any other: its parameters are weights and gates, its loss is that of the folded
network, its optimiser is `GatedSearch.optimizer` around the stage's. λ1 is the stage's weight decay; α and λ2 are
explained in `kdsearch_jax.pruning.control`. Removed units may be left out of the computation
(`kdsearch_jax.distill.shrinking`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdsearch_jax.distill.distiller import EXTRA, Distiller
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.distill.shrinking import Subnetwork
from kdsearch_jax.distill.steps import gradient_step
from kdsearch_jax.pruning.budgets import Limits
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.search import GatedSearch, search_state
from kdsearch_jax.pruning.settings import GatesConfig
from kdsearch_jax.pruning.transform import GATES
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import Batch, Step, TrainState


def gated_search(
    network: Network, limits: Sequence[Limits], stage: StageConfig, config: GatesConfig, run: RunConfig
) -> GatedSearch:
    """The search that an experiment's settings describe; limits: of its budgets, the largest first."""
    return GatedSearch(
        network,
        tuple(limits),
        max(stage.steps, 1),  # a stage of 0 steps ends before the first update
        every=run.steps_per_dispatch,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        ramp=config.ramp,
        warmup=config.warmup,
        penalty=config.penalty,
        sharpness=config.sharpness,
        importance_decay=config.importance_decay,
        lambda2=config.lambda2,
        initial_gates=config.init,
    )


def begin(
    search: GatedSearch, variables: Any, tx: optax.GradientTransformation, learned_maps: Any = None
) -> TrainState:
    """The state before the first update; its parameters are {"params": the teacher's weights, "gates": …}.

    Args:
      variables: the teacher's.
      tx: `search.optimizer(…)`.
      learned_maps: linear maps that the losses learn, with their optimiser's state (`Lesson.learned`).
    """
    params = search.init(variables)
    model_state = {name: collection for name, collection in variables.items() if name != "params" and collection}
    extra = None if learned_maps is None else {EXTRA: learned_maps}
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params), extra=extra)


def search_step(
    network: Subnetwork,
    teacher: Any,
    tx: optax.GradientTransformation,
    stage: StageConfig,
    objective: Objective,
    config: GatesConfig,
    run: RunConfig,
    distiller: Distiller | None = None,
) -> Step:
    """One update of weights and gates.

    Args:
      network: the gated network that is trained.
      teacher: the teacher's module.
      tx: `GatedSearch.optimizer(…)`.
      distiller: teachers and losses; None: `teacher` alone, compared by the objective's distance. The step's constants
        are those that it needs, for one teacher its variables.
    """
    distiller = distiller or Distiller.of(objective, teacher, run)
    frozen = config.batch_norm == "frozen"

    def loss(params: Any, maps: Any, state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[Array, Any]:
        target = distiller.target(constants, batch)
        folded, gates = network.fold(params, state.model_state)["params"], network.gates(params[GATES])
        student, model_state = distiller.train(
            network.module, folded, state.model_state, batch, key, gates, network.network.topology, frozen=frozen
        )
        metrics = {**objective.accuracy(student.outputs, batch), **objective.agreement(student.outputs, target.outputs)}
        return distiller.distance(maps, student, target, batch).mean(), (metrics, model_state)

    return gradient_step(tx, dataclasses.replace(stage, ema=None), run, loss, distiller)


def progress(search: GatedSearch, state: TrainState) -> dict[str, float]:
    """Metrics of a search: its network's "macs" and "params" as shares of the teacher's, "lambda2", "alive".

    "alive" is the share of units with g > 0.
    """
    topology = search.topology
    alive = flat_gates(search, state) > 0
    macs, params = np.array(topology.cost(alive.astype(float))) / topology.total()
    lambda2 = np.asarray(search_state(state.opt_state).lambda2)
    return {"macs": float(macs), "params": float(params), "lambda2": float(lambda2), "alive": float(alive.mean())}


def flat_gates(search: GatedSearch, state: TrainState) -> np.ndarray:
    """(units,) gates."""
    return search.topology.flatten({name: np.asarray(gate) for name, gate in state.params[GATES].items()})
