"""The optimiser of a stage: its schedule, its weight decay, and what its settings may be."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax import Array

from kdsearch_jax.tracing.messages import nearest
from kdsearch_jax.training.settings import RULES, RunConfig, StageConfig

CHOICES = {"optimizer": ("sgd", "adamw"), "schedule": ("cosine", "step", "constant"), "precision": ("fp32", "bf16")}


def make_schedule(stage: StageConfig) -> optax.Schedule:
    """Learning rate of update 0, 1, …: linear warm-up to `learning_rate` at update `warmup` − 1, then the schedule.

    `cosine` ends at 0 after the last update; `step` is multiplied by `decay` at each of `boundaries` (shares of all
    `steps`); `constant` stays.

    Raises:
      ValueError: a setting is out of range.
    """
    check_stage(stage)
    rate, remaining = stage.learning_rate, stage.steps - stage.warmup
    if stage.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(remaining, 1))
    elif stage.schedule == "step":
        steps = [round(share * stage.steps) - stage.warmup for share in stage.boundaries]
        main = optax.piecewise_constant_schedule(rate, {step: stage.decay ** steps.count(step) for step in steps})
    else:
        main = optax.constant_schedule(rate)
    if not stage.warmup:
        return main
    rising = optax.linear_schedule(rate / stage.warmup, rate, max(stage.warmup - 1, 1))
    return optax.join_schedules([rising, main], [stage.warmup])


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """The optimiser of a stage: clip the global norm, add weight decay, step with the scheduled rate.

    Weight decay is on kernels only: leaves of two axes or more that are not named `bias` or `scale`. For `sgd` it is
    part of the gradient, before Nesterov's momentum; for `adamw` it is decoupled (Loshchilov and Hutter 2019).

    Raises:
      ValueError: a setting is out of range.
    """
    schedule, parts = make_schedule(stage), []
    if stage.clip is not None:
        parts.append(optax.clip_by_global_norm(stage.clip))
    if stage.optimizer == "sgd":
        parts.append(optax.add_decayed_weights(stage.weight_decay, mask=is_kernel))
        parts.append(optax.sgd(schedule, stage.momentum, nesterov=stage.momentum > 0))
    else:
        parts.append(optax.adamw(schedule, b1=stage.momentum, weight_decay=stage.weight_decay, mask=is_kernel))
    return optax.chain(*parts)


def is_kernel(params: Any) -> Any:
    """Per leaf of `params`: whether weight decay acts on it."""

    def kernel(path: Any, leaf: Array) -> bool:
        return leaf.ndim >= 2 and getattr(path[-1], "key", None) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(kernel, params)


def check_record(record: StageConfig | RunConfig, prefix: str) -> None:
    """Raises ValueError for a setting out of range, by the rules of `kdsearch_jax.training.settings`."""
    for setting, known in CHOICES.items():
        if (value := getattr(record, setting, known[0])) not in known:
            raise ValueError(f"{setting}: {value!r} is unknown; {nearest(value, known)}")
    for pattern, (holds, requirement) in RULES.items():
        setting = pattern.removeprefix(prefix)
        value = getattr(record, setting, None) if setting != pattern else None
        if value is not None and not holds(value):
            raise ValueError(f"{setting}: {value!r} is not possible; {requirement}")


def check_stage(stage: StageConfig) -> None:
    """Raises ValueError for a setting of the stage that is out of range."""
    check_record(stage, "*.")
    if stage.warmup >= max(stage.steps, 1):
        raise ValueError(f"warmup: {stage.warmup} is not possible; give fewer updates than steps, {stage.steps}")
