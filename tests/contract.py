"""What every network of the package promises, whatever it computes."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from proof import variables_of


def check_call(module: nn.Module, shape: tuple[int, ...], outputs: tuple[int, ...], *, dropout: bool = False) -> None:
    """One convention: logits of every image that depend on that image alone, batch statistics and dropout in training
    only, no type promotion on the sly, and bfloat16 in gives bfloat16 out.

    `outputs` is the shape of one image's logits; `dropout` says that the network has some, which is then active.
    """
    images = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    variables = variables_of(module, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    evaluate = jax.jit(module.apply)
    with jax.numpy_dtype_promotion("strict"):
        logits = evaluate(variables, images)
    assert logits.shape == (3, *outputs) and logits.dtype == jnp.float32
    assert np.ptp(np.asarray(logits), axis=0).min() > 0  # the images matter
    others = np.concatenate([-images[:2], images[2:]])
    np.testing.assert_allclose(evaluate(variables, others)[2], logits[2], rtol=1e-5, atol=1e-5)

    @jax.jit
    def train(variables: Any, images: jax.Array) -> Any:
        return module.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})

    trained, changed = train(variables, images)
    assert trained.shape == logits.shape
    assert jax.tree.structure(changed.get("batch_stats")) == jax.tree.structure(variables.get("batch_stats"))
    before, after = (jax.tree.leaves(tree.get("batch_stats")) for tree in (variables, changed))
    assert not any(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert np.allclose(trained, logits, atol=1e-5) == ("batch_stats" not in variables and not dropout)

    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (variables, images))
    assert jax.eval_shape(module.apply, *half).dtype == jnp.bfloat16


def check_names(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Linen's automatic names (`Conv_0`) count calls, so a dropped layer would rename those behind it."""
    names = []

    def note(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        names.append(context.module.name)
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert len(names) > 3
    assert [name for name in names if name and re.search(r"[A-Z]|_\d+$", name)] == []
