"""Distillation losses, one value per example: the caller reduces them, once.

With p_T = softmax(teacher / T) and q_T = softmax(student / T),

    forward   KL(p_T ‖ q_T) = Σ_k p_T (log p_T − log q_T)     the student must cover all that the teacher holds possible
    reverse   KL(q_T ‖ p_T) = Σ_k q_T (log q_T − log p_T)     the student must stay where the teacher holds it possible

and `distillation` = (1 − c)·T²·KL + c·CE(labels). The factor T² keeps the size of the gradient: the KL's gradient with
respect to the student's logits is (q_T − p_T)/T, which falls as 1/T² for large T (Hinton, Vinyals and Dean 2015,
"Distilling the Knowledge in a Neural Network", section 2.1, arXiv 1503.02531), whose forward direction is the default.
The objective of "Search for Better Students to Learn Distilled Knowledge" (arXiv 2001.11612) is printed as
KL(f_s, f_t), the student first, without saying more; `direction="reverse"` is its literal reading.

Everything is computed in float32 whatever the dtype of the logits. Nothing here takes a mean or knows about a batch.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdsearch_jax.config import DistillConfig, nearest

Direction = Literal["forward", "reverse"]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """−log softmax(logits)[label].

    Args:
      logits: (..., classes), any floating dtype.
      labels: (...), integer classes.

    Returns:
      (...) float32, in nats.
    """
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def kl(
    student_logits: Array, teacher_logits: Array, temperature: float = 1.0, direction: Direction = "forward"
) -> Array:
    """The Kullback-Leibler divergence of the two softened predictions; zero where logits differ by a shift only.

    Args:
      student_logits, teacher_logits: (..., classes).
      temperature: T > 0 that divides both; 1 compares the predictions themselves.
      direction: "forward" is KL(teacher ‖ student), "reverse" is KL(student ‖ teacher).

    Returns:
      (...) float32, in nats, without the factor T².

    Raises:
      ValueError: temperature or direction out of range; another number of classes in teacher and student.
    """
    check(DistillConfig(temperature=temperature, direction=direction))
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {student_logits.shape} and teacher_logits {teacher_logits.shape} must have one shape; "
            "another last number means that teacher and student tell apart another number of classes"
        )
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    prediction, target = (student, teacher) if direction == "forward" else (teacher, student)
    return optax.losses.kl_divergence_with_log_targets(prediction, target)


def distillation(student_logits: Array, teacher_logits: Array, labels: Array, config: DistillConfig) -> Array:
    """(1 − c)·T²·KL + c·CE, with c = `config.cross_entropy`; the teacher gets no gradient.

    Args:
      student_logits, teacher_logits: (..., classes).
      labels: (...), integer classes; they count where c > 0.
      config: temperature, direction and c.

    Returns:
      (...) float32.

    Raises:
      ValueError: as `check` and `kl`.
    """
    check(config)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    soft = config.temperature**2 * kl(student_logits, teacher_logits, config.temperature, config.direction)
    if not config.cross_entropy:
        return soft
    return (1 - config.cross_entropy) * soft + config.cross_entropy * cross_entropy(student_logits, labels)


def check(config: DistillConfig) -> None:
    """Raises ValueError where a setting is out of its range: argument, value, way out."""
    if not 0 < config.temperature < math.inf:
        raise ValueError(
            f"temperature must be above 0 and finite, not {config.temperature!r}; 1 leaves the predictions as they are"
        )
    if not 0 <= config.cross_entropy <= 1:
        raise ValueError(f"cross_entropy is a share and must lie in [0, 1], not {config.cross_entropy!r}")
    if config.direction not in get_args(Direction):
        raise ValueError(
            f"direction: {config.direction!r} is unknown; {nearest(config.direction, get_args(Direction))}"
        )
