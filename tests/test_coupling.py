"""Small networks with the groups and frozen axes that tracing must find.

Each is proved: students with random units removed compute the gated network's logits and cost what was predicted.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import (
    Cases,
    branch,
    channels,
    check,
    groups,
    image,
    network,
    neurons,
    norm,
    out,
    pooled,
    prove,
    traced,
    variables_of,
)  # fmt: skip

from kdsearch_jax.pruning.network import trace

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE, VECTOR, TOKENS = (6, 6, 3), (12,), (4, 8)
case = Cases()


# --- convolutions ---------------------------------------------------------------------------------------------------


@case(IMAGE, channels(a=6, b=5), {"a/kernel[0]": "window", "a/kernel[2]": "fixed size", "out/kernel[1]": "output"})
def strided_and_dilated(m, x):
    x = nn.relu(norm("n")(nn.Conv(6, (3, 3), strides=2, name="a")(x)))
    return out(pooled(nn.relu(nn.Conv(5, (3, 3), kernel_dilation=2, name="b")(x))))


@case(IMAGE, channels(a=6, b=5))
def transposed_convolution(m, x):
    x = nn.relu(nn.ConvTranspose(6, (3, 3), strides=(2, 2), name="a")(x))
    return out(pooled(nn.relu(nn.ConvTranspose(5, (2, 2), strides=(2, 2), padding="VALID", name="b")(x))))


@case(IMAGE, channels(a=6, b=5))
def depthwise(m, x):
    x = nn.relu(nn.Conv(6, (1, 1), name="a")(x))
    x = nn.relu(norm("n")(nn.Conv(6, (3, 3), feature_group_count=6, name="d")(x)))
    return out(pooled(nn.relu(nn.Conv(5, (1, 1), name="b")(x))))


@case(IMAGE, channels(a=4))
def depthwise_with_multiplier(m, x):
    x = nn.relu(nn.Conv(4, (1, 1), name="a")(x))
    return out(pooled(nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="d")(x))))


@case(IMAGE, {"a": ("groups", 4)}, {"g/kernel[2]": "the inputs of each group"})
def grouped(m, x):
    x = nn.relu(nn.Conv(8, (1, 1), name="a")(x))
    return out(pooled(nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, name="g")(x))))


@case(IMAGE, {"a": ("groups", 2)})
def groups_of_groups(m, x):
    x = nn.relu(nn.Conv(8, (1, 1), name="a")(x))
    x = nn.relu(norm("n")(nn.Conv(8, (3, 3), feature_group_count=2, name="g")(x)))
    return out(pooled(nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="g2")(x))))


# --- dots -----------------------------------------------------------------------------------------------------------


@case(VECTOR, {"a": ("neurons", 4), "a#2": ("neurons", 3), "b": ("neurons", 5)})
def dense_general(m, x):
    x = nn.relu(nn.DenseGeneral((4, 3), name="a")(x))
    return out(nn.relu(nn.DenseGeneral(5, axis=(-2, -1), name="b")(x)))


@case(TOKENS, neurons(q=8, w=5, p=7), {"p[0]": "fixed size in dot_general"})
def einsum_with_batch_axes(m, x):
    y = nn.relu(nn.Dense(8, name="q")(x))
    y = nn.relu(jnp.einsum("bsc,co->bso", y, m.param("w", nn.initializers.normal(), (y.shape[-1], 5))))
    p = m.param("p", nn.initializers.normal(), (4, y.shape[-1], 7))
    return out(pooled(nn.relu(jnp.einsum("bso,sod->bsd", y, p))))


@case(VECTOR, neurons(b=5, k=7), {"a/kernel[1]": "not used as stored"})
def kernel_behind_a_nonlinear_function(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    k = m.param("k", nn.initializers.normal(), (6, 7))
    s = m.param("s", nn.initializers.ones, (1, 7))  # linear, but not along the axis that is read
    return out(nn.relu(nn.Dense(5, name="b")(x @ (jnp.exp(k) * s))))


@case(VECTOR, neurons(a=6, k=5))
def kernel_times_a_mask(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    k = m.param("k", nn.initializers.normal(), (x.shape[-1], 5))
    return out(nn.relu(x @ (k * m.param("s", nn.initializers.ones, (x.shape[-1], 1)))))


@case((3, 4), {"a": ("width", 6), **neurons(b=5)})
def gram_matrix(m, x):
    x = nn.Dense(6, name="a")(x)
    return out(nn.relu(nn.Dense(5, name="b")(jnp.einsum("bsc,btc->bst", x, x))).mean(1))


@case((5,), neurons(d=6), {"e/embedding[0]": "indexed by gather"})
def tied_embedding(m, x):
    embed = nn.Embed(7, 6, name="e")
    x = embed((10 * jnp.abs(x)).astype(jnp.int32) % 7)
    return embed.attend(nn.relu(nn.Dense(6, name="d")(x))).mean(1)


@case(VECTOR, neurons(a=6, b=12))
def size_derived_from_another(m, x):
    """`b` is twice as wide as `a`; a student's `b` may have any width."""
    x = nn.relu(nn.Dense(6, name="a")(x))
    return out(nn.relu(nn.Dense(2 * x.shape[-1], name="b")(x)))


