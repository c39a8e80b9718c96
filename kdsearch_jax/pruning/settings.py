"""Settings of the budget and the gates: `Experiment.budget` and `.gates`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from kdsearch_jax.tracing.kinds import KINDS

BOUNDS = ("macs", "params", "latency", "memory")


@dataclass(frozen=True)
class BudgetConfig:
    """What the student may cost: up to 1 a fraction of the teacher's cost, above 1 an absolute number; None: no bound.

    Attributes:
      macs: multiply-accumulates of one example. params: trainable parameters.
      latency: milliseconds of a call with `batch_size` examples. memory: bytes that such a call takes. Both are
        measured on the current device, in inference mode and float32 (`kdsearch_jax.evaluate`).
      round_to: widths are multiples of this number; `hardware`: of numbers that this device does not pad
        (`kdsearch_jax.pruning.hardware`).
      batch_size: examples of a call for latency and memory.
      target: a TPU slice that is not here, such as `tpu:v5e:1x1`: latency, memory and the multiples of `hardware` are
        those that its compiler estimates, in bfloat16 (docs/tpu.md). None: this device.
    """

    macs: float | None = 0.5
    params: float | None = None
    round_to: int | Literal["hardware"] = 1
    latency: float | None = None
    memory: float | None = None
    batch_size: int = 64
    target: str | None = None


@dataclass(frozen=True)
class GatesConfig:
    """Which structures may be removed, and how the proximal search treats their gates.

    Attributes:
      kinds: of `channels`, `neurons`, `heads`, `queries`, `values`, `width`, `groups`, `branches`.
      include, exclude: patterns (fnmatch) of group names.
      penalty: α_j, see `kdsearch_jax.pruning.control`. sharpness: exponent of α_j for `importance`.
      learning_rate, momentum: of the proximal step. importance_decay: of the running mean of importances.
      ramp: share of the steps over which the cost falls to the budget. warmup: share of the ramp in which nothing is
        removed and importances are measured.
      lambda2: a fixed λ2, instead of the closed loop that follows the budget.
      init: gates start at 1 (`one`), or at the norm of the kernel slices that they scale, 1 on average, by which the
        slices are divided (`norm`). Either way the gated network starts as the teacher.
      batch_norm: during the search BatchNorm uses batch statistics and is trained (`train`), or uses the teacher's
        statistics (`frozen`); then the whole network runs in inference mode, without dropout.
      shrink: if the cost of the remaining units is less than this share of the computed MACs, the search continues
        without the removed units (`kdsearch_jax.distill.shrinking`). None: never.
    """

    kinds: tuple[str, ...] = KINDS
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    penalty: Literal["importance", "macs", "params", "one"] = "importance"
    learning_rate: float = 0.01
    momentum: float = 0.9
    importance_decay: float = 0.97
    sharpness: float = 8.0
    ramp: float = 0.5
    warmup: float = 0.05
    lambda2: float | None = None
    init: Literal["one", "norm"] = "one"
    batch_norm: Literal["train", "frozen"] = "train"
    shrink: float | None = None


def _amount(value: float) -> bool:
    return 0 < value <= 1 or (value > 1 and float(value).is_integer())


_AMOUNT = "give a fraction of the teacher's in (0, 1], or a whole number above 1 for an absolute bound"
_KINDS = GatesConfig().kinds

# {setting: (condition, what to give instead)}; None is always allowed.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gates.warmup": (lambda v: 0 <= v < 1, "give a share of the ramp from 0 to below 1"),
    "gates.kinds": (
        lambda v: bool(v) and set(v) <= set(_KINDS) and len(set(v)) == len(v),
        f"give some of {', '.join(_KINDS)}, each once",
    ),
    "gates.include": (bool, "give at least one pattern; '*' is every group"),
    "gates.importance_decay": (lambda v: 0 <= v < 1, "give a number from 0 to below 1"),
    "gates.sharpness": (lambda v: v > 0, "give a number above 0"),
    "gates.ramp": (lambda v: 0 < v <= 1, "give a share of the steps above 0, up to 1"),
    "gates.lambda2": (lambda v: v >= 0, "give a number from 0, or None for the closed loop"),
    "gates.shrink": (lambda v: 0 <= v < 1, "give a share of the MACs from 0 to below 1, or None"),
    "budget.macs": (_amount, _AMOUNT),
    "budget.params": (_amount, _AMOUNT),
    "budget.latency": (lambda v: v > 0, "give a fraction of the teacher's in (0, 1], or milliseconds above 1"),
    "budget.memory": (_amount, "give a fraction of the teacher's in (0, 1], or a whole number of bytes above 1"),
    "budget.round_to": (lambda v: v == "hardware" or v >= 1, "give at least 1, or hardware"),
}
