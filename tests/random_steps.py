"""The steps of random networks.

A step is a function of (build, x, a, b, c): the network under construction, its newest value (batch, …, channels) and
three small integers that choose among the step's variants. It returns the new value. A step's decisions depend on the
sizes of the whole network (`build.whole`), since tracing cannot follow an `if` in Python; its computations use the
sizes of the current value or literals, as model authors do (`build.size` returns either).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[..., Any]
STEPS: dict[str, Step] = {}
TOO_WIDE = 20  # channels or tokens; a step that would exceed it returns the value unchanged


def step(function: Step) -> Step:
    STEPS[function.__name__.strip("_")] = function
    return function


def widths(a: int) -> int:
    """2 to 9 channels."""
    return 2 + a % 8


@jax.custom_vjp
def halved(x):
    return 0.5 * x


halved.defvjp(lambda x: (halved(x), None), lambda _, g: (0.5 * g,))


@jax.custom_jvp
def soft(x):
    return jnp.log1p(jnp.exp(-jnp.abs(x))) + jnp.maximum(x, 0)


@soft.defjvp
def _soft_jvp(primals, tangents):
    return soft(primals[0]), jax.nn.sigmoid(primals[0]) * tangents[0]


ACTIVATIONS = (
    nn.relu, nn.gelu, nn.silu, jnp.tanh, nn.sigmoid, nn.leaky_relu, nn.elu, nn.softplus, nn.hard_swish, jnp.sin,
    jnp.abs, nn.relu6, halved, soft, jnp.square, lambda x: jnp.where(x > 0, x, 0.1 * x), lambda x: jnp.clip(x, -1, 1),
    lambda x: nn.gelu(x, approximate=False), lambda x: jax.lax.select(x > 1, x, jnp.ones_like(x)),
    jax.lax.stop_gradient, nn.selu, nn.celu,
)  # fmt: skip


def activation_of(a: int) -> Step:
    return ACTIVATIONS[a % len(ACTIVATIONS)]


def pooled(x):
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def batch_norm(name, **options):
    return nn.BatchNorm(use_running_average=True, name=name, **options)


def spread(v, x):
    """A vector for each example, over the pixels or tokens of x."""
    return v.reshape(v.shape[0], *(1,) * (x.ndim - 2), -1)


# --- blocks as modules of their own, for the transformations of Linen -------------------------------------------------


class Block(nn.Module):
    """Two layers, of which the second is as wide as the input, around which there may be a shortcut."""

    hidden: int
    width: int
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.width, name="down")(nn.relu(nn.Dense(self.hidden, name="up")(x)))
        return x + y if self.residual else y


class Looped(nn.Module):
    """One turn of a loop over layers."""

    hidden: int
    width: int

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(self.width, name="down")(nn.gelu(nn.Dense(self.hidden, name="up")(x))), None


# --- layers with kernels ----------------------------------------------------------------------------------------------


@step
def dense(s, x, a, b, c):
    return s.keep(nn.Dense(widths(a), use_bias=b % 4 > 0, name=s.name("dense")), x)


@step
def hidden(s, x, a, b, c):
    """The plainest of units: a layer and its activation."""
    return activation_of(b)(nn.Dense(widths(a), name=s.name("dense"))(x))


@step
def dense_general(s, x, a, b, c):
    shape = (1 + a % 4, 2 + b % 3)
    y = nn.relu(nn.DenseGeneral(shape, name=s.name("general"))(x))
    if c % 3 == 0:
        return nn.DenseGeneral(widths(a + b), axis=(-2, -1), name=s.name("general"))(y)
    return y.reshape(*y.shape[:-2], math.prod(shape) if c % 3 == 1 else -1)


@step
def einsum(s, x, a, b, c):
    n = widths(a)
    if c % 3 == 0:
        y = nn.Einsum((s.size(x, b), n), "...c,cd->...d", name=s.name("einsum"))(x)
    elif c % 3 == 1:
        y = jnp.einsum("...c,cd->...d", x, s.param("w", (s.size(x, b), n)))
    else:  # one kernel for each head, of the model's own
        heads = s.param("w", (2, x.shape[-1], n))
        y = jnp.einsum("...c,hcd->...hd", x, heads)
        y = y.sum(-2) if b % 2 else y.reshape(*y.shape[:-2], -1)
    return nn.relu(y)


@step
def tied(s, x, a, b, c):
    """A kernel used twice, forth and back."""
    w = s.param("tied", (x.shape[-1], widths(a)))
    y = activation_of(b)(x @ w)
    return y @ w.T if c % 2 else x + 0.5 * (y @ w.T)


@step
def again(s, x, a, b, c):
    """A layer that was called before, if any reads as many channels."""
    fits = [(layer, n, out) for layer, n, out, ndim in s.layers if n == s.whole(x)[-1] and ndim == len(s.whole(x))]
    if not fits:
        return x
    layer = fits[a % len(fits)][0]
    return layer(nn.relu(layer(x))) if fits[a % len(fits)][2] == fits[a % len(fits)][1] and b % 2 else layer(x)


@step
def shared(s, x, a, b, c):
    """One layer called twice at once."""
    if c % 2:
        layer = nn.Dense(x.shape[-1], name=s.name("shared"))
        return layer(activation_of(b)(layer(x)))
    layer = nn.Dense(widths(a), name=s.name("shared"))
    return layer(x) * nn.sigmoid(layer(x[:, ::-1] if x.ndim > 2 else -x))


@step
def convolution(s, x, a, b, c):
    if x.ndim == 2:
        return nn.relu(nn.Dense(widths(a), name=s.name("dense"))(x))
    smallest = min(s.whole(x)[1:-1])
    options = [{}, {}, {"strides": 2}, {"kernel_dilation": 2}, {"padding": "VALID"}, {"padding": "CIRCULAR"}][c % 6]
    window = min(1 + b % 3, smallest) if "padding" in options else 1 + b % 3
    options = options if smallest > 1 else {}
    layer = nn.Conv(widths(a), (window,) * (x.ndim - 2), use_bias=b % 2 > 0, name=s.name("conv"), **options)
    y = layer(x) if options else s.keep(layer, x)
    return nn.relu(y) if c % 2 else y


@step
def transposed_convolution(s, x, a, b, c):
    if x.ndim != 4 or max(s.whole(x)[1:3]) > 4:
        return x
    options = {"transpose_kernel": c % 2 > 0, "padding": ("SAME", "VALID")[b % 2]}
    return nn.relu(nn.ConvTranspose(widths(a), (2, 2), strides=(2, 2), name=s.name("up"), **options)(x))


@step
def depthwise(s, x, a, b, c):
    if x.ndim == 2:
        return x
    times = 1 + b % 2
    if s.whole(x)[-1] * times > TOO_WIDE:
        return x
    n = s.size(x, c)
    window = (1 + a % 3,) * (x.ndim - 2)
    return nn.Conv(n * times, window, feature_group_count=n, name=s.name("depthwise"))(x)


@step
def grouped(s, x, a, b, c):
    """A convolution to a multiple of the groups, and one in groups."""
    groups = 2 + a % 3
    if x.ndim == 2:
        return x
    if s.whole(x)[-1] % groups or c % 2:
        x = nn.relu(nn.Conv(groups * (1 + c % 3), (1,) * (x.ndim - 2), name=s.name("conv"))(x))
    return nn.Conv(groups * (1 + b % 3), (3,) * (x.ndim - 2), feature_group_count=groups, name=s.name("grouped"))(x)


@step
def local(s, x, a, b, c):
    """A convolution that shares no weights."""
    if x.ndim == 2 or math.prod(s.whole(x)[1:]) > 64:
        return x
    return nn.ConvLocal(widths(a), (2,) * (x.ndim - 2), padding="SAME", name=s.name("local"))(x)


@step
def wrapped(s, x, a, b, c):
    """A block that Linen transforms: remat, jit, scan, vmap over examples, Sequential, WeightNorm."""
    n, hidden = s.size(x, b), widths(a)
    how = c % 6
    if how == 0:
        return nn.remat(Block)(hidden, n, b % 2 > 0, name=s.name("remat"))(x)
    if how == 1:
        return nn.jit(Block)(hidden, n, b % 2 > 0, name=s.name("jit"))(x)
    if how == 2:
        loop = nn.scan(Looped, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return loop(hidden, n, name=s.name("scan"))(x, None)[0]
    if how == 3:
        mapped = nn.vmap(Block, variable_axes={"params": None}, split_rngs={"params": False})
        return mapped(hidden, n, b % 2 > 0, name=s.name("vmap"))(x)
    if how == 4:
        return nn.Sequential([nn.Dense(hidden), nn.relu, nn.Dense(widths(b))], name=s.name("sequential"))(x)
    return nn.WeightNorm(nn.Dense(hidden, name=s.name("dense")), name=s.name("weight_norm"))(x)


# --- normalisation, scales, biases ------------------------------------------------------------------------------------


@step
def norm(s, x, a, b, c):
    n, places = s.whole(x)[-1], math.prod(s.whole(x)[1:-1])
    how = a % 8 if n > 1 else 0
    if how <= 2:
        return batch_norm(s.name("norm"), use_scale=b % 3 > 0, use_bias=c % 3 > 0)(x)
    if how == 3:
        return nn.LayerNorm(epsilon=0.1, use_bias=c % 2 > 0, name=s.name("norm"))(x)
    if how == 4:
        return nn.RMSNorm(epsilon=0.1, name=s.name("norm"))(x)
    if how == 5:
        groups = next(g for g in (3, 2, 1) if n % g == 0 and (n > g or g == 1))
        sizes = {"num_groups": groups} if b % 2 else {"num_groups": None, "group_size": n // groups}
        return nn.GroupNorm(**sizes, epsilon=0.1, name=s.name("norm"))(x)
    if how == 6 and places > 1:
        return nn.relu(nn.InstanceNorm(epsilon=0.1, name=s.name("norm"))(x))  # its mean alone would be constant
    return batch_norm(s.name("norm"), axis=1)(x) if x.ndim > 2 else x


@step
def norm_by_hand(s, x, a, b, c):
    axis = -1 if b % 2 or x.ndim == 2 else tuple(range(1, x.ndim - 1))
    if s.whole(x)[-1] < 2 or (axis != -1 and math.prod(s.whole(x)[1:-1]) < 2):
        return x  # nothing would be left of it
    if a % 3 == 0:
        return x / jnp.sqrt(jnp.mean(x**2, axis=axis, keepdims=True) + 0.1)
    if a % 3 == 1:
        return x / (jnp.sum(jnp.abs(x), axis=axis, keepdims=True) + 1)
    return nn.relu((x - x.mean(axis, keepdims=True)) * jax.lax.rsqrt(x.var(axis, keepdims=True) + 0.1))


@step
def scale(s, x, a, b, c):
    ones = (1,) * (x.ndim - 1)
    how = a % 6
    if how == 0:
        return x * s.param("gamma", (*ones, s.size(x, b)))
    if how == 1:
        return x + s.param("bias", (*ones, s.size(x, b)))
    if how == 2:
        return x * x.shape[-1] ** -0.5
    if how == 3:
        return x / math.sqrt(s.whole(x)[-1])
    if how == 4:
        return x * s.param("temperature", ones + (1,))
    return x * jnp.exp(s.param("gamma", (*ones, x.shape[-1])))


@step
def position(s, x, a, b, c):
    """A learned embedding of places, added or multiplied."""
    p = s.param("position", (1, *s.whole(x)[1:-1], s.size(x, a)))
    return x * p if b % 3 == 0 else x + p


@step
def activation(s, x, a, b, c):
    if a == 7 and b == 7:
        return nn.PReLU(name=s.name("prelu"))(x)
    return activation_of(a + 8 * b)(x)


@step
def hard_wired(s, x, a, b, c):
    """What only a size of its own lets a model do: an index as a number, a constant for each channel."""
    n = s.whole(x)[-1]
    ones = (1,) * (x.ndim - 1)
    if a % 4 == 0:
        return x + jnp.arange(x.shape[-1], dtype=x.dtype).reshape(*ones, -1)
    if a % 4 == 1:
        return x * jnp.asarray(np.linspace(0.5, 1.5, n), x.dtype).reshape(*ones, -1)
    if a % 4 == 2:
        return x @ jnp.asarray(np.eye(n)[::-1] + 0.1, x.dtype)
    return x / jnp.ones_like(x[..., :1, :]).sum(-1, keepdims=True)


# --- moving channels about --------------------------------------------------------------------------------------------


@step
def glu(s, x, a, b, c):
    """Two halves of one layer, or two layers, multiplied."""
    n = widths(a)
    gate = activation_of(b)
    if c % 4 == 0:
        return nn.Dense(n, name=s.name("left"))(x) * gate(nn.Dense(n, name=s.name("right"))(x))
    y = nn.Dense(2 * n, name=s.name("both"))(x)
    if c % 4 == 1:
        left, right = jnp.split(y, 2, axis=-1)
    elif c % 4 == 2:
        left, right = y[..., :n], y[..., n:]
    else:
        y = y.reshape(*y.shape[:-1], 2, n if a % 2 else -1)
        left, right = y[..., 0, :], y[..., 1, :]
    return left * gate(right)


@step
def halves(s, x, a, b, c):
    """One layer's output in parts that go their own ways and meet again, in this order or another."""
    parts = 2 + a % 2
    if s.whole(x)[-1] % parts or c % 2:
        x = nn.relu(nn.Dense(parts * (1 + b % 4), name=s.name("parts"))(x))
    pieces = jnp.split(x, parts, axis=-1)
    if b % 3 == 0:
        pieces = pieces[1:] + pieces[:1]
    if b % 3 == 1:
        pieces[0] = jnp.tanh(pieces[0])
    if b % 3 == 2:
        pieces[0] = nn.Dense(widths(a + c), name=s.name("dense"))(pieces[0])
    return jnp.concatenate(pieces, -1)


