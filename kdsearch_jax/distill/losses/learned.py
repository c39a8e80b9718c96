"""Linear maps that a loss learns: {"kernel": (inputs, outputs), "bias": (outputs,)}.

They are trained together with the student and are not part of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

Linear = dict[str, Array]


def linear(parameters: Linear, values: Array) -> Array:
    """values·kernel + bias, over the last axis."""
    product = values @ parameters["kernel"]
    return product + parameters["bias"].reshape((1,) * (product.ndim - 1) + (-1,))


def init(key: Array, inputs: int, outputs: int, *, identity: bool = False) -> Linear:
    """The identity if `identity` and the sizes agree, else normal numbers of variance 1/inputs; the bias is zero."""
    if identity and inputs == outputs:
        kernel = jnp.eye(inputs)
    else:
        kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}
