"""Runs a module in training or inference mode, as its `CallSpec` says, in float32 or bfloat16.

With `precision="bf16"`, parameters and inputs are cast so that an unmodified module computes in bfloat16. Other
collections (BatchNorm's running statistics) keep their dtype, and Flax reduces its statistics in float32.
Floating-point outputs are always float32.

On CPUs, XLA's own bfloat16 arithmetic is slower than float32's. In programs that are compiled for one CPU device with
AMX (`compiled_for`), "bf16" therefore means that dense convolutions multiply bfloat16 numbers and add in float32; all
else, activations included, is float32.

Convolutions are replaced by those of
`kdsearch_jax.adapters.convolution.dispatch`; tracing and the proof of equality run the module's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax import Array
from jax.sharding import Mesh

from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.call_spec import CallSpec, mode_keywords
from kdsearch_jax.adapters.convolution import native
from kdsearch_jax.adapters.convolution.dispatch import fast_convolutions
from kdsearch_jax.tracing.messages import nearest

_for_one_cpu: ContextVar[bool] = ContextVar("for_one_cpu", default=False)
_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@contextmanager
def compiled_for(mesh: Mesh) -> Iterator[None]:
    """Within this context, what is traced will be compiled for the devices of this mesh."""
    token = _for_one_cpu.set(mesh.size == 1 and mesh.devices.flat[0].platform == "cpu")
    try:
        yield
    finally:
        _for_one_cpu.reset(token)


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
    dtype, rounded = _computation(precision)
    args, keywords = _arguments(module, inputs, dtype, call_spec, train=True)
    with fast_convolutions(rounded=rounded):
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
    dtype, rounded = _computation(precision)
    args, keywords = _arguments(module, inputs, dtype, call_spec, train=False)
    with fast_convolutions(rounded=rounded):
        outputs = module.apply({**variables, "params": _cast(variables["params"], dtype)}, *args, **keywords)
    return _cast(outputs, jnp.float32)


def dtype_of(precision: str) -> Any:
    """The dtype of "fp32" or "bf16". Raises ValueError for another name."""
    if precision not in _DTYPES:
        raise ValueError(f"precision: {precision!r} is unknown; {nearest(precision, _DTYPES)}")
    return _DTYPES[precision]


def _computation(precision: str) -> tuple[Any, bool]:
    """(dtype of parameters and inputs, whether convolutions round their factors to bfloat16)."""
    dtype = dtype_of(precision)
    rounded = dtype == jnp.bfloat16 and _for_one_cpu.get() and native.ready(bf16=True)
    return (jnp.float32, True) if rounded else (dtype, False)


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
