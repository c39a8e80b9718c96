"""Builds the same network in Linen and NNX from a function of (layers, x), where `layers` creates layers by name.

Sizes are read from the parameters, so that tracing finds the same in both libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from proof import variables_of

from kdsearch_jax.adapters.functional_module import FunctionalModule

LIBRARIES = ("linen", "nnx")
INIT = nn.initializers.normal(0.4)


class OfLinen:
    """The layers of a Linen module during its call."""

    def __init__(self, module: nn.Module):
        self.module = module

    def param(self, name: str, *shape: int, dtype: Any = jnp.float32) -> Any:
        if self.module.has_variable("params", name):
            return self.module.get_variable("params", name)
        return self.module.param(name, INIT, shape, dtype)

    def dense(self, name: str, n: int, x: Any) -> Any:
        return nn.Dense(n, name=name)(x)

    def conv(self, name: str, n: int, window: int, x: Any) -> Any:
        return nn.Conv(n, (window,) * (x.ndim - 2), name=name)(x)


class OfNnx:
    """The layers of an NNX module, which are created by the first call."""

    def __init__(self, module: nnx.Module, rngs: nnx.Rngs | None = None):
        self.module, self.rngs = module, rngs

    def _layer(self, name: str, make: Callable[[nnx.Rngs], Any]) -> Any:
        if self.rngs is not None:
            setattr(self.module, name, make(self.rngs))
        return getattr(self.module, name)

    def param(self, name: str, *shape: int, dtype: Any = jnp.float32) -> Any:
        return self._layer(name, lambda rngs: nnx.Param(INIT(rngs.params(), shape, dtype)))[...]

    def dense(self, name: str, n: int, x: Any) -> Any:
        return self._layer(name, lambda rngs: nnx.Linear(x.shape[-1], n, rngs=rngs))(x)

    def conv(self, name: str, n: int, window: int, x: Any) -> Any:
        windows = (window,) * (x.ndim - 2)
        return self._layer(name, lambda rngs: nnx.Conv(x.shape[-1], n, windows, rngs=rngs))(x)


def network_in(library: str, function: Callable[[Any, Any], Any], x: np.ndarray) -> tuple[Any, Any]:
    """(the module, random variables of it) of a function of (layers, x)."""
    if library == "linen":

        class OfFunction(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> Any:
                return function(OfLinen(self), x)

        return OfFunction(), variables_of(OfFunction(), x)

    class Holding(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            function(OfNnx(self, rngs), jnp.asarray(x))

        def __call__(self, x: jax.Array) -> Any:
            return function(OfNnx(self), x)

    return FunctionalModule.split(Holding(nnx.Rngs(0)))
