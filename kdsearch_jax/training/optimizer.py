"""The optimiser of a training stage: schedule, weight decay, and the checks of its settings."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax import Array

from kdsearch_jax.tracing.messages import nearest
from kdsearch_jax.training.settings import RULES, RunConfig, StageConfig

CHOICES = {"optimizer": ("sgd", "adamw"), "schedule": ("cosine", "step", "constant"), "precision": ("fp32", "bf16")}


def make_schedule(stage: StageConfig) -> optax.Schedule:
    """The learning rate by update: linear warm-up to `learning_rate` at update `warmup` − 1, then the schedule.

    `cosine` reaches 0 after the last update; `step` multiplies the rate by `decay` at each of `boundaries` (fractions
    of `steps`); `constant` keeps it.

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
    """The optimiser of a stage: clips the global norm, adds weight decay, and steps at the scheduled rate.

    Weight decay applies to kernels only: leaves with two or more axes that are not named `bias` or `scale`. For `sgd`
    it is part of the gradient, before Nesterov momentum; for `adamw` it is decoupled (Loshchilov and Hutter 2019).

    Raises:
      ValueError: a setting is out of range.
    """
    schedule, parts = make_schedule(stage), []
    if stage.clip is not None:
        parts.append(optax.clip_by_global_norm(stage.clip))
    if stage.optimizer == "sgd":
        parts.append(optax.add_decayed_weights(stage.weight_decay, mask=weight_decay_mask))
        parts.append(optax.sgd(schedule, stage.momentum, nesterov=stage.momentum > 0))
    else:
        parts.append(optax.adamw(schedule, b1=stage.momentum, weight_decay=stage.weight_decay, mask=weight_decay_mask))
    return optax.chain(*parts)


def weight_decay_mask(params: Any) -> Any:
    """Whether weight decay applies, for each leaf of `params`."""

    def is_kernel(path: Any, leaf: Array) -> bool:
        return leaf.ndim >= 2 and getattr(path[-1], "key", None) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def check_settings(config: StageConfig | RunConfig, prefix: str) -> None:
    """Raises ValueError for a setting that violates the rules in `kdsearch_jax.training.settings`.

    Args:
      config: the settings.
      prefix: of the rules that apply: "*." for a stage, "run." for the run.
    """
    for setting, known in CHOICES.items():
        if (value := getattr(config, setting, known[0])) not in known:
            raise ValueError(f"{setting}: {value!r} is unknown; {nearest(value, known)}")
    for pattern, (holds, requirement) in RULES.items():
        setting = pattern.removeprefix(prefix)
        value = getattr(config, setting, None) if setting != pattern else None
        if value is not None and not holds(value):
            raise ValueError(f"{setting}: {value!r} is invalid; {requirement}")


def check_stage(stage: StageConfig) -> None:
    """Raises ValueError for a setting of the stage that is out of range."""
    check_settings(stage, "*.")
    if stage.warmup >= max(stage.steps, 1):
        raise ValueError(f"warmup: {stage.warmup} is invalid; give fewer updates than steps, {stage.steps}")