@case(IMAGE, channels(a=6, b=5))
def transposed_convolution_with_a_flipped_kernel(m, x):
    x = nn.relu(nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True, name="a")(x))
    return out(pooled(nn.relu(nn.ConvTranspose(5, (2, 2), transpose_kernel=True, name="b")(x))))


# --- moving axes ----------------------------------------------------------------------------------------------------


@case(IMAGE, {"a": ("channels", 4), "b": ("neurons", 7)})
def flattened(m, x):
    x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="a")(x)), (2, 2), (2, 2))
    return out(nn.relu(nn.Dense(7, name="b")(x.reshape(x.shape[0], -1))))


@case(IMAGE, channels(a=5))
def transposed(m, x):
    return out(nn.relu(nn.Conv(5, (3, 3), name="a")(x)).transpose(0, 3, 1, 2).mean((2, 3)))


@case(TOKENS, neurons(q=3), {"s[3]": "fixed size in mul"})
def split_into_as_many_as_there_are(m, x):
    y = nn.relu(nn.Dense(12, name="q")(x).reshape(*x.shape[:2], -1, 4))
    y = y * m.param("s", nn.initializers.ones, (1, 1, 1, 4))
    return out(pooled(y.reshape(*x.shape[:2], -1)))


@case(TOKENS, {"k": ("heads", 3), "o": ("neurons", 8)})
def attention_heads(m, x):
    q, k, v = (nn.Dense(12, name=name)(x).reshape(*x.shape[:2], -1, 4) for name in "qkv")
    weights = nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k) / 2.0)
    y = jnp.einsum("bhst,bthd->bshd", weights, v).reshape(*x.shape[:2], -1)
    return out(pooled(nn.Dense(8, name="o")(y)))


@case(TOKENS, neurons(o=8), {f"{n}/kernel[1]": "(cannot reshape" for n in "qkv"})
def attention_with_a_written_number_of_heads(m, x):
    q, k, v = (nn.Dense(12, name=name)(x).reshape(*x.shape[:2], 3, 4) for name in "qkv")
    weights = nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k) / 2.0)
    y = jnp.einsum("bhst,bthd->bshd", weights, v).reshape(*x.shape[:2], 12)
    return out(pooled(nn.Dense(8, name="o")(y)))


@case(
    TOKENS,
    {
        "a": ("width", 8), "att/key": ("heads", 4), "att/key#2": ("queries", 2), "att/value": ("values", 2),
        **branch("att/key+n"),
    },
)  # fmt: skip
def attention_of_linen(m, x):
    x = nn.Dense(8, name="a")(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="att")(nn.LayerNorm(name="n")(x))
    return out(x.mean(1))


@case(IMAGE, channels(a=4, c0=4, c1=4))
def dense_block(m, x):
    x = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
    for i in range(2):
        x = jnp.concatenate([x, nn.relu(nn.Conv(4, (3, 3), name=f"c{i}")(norm(f"n{i}")(x)))], -1)
    return out(pooled(x))


@case((8, 8, 3), channels(a=4, b=6, c=5, up=4))
def u_net(m, x):
    a = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
    b = nn.relu(nn.Conv(6, (3, 3), name="b")(nn.max_pool(a, (2, 2), (2, 2))))
    b = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="up")(b)
    return out(pooled(nn.relu(nn.Conv(5, (3, 3), name="c")(jnp.concatenate([a, b], -1)))))


@case(VECTOR, {**neurons(b=4), "a#2": ("neurons", 4), **branch("c")}, {"a/kernel[1]": "needs this size"})
def sliced_at_a_written_place(m, x):
    x = nn.relu(nn.Dense(8, name="a")(x))
    return out(nn.relu(nn.Dense(4, name="b")(x[:, :4]) + nn.Dense(4, name="c")(x[:, 4:])))


