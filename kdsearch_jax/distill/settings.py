"""Settings of distillation: `Experiment.distill`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kdsearch_jax.tracing.messages import nearest, require


@dataclass(frozen=True)
class DistillConfig:
    """loss = (1 − cross_entropy)·Σ weight·loss + cross_entropy·CE, over `losses`; see `kdsearch_jax.distill.losses`.

    losses: `name` or `name:weight` each. Of predictions, times T²: kl (in `direction`), dkd (decoupled KL, by
    `dkd_beta`), dist. Of features: at (usual weight 1000), hint (100), rkd_distance (25), rkd_angle (50), crd (0.8).
    retrain_losses: those of retraining, if they differ from the search's.
    features: layers whose outputs are compared, as paths or patterns (fnmatch); by default the last of each resolution.
    teachers: additional teachers, each as in `teacher_from`. The student learns from the mean of their softened
    probabilities, or of their logits (`ensemble`). cache: compute teachers' outputs once, if data are not augmented and
    no features are compared; in a comparison, a single teacher's also if they are augmented.

    loss: `package.module:function` of (student's outputs, teacher's outputs, batch) that replaces all of the above;
    metrics: one of (outputs, batch), for the results table. logits: outputs compared by KL, as paths or patterns
    (fnmatch); class logits with labels are recognised, other outputs are compared by squared error. See
    `kdsearch_jax.distill.objective`.
    """

    temperature: float = 4.0
    direction: Literal["forward", "reverse"] = "forward"
    cross_entropy: float = 0.0
    losses: tuple[str, ...] = ("kl",)
    retrain_losses: tuple[str, ...] = ()
    dkd_beta: float = 8.0
    features: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    ensemble: Literal["probabilities", "logits"] = "probabilities"
    cache: bool = True
    loss: str | None = None
    metrics: str | None = None
    logits: tuple[str, ...] = ()


LOSSES = ("kl", "dkd", "dist", "at", "hint", "rkd_distance", "rkd_angle", "crd")


def loss_weights(losses: Iterable[str], setting: str = "distill.losses") -> dict[str, float]:
    """{name: weight} of `name` and `name:weight`; a name alone has weight 1.

    Raises ValueError for an empty list, an unknown loss (with the nearest known one), a loss given twice, or a weight
    that is not a number above 0.
    """
    weights: dict[str, float] = {}
    for item in losses:
        name, colon, text = item.partition(":")
        if name not in LOSSES:
            raise ValueError(f"{setting}: {name!r} is no loss; {nearest(name, LOSSES)}")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = math.nan
        require(0 < weight < math.inf, setting, item, f"give a weight above 0, as in {name}:0.5")
        require(name not in weights, setting, item, f"{name} is there twice; name each loss once")
        weights[name] = weight
    require(bool(weights), setting, tuple(losses), "name at least one loss, as in kl")
    return weights


# {setting or *.ending: (what holds, what to give instead)}; None is left alone.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "distill.temperature": (lambda v: v > 0, "give a number above 0"),
    "distill.cross_entropy": (lambda v: 0 <= v <= 1, "give a share of the loss from 0 to 1"),
    "distill.dkd_beta": (lambda v: v >= 0, "give a number from 0"),
}