@step
def cut(s, x, a, b, c):
    n = s.whole(x)[-1]
    if n < 3:
        return x
    return [
        lambda: x[..., 1 + b % 2 :],
        lambda: x[..., : -1 - b % 2],
        lambda: x[..., : n - 1],
        lambda: x[..., -2:],
        lambda: x[..., ::2],
        lambda: x[..., 1:3],
        lambda: x[..., : x.shape[-1] // 2],
        lambda: jax.lax.dynamic_slice_in_dim(x, 1, 2, axis=x.ndim - 1),
    ][a % 8]()


@step
def move(s, x, a, b, c):
    """Roll, flip, pad, permute: along channels or along places."""
    axis = -1 if b % 2 or x.ndim == 2 else 1
    n, ones = s.whole(x)[axis], [(0, 0)] * x.ndim
    if n < 2:
        return x
    ones[axis] = (c % 2, 1)
    order = np.random.default_rng(c).permutation(n)
    return [
        lambda: jnp.roll(x, 1 + c % 2, axis),
        lambda: jnp.roll(x, (1, -1), (1, -1)) if x.ndim > 2 else x,
        lambda: jnp.flip(x, axis),
        lambda: jnp.pad(x, ones),
        lambda: jnp.pad(x, ones, mode=("edge", "reflect", "wrap")[c % 3]),
        lambda: jnp.take(x, jnp.asarray(order), axis=axis),
        lambda: jnp.repeat(x, 2, axis) if n * 2 <= TOO_WIDE else x,
        lambda: jnp.concatenate([x, jnp.ones_like(x)], axis) if n * 2 <= TOO_WIDE else x,
    ][a % 8]()


@step
def shuffle(s, x, a, b, c):
    """Channels in two groups, dealt out by turns."""
    if s.whole(x)[-1] % 2:
        return x
    shape = (2, -1) if a % 2 else (-1, 2)
    return x.reshape(*x.shape[:-1], *shape).swapaxes(-1, -2).reshape(x.shape)


@step
def pixels(s, x, a, b, c):
    """Depth to space and space to depth."""
    shape = s.whole(x)
    if x.ndim != 4:
        return x
    if a % 2 and shape[1] % 2 == 0 and shape[2] % 2 == 0 and shape[3] * 4 <= TOO_WIDE:
        y = x.reshape(x.shape[0], shape[1] // 2, 2, shape[2] // 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(*y.shape[:3], -1)
    if a % 2 == 0 and max(shape[1:3]) <= 4:
        x = nn.Conv(4 * (1 + b % 3), (1, 1), name=s.name("depth"))(x)
        order = ((2, 2, -1), (-1, 2, 2))[c % 2]
        y = x.reshape(*x.shape[:3], *order).transpose(*((0, 1, 3, 2, 4, 5) if c % 2 == 0 else (0, 1, 4, 2, 5, 3)))
        return y.reshape(x.shape[0], 2 * shape[1], 2 * shape[2], -1)
    return x


@step
def joined(s, x, a, b, c):
    """Concatenation with an older value, with itself, with constants, with a branch of one's own."""
    if s.whole(x)[-1] > TOO_WIDE // 2:
        return x
    how = b % 4
    if how == 0:
        other = nn.relu(nn.Dense(widths(a), name=s.name("grown"))(x))
    elif how == 1:
        other = activation_of(a)(x)
    elif how == 2:
        other = jnp.zeros((*x.shape[:-1], 1 + a % 3), x.dtype)
    else:
        other = s.older(a, x)
    return jnp.concatenate([x, other] if c % 2 else [other, x], -1)


@step
def met(s, x, a, b, c):
    """An older value, projected where it does not fit, is added, multiplied, subtracted, or the greater is taken."""
    other = s.older(a, x)
    if s.whole(other)[-1] != s.whole(x)[-1]:
        other = nn.Dense(s.size(x, c), name=s.name("fit"))(other)
    return (jnp.add, jnp.add, jnp.multiply, jnp.maximum, lambda x, y: x - 0.5 * y)[b % 5](x, other)


# --- mixing, and gates made of the value ------------------------------------------------------------------------------


@step
def squeeze(s, x, a, b, c):
    """Squeeze and excitation; the gate may be a sigmoid or a softmax over the channels."""
    y = nn.relu(nn.Dense(widths(a), name=s.name("squeeze"))(pooled(x)))
    y = nn.Dense(s.size(x, b), name=s.name("excite"))(y)
    return x * spread((nn.sigmoid, nn.softmax, jnp.tanh)[c % 3](y), x)


@step
def reduced(s, x, a, b, c):
    """A statistic of the channels, given back to all of them, or kept beside them."""
    if s.whole(x)[-1] < 2:
        return x
    y = [
        lambda: x.mean(-1, keepdims=True),
        lambda: x.max(-1, keepdims=True),
        lambda: x.sum(-1, keepdims=True),
        lambda: nn.logsumexp(x, -1, keepdims=True),
    ][a % 4]()
    return [lambda: x * nn.sigmoid(y), lambda: jnp.concatenate([x, y], -1), lambda: x - y, lambda: x + y][b % 4]()


@step
def along(s, x, a, b, c):
    """Operations that mix an axis but keep its length."""
    axis = x.ndim - 1 if b % 2 or x.ndim == 2 else 1
    if s.whole(x)[axis] < 2:
        return x
    return [
        lambda: x * nn.softmax(x, axis),
        lambda: jnp.cumsum(x, axis),
        lambda: jnp.sort(x, axis),
        lambda: nn.log_softmax(x, axis),
        lambda: jax.lax.associative_scan(jnp.add, x, axis=axis),
        lambda: jax.lax.cummax(x, axis),
    ][a % 6]()


@step
def outer(s, x, a, b, c):
    """Products of all pairs: a bilinear layer, or a gram matrix of the places."""
    if a % 2 or x.ndim == 2:
        # Bounded: products of products outgrow float32, and then the network itself is not finite.
        left = jnp.tanh(nn.Dense(2 + b % 3, name=s.name("left"))(x))
        right = jnp.tanh(nn.Dense(2 + c % 3, name=s.name("right"))(x))
        y = jnp.einsum("...i,...j->...ij", left, right)
        return y.reshape(*y.shape[:-2], -1)
    t = jnp.tanh(x.reshape(x.shape[0], -1, x.shape[-1]))
    if s.whole(t)[1] > 8:
        return x
    gram = jnp.einsum("bsc,btc->bst", t, t) if b % 2 else jnp.einsum("bsc,bsd->bcd", t, t)
    return nn.relu(gram)


@step
def control(s, x, a, b, c):
    """Control flow with constant predicates and fixed numbers of turns, and loops over places."""
    return [
        lambda: jax.lax.cond(True, nn.relu, jnp.tanh, x),
        lambda: jax.lax.fori_loop(0, 2, lambda _, v: 0.5 * v + jnp.tanh(v), x),
        lambda: (
            jax.lax.scan(lambda h, t: (0.5 * h + t,) * 2, x[:, 0], x.swapaxes(0, 1))[1].swapaxes(0, 1)
            if x.ndim > 2
            else x
        ),
        lambda: jax.vmap(lambda row: row * jnp.tanh(row).mean(0, keepdims=True) if row.ndim > 1 else jnp.tanh(row))(x),
        lambda: jax.lax.map(jnp.tanh, x),
        lambda: jax.checkpoint(lambda v: jnp.sin(v) * v)(x),
        lambda: jax.jit(lambda v: jnp.sin(v) + v)(x),
        lambda: nn.Dropout(0.5, deterministic=True)(x),
    ][(a + 8 * b) % 8]()


# --- residual branches ------------------------------------------------------------------------------------------------


@step
def residual(s, x, a, b, c):
    """Pre-norm, post-norm, scaled, bottleneck or convolutional."""
    n, hidden = s.size(x, c), widths(a)
    make = nn.Dense
    if x.ndim == 4 and b % 2:
        make = lambda n, name: nn.Conv(n, (3, 3), name=name)  # noqa: E731
    y = x
    if b % 3 == 0:
        y = (nn.LayerNorm(epsilon=0.1, name=s.name("pre")) if a % 2 else batch_norm(s.name("pre")))(y)
    y = activation_of(a + c)(make(hidden, name=s.name("up"))(y))
    y = make(n, name=s.name("down"))(y)
    if b % 4 == 1:
        y = batch_norm(s.name("post"))(y)
    if b % 4 == 2:
        y = y * s.param("gamma", (1,) * (x.ndim - 1) + (n,))
    if b % 4 == 3:
        y = 0.5 * y
    return nn.relu(x + y) if c % 4 == 3 else x + y


@step
def nested(s, x, a, b, c):
    """A branch in a branch."""
    y = nn.relu(nn.Dense(widths(a), name=s.name("in"))(x))
    y = y + nn.Dense(s.size(y, c), name=s.name("b"))(nn.relu(nn.Dense(widths(b), name=s.name("a"))(y)))
    return x + nn.Dense(s.size(x, c), name=s.name("out"))(y)


@step
def parallel(s, x, a, b, c):
    """Two branches at once, added or put side by side, as in Inception."""
    n = s.size(x, c)
    left = nn.Dense(n, name=s.name("left2"))(nn.relu(nn.Dense(widths(a), name=s.name("left1"))(x)))
    right = nn.Dense(n, name=s.name("right2"))(jnp.tanh(nn.Dense(widths(b), name=s.name("right1"))(x)))
    if c % 3 == 0 and s.whole(x)[-1] <= TOO_WIDE // 2:
        return jnp.concatenate([left, right], -1)
    return x + left + right if c % 3 == 1 else x + (left + right)


# --- images -----------------------------------------------------------------------------------------------------------


@step
def pool(s, x, a, b, c):
    if x.ndim == 2 or min(s.whole(x)[1:-1]) < 2:
        return x
    window = (2,) * (x.ndim - 2)
    strides = window if b % 2 else None
    return (nn.max_pool, nn.avg_pool, nn.max_pool)[a % 3](x, window, strides, "SAME" if c % 2 else "VALID")


@step
def grow(s, x, a, b, c):
    """Makes an image twice as large."""
    if x.ndim != 4 or max(s.whole(x)[1:3]) > 4:
        return x
    shape = (x.shape[0], 2 * s.whole(x)[1], 2 * s.whole(x)[2], x.shape[-1])
    if a % 3 == 2:
        return x.repeat(2, 1).repeat(2, 2)
    return jax.image.resize(x, shape, ("nearest", "bilinear")[a % 3])


@step
def global_pool(s, x, a, b, c):
    """To a vector."""
    if x.ndim == 2:
        return x
    axes = tuple(range(1, x.ndim - 1))
    return [lambda: x.mean(axes), lambda: x.max(axes), lambda: x.sum(axes), lambda: x[:, 0].mean(axes[:-1])][a % 4]()


@step
def flatten(s, x, a, b, c):
    if x.ndim == 2 or math.prod(s.whole(x)[1:]) > 6 * TOO_WIDE:
        return x
    if a % 3 == 2:
        x = jnp.moveaxis(x, -1, 1)
    x = x.reshape(x.shape[0], -1 if b % 2 else math.prod(x.shape[1:]))
    return nn.relu(nn.Dense(widths(c), name=s.name("flat"))(x))


@step
def patches(s, x, a, b, c):
    """An image as a sequence: pixels, or patches of 2 × 2, by a reshape or a convolution."""
    shape = s.whole(x)
    if x.ndim != 4:
        return x
    if a % 3 == 0 or shape[1] % 2 or shape[2] % 2:
        return x.reshape(x.shape[0], -1, x.shape[-1]) if shape[1] * shape[2] <= TOO_WIDE else x
    if a % 3 == 1:
        y = nn.Conv(widths(b), (2, 2), strides=2, padding="VALID", name=s.name("patch"))(x)
    else:
        y = x.reshape(x.shape[0], shape[1] // 2, 2, shape[2] // 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        y = nn.Dense(widths(b), name=s.name("patch"))(y.reshape(*y.shape[:3], -1))
    return y.reshape(y.shape[0], -1, y.shape[-1])


# --- sequences --------------------------------------------------------------------------------------------------------


@step
def unflatten(s, x, a, b, c):
    """A vector as a sequence or an image, a sequence as an image."""
    if x.ndim == 3:
        t = s.whole(x)[1]
        h = next((h for h in (4, 3, 2) if t % h == 0 and t // h > 1), None)
        return x.reshape(x.shape[0], h, t // h, x.shape[-1] if a % 2 else -1) if h else x
    if x.ndim == 4:
        return x
    places, n = ((3,), (2, 2))[a % 2], widths(b)
    if c % 4 == 0:
        return nn.Dense(n, name=s.name("wide"))(x[..., None]) if s.whole(x)[-1] <= 9 else x
    x = nn.Dense(math.prod(places) * n, name=s.name("wide"))(x)
    if c % 4 == 1:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, *places), 1, -1)
    return nn.relu(x.reshape(x.shape[0], *places, n if c % 4 == 2 else -1))


@step
def sequence(s, x, a, b, c):
    """Of a sequence: its first token, a token more, its tokens mixed."""
    if x.ndim != 3:
        return x
    t = s.whole(x)[1]
    if a % 4 == 0:
        return x[:, -1 if b % 2 else 0]
    if a % 4 == 1 and t < TOO_WIDE:
        first = s.param("token", (1, 1, s.size(x, b)))
        return jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[-1])), x], 1)
    if a % 4 == 2:  # as in MLP-Mixer
        y = nn.gelu(nn.Dense(widths(b), name=s.name("mix1"))(x.swapaxes(1, 2)))
        return x + nn.Dense(t, name=s.name("mix2"))(y).swapaxes(1, 2)
    u, v = jnp.split(nn.Dense(2 * widths(b), name=s.name("gate"))(x), 2, axis=-1)  # as in gMLP
    return u * jnp.tanh(nn.Dense(t, name=s.name("places"))(v.swapaxes(1, 2)).swapaxes(1, 2))