@case(VECTOR, neurons(b=4), {"a/kernel[1]": "no kernel reads it"})
def slice_that_would_show_others(m, x):
    """The last three of eight channels: with one removed, the code still takes three."""
    return out(nn.relu(nn.Dense(4, name="b")(nn.relu(nn.Dense(8, name="a")(x))[:, -3:])))


@case(VECTOR, {**neurons(b=4), **branch("b")}, {"a/kernel[1]": "needs this size"})
def window_in_the_middle(m, x):
    """The sizes fit when a channel outside of the window is removed; only labels show that the window moved."""
    x = nn.relu(nn.Dense(8, name="a")(x))
    return out(nn.relu(nn.Dense(4, name="b")(x) + nn.Dense(4, name="c")(x[:, 2:5])))


@case(VECTOR, neurons(a=4))
def gated_linear_unit(m, x):
    a, b = jnp.split(nn.Dense(8, name="a")(x), 2, axis=-1)
    return out(a * nn.sigmoid(b))


@case(VECTOR, {**neurons(a=4, b=4), **branch("c")})
def halves_that_go_separate_ways(m, x):
    """`split` moves the middle when one half loses a unit, so the halves are paired unit by unit."""
    a, b = jnp.split(nn.relu(nn.Dense(8, name="a")(x)), 2, axis=-1)
    return out(nn.relu(nn.Dense(4, name="b")(a) + nn.Dense(4, name="c")(b)))


@case(VECTOR, neurons(a=7, b=5))
def halves_that_change_places(m, x):
    a, b = jnp.split(nn.Dense(14, name="a")(x), 2, axis=-1)
    return out(nn.relu(nn.Dense(5, name="b")(jnp.concatenate([jnp.tanh(b), a], -1))))


@case(VECTOR, neurons(a=2, b=2))
def halves_of_two(m, x):
    """Groups that can lose only one unit."""
    a, b = jnp.split(nn.relu(nn.Dense(4, name="a")(x)), 2, axis=-1)
    return out(jnp.tanh(nn.Dense(2, name="b")(a)) * nn.Dense(2, name="c")(b))


@case(IMAGE, channels(a=4, b=5))
def channel_shuffle(m, x):
    """Runs at any even width, but computes something else unless the halves lose the same units."""
    x = nn.relu(nn.Conv(8, (1, 1), name="a")(x))
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, c // 2).swapaxes(-1, -2).reshape(b, h, w, c)
    return out(pooled(nn.relu(nn.Conv(5, (1, 1), name="b")(x))))


@case(IMAGE, channels(a=4, b=5), {"out/kernel[0]": "fixed index (padding"})
def padded(m, x):
    x = jnp.pad(nn.relu(nn.Conv(4, (3, 3), name="a")(x)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = nn.relu(nn.Conv(5, (3, 3), padding="VALID", name="b")(x))
    return out(pooled(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 2)))))


@case(IMAGE, channels(a=4, b=5))
def pools_and_reductions(m, x):
    x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="a")(x)), (2, 2), (2, 2))
    return out(jnp.max(nn.avg_pool(nn.Conv(5, (3, 3), name="b")(x), (2, 2), (1, 1)), (1, 2)))


@case(IMAGE, neurons(b=5), {"a/kernel[3]": "pooled by reduce_window_max"})
def pooled_over_channels(m, x):
    x = nn.Conv(6, (3, 3), name="a")(x)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 1, 2), (1, 1, 1, 2), "VALID")
    return out(nn.relu(nn.Dense(5, name="b")(pooled(x))))


@case(VECTOR, neurons(a=2, b=5), {"a/kernel[1]": "needs this size"})
def last_two_in_place_of_the_first_two(m, x):
    """The two channels in the middle are free, since all indices are counted from the ends."""
    x = nn.relu(nn.Dense(6, name="a")(x))
    return out(nn.relu(nn.Dense(5, name="b")(jnp.concatenate([x[:, ::-1][:, :2], x[:, 2:]], -1))))


# --- elementwise, calls and loops -----------------------------------------------------------------------------------


@case(VECTOR, neurons(a=6))
def where_and_select(m, x):
    x = nn.Dense(6, name="a")(x)
    x = jnp.where(x > 0, x, 0.1 * x)
    return out(jax.lax.select(x > 1, x, jnp.ones_like(x)))


