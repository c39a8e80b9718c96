"""Networks that nobody thought of: small ones put together at random, each cut at random and proved exact.

The environment variable KDSEARCH_EXAMPLES sets how many; 25 without it. What once failed stands below as an example.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from proof import image, norm, pooled, prove, traced, variables_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXAMPLES = int(os.environ.get("KDSEARCH_EXAMPLES", "25"))
DECIDED = {}  # (steps, name): what the code chose to do at the sizes of the whole network
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu, "tanh": nn.tanh, "sigmoid": nn.sigmoid}


class Random(nn.Module):
    """Runs a program of steps (name, *options) on an image: each makes something of the newest value."""

    steps: tuple

    @nn.compact
    def __call__(self, x):
        values, shared = [x], {}
        for i, (kind, *options) in enumerate(self.steps):
            values.append(getattr(self, f"do_{kind}")(f"{kind}{i}", values, shared, *options))
        x = values[-1]
        return nn.Dense(3, name="out")(pooled(x) if x.ndim > 2 else x)

    def once(self, name, choice):
        """A choice that depends on sizes is made once, for the whole network: no walk can foresee `if` in Python."""
        return DECIDED.setdefault((self.steps, name), choice)

    def do_conv(self, name, values, shared, features, size, strides, bias):
        x = values[-1]
        if x.ndim != 4:
            return nn.Dense(features, use_bias=bias, name=name)(x)
        strides = strides if min(x.shape[1:3]) > 2 else 1
        return nn.Conv(features, (size, size), strides=strides, use_bias=bias, name=name)(x)

    def do_norm(self, name, values, shared):
        return norm(name)(values[-1])

    def do_layer_norm(self, name, values, shared):
        return nn.LayerNorm(name=name)(values[-1])

    def do_activation(self, name, values, shared, kind):
        return ACTIVATIONS[kind](values[-1])

    def do_depthwise(self, name, values, shared, multiplier):
        x = values[-1]
        if x.ndim != 4:
            return x
        n = x.shape[-1]
        return nn.Conv(n * multiplier, (3, 3), feature_group_count=n, name=name)(x)

    def do_grouped(self, name, values, shared, groups, each):
        """A convolution to a multiple of the groups, and one in groups."""
        if values[-1].ndim != 4:
            return values[-1]
        x = nn.relu(nn.Conv(4 * groups, (1, 1), name=f"{name}_in")(values[-1]))
        return nn.Conv(each * groups, (3, 3), feature_group_count=groups, name=name)(x)

    def do_pool(self, name, values, shared, kind):
        x = values[-1]
        if x.ndim != 4 or min(x.shape[1:3]) < 2:
            return x
        return (nn.max_pool if kind else nn.avg_pool)(x, (2, 2), (2, 2))

    def do_squeeze(self, name, values, shared, features):
        x = values[-1]
        s = nn.relu(nn.Dense(features, name=f"{name}_a")(pooled(x) if x.ndim > 2 else x))
        s = nn.sigmoid(nn.Dense(x.shape[-1], name=f"{name}_b")(s))
        return x * s.reshape(s.shape[0], *(1,) * (x.ndim - 2), -1)

    def do_residual(self, name, values, shared, features, scale, activation):
        x = values[-1]
        make = nn.Dense if x.ndim != 4 else lambda n, name: nn.Conv(n, (3, 3), name=name)
        y = ACTIVATIONS[activation](norm(f"{name}_n")(make(features, name=f"{name}_a")(x)))
        y = make(x.shape[-1], name=f"{name}_b")(y)
        if scale:
            y = y * self.param(f"{name}_gamma", nn.initializers.ones, (1,) * (y.ndim - 1) + (y.shape[-1],))
        return x + y

    def do_add(self, name, values, shared, back):
        """Adds an older value, projected where it does not fit."""
        x, old = values[-1], values[-1 - back % len(values)]
        if x.shape[:-1] != old.shape[:-1]:
            return x
        fits = self.once(name, x.shape == old.shape)
        return x + (old if fits else nn.Dense(x.shape[-1], name=name)(old))

    def do_concat(self, name, values, shared, back):
        x, old = values[-1], values[-1 - back % len(values)]
        return jnp.concatenate([x, old], -1) if x.shape[:-1] == old.shape[:-1] else x

    def do_halves(self, name, values, shared, how):
        """GLU, or one half changed and both put together again."""
        x = values[-1]
        if self.once(name, x.shape[-1] % 2):
            x = nn.Dense(6, name=name)(x)
        a, b = jnp.split(x, 2, axis=-1)
        return a * nn.sigmoid(b) if how else jnp.concatenate([nn.tanh(b), a], -1)

    def do_slice(self, name, values, shared, start):
        x = values[-1]
        return x[..., start:] if self.once(name, x.shape[-1] > start + 1) else x

    def do_flatten(self, name, values, shared):
        return values[-1].reshape(values[-1].shape[0], -1)

    def do_shuffle(self, name, values, shared):
        x = values[-1]
        if self.once(name, x.shape[-1] % 2):
            return x
        return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)

    def do_shared(self, name, values, shared, features):
        """One layer, twice: it must be as wide as what it reads."""
        x = values[-1]
        layer = nn.Dense(x.shape[-1], name=name)
        return layer(nn.relu(layer(x)))

    def do_attention(self, name, values, shared, heads, derived):
        x = values[-1]
        if x.ndim == 2:
            return x
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if not derived:
            y = nn.MultiHeadDotProductAttention(num_heads=heads, qkv_features=4 * heads, name=name)(tokens)
        else:
            q, k, v = (nn.Dense(4 * heads, name=f"{name}_{n}")(tokens).reshape(*tokens.shape[:2], -1, 4) for n in "qkv")
            y = jnp.einsum("bhst,bthd->bshd", nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k) / 2), v)
            y = y.reshape(*tokens.shape[:2], -1)
        return nn.Dense(x.shape[-1], name=f"{name}_o")(y.reshape(*tokens.shape[:2], -1)).reshape(x.shape)

    def do_scale(self, name, values, shared, by_size):
        x = values[-1]
        if by_size:
            return x * x.shape[-1] ** -0.5
        return x * self.param(name, nn.initializers.ones, (1,) * (x.ndim - 1) + (x.shape[-1],))

    def do_where(self, name, values, shared):
        return jnp.where(values[-1] > 0, values[-1], 0.1 * values[-1])


def step(kind, *options):
    return st.tuples(st.just(kind), *options)


features, few = st.integers(2, 8), st.integers(1, 3)
STEPS = st.lists(
    st.one_of(
        step("conv", features, st.sampled_from([1, 3]), st.integers(1, 2), st.booleans()),
        step("conv", features, st.sampled_from([1, 3]), st.just(1), st.booleans()),
        step("norm"),
        step("activation", st.sampled_from(sorted(ACTIVATIONS))),
        step("depthwise", st.integers(1, 2)),
        step("grouped", st.integers(2, 3), few),
        step("pool", st.booleans()),
        step("squeeze", features),
        step("residual", features, st.booleans(), st.sampled_from(sorted(ACTIVATIONS))),
        step("add", few),
        step("concat", few),
        step("halves", st.booleans()),
        step("slice", few),
        step("flatten"),
        step("layer_norm"),
        step("shuffle"),
        step("shared", features),
        step("attention", few, st.booleans()),
        step("scale", st.booleans()),
        step("where"),
    ),
    min_size=2,
    max_size=8,
).map(tuple)


@example((("conv", 4, 3, 1, True), ("residual", 3, True, "relu"), ("concat", 1), ("flatten",)))
@example((("conv", 6, 1, 1, True), ("shuffle",), ("halves", False), ("conv", 4, 1, 1, False)))
@example((("norm",), ("halves", False)))
@example((("grouped", 2, 1), ("norm",), ("attention", 3, False), ("conv", 4, 1, 1, True)))
@example((("grouped", 2, 1), ("attention", 3, False), ("residual", 4, False, "silu"), ("concat", 3), ("where",)))
@settings(max_examples=EXAMPLES, derandomize=EXAMPLES <= 25, suppress_health_check=list(HealthCheck), print_blob=True)
@given(STEPS)
def test_any_network_is_exact_or_says_why_not(steps):
    module, x = Random(steps), image(4, 4, 3, batch=2)
    try:
        network = traced(module, x)  # which counts that every index is in a group, or frozen for a reason
    except ValueError as error:
        assert "nothing in this network can be pruned" in str(error)
        return
    prove(network, variables_of(module, x), x, hows=("half",), seed=len(steps))


@pytest.mark.parametrize(
    ("steps", "free"),
    [
        ((("conv", 4, 3, 1, True), ("activation", "relu"), ("grouped", 2, 2)), {"conv0", "grouped2"}),
        ((("conv", 5, 3, 2, True), ("depthwise", 2), ("squeeze", 3)), {"conv0", "squeeze2_a"}),
        (
            (("conv", 4, 3, 1, False), ("norm",), ("residual", 3, False, "gelu"), ("attention", 2, True)),
            {"residual2_a", "residual2_a+residual2_n:branch", "attention3_k"},
        ),
    ],
)
def test_what_is_generated_can_be_pruned(steps, free):
    """So that the promise above is not an empty one."""
    network = traced(Random(steps), jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32))
    assert {group.name for group in network.topology.groups} == free
