"""The size attributes of flax.nnx layers, derived from their arrays.

An NNX layer stores its sizes twice: as the shapes of its arrays, and as attributes (`in_features`, `kernel_shape`,
`num_heads`), some of which it reads when it is called. `layer_attributes` says what the attributes must be once the
arrays have been sliced. Arrays may have leading axes that are mapped or scanned over, so axes are counted from the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from kdsearch_jax.adapters.base import Sizes


def layer_attributes(old: Any, new: Any) -> Sizes:
    """{attribute: value} that must change in `new`, which is the layer `old` with arrays of other shapes.

    Attributes that disagree with the arrays of `old` were set by the user and are left alone.
    """
    rule = next((rule for kind, rule in _RULES if isinstance(old, kind)), None)
    if rule is None:
        return {}
    try:
        before, after = rule(old, old), rule(old, new)
    except (AttributeError, IndexError, ZeroDivisionError):  # the user replaced a sublayer by something else
        return {}
    return {
        name: value
        for name, value in after.items()
        if value != before[name] and getattr(old, name, None) == before[name]
    }


def _kernel(layer: Any, name: str = "kernel") -> tuple[int, ...]:
    return tuple(getattr(layer, name).shape)


def _linear(old: Any, new: Any) -> Sizes:
    return {"in_features": _kernel(new)[-2], "out_features": _kernel(new)[-1]}


def _linear_general(old: Any, new: Any) -> Sizes:
    outs, ins, batch = len(old.out_features), len(old.in_features), len(old.batch_axis)
    shape = _kernel(new)[-(outs + ins + batch) :]
    sizes = dict(zip(old.batch_axis, shape[:batch], strict=True))
    return {
        "in_features": shape[batch : batch + ins],
        "out_features": shape[batch + ins :],
        "batch_axis": type(old.batch_axis)(sizes),
    }


def _conv(old: Any, new: Any) -> Sizes:
    # Whole groups are removed, so the number of outputs per group does not change.
    groups = old.feature_group_count
    groups = max(1, _kernel(new)[-1] * groups // _kernel(old)[-1]) if groups > 1 else 1
    return {
        "in_features": _kernel(new)[-2] * groups,
        "out_features": _kernel(new)[-1],
        "feature_group_count": groups,
        "kernel_shape": _kernel(new)[-len(old.kernel_shape) :],
    }


def _conv_transpose(old: Any, new: Any) -> Sizes:
    ins, outs = (-1, -2) if old.transpose_kernel else (-2, -1)
    return {
        "in_features": _kernel(new)[ins],
        "out_features": _kernel(new)[outs],
        "kernel_shape": _kernel(new)[-len(old.kernel_shape) :],
    }


def _einsum(old: Any, new: Any) -> Sizes:
    sizes: Sizes = {"kernel_shape": type(old.kernel_shape)(_kernel(new)[-len(old.kernel_shape) :])}
    if old.bias is not None:
        sizes["bias_shape"] = type(old.bias_shape)(_kernel(new, "bias")[-len(old.bias_shape) :])
    return sizes


def _embed(old: Any, new: Any) -> Sizes:
    shape = _kernel(new, "embedding")
    return {"num_embeddings": shape[-2], "features": shape[-1]}


def _features(layer: Any) -> int:
    """The features of a normalisation layer, from any of its arrays; AttributeError if it has none."""
    names = (name for name in ("mean", "scale", "bias") if getattr(layer, name, None) is not None)
    return _kernel(layer, next(names, "scale"))[-1]


def _norm(old: Any, new: Any) -> Sizes:
    return {"num_features": _features(new)}


def _group_norm(old: Any, new: Any) -> Sizes:
    return {"num_groups": _features(new) // old.group_size}  # whole groups are removed


def _attention(old: Any, new: Any) -> Sizes:
    heads, size = _kernel(new.query)[-2:]
    return {
        "num_heads": heads,
        "num_kv_heads": _kernel(new.key)[-2],
        "head_dim": size,
        "qkv_features": heads * size,
        "in_features": _kernel(new.query)[-3],
        "in_kv_features": _kernel(new.key)[-3],
        "out_features": _kernel(new.out)[-1],
    }


def _lora(old: Any, new: Any) -> Sizes:
    return {"in_features": _kernel(new, "lora_a")[-2], "out_features": _kernel(new, "lora_b")[-1]}


def _cell(ins: str, hidden: str) -> Callable[[Any, Any], Sizes]:
    """A recurrent cell, by the names of the layers that read its input and its state."""
    return lambda old, new: {
        "in_features": _kernel(getattr(new, ins))[-2],
        "hidden_features": _kernel(getattr(new, hidden))[-2],
    }


_RULES: tuple[tuple[Any, Callable[[Any, Any], Sizes]], ...] = (
    (nnx.Linear, _linear),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Conv, _conv),
    (nnx.ConvTranspose, _conv_transpose),
    (nnx.Einsum, _einsum),
    (nnx.Embed, _embed),
    ((nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm), _norm),
    (nnx.GroupNorm, _group_norm),
    (nnx.MultiHeadAttention, _attention),
    (nnx.LoRA, _lora),
    (nnx.LSTMCell, _cell("ii", "hi")),
    ((nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell), _cell("dense_i", "dense_h")),
)
