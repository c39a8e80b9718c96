"""Settings of the training stages and of the run: `Experiment.teacher`, `.search`, `.retrain` and `.run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StageConfig:
    """Length and optimiser of a training stage.

    steps: number of updates; batch_size: examples per update, over all devices.
    optimizer: `sgd` (Nesterov momentum) or `adamw`; weight_decay: λ1 of the objective, applied to kernels only.
    schedule: `cosine` to 0, `step` (multiply by `decay` at each of `boundaries`, fractions of steps) or `constant`.
    warmup: updates of linear warm-up; clip: maximum global gradient norm; ema: decay of the averaged weights.
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
    """Settings that all stages of a run share.

    precision: of the forward and backward pass (`fp32`, `bf16`); parameters stay fp32. steps_per_dispatch: updates
    compiled into a call. checkpoint_every, evaluate_every: in updates; keep: newest checkpoints kept besides the best.
    checkpoint_share: fraction of the time that checkpoints may take; one that would exceed it is skipped, but never for
    more than 10 minutes. None skips no checkpoint, as does `spike`.
    spike: if the loss of a call exceeds this multiple of its running median, or is not finite, training goes back to
    the last checkpoint and on with other batches, at most `rollbacks` times per stage; None disables this.
    shard: `fsdp` divides parameters, optimiser state, averages and the teacher among all devices, each array along its
    largest axis that their number divides; None: every device holds all of them. The results are the same.
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
    shard: Literal["fsdp"] | None = None


# {setting or *.suffix: (condition, what to give instead)}; None is not checked.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "*.steps": (lambda v: v >= 0, "give 0 or more updates"),
    "*.batch_size": (lambda v: v >= 1, "give at least 1 image"),
    "*.eval_batch_size": (lambda v: v >= 1, "give at least 1 image"),
    "*.learning_rate": (lambda v: v > 0, "give a number above 0"),
    "*.momentum": (lambda v: 0 <= v < 1, "give a number from 0 up to, but not including, 1"),
    "*.weight_decay": (lambda v: v >= 0, "give 0 or a positive number"),
    "*.boundaries": (
        lambda v: all(0 < b < 1 for b in v) and list(v) == sorted(set(v)),
        "give increasing fractions of the steps, between 0 and 1",
    ),
    "*.decay": (lambda v: 0 < v <= 1, "give a factor above 0 and at most 1"),
    "*.warmup": (lambda v: v >= 0, "give 0 or more updates"),
    "*.clip": (lambda v: v > 0, "give a norm above 0, or None not to clip"),
    "*.ema": (lambda v: 0 < v < 1, "give a decay between 0 and 1, or None not to average"),
    "run.seed": (lambda v: 0 <= v < 2**32, "give an integer from 0 to 4294967295"),
    "run.steps_per_dispatch": (lambda v: v >= 1, "give at least 1 update"),
    "run.checkpoint_every": (lambda v: v >= 1, "give at least 1 update"),
    "run.checkpoint_share": (lambda v: 0 < v <= 1, "give a fraction in (0, 1], or None to skip no checkpoint"),
    "run.evaluate_every": (lambda v: v >= 1, "give at least 1 update"),
    "run.keep": (lambda v: v >= 1, "give at least 1 checkpoint"),
    "run.spike": (lambda v: v > 1, "give a factor above 1, or None never to roll back"),
    "run.rollbacks": (lambda v: v >= 1, "give at least 1"),
}
