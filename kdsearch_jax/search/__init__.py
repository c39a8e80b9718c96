"""`kdsearch_jax.search(…)`, the Python call, and `python -m kdsearch_jax.search`, the command.

Both go the same road (`kdsearch_jax.runs.stages`). The function is what the name `kdsearch_jax.search` means,
whatever was
imported before; the command is `kdsearch_jax.search.__main__`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsearch_jax.distill.objective import Loss, Metrics
    from kdsearch_jax.runs.api import Front, Result


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
) -> Result | Front:
    """Finds the sub-network of a trained network that learns best from it within a budget, and distils into it.

    Args:
      module: any Flax module, Linen or NNX; nothing in it is changed.
      variables: its trained variables, {"params": …, "batch_stats": …}; None for an NNX module, which has its own.
      data: {entry: pytree of arrays}, one row an example, to be split for training, validation and test; or
        {"train": such a dictionary, "validation": …, "test": …}; or the name of a data set, as `--data` takes it.
      budget: share of the teacher's multiply-accumulates, or {"macs", "params", "latency", "memory", "batch_size",
        "round_to"}, see `kdsearch_jax.pruning.settings.BudgetConfig`. Several shares, as in [0.7, 0.5, 0.3] or
        {"params": [0.7,
        0.5]}, each get a student from one search.
      loss: (student_outputs, teacher_outputs, batch) → (batch,) or (), to be made small; None as
      `kdsearch_jax.distill.objective`.
      metrics: (outputs, batch) → {name: (batch,)}, for the table.
      inputs: entries that feed the call's arguments, in order, or {argument: entry}; None: `images`, or the only entry
        besides `labels`, or those that are named as the arguments are. Other entries are for loss and metrics.
      train_kwargs, eval_kwargs: the call's keywords in training and inference, where it has others than `train`,
        `training`, `is_training` and `deterministic`.
      search_steps, retrain_steps: updates; batch_size: examples an update; learning_rate: of SGD with gradients clipped
        to a norm of 1, in both.
      mean, std: per channel, for entries `images` in uint8, which are normalised to (image/255 − mean)/std.
      baselines: of "uniform" and "magnitude", hand-made students of equal cost to compare with.
      workdir: the run's directory, also gs://BUCKET/NAME; a temporary one, which stays, if left out. resume: go on with
        the run that it holds.
      settings: anything else, by its name in `kdsearch_jax.runs.config`: {"search.optimizer": "adamw"}.

    Returns:
      student and record, see `kdsearch_jax.runs.api.Result`; of several budgets a `kdsearch_jax.runs.api.Front` of
      them.

    Raises:
      ValueError: in one line, where something of the above cannot be; before any work.
    """
    from kdsearch_jax.runs import api

    given = {key: value for key, value in locals().items() if key != "api"}
    return api.run(**given)
