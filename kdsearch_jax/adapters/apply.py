"""Runs a module in training or inference mode, as its `CallSpec` says, in float32 or bfloat16.

With `precision="bf16"`, parameters and inputs are cast so that an unmodified module computes in bfloat16. Other
collections (BatchNorm's running statistics) keep their dtype, and Flax reduces its statistics in float32.
Floating-point outputs are always float32. Convolutions are replaced by those of
`kdsearch_jax.adapters.convolution.dispatch`; tracing and the proof of equality run the module's own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax import Array

from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.call_spec import CallSpec, mode_keywords
from kdsearch_jax.adapters.convolution.dispatch import fast_convolutions
from kdsearch_jax.tracing.messages import nearest

_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def apply_train(
    module: Any,
    params: Any,
    model_state: Any,
    inputs: Any,
    key: Array,
    precision: str = "fp32",
    call_spec: CallSpec | None = None,
) -> tuple[Any, Any]:
    """Applies the module in training mode.

    Args:
      params: the "params" collection.
      model_state: all other collections; every one may change.
      inputs: as returned by `CallSpec.bind`, or one array.
      key: for dropout and all other random streams of the module.
      precision: "fp32" or "bf16".
      call_spec: how the module is called; None if it takes `inputs` and at most a training switch.

    Returns:
      (outputs, with floating-point arrays in float32; the new `model_state` with the structure and dtypes of the old).
    """
    dtype = dtype_of(precision)
    args, keywords = _arguments(module, inputs, dtype, call_spec, train=True)
    with fast_convolutions():
        outputs, changed = module.apply(
            {"params": _cast(params, dtype), **model_state},
            *args,
            **keywords,
            rngs={"dropout": key, "params": jax.random.fold_in(key, 1)},  # Linen's streams fall back on "params"
            mutable=list(model_state),
        )
    kept = jax.tree.map(lambda old, new: new.astype(old.dtype), model_state, unfreeze(changed))
    return _cast(outputs, jnp.float32), kept


def apply_eval(
    module: Any, variables: Any, inputs: Any, precision: str = "fp32", call_spec: CallSpec | None = None
) -> Any:
    """Applies the module in inference mode; arguments and outputs as for `apply_train`."""
    dtype = dtype_of(precision)
    args, keywords = _arguments(module, inputs, dtype, call_spec, train=False)
    with fast_convolutions():
        outputs = module.apply({**variables, "params": _cast(variables["params"], dtype)}, *args, **keywords)
    return _cast(outputs, jnp.float32)


def dtype_of(precision: str) -> Any:
    """The dtype of "fp32" or "bf16". Raises ValueError for another name."""
    if precision not in _DTYPES:
        raise ValueError(f"precision: {precision!r} is unknown; {nearest(precision, _DTYPES)}")
    return _DTYPES[precision]


def _arguments(
    module: Any, inputs: Any, dtype: Any, call_spec: CallSpec | None, train: bool
) -> tuple[Any, dict[str, Any]]:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    keywords = mode_keywords(module, train) if call_spec is None else call_spec.keywords(module, train)
    return call_arguments(_cast(inputs, dtype), keywords)


def _cast(tree: Any, dtype: Any) -> Any:
    def cast(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
