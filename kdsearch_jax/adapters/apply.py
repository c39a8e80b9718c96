"""A module run in training or in inference mode, as its `CallSpec` says, in float32 or bfloat16.

With `precision="bf16"` parameters and inputs are cast, so that an unmodified module computes in bfloat16; the other
collections (BatchNorm's running statistics) stay as they are, and Flax reduces its statistics in float32. Whatever the
precision, outputs of floating point are float32. Convolutions of Linen and NNX modules are the fast ones of
`kdsearch_jax.adapters.convolution.dispatch` here. Tracing and the proof of equality see the module's own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax import Array

from kdsearch_jax.adapters.base import bound
from kdsearch_jax.adapters.call_spec import CallSpec, mode
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
    call: CallSpec | None = None,
) -> tuple[Any, Any]:
    """The module in training mode.

    Args:
      params, model_state: {"params": params, **model_state} are its variables; every collection of `model_state` may
        change.
      inputs: as `CallSpec.bind` gives them, or one array.
      key: for dropout and any other random stream of the module.
      precision: "fp32" or "bf16".
      call: how the module is called; None where its signature says it all.

    Returns:
      its outputs, of floating point in float32, and the new `model_state`, of the old structure and dtypes.
    """
    dtype = dtype_of(precision)
    args, keywords = _bound(module, inputs, dtype, call, train=True)
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


def apply_eval(module: Any, variables: Any, inputs: Any, precision: str = "fp32", call: CallSpec | None = None) -> Any:
    """Outputs of the module in inference mode, of floating point in float32; nothing changes. Arguments as above."""
    dtype = dtype_of(precision)
    args, keywords = _bound(module, inputs, dtype, call, train=False)
    with fast_convolutions():
        outputs = module.apply({**variables, "params": _cast(variables["params"], dtype)}, *args, **keywords)
    return _cast(outputs, jnp.float32)


def dtype_of(precision: str) -> Any:
    """The dtype of a precision. Raises ValueError where there is none."""
    if precision not in _DTYPES:
        raise ValueError(f"precision: {precision!r} is unknown; {nearest(precision, _DTYPES)}")
    return _DTYPES[precision]


def _bound(module: Any, inputs: Any, dtype: Any, call: CallSpec | None, train: bool) -> tuple[Any, dict[str, Any]]:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return bound(_cast(inputs, dtype), mode(module, train) if call is None else call.keywords(module, train))


def _cast(tree: Any, dtype: Any) -> Any:
    def cast(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
