"""`kdsearch_jax.search(…)` from Python, and `python -m kdsearch_jax.search` on the command line.

Both run the same stages (`kdsearch_jax.runs.stages`). The name `kdsearch_jax.search` is the function, whatever else was
imported; the command is in `kdsearch_jax.search.__main__`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsearch_jax.distill.objective import Loss, Metrics
    from kdsearch_jax.runs.api import BudgetSweep, Result


def search(
    module: Any,
    variables: Any,
    data: Any,
    *,
    budget: float | Sequence[float] | Mapping[str, Any] = 0.5,
    loss: Loss | None = None,
    metrics: Metrics | None = None,
    inputs: Sequence[str] | Mapping[str, str] | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    search_steps: int = 400,
    retrain_steps: int = 400,
    batch_size: int = 64,
    learning_rate: float = 0.005,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    baselines: Sequence[str] = (),
    seed: int = 0,
    workdir: str | Path | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Result | BudgetSweep:
    """Finds the sub-network that learns best from a trained network within a budget, and distils into it.

    Builds an `Experiment` from its arguments, runs every stage and returns the student.

    Args:
      module: any Flax module, Linen or NNX; it is not modified.
      variables: its trained variables, {"params": …, "batch_stats": …}; None for an NNX module, which holds its own.
      data: {entry: pytree of arrays} with one row per example, to be split into training, validation and test; or
        {"train": such a dictionary, "validation": …, "test": …}; or the name of a data set as in `--data`.
      budget: fraction of the teacher's multiply-accumulates, or {"macs", "params", "latency", "memory", "batch_size",
        "round_to"} as in `kdsearch_jax.pruning.settings.BudgetConfig`. Several values, such as [0.7, 0.5, 0.3] or
        {"params": [0.7, 0.5]}, yield one student each from a single search.
      loss: (student_outputs, teacher_outputs, batch) → (batch,) or (), to be minimised. The default is described in
        `kdsearch_jax.distill.objective`.
      metrics: (outputs, batch) → {name: (batch,)}, reported in the table.
      inputs: entries that feed the call's arguments, in order, or {argument: entry}. The default is `images`, the only
        entry besides `labels`, or the entries named like the arguments. Other entries are for loss and metrics.
      train_kwargs, eval_kwargs: keywords of the call in training and inference; `train`, `training`, `is_training` and
        `deterministic` are set automatically.
      search_steps, retrain_steps: number of updates.
      batch_size: examples per update.
      learning_rate: of SGD with gradients clipped to norm 1, in search and retraining.
      mean, std: one number per channel, for uint8 entries `images`, normalised to (image / 255 − mean) / std.
      baselines: of "uniform" and "magnitude", hand-made students of equal cost to compare with.
      workdir: the run's directory, also gs://BUCKET/NAME; by default a temporary one, which is kept.
      resume: continue the run in `workdir`.
      settings: other settings by their name in `kdsearch_jax.runs.config`, such as {"search.optimizer": "adamw"}.

    Returns:
      The student and its record; for several budgets, a `kdsearch_jax.runs.api.BudgetSweep` of them.

    Raises:
      ValueError: an argument is invalid, the data or the teacher cannot be used, or the budget cannot be met. Raised
        before any training, with a message of one line.
    """
    from kdsearch_jax import storage
    from kdsearch_jax.adapters.devices import without_mesh
    from kdsearch_jax.data.settings import DataConfig
    from kdsearch_jax.distill.settings import DistillConfig
    from kdsearch_jax.runs import api
    from kdsearch_jax.runs.config import Experiment, ModelConfig, changed
    from kdsearch_jax.training.settings import RunConfig, StageConfig

    with storage.addresses_in_errors(), without_mesh():
        teacher = api.ModuleWithVariables.of(module, variables)
        bounds, budgets = api.parse_budget(budget)
        stage = StageConfig(batch_size=batch_size, learning_rate=learning_rate, clip=1.0)  # a user's loss has any scale
        experiment = Experiment(
            name=teacher.class_name,
            model=ModelConfig(teacher.registered_name, {}, dict(train_kwargs or {}), dict(eval_kwargs or {})),
            data=DataConfig(
                data if isinstance(data, str) else "arrays",
                mean=None if mean is None else tuple(map(float, mean)),
                std=None if std is None else tuple(map(float, std)),
                inputs=api.parse_inputs(inputs, data, teacher.module),
            ),
            search=dataclasses.replace(stage, steps=search_steps, schedule="constant"),
            retrain=dataclasses.replace(stage, steps=retrain_steps),
            distill=DistillConfig(loss=api.describe_callable(loss), metrics=api.describe_callable(metrics)),
            budget=bounds,
            budgets=budgets,
            baselines=tuple(baselines),  # type: ignore  # checked by `changed`
            run=RunConfig(seed=seed),
        )
        experiment = changed(experiment, settings or {})
        return api.run_experiment(experiment, teacher, data, loss, metrics, workdir=workdir, resume=resume)
