"""Settings of a training stage and of a run: `Experiment.teacher`, `.search`, `.retrain` and `.run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: how long, with what optimiser.

    steps: optimiser updates; batch_size: images an update, over all devices.
    optimizer: `sgd` (momentum, Nesterov) or `adamw`; weight_decay is λ1 of the objective, on kernels only for adamw.
    schedule: `cosine` to 0, `step` (times `decay` at each of `boundaries`, shares of steps) or `constant`.
    warmup: updates of linear warm-up; clip: largest global gradient norm; ema: decay of averaged weights.
    """

    steps: int = 400
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    boundaries: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    warmup: int = 0
    clip: float | None = None
    ema: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """How a run behaves, whatever it computes.

    precision: of the forward and backward pass (`fp32`, `bf16`); parameters stay fp32. steps_per_dispatch: updates
    compiled into one call. checkpoint_every, evaluate_every: in updates; keep: newest checkpoints kept beside the best.
    checkpoint_share: of the time that checkpoints may take; one that falls due so soon that they would take more is
    left out, though not beyond 10 minutes after the one before; None: none is left out, as where `spike` is given.
    spike: where the loss of a call is so many times its running median, or not finite, training goes back to the last
    checkpoint and on by other batches, at most `rollbacks` times a stage; None: never.
    """

    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    steps_per_dispatch: int = 10
    checkpoint_every: int = 200
    checkpoint_share: float | None = 0.01
    evaluate_every: int = 200
    keep: int = 2
    eval_batch_size: int = 500
    spike: float | None = None
    rollbacks: int = 3


# {setting or *.ending: (what holds, what to give instead)}; None is left alone.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "*.steps": (lambda v: v >= 0, "give 0 or more updates"),
    "*.batch_size": (lambda v: v >= 1, "give at least 1 image"),
    "*.eval_batch_size": (lambda v: v >= 1, "give at least 1 image"),
    "*.learning_rate": (lambda v: v > 0, "give a number above 0"),
    "*.momentum": (lambda v: 0 <= v < 1, "give a number from 0 to below 1"),
    "*.weight_decay": (lambda v: v >= 0, "give a number from 0"),
    "*.boundaries": (
        lambda v: all(0 < b < 1 for b in v) and list(v) == sorted(set(v)),
        "give rising shares of the steps, between 0 and 1",
    ),
    "*.decay": (lambda v: 0 < v <= 1, "give a factor above 0, up to 1"),
    "*.warmup": (lambda v: v >= 0, "give 0 or more updates"),
    "*.clip": (lambda v: v > 0, "give a norm above 0, or None for no clipping"),
    "*.ema": (lambda v: 0 < v < 1, "give a decay between 0 and 1, or None for no average"),
    "run.seed": (lambda v: 0 <= v < 2**32, "give a whole number from 0 to 4294967295"),
    "run.steps_per_dispatch": (lambda v: v >= 1, "give at least 1 update"),
    "run.checkpoint_every": (lambda v: v >= 1, "give at least 1 update"),
    "run.checkpoint_share": (lambda v: 0 < v <= 1, "give a share in (0, 1], or None to leave no checkpoint out"),
    "run.evaluate_every": (lambda v: v >= 1, "give at least 1 update"),
    "run.keep": (lambda v: v >= 1, "give at least 1 checkpoint"),
    "run.spike": (lambda v: v > 1, "give a factor above 1, or None for no going back"),
    "run.rollbacks": (lambda v: v >= 1, "give at least 1"),
}
