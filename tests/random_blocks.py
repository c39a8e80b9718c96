"""More steps of random networks (see `random_steps`): the blocks of published networks, as their authors write them."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from random_steps import TOO_WIDE, Block, activation_of, batch_norm, pooled, spread, step, widths


def _dense(s, name, n, x):
    return nn.Dense(n, name=s.name(name))(x)


def _sequence(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


# --- kernels made of several parameters -------------------------------------------------------------------------------


@step
def low_rank(s, x, a, b, c):
    """A kernel that is a product, a sum, a sum with a product (LoRA), or several put together."""
    n, rank, wide = s.size(x, c), 2 + b % 2, widths(a)
    if a % 4 == 0:
        return nn.relu(x @ (s.param("p", (n, rank)) @ s.param("q", (rank, wide))))
    if a % 4 == 1:
        return nn.relu(x @ (s.param("w", (n, wide)) + s.param("v", (n, wide))))
    if a % 4 == 2:
        return nn.relu(_dense(s, "w", wide, x) + 0.5 * (x @ s.param("p", (n, rank)) @ s.param("q", (rank, wide))))
    both = jnp.concatenate([s.param("w", (n, wide)), s.param("v", (n, rank))], 1)
    left, right = jnp.split(x @ both, [wide], axis=-1)
    return left * right.mean(-1, keepdims=True) if b % 3 == 0 else jnp.concatenate([jnp.tanh(right), left], -1)


@step
def normalised_kernel(s, x, a, b, c):
    """A cosine layer, a kernel with a mask or a scale, one that must be positive."""
    w = s.param("w", (s.size(x, c), widths(a)))
    w = [
        lambda: w / jnp.sqrt((w**2).sum(0, keepdims=True) + 0.1),
        lambda: w / jnp.sqrt((w**2).sum(1, keepdims=True) + 0.1),
        lambda: w * s.param("scale", (1, w.shape[1])),
        lambda: w * s.param("scale", (w.shape[0], 1)),
        lambda: nn.softplus(w),
        lambda: w * 0.5,
    ][b % 6]()
    return nn.relu(x @ w)


@step
def ensemble(s, x, a, b, c):
    """A kernel for each token, or for each of two members whose outputs are averaged or put side by side."""
    if c % 2 and x.ndim == 3:
        mapped = nn.vmap(Block, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True})
        return mapped(widths(a), s.size(x, b), b % 2 > 0, name=s.name("places"))(x)
    mapped = nn.vmap(
        Block, in_axes=None, out_axes=-2, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2
    )
    y = mapped(widths(a), widths(b), name=s.name("members"))(x)
    return y.mean(-2) if a % 2 else y.reshape(*y.shape[:-2], -1)


# --- gates ------------------------------------------------------------------------------------------------------------


@step
def film(s, x, a, b, c):
    """A scale and a shift for each channel, made of an older value."""
    n = s.size(x, c)
    y = nn.silu(_dense(s, "embedding", widths(a), pooled(s.older(b, x))))
    both = nn.Dense(2 * n, name=s.name("modulation"))(y)
    scale, shift = jnp.split(both, 2, -1) if c % 4 < 2 else (both[..., :n], both[..., n:])
    return x * (1 + spread(scale, x)) + spread(shift, x)


@step
def highway(s, x, a, b, c):
    n = s.size(x, c)
    gate = nn.sigmoid(_dense(s, "gate", n if b % 2 else 1, x))
    return gate * activation_of(a)(_dense(s, "h", n, x)) + (1 - gate) * x


@step
def experts(s, x, a, b, c):
    """A mixture: the outputs of several layers, weighted by a softmax over them; or the choice of channels of SKNet."""
    n = widths(a)
    y = jnp.stack([nn.relu(_dense(s, "expert", n, x)) for _ in range(2)], -2)
    if b % 2:
        weights = nn.softmax(_dense(s, "router", 2, x))
        return jnp.einsum("...e,...ed->...d", weights, y) if c % 2 else (y * weights[..., None]).sum(-2)
    z = nn.relu(_dense(s, "squeeze", 2 + c % 3, pooled(y.sum(-2))))
    weights = jnp.stack([_dense(s, "select", n, z) for _ in range(2)], 1)
    weights = nn.softmax(weights, 1)
    return sum(spread(weights[:, i], x) * y[..., i, :] for i in range(2))


@step
def places(s, x, a, b, c):
    """Attention over places by what the channels say (CBAM), or over channels by a convolution over them (ECA)."""
    if x.ndim != 4:
        return x
    if a % 2:
        mixed = jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], -1)
        return x * nn.sigmoid(nn.Conv(1, (3, 3), name=s.name("places"))(mixed))
    return x * spread(nn.sigmoid(nn.Conv(1, (3,), name=s.name("eca"))(pooled(x)[..., None])[..., 0]), x)


# --- convolutional blocks ---------------------------------------------------------------------------------------------


@step
def ghost(s, x, a, b, c):
    """Half of the channels by a convolution, the others by a cheap one of these."""
    if x.ndim != 4:
        return x
    y = nn.relu(nn.Conv(widths(a) // 2 + 1, (1, 1), name=s.name("primary"))(x))
    n = s.size(y, c)
    return jnp.concatenate([y, nn.Conv(n, (3, 3), feature_group_count=n, name=s.name("cheap"))(y)], -1)


@step
def inverted(s, x, a, b, c):
    """The block of MobileNet and EfficientNet."""
    if x.ndim != 4:
        return x
    n, wide = s.size(x, c), widths(a)
    y = nn.relu6(batch_norm(s.name("n"))(nn.Conv(wide, (1, 1), use_bias=False, name=s.name("expand"))(x)))
    y = nn.Conv(wide, (3, 3), feature_group_count=wide, use_bias=False, name=s.name("depthwise"))(y)
    y = nn.relu6(batch_norm(s.name("n"))(y))
    if b % 2:
        z = nn.relu(nn.Conv(2, (1, 1), name=s.name("reduce"))(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Conv(wide, (1, 1), name=s.name("restore"))(z))
    y = batch_norm(s.name("n"))(nn.Conv(n, (1, 1), use_bias=False, name=s.name("project"))(y))
    return x + y if c % 4 < 3 else y


@step
def cross_stage(s, x, a, b, c):
    """Half of the channels go around a block (CSPNet, ShuffleNetV2), with a shuffle at the end."""
    if s.whole(x)[-1] % 2:
        x = nn.relu(_dense(s, "even", 4 + 2 * (a % 3), x))
    left, right = jnp.split(x, 2, -1) if b % 2 else (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])
    right = nn.relu(_dense(s, "right", s.size(right, c), right))
    y = jnp.concatenate([left, right], -1)
    if c % 3:
        return y
    return y.reshape(*y.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(y.shape)


@step
def pyramid(s, x, a, b, c):
    """What was pooled to several sizes is brought back and put beside the rest, or down and up again with a skip."""
    shape = s.whole(x)
    if x.ndim != 4 or shape[1] % 2 or shape[2] % 2 or shape[3] > TOO_WIDE // 2:
        return x
    y = nn.max_pool(x, (2, 2), (2, 2))
    y = nn.relu(nn.Conv(widths(a), (1, 1), name=s.name("low"))(y))
    if b % 3 == 0:
        y = jax.image.resize(y, (*y.shape[:1], *shape[1:3], y.shape[-1]), "nearest")
    elif b % 3 == 1:
        y = nn.ConvTranspose(widths(b), (2, 2), strides=(2, 2), name=s.name("up"))(y)
    else:
        y = jnp.broadcast_to(y.mean((1, 2), keepdims=True), (y.shape[0], *shape[1:3], y.shape[-1]))
    return jnp.concatenate([x, y], -1)


# --- attention, as it is written elsewhere ----------------------------------------------------------------------------


@step
def heads_in_the_batch(s, x, a, b, c):
    """Heads are flattened with the batch for the products, and taken apart again."""
    if x.ndim == 2:
        return x
    tokens = _sequence(x)
    heads, size = 2 + a % 2, 2 + b % 2
    t = tokens.shape[1]

    def apart(y):
        y = y.reshape(y.shape[0], t, *((heads, -1) if c % 2 else (-1, size))).transpose(0, 2, 1, 3)
        return y.reshape(-1, t, size if c % 4 < 2 else y.shape[-1])

    q, k, v = (apart(_dense(s, n, heads * size, tokens)) for n in "qkv")
    y = nn.softmax(q @ k.swapaxes(1, 2) / math.sqrt(size)) @ v
    y = y.reshape(x.shape[0], *((-1, t, size) if c % 8 < 4 else (heads, t, -1))).transpose(0, 2, 1, 3)
    return _dense(s, "o", s.size(x, b), y.reshape(*y.shape[:2], -1)).reshape(x.shape)


@step
def fused(s, x, a, b, c):
    """Queries, keys and values in one layer whose output is reshaped, in one order or another; a bias for each head."""
    if x.ndim == 2:
        return x
    tokens = _sequence(x)
    heads, size = 2 + a % 2, 2
    y = _dense(s, "qkv", 3 * heads * size, tokens)
    if b % 3 == 0:
        y = y.reshape(*y.shape[:2], 3, -1 if c % 2 else heads, size).transpose(2, 0, 3, 1, 4)
        q, k, v = y[0], y[1], y[2]
    elif b % 3 == 1:
        y = y.reshape(*y.shape[:2], -1 if c % 2 else heads, 3 * size).transpose(0, 2, 1, 3)
        q, k, v = jnp.split(y, 3, axis=-1)
    else:
        q, k, v = (t.reshape(*t.shape[:2], -1, size).transpose(0, 2, 1, 3) for t in jnp.split(y, 3, axis=-1))
    scores = jnp.einsum("bhsd,bhtd->bhst", q, k) / math.sqrt(size)
    if c % 4 < 2:
        t = s.whole(tokens)[1]
        scores = scores + s.param("relative", (heads if a >= 4 else q.shape[1], t, t))[None]
    if c % 8 >= 6:  # heads that talk to each other
        scores = _dense(s, "talk", heads, scores.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    y = jnp.einsum("bhst,bhtd->bshd", nn.softmax(scores), v)
    if b >= 4:
        return nn.DenseGeneral(s.size(x, a), axis=(-2, -1), name=s.name("o"))(y).reshape(x.shape)
    return _dense(s, "o", s.size(x, a), y.reshape(*y.shape[:2], -1)).reshape(x.shape)


@step
def windows(s, x, a, b, c):
    """An image in windows that go to the batch, after a roll or not, a block in each, and back."""
    shape = s.whole(x)
    if x.ndim != 4 or shape[1] % 2 or shape[2] % 2:
        return x
    y = jnp.roll(x, (-1, -1), (1, 2)) if c % 2 else x
    h, w = shape[1] // 2, shape[2] // 2
    y = y.reshape(x.shape[0], h, 2, w, 2, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, s.size(x, b))
    if a % 2:
        layer = nn.MultiHeadDotProductAttention(2, qkv_features=4, out_features=s.size(x, c), name=s.name("window"))
        y = y + layer(y)
    else:
        y = nn.relu(_dense(s, "window", widths(a), y))
    y = y.reshape(-1, h, w, 2, 2, y.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(-1, shape[1], shape[2], y.shape[-1])


@step
def folded(s, x, a, b, c):
    """Places go to the batch for a layer, as is done for frames of a film."""
    if x.ndim == 2:
        return x.reshape(-1).reshape(x.shape[0], -1)
    y = nn.relu(_dense(s, "each", widths(a), x.reshape(-1, x.shape[-1])))
    return y.reshape(*s.whole(x)[:-1], -1 if b % 2 else widths(a))


@step
def pooled_by_attention(s, x, a, b, c):
    """Places are weighed by a softmax over them, by one set of weights or one for each head."""
    if x.ndim == 2:
        return x
    tokens = _sequence(x)
    heads = 1 + a % 3
    weights = nn.softmax(_dense(s, "weights", heads, jnp.tanh(_dense(s, "key", widths(b), tokens))), 1)
    y = jnp.einsum("bth,btc->bhc", weights, tokens)
    return y.reshape(y.shape[0], -1) if c % 2 else y.mean(1)


@step
def latent(s, x, a, b, c):
    """Learned queries ask the tokens (Perceiver, DETR)."""
    if x.ndim == 2:
        return x
    tokens, n = _sequence(x), widths(a)
    q = s.param("queries", (3, n))
    k, v = _dense(s, "k", n, tokens), _dense(s, "v", widths(b), tokens)
    weights = nn.softmax(jnp.einsum("qd,btd->bqt", q, k) / math.sqrt(n))
    return jnp.einsum("bqt,btd->bqd", weights, v)


@step
def state_space(s, x, a, b, c):
    """A linear recurrence with a decay for each channel, as a scan, and a gate (S4D, RWKV, Mamba)."""
    if x.ndim != 3:
        return x
    n = s.size(x, c)
    decay = nn.sigmoid(s.param("decay", (n,)))
    u = _dense(s, "in", n, x)

    def turn(h, token):
        h = decay[None] * h + token
        return h, h

    start = jnp.zeros_like(u[:, 0]) if b % 2 else jnp.broadcast_to(s.param("start", (1, n)), u[:, 0].shape)
    _, y = jax.lax.scan(turn, start, u.swapaxes(0, 1))
    return y.swapaxes(0, 1) * nn.silu(_dense(s, "gate", n, x))


@step
def masked(s, x, a, b, c):
    """A causal mask, or ALiBi, in attention with one head."""
    if x.ndim == 2:
        return x
    tokens, n = _sequence(x), widths(a)
    t = s.whole(tokens)[1]
    q, k, v = (_dense(s, m, w, tokens) for m, w in (("q", n), ("k", n), ("v", widths(b))))
    scores = jnp.einsum("bsd,btd->bst", q, k) * n**-0.5
    if c % 2:
        scores = jnp.where(np.tril(np.ones((t, t), bool))[None], scores, -1e9)
    else:
        scores = scores - jnp.asarray(np.abs(np.subtract.outer(np.arange(t), np.arange(t))), x.dtype)[None]
    return (nn.softmax(scores) @ v).reshape(*s.whole(x)[:-1], -1)


# --- residual streams -------------------------------------------------------------------------------------------------


@step
def normed_stream(s, x, a, b, c):
    """Two residual blocks on one stream, with a norm over channels before or after each addition."""
    n, post = s.size(x, c), b % 2

    def norm(x):
        x = {
            0: lambda: nn.LayerNorm(epsilon=0.1, name=s.name("norm"))(x),
            1: lambda: nn.RMSNorm(epsilon=0.1, name=s.name("norm"))(x),
            2: lambda: nn.GroupNorm(1, epsilon=0.1, name=s.name("norm"))(x),
            3: lambda: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1),
            4: lambda: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1),
            5: lambda: x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 0.1),
        }[a % 6]()
        return x * s.param("gain", (1,) * (x.ndim - 1) + (n,)) if a % 2 else x

    for _ in range(2):
        y = _dense(s, "down", n, activation_of(b)(_dense(s, "up", widths(c), x if post else norm(x))))
        x = norm(x + y) if post else x + y
    return x
