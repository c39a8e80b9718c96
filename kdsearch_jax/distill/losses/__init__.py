"""Distillation losses, one value per example: the caller reduces them, once.

With p_T = softmax(teacher / T) and q_T = softmax(student / T),

    forward   KL(p_T ‖ q_T) = Σ_k p_T (log p_T − log q_T)     mode-covering
    reverse   KL(q_T ‖ p_T) = Σ_k q_T (log q_T − log p_T)     mode-seeking

and `distillation` = (1 − c)·T²·KL + c·CE(labels). The factor T² preserves the size of the gradient: the KL's gradient
with respect to the student's logits is (q_T − p_T)/T, which falls as 1/T² for large T (Hinton, Vinyals and Dean 2015,
"Distilling the Knowledge in a Neural Network", section 2.1, arXiv 1503.02531). Their direction, forward, is the
default. "Search for Better Students to Learn Distilled Knowledge" (arXiv 2001.11612) prints its objective as
KL(f_s, f_t), the student first; `direction="reverse"` is the literal reading.

`distill.losses` replaces the KL by others or adds them, each with a weight (`kdsearch_jax.distill.settings.LOSSES`):

    kl, dkd, dist                       of predictions, times T²                                       `predictions`
    at, hint                            of features, position by position                              `maps`
    rkd_distance, rkd_angle, crd        of the last features, one vector per example, in a batch       `batchwise`

`distillation` computes the first row; `kdsearch_jax.distill.distiller` adds the others, which need features. The first
row and the cross-entropy leave out classes that a model has masked (`unmasked`).

Everything is computed in float32, whatever the dtype of the logits. No function here takes a mean over examples. Losses
of a whole batch (correlations, pairs) are divided among its examples, so that their mean is the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kdsearch_jax.distill.losses.batchwise import angles, contrastive, distances, pooled
from kdsearch_jax.distill.losses.maps import attention, hint
from kdsearch_jax.distill.losses.predictions import (
    Direction,
    check,
    cross_entropy,
    decoupled,
    kl,
    relations,
    unmasked,
)
from kdsearch_jax.distill.settings import DistillConfig, loss_weights

__all__ = [
    "Direction",
    "angles",
    "attention",
    "check",
    "contrastive",
    "cross_entropy",
    "decoupled",
    "distances",
    "distillation",
    "hint",
    "kl",
    "pooled",
    "relations",
    "unmasked",
]


def distillation(student_logits: Array, teacher_logits: Array, labels: Array, config: DistillConfig) -> Array:
    """(1 − c)·T²·Σ weight·loss + c·CE, with c = `config.cross_entropy`; the teacher gets no gradient.

    The sum is over those of `config.losses` that compare predictions, by default the KL alone.

    Args:
      student_logits, teacher_logits: (..., classes).
      labels: (...), integer classes; they count where c > 0, and for `dkd`.
      config: temperature, direction, losses and c.

    Returns:
      (...) float32.

    Raises:
      ValueError: as `check`, `kl` and `kdsearch_jax.distill.settings.loss_weights`.
    """
    check(config)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    pair, temperature = (student_logits, teacher_logits), config.temperature
    soft = None
    for name, weight in loss_weights(config.losses).items():
        if name == "kl":
            value = kl(*pair, temperature, config.direction)
        elif name == "dkd":
            value = decoupled(*pair, labels, temperature, beta=config.dkd_beta)
        elif name == "dist":
            value = relations(*pair, temperature)
        else:
            continue
        value = temperature**2 * value if weight == 1 else (temperature**2 * weight) * value
        soft = value if soft is None else soft + value
    soft = jnp.zeros(student_logits.shape[:-1], jnp.float32) if soft is None else soft
    if not config.cross_entropy:
        return soft
    return (1 - config.cross_entropy) * soft + config.cross_entropy * cross_entropy(student_logits, labels)
