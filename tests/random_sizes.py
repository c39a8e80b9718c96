"""More steps of random networks (see `random_steps`): operands of size 1, paired halves, sizes in attributes."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from random_steps import activation_of, step, widths


class Heads(nn.Module):
    """An attention that holds its number of heads, and splits and joins them by it."""

    heads: int
    size: int

    @nn.compact
    def __call__(self, x):
        n = self.heads
        q, k, v = (nn.Dense(n * self.size, name=name)(x).reshape(*x.shape[:-1], n, self.size) for name in "qkv")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / self.size**0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:-1], n * self.size)


class Sized(nn.Module):
    """A layer with its own kernel, whose shape is a literal, and with a width that it reshapes by."""

    inputs: int
    width: int
    reshapes: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (self.inputs, self.width))
        bias = self.param("bias", nn.initializers.normal(), (self.width,))
        y = nn.relu(x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,)))
        return y.reshape(y.shape[0], -1, self.width).reshape(*x.shape[:-1], self.width) if self.reshapes else y


@step
def masked(s, x, a, b, c):
    """A value times something that has a single channel: a mask, a gate, a weight."""
    other = s.before(a)
    if s.whole(other)[:-1] != s.whole(x)[:-1]:
        other = x
    if b % 8 == 0:
        one = nn.sigmoid(nn.Dense(1, name=s.name("gate"))(other))
    elif b % 8 == 1:
        one = nn.sigmoid(nn.Dense(widths(c), name=s.name("gate"))(other))[..., c % 2 : c % 2 + 1]
    elif b % 8 == 2:
        one = s.param("scale", (1,))
    elif b % 8 == 3:
        one = nn.Dense(widths(c), name=s.name("gate"))(other).max(-1, keepdims=True)
    elif b % 8 == 4:
        one = jax.lax.top_k(nn.Dense(widths(c), name=s.name("gate"))(other), 2)[0][..., :1]
    elif b % 8 == 5:
        one = jnp.split(nn.softmax(nn.Dense(widths(c), name=s.name("gate"))(other)), [1], axis=-1)[0]
    elif b % 8 == 6:
        one = s.param("scale", (s.whole(x)[-2], 1)) if x.ndim > 2 else s.param("scale", (1, 1))
    else:
        one = nn.Dense(widths(c), name=s.name("gate"))(other).mean(-1, keepdims=True)
    one = one.reshape((1,) * (x.ndim - one.ndim) + one.shape)
    if c % 3 == 0:
        return x * one
    return jnp.where(one > 0, x, 0.1 * x) if c % 3 == 1 else jnp.maximum(x, one)


@step
def mixture(s, x, a, b, c):
    """Experts in a list, each weighed by a column of the router's softmax."""
    weights = nn.softmax(nn.Dense(3, name=s.name("router"))(x))
    made = [nn.Dense(widths(b), name=s.name("down"))(activation_of(c)(nn.Dense(widths(a), name=s.name("up"))(x)))
            for _ in range(3)]  # fmt: skip
    return sum(weights[..., i : i + 1] * y for i, y in enumerate(made))


@step
def halves(s, x, a, b, c):
    """Two halves of a layer that are used apart, in the code's own order."""
    y = nn.Dense(2 * widths(a), name=s.name("both"))(x)
    n = y.shape[-1] // 2
    if b % 4 == 0:
        left, right = jnp.split(y, 2, axis=-1)
    elif b % 4 == 1:
        left, right = y[..., :n], y[..., n:]
    elif b % 4 == 2:
        left, right = y[..., ::2], y[..., 1::2]
    else:
        pair = y.reshape(*y.shape[:-1], 2, n)
        left, right = pair[..., 0, :], pair[..., 1, :]
    if c % 3 == 0:
        return jnp.concatenate([nn.relu(left), jnp.tanh(right)], axis=-1)
    if c % 3 == 1:
        return jnp.concatenate([left, nn.Dense(widths(b), name=s.name("inner"))(nn.relu(right))], axis=-1)
    return jnp.concatenate([-right, left], axis=-1) * 0.5 + y


@step
def two_groups(s, x, a, b, c):
    """Two layers side by side, read by a convolution in two groups."""
    if x.ndim != 3:
        return x
    sides = [nn.relu(nn.Dense(2 + a % 4, name=s.name("side"))(x)) for _ in range(2)]
    return nn.Conv(2 * (1 + b % 4), (1 + c % 3,), feature_group_count=2, name=s.name("grouped"))(
        jnp.concatenate(sides, axis=-1)
    )


@step
def held_heads(s, x, a, b, c):
    """Attention in a module that holds the number of its heads."""
    if x.ndim != 3:
        return x
    return Heads(2 + a % 3, 2 + b % 3, name=s.name("attention"))(x)


@step
def sized(s, x, a, b, c):
    """A kernel of a literal shape in a module of its own."""
    return Sized(s.size(x, b), widths(a), c % 2 == 0, name=s.name("sized"))(x)
