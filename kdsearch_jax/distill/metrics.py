"""Metrics of predictions, per example and jittable; the caller averages over the examples that count."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kdsearch_jax.distill import losses


def top_k(logits: Array, labels: Array, k: int) -> Array:
    """1 where the label is among the k largest logits, else 0.

    Of equal logits the earlier class counts as the larger, as in `argmax`. A prediction with NaN in it is wrong, and so
    is one for a class that does not exist or that the model has masked. With k classes or fewer everything else is
    right.

    Args:
      logits: (…, classes), any floating dtype.
      labels: (…), integer, 0 … classes − 1.
      k: 1 or more.

    Returns:
      (…) float32.

    Raises:
      ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k: {k} is not possible; give at least 1")
    labels = labels[..., None]
    own = jnp.take_along_axis(logits, labels, axis=-1)
    earlier = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) < labels
    ahead = ((logits > own) | ((logits == own) & earlier)).sum(-1)
    broken = jnp.isnan(logits).any(-1) | jnp.isnan(own[..., 0])
    masked = ~jnp.take_along_axis(losses.unmasked(logits), labels, axis=-1)[..., 0]
    return ((ahead < k) & ~broken & ~masked).astype(jnp.float32)


def agreement(student_logits: Array, teacher_logits: Array) -> Array:
    """1 where the most likely class that neither model has masked is the same, else 0.

    Args:
      student_logits, teacher_logits: (…, classes).

    Returns:
      (…) float32.
    """
    kept = losses.unmasked(student_logits, teacher_logits)
    student, teacher = (jnp.where(kept, logits, -jnp.inf).argmax(-1) for logits in (student_logits, teacher_logits))
    return (student == teacher).astype(jnp.float32)


def kl_to_teacher(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(teacher ‖ student) of the predictions as they are, temperature 1, over unmasked classes; in nats.

    Args:
      student_logits, teacher_logits: (…, classes).

    Returns:
      (…) float32.

    Raises:
      ValueError: the shapes differ.
    """
    return losses.kl(student_logits, teacher_logits)
