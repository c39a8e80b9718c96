"""Losses that compare features position by position: activations (batch, …positions, channels) of a layer.

Teacher and student must have the same positions; their numbers of channels may differ.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kdsearch_jax.distill.losses.learned import Linear, linear


def attention(student: Array, teacher: Array) -> Array:
    """Attention transfer: compares where a layer is active, summed over channels.

    With Q = Σ_c a_c² at every position and q = Q/‖Q‖₂, the mean over positions of (q_s − q_t)². The paper prints the
    distance ‖q_s − q_t‖ itself, whose gradient has no limit where the two agree; its authors' code has this square, and
    the weight of 1000 that goes with it. Zero if the features agree up to a factor per example.

    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", equation 2, arXiv 1612.03928.

    Args:
      student, teacher: (batch, …positions, channels); numbers of channels may differ.

    Returns:
      (batch,) float32.

    Raises:
      ValueError: the positions differ, or there are none.
    """
    _check_positions(student, teacher)
    if student.ndim < 3:
        raise ValueError(f"attention: features {student.shape} have no positions; choose a layer (batch, …, channels)")
    return jnp.square(_map(student) - _map(teacher)).mean(1)


def hint(student: Array, teacher: Array, projection: Linear) -> Array:
    """Hints: the mean over positions and channels of (r(a_s) − a_t)², with r linear in the channels and learned.

    r is a 1×1 convolution, from the student's channels to the teacher's, and belongs to training alone.

    Romero, Ballas, Kahou, Chassang, Gatta and Bengio 2015, "FitNets: Hints for Thin Deep Nets", equation 3, arXiv
    1412.6550, whose r is a larger convolution that makes up for different resolutions.

    Args:
      student: (batch, …positions, channels); teacher: (batch, …positions, its channels).
      projection: from the student's channels to the teacher's.

    Returns:
      (batch,) float32.

    Raises:
      ValueError: the positions differ.
    """
    _check_positions(student, teacher)
    difference = linear(projection, student.astype(jnp.float32)) - teacher.astype(jnp.float32)
    return jnp.square(difference).mean(range(1, difference.ndim))


def _map(features: Array) -> Array:
    """(batch, positions): squared activations, of unit length; zeros stay zeros."""
    energy = jnp.square(features.astype(jnp.float32)).mean(-1).reshape(len(features), -1)
    return energy * jax.lax.rsqrt(jnp.square(energy).sum(1, keepdims=True) + 1e-20)


def _check_positions(student: Array, teacher: Array) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"features: {student.shape} of the student and {teacher.shape} of the teacher must agree except for the "
            "last axis, that of channels; choose another layer"
        )
