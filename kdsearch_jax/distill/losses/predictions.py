"""Losses that compare predictions: softened probabilities of teacher and student, from their logits.

Classes that a model has masked (-inf, -1e9, the smallest float and the like) are left out of each loss, which then has
finite gradients and equals the loss on the other classes; see `unmasked`. NaN is not a mask.

The factor T² is not included; `kdsearch_jax.distill.losses.distillation` applies it to all losses.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.tracing.messages import nearest

Direction = Literal["forward", "reverse"]


def unmasked(*logits: Array) -> Array:
    """Which classes no model has masked.

    A class is masked if its logit is 1e8 or more below the largest of its example in any of the arrays, or 5e3 or more
    below it in all of several arrays (such as -1e4, whose probability is zero in all of them).

    Args:
      logits: (..., classes) each, of one shape.

    Returns:
      (..., classes) bool.
    """
    below = jnp.stack([_below_largest(each) for each in logits])
    masked = (below <= -_MASK).any(0)
    return ~(masked | (below <= -_MASK_OF_ALL).all(0)) if len(logits) > 1 else ~masked


def cross_entropy(logits: Array, labels: Array) -> Array:
    """−log softmax(logits)[label]; 0 if the model has masked the label.

    Args:
      logits: (..., classes), any floating dtype.
      labels: (...), integer classes.

    Returns:
      (...) float32, in nats.
    """
    kept = unmasked(logits)
    found = optax.losses.softmax_cross_entropy_with_integer_labels(_filled(logits, kept), labels)
    return jnp.where(jnp.take_along_axis(kept, labels[..., None], axis=-1)[..., 0], found, 0.0)


def kl(
    student_logits: Array, teacher_logits: Array, temperature: float = 1.0, direction: Direction = "forward"
) -> Array:
    """The Kullback-Leibler divergence of the softened predictions; zero if logits differ by a shift only.

    Args:
      student_logits, teacher_logits: (..., classes).
      temperature: T > 0 that divides both; 1 compares the predictions themselves.
      direction: "forward" is KL(teacher ‖ student), "reverse" is KL(student ‖ teacher).

    Returns:
      (...) float32, in nats, without the factor T².

    Raises:
      ValueError: temperature or direction out of range, or the numbers of classes differ.
    """
    check(DistillConfig(temperature=temperature, direction=direction))
    student, teacher, _ = _softened(student_logits, teacher_logits, temperature)
    prediction, target = (student, teacher) if direction == "forward" else (teacher, student)
    return optax.losses.kl_divergence_with_log_targets(prediction, target)


def decoupled(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Array:
    """α·TCKD + β·NCKD: the two parts of the forward KL, the second without the teacher's confidence as a factor.

    With p the teacher's probability of the label, TCKD is the KL of (p, 1 − p), NCKD the KL of the conditional
    distributions over the other classes, and KL = TCKD + (1 − p)·NCKD.

    Zhao, Cui, Song, Qiu and Liang 2022, "Decoupled Knowledge Distillation", equations 6 and 7, arXiv 2203.08679; α = 1
    throughout, β from 0.5 (ImageNet) to 8 or more (CIFAR-100), larger for more confident teachers.

    Args:
      student_logits, teacher_logits: (..., classes).
      labels: (...), integer classes.
      temperature: T > 0 that divides the logits.
      alpha, beta: weights of the two parts.

    Returns:
      (...) float32, in nats, without the factor T².

    Raises:
      ValueError: the numbers of classes differ.
    """
    student, teacher, _ = _softened(student_logits, teacher_logits, temperature)
    own = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)

    def split(logs: Array) -> tuple[Array, Array, Array]:
        """Logarithms of the label's probability, of all others' together, and of each within these."""
        others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logs), axis=-1)
        return jnp.where(own, logs, 0.0).sum(-1), others, jnp.where(own, 0.0, logs - others[..., None])

    label, rest, within = split(student)
    label_t, rest_t, within_t = split(teacher)
    target = jnp.exp(label_t) * (label_t - label) + jnp.exp(rest_t) * (rest_t - rest)
    other = jnp.where(own, 0.0, jnp.exp(within_t) * (within_t - within)).sum(-1)
    return alpha * target + beta * other


def relations(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
    """DIST: 1 − Pearson's correlation of the softened predictions, over the classes and over the examples.

    inter: 1 − correlation of an example's probabilities with the teacher's, over classes;
    intra: 1 − correlation of a class's probabilities with the teacher's, over the batch, mean over classes.

    The first has a value for each example. The second is a sum over the batch: with a and b the centred columns at unit
    length, 1 − a·b = Σ_i ½(a_i − b_i)², so example i has its term times the number of examples, and the batch's mean is
    the published loss. A constant vector, which has no correlation, counts as zero. Both weights are 1.

    Huang, You, Wang, Qian and Xu 2022, "Knowledge Distillation from A Stronger Teacher", equations 8 to 10, arXiv
    2205.10536.

    Args:
      student_logits, teacher_logits: (..., classes); all leading axes count as examples, as in the authors' code for
        segmentation.
      temperature: T > 0 that divides the logits.

    Returns:
      (...) float32, inter + intra, without the factor T².

    Raises:
      ValueError: the numbers of classes differ.
    """
    *both, kept = _softened(student_logits, teacher_logits, temperature)
    kept = kept.reshape(-1, kept.shape[-1])
    student, teacher = (jnp.exp(logs).reshape(kept.shape) for logs in both)
    inter = 0.5 * jnp.square(_standard(student, kept, 1) - _standard(teacher, kept, 1)).sum(1)
    intra = 0.5 * jnp.square(_standard(student, kept, 0) - _standard(teacher, kept, 0)).sum(1) * len(student)
    intra = intra / jnp.maximum(kept.any(0).sum(), 1)
    return (inter + intra).reshape(student_logits.shape[:-1])


def check(config: DistillConfig) -> None:
    """Raises ValueError if a setting is out of range."""
    if not 0 < config.temperature < math.inf:
        raise ValueError(
            f"temperature must be above 0 and finite, not {config.temperature!r}; 1 does not change the predictions"
        )
    if not 0 <= config.cross_entropy <= 1:
        raise ValueError(f"cross_entropy is a share and must lie in [0, 1], not {config.cross_entropy!r}")
    if config.direction not in get_args(Direction):
        raise ValueError(
            f"direction: {config.direction!r} is unknown; {nearest(config.direction, get_args(Direction))}"
        )


def _softened(student_logits: Array, teacher_logits: Array, temperature: float) -> tuple[Array, Array, Array]:
    """(log-probabilities of student and teacher over the unmasked classes in float32, which classes these are)."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {student_logits.shape} and teacher_logits {teacher_logits.shape} must have one shape; "
            "if the last axis differs, teacher and student have different numbers of classes"
        )
    kept = unmasked(student_logits, teacher_logits)
    student, teacher = (
        jax.nn.log_softmax(_filled(logits, kept, temperature)) for logits in (student_logits, teacher_logits)
    )
    return student, teacher, kept


_MASK, _MASK_OF_ALL = 1e8, 5e3  # below the largest logit
_FILL = -1e9  # for masked classes: of probability zero, finite, and the same in teacher and student


def _below_largest(logits: Array) -> Array:
    """logits − their maximum over the classes, in float32; -inf for all where all are."""
    logits = logits.astype(jnp.float32)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return logits - jnp.where(largest == -jnp.inf, 0.0, largest)


def _filled(logits: Array, kept: Array, temperature: float = 1.0) -> Array:
    """The logits over the temperature up to a shift, with masked ones replaced."""
    return jnp.where(kept, _below_largest(logits) / temperature, _FILL)


_FLAT = 1e-14  # squared length below which the variation of probabilities is rounding


def _standard(values: Array, kept: Array, axis: int) -> Array:
    """The kept values, centred and of unit length along an axis; zero if they are constant."""
    mean = jnp.where(kept, values, 0.0).sum(axis, keepdims=True) / jnp.maximum(kept.sum(axis, keepdims=True), 1)
    centred = jnp.where(kept, values - mean, 0.0)
    return centred * jax.lax.rsqrt(jnp.square(centred).sum(axis, keepdims=True) + _FLAT)
