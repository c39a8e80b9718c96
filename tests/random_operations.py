"""More steps of random networks (see `random_steps`): operations beyond layers.

Kernel norms, Fourier transforms, experts, einsums of several operands, loops with a stopping condition.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from random_steps import step, widths


def _tokens(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


@step
def norm_of_a_kernel(s, x, a, b, c):
    """Weight normalisation, spectral normalisation, weight standardisation, by hand."""
    w = s.param("w", (s.size(x, c), widths(a)))
    w = [
        lambda: s.param("g", (1, widths(a))) * w / jnp.linalg.norm(w, axis=0, keepdims=True),
        lambda: w * jax.lax.rsqrt(jnp.sum(w**2, 0, keepdims=True) + 1e-3),
        lambda: w / (jnp.linalg.norm(w) + 1e-3),
        lambda: _over_its_largest_singular_value(w, s.param("u", (1, widths(a)))),
        lambda: (w - w.mean(0, keepdims=True)) / jnp.sqrt(w.var(0, keepdims=True) + 1e-3),
        lambda: w / jnp.sqrt(jnp.mean(jnp.square(w), 0, keepdims=True) + 1e-3),
        lambda: nn.relu(w) - jnp.abs(w),
    ][b % 7]()
    return nn.relu(x @ w)


def _over_its_largest_singular_value(w, u):
    v = u @ w.T
    v = v / (jnp.linalg.norm(v) + 1e-3)
    u = v @ w
    u = u / (jnp.linalg.norm(u) + 1e-3)
    return w / (1e-3 + (v @ w @ u.T))


@step
def normalised_layer(s, x, a, b, c):
    layer = nn.Dense(widths(a), name=s.name("inner"))
    if b % 2:
        return nn.relu(nn.WeightNorm(layer, epsilon=1e-3, name=s.name("weight"))(x))
    return nn.relu(nn.SpectralNorm(layer, epsilon=1e-3, name=s.name("spectral"))(x, update_stats=False))


@step
def fourier(s, x, a, b, c):
    """Places are mixed by a Fourier transform, or the channels are, or filtered by a parameter in between."""
    if x.ndim == 2:
        return jnp.abs(jnp.fft.rfft(x)) if a % 2 and s.whole(x)[-1] > 1 else x
    if a % 4 == 0:
        return jnp.fft.fft(x, axis=1).real
    if a % 4 == 1:
        return jnp.fft.fft2(x, axes=(1, x.ndim - 1)).real / x.shape[-1]
    n = s.whole(x)[1]
    shape = (1, n // 2 + 1, *(1,) * (x.ndim - 3), x.shape[-1])
    kernel = jax.lax.complex(s.param("re", shape), s.param("im", shape))
    return jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * kernel, n=n, axis=1)


@step
def routed(s, x, a, b, c):
    """Experts of stacked kernels, by ragged products, einsums, a vmap or picked kernels."""
    tokens, hidden = _tokens(x), widths(a)
    n = s.size(x, c)
    up, down = s.param("up", (2, tokens.shape[-1], hidden)), s.param("down", (2, hidden, n))
    chances = nn.softmax(nn.Dense(2, name=s.name("router"))(tokens))
    if b % 4 == 0:
        flat = tokens.reshape(-1, tokens.shape[-1])
        # Which expert a token goes to must not hang on rounding.
        sizes = jnp.array([flat.shape[0] // 2, flat.shape[0] - flat.shape[0] // 2])
        y = jax.lax.ragged_dot(nn.silu(jax.lax.ragged_dot(flat, up, sizes)), down, sizes)
        y = y.reshape(*tokens.shape[:2], -1) * chances[..., :1]
    elif b % 4 == 1:
        y = jnp.einsum("btef,efc,bte->btc", nn.silu(jnp.einsum("btc,ecf->btef", tokens, up)), down, chances)
    elif b % 4 == 2:
        y = jax.vmap(lambda up, down: nn.silu(tokens @ up) @ down)(up, down)
        y = jnp.einsum("ebtc,bte->btc", y, chances)
    else:
        which = jnp.arange(s.whole(tokens)[1]) % 2
        y = jnp.einsum("btf,tfc->btc", nn.silu(jnp.einsum("btc,tcf->btf", tokens, up[which])), down[which])
    return y.reshape(*s.whole(x)[:-1], -1)


@step
def several(s, x, a, b, c):
    """An einsum of three or four operands."""
    u, v = s.param("u", (x.shape[-1], widths(a))), s.param("v", (widths(a), widths(b)))
    if c % 3 == 0:
        return nn.relu(jnp.einsum("...i,ir,ro->...o", x, u, v))
    if c % 3 == 1:
        return nn.relu(jnp.einsum("...i,ir,r,ro->...o", x, u, s.param("g", (widths(a),)), v))
    return jnp.tanh(jnp.einsum("...i,...j,ir,jr->...r", x, x, u, s.param("w", u.shape)))


@step
def until(s, x, a, b, c):
    """A loop that ends by a condition, with a kernel or without."""
    w = s.param("w", (s.size(x, c),) * 2) if a % 2 else None

    def turn(state):
        y, n = state
        return jnp.tanh(0.5 * (y if w is None else y @ w) + x), n + 1

    return jax.lax.while_loop(lambda state: state[1] < 1 + b % 3, turn, (x if c % 2 else jnp.zeros_like(x), 0))[0]