@step
def attention_of_linen(s, x, a, b, c):
    heads = 1 + a % 3
    if x.ndim == 2:
        return x
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    options = {"qkv_features": heads * (1 + b % 3), "out_features": s.size(x, c), "normalize_qk": c % 8 == 7}
    layer = nn.MultiHeadDotProductAttention(heads, name=s.name("attention"), **options)
    y = layer(tokens) if b % 2 else layer(tokens, s.tokens(a, tokens))
    return (tokens + y if c % 2 else y).reshape(*s.whole(x)[:-1], -1)


def _rotated(x):
    """Each pair of channels of (batch, tokens, heads, size), turned by an angle of its token."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 10.0 ** -np.arange(half)
    cos, sin = (jnp.asarray(f(angle), x.dtype)[None, :, None] for f in (np.cos, np.sin))
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


@step
def attention(s, x, a, b, c):
    """Attention by hand: einsum or matmul, softmax or none, any of its sizes written out or not, rotated or not."""
    if x.ndim == 2:
        return x
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    heads, size = 1 + a % 3, 2 + 2 * (a % 2)
    shape = ((-1, size), (heads, -1), (heads, size))[b % 3]
    if c % 4 == 3:
        qkv = nn.Dense(3 * heads * size, name=s.name("qkv"))(tokens)
        q, k, v = (t.reshape(*t.shape[:2], *shape) for t in jnp.split(qkv, 3, axis=-1))
    else:
        layers = (nn.Dense(heads * size, use_bias=b % 2 > 0, name=s.name(n)) for n in "qkv")
        q, k, v = (layer(tokens).reshape(*tokens.shape[:2], *shape) for layer in layers)
    if b >= 6:
        q, k = _rotated(q), _rotated(k)
    q = q / math.sqrt(size) if a >= 4 else q * q.shape[-1] ** -0.5
    if c % 2:
        q, k, v = (t.swapaxes(1, 2) for t in (q, k, v))
        weights = nn.softmax(q @ k.swapaxes(-1, -2), -1)
        y = (weights @ v).swapaxes(1, 2)
    else:
        weights = jnp.einsum("bshd,bthd->bhst", q, k)
        weights = nn.relu(weights) / weights.shape[-1] if c % 4 == 2 else nn.softmax(weights, -1)
        y = jnp.einsum("bhst,bthd->bshd", weights, v)
    y = y.reshape(*y.shape[:2], heads * size if c >= 4 else -1)
    y = nn.Dense(s.size(x, b), name=s.name("o"))(y)
    return (tokens + y).reshape(x.shape) if a % 2 else y.reshape(x.shape)


@step
def grouped_query(s, x, a, b, c):
    """Several queries to one key: heads in groups, or keys repeated; or keys without heads."""
    if x.ndim == 2:
        return x
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    groups, times, size = 2, 2, 2 + a % 2
    q = nn.Dense(groups * times * size, name=s.name("q"))(tokens)
    if b % 3 == 2:
        k, v = (nn.Dense(size, name=s.name(n))(tokens) for n in "kv")
        q = q.reshape(*q.shape[:2], -1, size)
        y = jnp.einsum("bhst,btd->bshd", nn.softmax(jnp.einsum("bshd,btd->bhst", q, k)), v)
        return nn.Dense(widths(c), name=s.name("o"))(y.reshape(*y.shape[:2], -1)).reshape(*s.whole(x)[:-1], -1)
    k, v = (nn.Dense(groups * size, name=s.name(n))(tokens) for n in "kv")
    k, v = (t.reshape(*t.shape[:2], -1 if c % 2 else groups, size) for t in (k, v))
    if b % 3 == 0:
        q = q.reshape(*q.shape[:2], -1 if c % 2 else groups, times, size)
        weights = nn.softmax(jnp.einsum("bsgrd,btgd->bgrst", q, k))
        y = jnp.einsum("bgrst,btgd->bsgrd", weights, v)
    else:
        q = q.reshape(*q.shape[:2], -1, size)
        k, v = (jnp.repeat(t, times, axis=2) for t in (k, v))
        y = jnp.einsum("bhst,bthd->bshd", nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k)), v)
    return nn.Dense(widths(c), name=s.name("o"))(y.reshape(*y.shape[:2], -1)).reshape(*s.whole(x)[:-1], -1)


@step
def linear_attention(s, x, a, b, c):
    """Keys meet values before queries."""
    if x.ndim == 2:
        return x
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = (nn.Dense(widths(n), name=s.name(m))(tokens) for n, m in ((a, "q"), (a, "k"), (b, "v")))
    k = nn.softmax(k, 1) if c % 2 else nn.relu(k)
    y = jnp.einsum("btc,btd->bcd", k, v)
    return jnp.einsum("bsc,bcd->bsd", nn.sigmoid(q), y).reshape(*s.whole(x)[:-1], -1)


@step
def recurrent(s, x, a, b, c):
    if x.ndim != 3 or s.whole(x)[1] > 6:
        return x
    cell = (nn.LSTMCell, nn.GRUCell, nn.SimpleCell, nn.OptimizedLSTMCell, nn.MGUCell)[b % 5]
    y = nn.RNN(cell(2 + a % 4, name=s.name("cell")), reverse=c % 3 == 2, keep_order=True, name=s.name("rnn"))(x)
    return y[:, -1] if c % 2 else y