@case(VECTOR, neurons(a=6, b=5))
def checkpointed_and_custom_derivatives(m, x):
    x = nn.silu(nn.remat(nn.Dense)(6, name="a")(x))
    return out(jax.nn.relu6(nn.Dense(5, name="b")(x)))


class Residual(nn.Module):
    """One step of a loop over layers."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.relu(nn.Dense(5, name="up")(x))
        return x + nn.Dense(8, name="down")(h), None


@case(VECTOR, {"a": ("neurons", 8), "layers/up": ("neurons", 5)}, {"layers/up/kernel[0]": "stacked over the steps"})
def loop_over_layers(m, x):
    loop = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return out(loop(name="layers")(nn.Dense(8, name="a")(x), None)[0])


@case((6, 4), {**neurons(b=6), "cell/hf": ("neurons", 5)})
def recurrent(m, x):
    x = nn.RNN(nn.LSTMCell(5, name="cell"), name="rnn")(x)
    return out(nn.relu(nn.Dense(6, name="b")(x[:, -1])))


@case(VECTOR, neurons(a=6))
def shared_layer(m, x):
    shared = nn.Dense(6, name="d")
    return out(nn.relu(shared(nn.relu(shared(nn.Dense(6, name="a")(x))))))


@case(IMAGE, {"a": ("channels", 6), "b": ("channels", 5), "s1": ("neurons", 4)})
def squeeze_and_excitation(m, x):
    x = nn.relu(nn.Conv(6, (3, 3), name="a")(x))
    s = nn.relu(nn.Dense(4, name="s1")(pooled(x)))
    x = x * nn.sigmoid(nn.Dense(x.shape[-1], name="s2")(s))[:, None, None, :]
    return out(pooled(nn.relu(nn.Conv(5, (1, 1), name="b")(x))))


# --- what mixes, and what is not understood -------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm], ids=lambda layer: layer.__name__)
def test_normalisation_over_the_units_masks_them(layer):
    @network
    def net(m, x):
        x = layer(name="n")(nn.relu(nn.Dense(6, name="a")(x)))
        return out(nn.relu(nn.Dense(5, name="b")(x)))

    x = image(*VECTOR)
    found = traced(net, x)
    assert groups(found) == {"a": ("width", 6), **neurons(b=5)}
    assert [group.masked for group in found.topology.groups] == [True, False]
    prove(found, variables_of(net, x), x)


@case(VECTOR, neurons(a=6, b=5))
def scaled_by_its_size(m, x):
    x = nn.Dense(6, name="a")(x)
    return out(nn.relu(nn.Dense(5, name="b")(nn.relu(x) * x.shape[-1] ** -0.5)))


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "its size enters the computation as a number"})
def raised_to_its_size(m, x):
    x = nn.sigmoid(nn.Dense(6, name="a")(x))
    return out(nn.relu(nn.Dense(5, name="b")(jax.lax.integer_pow(x, x.shape[-1]))))


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "its size enters the computation as a number, in reduce_sum"})
def divided_by_a_count_of_ones(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    return out(nn.relu(nn.Dense(5, name="b")(x / jnp.ones_like(x[:1]).sum())))


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "in tanh of an_operation_more_from_some_size_on (tests/test_coupling.py:"})
def an_operation_more_from_some_size_on(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    x = jnp.tanh(x) if x.shape[-1] >= 6 else x
    return out(nn.relu(nn.Dense(5, name="b")(x)))


@case(
    VECTOR,
    neurons(b=5),
    {"a/kernel[1]": "in sin of an_operation_more_below_some_size_at_the_end (tests/test_coupling.py:"},
)
def an_operation_more_below_some_size_at_the_end(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    y = out(nn.relu(nn.Dense(5, name="b")(x)))
    return y if x.shape[-1] >= 6 else jnp.sin(y)


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "in add of as_many_operations_as_units (tests/test_coupling.py:"})
def as_many_operations_as_units(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    for _ in range(x.shape[-1]):
        x = x + 1.0
    return out(nn.relu(nn.Dense(5, name="b")(x)))


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "combined with a tensor of fixed size in add"})
def added_to_its_index(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    return out(nn.relu(nn.Dense(5, name="b")(x + jnp.arange(x.shape[-1], dtype=x.dtype)[None])))


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "which operations there are"})
def path_by_size(m, x):
    x = nn.Dense(6, name="a")(x)
    return out(nn.relu(nn.Dense(5, name="b")(jnp.tanh(x) if x.shape[-1] == 6 else nn.relu(x))))


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "its units are mixed by sort"})
def sorted_(m, x):
    return out(nn.relu(nn.Dense(5, name="b")(jnp.sort(nn.Dense(6, name="a")(x), -1))))


def on_the_host(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "the unknown primitive pure_callback of"})
def unknown_primitive(m, x):
    return out(nn.relu(nn.Dense(5, name="b")(on_the_host(nn.Dense(6, name="a")(x)))))


@case(VECTOR, neurons(c=5), {"a/kernel[1]": "fixed size in dot_general"})
def conditional(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    x = jax.lax.cond(x[0, 0] > 0, lambda x: 2 * x, lambda x: x @ jnp.ones((6, 6)), x)
    return out(nn.relu(nn.Dense(5, name="c")(x)))


# --- residual branches ----------------------------------------------------------------------------------------------


@case(IMAGE, {**channels(a=6, b=5), **branch("b+n2")})
def identity_shortcut(m, x):
    x = nn.relu(nn.Conv(6, (3, 3), name="a")(x))
    y = nn.relu(norm("n1")(nn.Conv(5, (3, 3), name="b")(x)))
    return out(pooled(nn.relu(x + norm("n2")(nn.Conv(6, (3, 3), name="c")(y)))))


@case(IMAGE, {**channels(a=6, b=5, c=7), **branch("b+n2")})
def projected_shortcut(m, x):
    x = nn.relu(nn.Conv(6, (3, 3), name="a")(x))
    y = nn.relu(norm("n1")(nn.Conv(5, (3, 3), strides=2, name="b")(x)))
    y = norm("n2")(nn.Conv(7, (3, 3), name="c")(y))
    return out(pooled(nn.relu(norm("np")(nn.Conv(7, (1, 1), strides=2, name="p")(x)) + y)))


@case(IMAGE, {**channels(a=6, b=5), **branch("b+n2")})
def pre_activation(m, x):
    x = nn.Conv(6, (3, 3), name="a")(x)
    y = nn.Conv(5, (3, 3), name="b")(nn.relu(norm("n1")(x)))
    x = x + nn.Conv(6, (3, 3), name="c")(nn.relu(norm("n2")(y)))
    return out(pooled(nn.relu(norm("n3")(x))))


@case(TOKENS, {"a": ("width", 8), "b": ("neurons", 5), **branch("b+n")})
def pre_norm_mlp(m, x):
    x = nn.Dense(8, name="a")(x)
    y = nn.gelu(nn.Dense(5, name="b")(nn.LayerNorm(name="n")(x)))
    return out(pooled(x + nn.Dense(8, name="c")(y)))


@case(VECTOR, {**neurons(a=6, b=5), **branch("b+c")})
def layer_scale(m, x):
    x = nn.Dense(6, name="a")(x)
    y = nn.Dense(6, name="c")(nn.relu(nn.Dense(5, name="b")(x)))
    return out(x + m.param("gamma", nn.initializers.ones, (1, x.shape[-1])) * y)


@case(VECTOR, neurons(a=6), {"branch_behind_tanh": "a residual branch that no parameters scale"})
def branch_behind_tanh(m, x):
    x = nn.Dense(6, name="a")(x)
    return out(x + jnp.tanh(nn.Dense(6, name="b")(x)))


@case(VECTOR, {**neurons(a=6, b=5, c1=4), **branch("c1+c2"), **branch("b+d")})
def branch_in_a_branch(m, x):
    x = nn.Dense(6, name="a")(x)
    y = nn.relu(nn.Dense(5, name="b")(x))
    y = y + nn.Dense(5, name="c2")(nn.relu(nn.Dense(4, name="c1")(y)))
    return out(nn.relu(x + nn.Dense(6, name="d")(y)))


@case(VECTOR, {**neurons(a=6), **branch("e")})
def branch_with_a_shared_layer(m, x):
    shared = nn.Dense(6, name="d")
    x = shared(nn.relu(nn.Dense(6, name="a")(x)))
    return out(x + nn.Dense(6, name="e")(nn.relu(shared(x))))


@pytest.mark.parametrize(("module", "shape", "free", "frozen"), case)
def test_rule(module, shape, free, frozen):
    check(module, shape, free, frozen, ("half", "one"))


def test_unknown_primitives_are_named_in_the_description():
    @network
    def net(m, x):
        return out(nn.relu(nn.Dense(5, name="b")(on_the_host(nn.Dense(6, name="a")(x)))))

    text = trace(net, image(*VECTOR)).topology.describe()
    assert "unknown primitive: pure_callback" in text and "params/a/kernel[axis 1]" in text
