"""Losses that compare relations between the examples of a batch: one vector per example, of any length.

An example's value is its share of the batch's loss, so the mean over the batch is the published loss over all pairs or
triplets of different examples. A batch of one has no relations and the loss 0.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdsearch_jax.distill.losses.learned import Linear, linear


def pooled(features: Array) -> Array:
    """(batch, channels) in float32: means over positions."""
    return features.astype(jnp.float32).mean(range(1, features.ndim - 1))


def distances(student: Array, teacher: Array) -> Array:
    """RKD by distances: compares the distances between examples.

    With ψ_ij = ‖x_i − x_j‖ over its mean over all pairs, the mean over j ≠ i of huber(ψ_s − ψ_t) is example i's. Zero
    if the student's vectors are the teacher's, translated, rotated, reflected or scaled. Memory: batch²·size.

    Park, Kim, Lu and Cho 2019, "Relational Knowledge Distillation", equations 4 to 8, arXiv 1904.05068; their weight
    is 25.

    Args:
      student, teacher: (batch, size); sizes may differ.

    Returns:
      (batch,) float32.
    """

    def relative(x: Array) -> Array:
        lengths, count = _lengths(_differences(x)), len(x)
        mean = lengths.sum() / max(count * (count - 1), 1)
        return lengths / jnp.where(mean > 0, mean, 1.0)

    each = optax.losses.huber_loss(relative(student), relative(teacher))  # the diagonal is 0 in both
    return each.sum(1) / max(len(student) - 1, 1)


def angles(student: Array, teacher: Array) -> Array:
    """RKD by angles: compares the angles that any three examples form.

    With cos_ijk the cosine of the angle at j between i and k, the mean over i ≠ j ≠ k ≠ i of huber(cos_s − cos_t) is
    example j's. Zero if `distances` is. Memory: batch³.

    Park, Kim, Lu and Cho 2019, "Relational Knowledge Distillation", equations 9 and 10, arXiv 1904.05068; their weight
    is 50, twice that of the distances.

    Args:
      student, teacher: (batch, size); sizes may differ.

    Returns:
      (batch,) float32.
    """

    def cosines(x: Array) -> Array:
        differences = _differences(x)  # [j, i] = x_i − x_j
        lengths = _lengths(differences)[..., None]
        unit = differences / jnp.where(lengths > 0, lengths, 1.0)
        return jnp.einsum("jid,jkd->jik", unit, unit)

    count = len(student)
    each = optax.losses.huber_loss(cosines(student), cosines(teacher))
    each = jnp.where(jnp.eye(count, dtype=bool)[None], 0.0, each)  # i = k; where i or k is j both cosines are 0
    return each.sum((1, 2)) / max((count - 1) * (count - 2), 1)


def contrastive(
    student: Array, teacher: Array, student_head: Linear, teacher_head: Linear, temperature: float = 0.07
) -> Array:
    """CRD: the student's vector must identify the teacher's vector of the same example among the batch, and vice versa.

    With s and t the vectors through learned linear heads at unit length, N = batch − 1 and
    h_ij = e/(e + N·c), e = exp(s_i·t_j/τ), example i has

        −2·log h_ii − Σ_{j≠i} log(1 − h_ij) − Σ_{j≠i} log(1 − h_ji)

    Negatives are the rest of the batch, whatever their labels, so the loss is a pure function of the batch. The paper
    draws negatives from a memory of all examples, which is state that every step changes. c normalises e; the authors'
    code estimates it as the mean of e in the first batch, here it is that of each batch, without gradient. The loss
    does not reach 0: it is a bound on mutual information.

    Tian, Krishnan and Isola 2020, "Contrastive Representation Distillation", equations 10 and 19, arXiv 1910.10699;
    their weight is 0.8 and τ 0.07 in the code (0.1 in the paper).

    Args:
      student, teacher: (batch, size); sizes may differ.
      student_head, teacher_head: from these sizes to a common one.
      temperature: τ > 0.

    Returns:
      (batch,) float32, in nats.
    """
    left, right = (_unit(linear(head, x)) for head, x in ((student_head, student), (teacher_head, teacher)))
    scores, count = left @ right.T / temperature, len(student)
    normaliser = jax.lax.stop_gradient(jax.nn.logsumexp(scores)) - 2 * math.log(count)
    odds = scores - normaliser - math.log(max(count - 1, 1))
    positive = jax.nn.log_sigmoid(jnp.diagonal(odds))
    negative = jnp.where(jnp.eye(count, dtype=bool), 0.0, jax.nn.log_sigmoid(-odds))
    return -(2 * positive + negative.sum(1) + negative.sum(0))


def _differences(x: Array) -> Array:
    """[j, i] = x_i − x_j, (batch, batch, size) in float32."""
    x = x.astype(jnp.float32)
    return x[None] - x[:, None]


def _lengths(x: Array) -> Array:
    """‖x‖₂ over the last axis, with gradient 0 at 0, where it has none."""
    squares = jnp.square(x).sum(-1)
    apart = squares > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-20)
