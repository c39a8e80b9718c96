"""The training state, and what one update does to it.

A `Step` is a pure function (state, batch, key, constants) → (state, metrics); `kdsearch_jax.distill` has those for
labels, for distillation and for the search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.core import unfreeze
from jax import Array

Batch = dict[str, Any]  # {entry: pytree of arrays (batch, …)}; images are normalised
Metrics = dict[str, Array]  # scalars, one of them "loss"


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes and checkpoints contain.

    Attributes:
      step: int32 scalar, updates done.
      params: the trained parameters, float32 whatever the precision of the computation.
      model_state: the module's other collections, {"batch_stats": …}; {} if it has none.
      opt_state: the optimiser's state.
      ema: averaged {"params": …, **model_state}, or None.
      extra: whatever else a `Step` or `between` carries along, such as maps that a loss learns; or None.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any = None
    extra: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to evaluate and keep: the averaged ones if there are any, otherwise the current ones."""
        return {"params": self.params, **self.model_state} if self.ema is None else self.ema


Step = Callable[[TrainState, Batch, Array, Any], tuple[TrainState, Metrics]]


def create_state(
    variables: Any, tx: optax.GradientTransformation, *, ema: float | None = None, extra: Any = None
) -> TrainState:
    """The initial state for a network's `variables`, {"params": …, "batch_stats": …}."""
    model_state = {name: leaves for name, leaves in unfreeze(variables).items() if name != "params" and leaves}
    params = unfreeze(variables)["params"]
    average = None if ema is None else {"params": params, **model_state}
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params), average, extra)


def update(
    state: TrainState, gradient: Any, model_state: Any, tx: optax.GradientTransformation, ema: float | None
) -> TrainState:
    """Applies the gradient of the parameters; `extra` is unchanged.

    Args:
      model_state: the new one.
      ema: decay of the averaged variables, or None.
    """
    average = state.ema
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if ema is not None:
            average = update_average(state.ema, {"params": params, **model_state}, ema, state.step)
    return state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=average)


def update_average(average: Any, variables: Any, decay: float, step: Array) -> Any:
    """a ← d·a + (1 − d)·v with d = min(decay, (1 + step)/(10 + step)), so that the first values are soon forgotten.

    Statistics are averaged like parameters; leaves that are not floating point are copied.
    """
    count = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + count) / (10 + count))

    def mix(old: Array, new: Array) -> Array:
        return (rate * old + (1 - rate) * new).astype(old.dtype) if jnp.issubdtype(old.dtype, jnp.floating) else new

    return jax.tree.map(mix, average, variables)
