"""Proximal operators, and the accelerated proximal L1 step as one optax transformation.

    z ← S(g − η ∇, η γ),   v ← z − g + μ v,   g ← max(0, z + μ v),      S(x, t) = sign(x) max(|x| − t, 0)

with step size η, momentum μ and penalty γ = λ2 α_j per gate (the accelerated form that Huang & Wang, Sparse Structure
Selection, ECCV 2018, use for scaling factors). A chain of momentum and shrinkage is not equivalent: heavy-ball momentum
carries a coordinate past the zero that the shrinkage set, so zeros are rare and wrong. Step size, shrinkage and
extrapolation have to be in one transformation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def soft_threshold(x: jax.Array, threshold: ArrayLike) -> jax.Array:
    """prox of threshold·‖x‖₁: argmin_y ½‖y − x‖² + threshold·‖y‖₁, elementwise; threshold ≥ 0."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0.0)


class ProximalState(NamedTuple):
    """count: () int32, updates done; velocity: v, a pytree like the parameters."""

    count: jax.Array
    velocity: Any


def accelerated_proximal_l1(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, *, nonnegative: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The accelerated proximal L1 step of the module's docstring, as an optax transformation.

    Its `update(gradients, state, params, *, penalty)` takes γ as a pytree like `params`, or a scalar. The penalty is an
    argument because the controller of the search changes it.

    Zeros are exact: the update is `new − old`, and `old + (0 − old)` is 0 in floating point. With `nonnegative`, a gate
    with shrinkage z = 0 becomes 0 at once: starting from v = 0, μ v ≤ g always holds, so v = −g + μ v ≤ 0.

    Args:
      learning_rate: η ≥ 0, or a schedule of it.
      momentum: μ in [0, 1).
      nonnegative: applies the maximum with 0.

    Raises:
      ValueError: momentum or learning rate is out of range; or, in `update`, params or penalty are missing.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: {momentum} must be in [0, 1)")
    if not callable(learning_rate) and learning_rate < 0:
        raise ValueError(f"learning_rate: {learning_rate} must not be negative")

    def init(params: Any) -> ProximalState:
        return ProximalState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: Any, params: Any = None, *, penalty: Any = None, **_: Any) -> Any:
        if params is None or penalty is None:
            raise ValueError(
                "accelerated_proximal_l1: update needs params and penalty=γ (a pytree like params, or a scalar)"
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        if jax.tree.structure(penalty) != jax.tree.structure(params):
            penalty = jax.tree.map(lambda _: penalty, params)

        def step(g: jax.Array, gradient: jax.Array, v: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = soft_threshold(g - rate * gradient, rate * gamma)
            v = z - g + momentum * v
            new = z + momentum * v
            new = jnp.maximum(new, 0.0) if nonnegative else new
            return (new - g).astype(g.dtype), v.astype(g.dtype)

        both = jax.tree.map(step, params, gradients, state.velocity, penalty)
        updates, velocity = _unzip(both, params)
        return updates, ProximalState(state.count + 1, velocity)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _unzip(pairs: Any, like: Any) -> tuple[Any, Any]:
    return jax.tree.transpose(jax.tree.structure(like), jax.tree.structure((0, 0)), pairs)
