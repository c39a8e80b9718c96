"""Every layer of `flax.linen` that holds sizes, and usual ways to combine them.

Each network has the groups that must be found, or the reason why not, and is proved as in `test_coupling`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import Cases, branch, channels, check, neurons, norm, out, pooled

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE, VECTOR, TOKENS = (6, 6, 3), (12,), (4, 8)
case = Cases()
normal = nn.initializers.normal()


def heads(**sizes):
    return {name: ("heads", size) for name, size in sizes.items()}


# --- layers that make units -----------------------------------------------------------------------------------------


@case(IMAGE, neurons(a=4), {"a/kernel[2]": "fixed size"})
def conv_local(m, x):
    """Its kernel has an entry for each position and input; its outputs can be pruned, its inputs cannot."""
    x = nn.relu(nn.ConvLocal(4, (3, 3), name="a")(x))
    return out(pooled(x))


@case(TOKENS, {"e": ("neurons", 3), "e#2": ("neurons", 5), "o": ("neurons", 6)})
def einsum(m, x):
    x = nn.relu(nn.Einsum((8, 3, 5), "btc,chd->bthd", name="e")(x))
    return out(pooled(nn.relu(nn.Einsum((3, 5, 6), "bthd,hdo->bto", name="o")(x))))


@case((5,), neurons(e=6))
def embedding(m, x):
    tokens = (10 * jnp.abs(x)).astype(jnp.int32) % 7
    x = nn.Embed(7, 6, name="e")(tokens)
    return out((x + m.param("places", normal, (1, 5, x.shape[-1]))).mean(1))


@case((5,), neurons(e=6), {"e/embedding[0]": "indexed by"})
def tied_embedding(m, x):
    embed = nn.Embed(7, 6, name="e")
    return embed.attend(nn.relu(embed((10 * jnp.abs(x)).astype(jnp.int32) % 7))).mean(1)


@case(VECTOR, {**neurons(d=6), "down": ("neurons", 2)})
def low_rank_adapter(m, x):
    update = nn.Dense(6, use_bias=False, name="up")(nn.Dense(2, use_bias=False, name="down")(x))
    return out(nn.relu(nn.Dense(6, name="d")(x) + update))


@case(VECTOR, neurons(a=6, b=6))
def sum_of_kernels(m, x):
    """The consuming kernel is a sum of two parameters, one of them as the imaginary part of a complex array."""
    x, y = nn.relu(nn.Dense(6, name="a")(x)), nn.relu(nn.Dense(6, name="b")(x))
    real, imaginary = (m.param(name, normal, (x.shape[-1], 3)) for name in ("real", "imaginary"))
    plain, less = (m.param(name, normal, (y.shape[-1], 3)) for name in ("plain", "less"))
    whole = x @ (real + 1j * imaginary)
    return jnp.abs(whole) + whole.imag + y @ (plain - 0.5 * less)


# --- attention ------------------------------------------------------------------------------------------------------


def attend(q, k, v, scale=0.5):
    """(batch, tokens, heads, size) each; scaled by a parameter."""
    weights = nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k) * scale)
    return jnp.einsum("bhst,bthd->bshd", weights, v)


@case(
    TOKENS,
    {"att/key": ("heads", 4), "att/key#2": ("queries", 2), "att/value": ("values", 2), "att/out": ("neurons", 8)},
)
def attention_of_linen(m, x):
    return out(pooled(nn.MultiHeadDotProductAttention(num_heads=4, name="att")(x)))


@case(TOKENS, {"qkv": ("heads", 3)})
def attention_from_one_projection(m, x):
    """Queries, keys and values in one kernel: 3 × heads × size."""
    qkv = nn.Dense(36, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, -1, 4), 2, 0)
    return out(pooled(attend(q, k, v).reshape(*x.shape[:2], -1)))


@case(TOKENS, {"qkv": ("heads", 3)})
def attention_by_heads_first(m, x):
    """Heads × (3 × size), as GPT-NeoX has it."""
    qkv = nn.Dense(36, name="qkv")(x).reshape(*x.shape[:2], -1, 12)
    return out(pooled(attend(*jnp.split(qkv, 3, axis=-1)).reshape(*x.shape[:2], -1)))


@case(TOKENS, {"k": ("heads", 2)})
def grouped_query_attention(m, x):
    """Two heads of keys and values for six of queries."""
    q = nn.Dense(24, name="q")(x).reshape(*x.shape[:2], -1, 4)
    k, v = (jnp.repeat(nn.Dense(8, name=n)(x).reshape(*x.shape[:2], -1, 4), 3, axis=2) for n in "kv")
    return out(pooled(attend(q, k, v).reshape(*x.shape[:2], -1)))


@case(TOKENS, heads(k=3))
def attention_with_rotated_places(m, x):
    q, k, v = (nn.Dense(12, name=n)(x).reshape(*x.shape[:2], -1, 4) for n in "qkv")
    angle = np.arange(4)[None, :, None, None] / np.array([1.0, 10.0, 1.0, 10.0])

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        return x * np.cos(angle) + jnp.concatenate([-b, a], -1) * np.sin(angle)

    return out(pooled(attend(rotate(q), rotate(k), v).reshape(*x.shape[:2], -1)))


@case(TOKENS, heads(k=3))
def attention_with_normalised_queries(m, x):
    q, k, v = (nn.Dense(12, name=n)(x).reshape(*x.shape[:2], -1, 4) for n in "qkv")
    q, k = nn.RMSNorm(name="nq")(q), nn.RMSNorm(name="nk")(k)
    return out(pooled(attend(q, k, v).reshape(*x.shape[:2], -1)))


@case(TOKENS, heads(k=3))
def attention_with_a_bias_of_relative_places(m, x):
    q, k, v = (nn.Dense(12, name=n)(x).reshape(*x.shape[:2], -1, 4) for n in "qkv")
    table = m.param("table", normal, (7, k.shape[2]))
    places = np.arange(4)[:, None] - np.arange(4)[None] + 3
    bias = table[places.reshape(-1)].reshape(4, 4, -1).transpose(2, 0, 1)
    weights = nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k) * 0.5 + bias[None])
    return out(pooled(jnp.einsum("bhst,bthd->bshd", weights, v).reshape(*x.shape[:2], -1)))


@case(TOKENS, heads(k=3))
def attention_of_jax(m, x):
    q, k, v = (nn.Dense(12, name=n)(x).reshape(*x.shape[:2], -1, 4) for n in "qkv")
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out(pooled(y.reshape(*x.shape[:2], -1)))


@case((64,), {**heads(k=3), **branch("k+v")}, {"e/kernel[1]": "test_layers.py:"})
def attention_in_shifted_windows(m, x):
    """As in Swin: roll, split into windows, attend, merge and roll back."""
    x = nn.Dense(8, name="e")(x.reshape(-1, 8, 8, 1))
    shifted = jnp.roll(x, (-1, -1), (1, 2))
    windows = shifted.reshape(-1, 4, 2, 4, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
    q, k, v = (nn.Dense(12, name=n)(windows).reshape(*windows.shape[:2], -1, 4) for n in "qkv")
    y = nn.Dense(8, name="o")(attend(q, k, v).reshape(*windows.shape[:2], -1))
    y = y.reshape(-1, 4, 4, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)
    return out(pooled(x + jnp.roll(y, (1, 1), (1, 2))))


# --- normalisation --------------------------------------------------------------------------------------------------


@case(IMAGE, channels(a=4, b=5))
def group_norm(m, x):
    x = nn.GroupNorm(4, name="n")(nn.relu(nn.Conv(8, (3, 3), name="a")(x)))
    return out(pooled(nn.relu(nn.Conv(5, (1, 1), name="b")(x))))


@case(IMAGE, channels(a=4))
def group_norm_by_group_size(m, x):
    return out(pooled(nn.relu(nn.GroupNorm(None, 2, name="n")(nn.Conv(8, (3, 3), name="a")(x)))))


@case(IMAGE, channels(a=8))
def instance_norm(m, x):
    return out(jnp.square(nn.InstanceNorm(name="n")(nn.Conv(8, (3, 3), name="a")(x))).mean((1, 2)))


@case(VECTOR, neurons(a=6), {"a/kernel[0]": "an axis of fixed size"})
def weight_norm(m, x):
    x = nn.relu(nn.WeightNorm(nn.Dense(6, name="a"), name="wa")(x))
    return out(nn.relu(x))


@case(VECTOR, {"s/a/kernel": ("neurons", 6), **neurons(b=5)})
def spectral_norm(m, x):
    x = nn.relu(nn.SpectralNorm(nn.Dense(6, name="a"), name="s")(x, update_stats=False))
    return out(nn.relu(nn.Dense(5, name="b")(x)))


@case(VECTOR, neurons(a=6, b=5))
def parametric_relu(m, x):
    x = nn.PReLU(name="p")(nn.Dense(6, name="a")(x))
    x = nn.Dense(5, name="b")(x)
    return out(jnp.where(x > 0, x, x * m.param("slope", normal, (1, x.shape[-1]))))


# --- recurrence -----------------------------------------------------------------------------------------------------


def recurrent(cell, **options):
    def net(m, x):
        y = nn.RNN(cell(5, name="cell", **options), name="rnn")(x)
        return out(nn.relu(nn.Dense(6, name="b")(y[:, -1])))

    net.__name__ = cell.__name__
    return net


for cell, name in [
    (nn.LSTMCell, "hf"), (nn.OptimizedLSTMCell, "hf"), (nn.GRUCell, "hn"), (nn.MGUCell, "hf"), (nn.SimpleCell, "h"),
]:  # fmt: skip
    case((6, 4), {f"cell/{name}": ("neurons", 5), **neurons(b=6)})(recurrent(cell))


@case((4, 6, 6, 2), {"cell/hh": ("channels", 5)})
def convolutional_lstm(m, x):
    x = nn.RNN(nn.ConvLSTMCell(5, (3, 3), name="cell"), name="rnn")(x)
    return out(pooled(x[:, -1]))


@case((6, 4), {"f/hf": ("neurons", 5), "b/hf": ("neurons", 5)})
def both_ways(m, x):
    rnns = [nn.RNN(nn.OptimizedLSTMCell(5, name=n), name=f"rnn_{n}") for n in "fb"]
    return out(pooled(nn.Bidirectional(*rnns, name="both")(x)))


class Stack(nn.Module):
    """One step of a loop over layers."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(10, name="up")(nn.LayerNorm(name="n")(x)))
        return x + nn.Dense(8, name="down")(h), None


@case(TOKENS, {"layers/up": ("neurons", 10)}, {"layers/up/kernel[0]": "stacked over the steps"})
def loop_of_checkpointed_layers(m, x):
    loop = nn.scan(nn.remat(Stack), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return out(pooled(loop(name="layers")(x, None)[0]))


class Wide(nn.Module):
    """A step that has parameters and a width of its own."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(10, name="up")(x))
        return x + nn.Dense(self.width, name="down")(h) * self.param("scale", normal, (1, 1, self.width)), None


@case(TOKENS, {"layers/up": ("neurons", 10)}, {"layers/up/kernel[0]": "stacked over the steps"})
def unrolled_loop_of_layers_with_a_width(m, x):
    loop = nn.scan(Wide, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, unroll=2)
    return out(pooled(loop(width=8, name="layers")(x, None)[0]))


# --- networks of third parties --------------------------------------------------------------------------------------


@case(TOKENS, {"wi": ("neurons", 5)})
def gated_mlp_from_one_projection(m, x):
    a, b = jnp.split(nn.Dense(10, name="wi")(x), 2, axis=-1)
    return out(pooled(a * nn.gelu(b)))


@case(TOKENS, {"wi": ("neurons", 5)})
def gated_mlp_by_reshape(m, x):
    y = nn.Dense(10, name="wi")(x).reshape(*x.shape[:2], 2, -1)
    return out(pooled(y[..., 0, :] * nn.silu(y[..., 1, :])))


@case(IMAGE, channels(a=5, b=4))
def depth_to_space(m, x):
    x = nn.relu(nn.Conv(20, (3, 3), name="a")(x))
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)
    return out(pooled(nn.relu(nn.Conv(4, (3, 3), name="b")(x))))


@case(IMAGE, channels(a=5, b=4))
def space_to_depth(m, x):
    x = nn.relu(nn.Conv(5, (3, 3), name="a")(x))
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
    return out(pooled(nn.relu(nn.Conv(4, (1, 1), name="b")(x))))


@case(IMAGE, channels(a=4, b=5))
def patch_merging(m, x):
    x = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
    x = jnp.concatenate([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return out(pooled(nn.relu(nn.Conv(5, (1, 1), name="b")(norm("n")(x)))))


@case((8, 8, 3), channels(a=4, b=5, d=4))
def shuffled_groups(m, x):
    """ShuffleNet: a grouped convolution, a shuffle, and a depthwise convolution."""
    x = nn.relu(nn.Conv(4, (1, 1), name="a")(x))
    x = nn.relu(nn.Conv(8, (1, 1), name="g")(x))
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
    x = nn.Conv(c, (3, 3), feature_group_count=c, name="d")(x)
    return out(pooled(nn.relu(nn.Conv(5, (1, 1), name="b")(x))))


@case(TOKENS, {**neurons(c1=6, c2=8, t1=5), **branch("c1+c2"), **branch("t1+t2")})
def mixer(m, x):
    x = nn.Dense(8, name="e")(x)
    y = nn.Dense(4, name="t2")(nn.gelu(nn.Dense(5, name="t1")(x.swapaxes(1, 2))))
    x = x + y.swapaxes(1, 2)
    return out(pooled(x + nn.Dense(8, name="c2")(nn.gelu(nn.Dense(6, name="c1")(x)))))


@case(TOKENS, neurons(e=8, b=5))
def class_token_and_places(m, x):
    x = nn.Dense(8, name="e")(x)
    token = jnp.tile(m.param("token", normal, (1, 1, x.shape[-1])), (x.shape[0], 1, 1))
    x = jnp.concatenate([token, x], 1)
    x = x + m.param("places", normal, (1, 5, x.shape[-1]))
    return out(nn.relu(nn.Dense(5, name="b")(x))[:, 0])


@case(IMAGE, channels(a=5, b=4))
def resized_and_padded(m, x):
    x = nn.relu(nn.Conv(5, (3, 3), name="a")(x))
    x = jax.image.resize(x, (x.shape[0], 12, 9, x.shape[-1]), "bilinear")
    x = jnp.pad(x, ((0, 0), (1, 1), (2, 2), (0, 0)), mode="reflect")
    return out(pooled(nn.hard_swish(nn.Conv(4, (3, 3), name="b")(x))))


@case(IMAGE, channels(a=5))
def pooled_to_a_grid(m, x):
    x = nn.relu(nn.Conv(5, (3, 3), name="a")(x))
    return out(x.reshape(x.shape[0], 2, 3, 2, 3, -1).max((2, 4)).reshape(x.shape[0], -1))


@case(IMAGE, channels(b=5), {"a/kernel[3]": "its units are mixed by reduce_max"})
def softmax_over_channels(m, x):
    x = nn.softmax(nn.Conv(4, (3, 3), name="a")(x))
    return out(pooled(nn.relu(nn.Conv(5, (1, 1), name="b")(x))))


@case(VECTOR, neurons(c=5), {"a/kernel[1]": "mixed by cumsum", "b/kernel[1]": "mixed by top_k"})
def summed_up_and_ranked(m, x):
    a = jnp.cumsum(nn.Dense(6, name="a")(x), -1)
    b = jax.lax.top_k(nn.Dense(6, name="b")(x), 3)[0]
    return out(nn.relu(nn.Dense(5, name="c")(jnp.concatenate([a, b], -1))))


@case(VECTOR, neurons(b=5), {"a/kernel[1]": "its units are mixed by reduce_max"})
def loop_until(m, x):
    x = nn.Dense(6, name="a")(x)
    x = jax.lax.while_loop(lambda x: jnp.max(x) < 3, lambda x: 2 * x + 1, x)
    return out(nn.relu(nn.Dense(5, name="b")(x)))


@case(VECTOR, neurons(a=6, b=5))
def loop_of_a_known_length_and_a_choice(m, x):
    choice = x[0, 0] > 0
    a = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x) + 0.1, nn.Dense(6, name="a")(x))
    x = nn.Dense(5, name="b")(nn.relu(a))
    return out(jax.lax.cond(choice, nn.relu, lambda x: 0.1 * x, x))


@case(IMAGE, channels(a=5))
def written_in_place(m, x):
    x = nn.relu(nn.Conv(5, (3, 3), name="a")(x))
    return out(pooled(x.at[:, 0].set(0.0).at[:, :, 1].add(x[:, :, 2])))


@case(TOKENS, neurons(a=6))
def stacked_and_taken_apart(m, x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    a, b = jnp.unstack(jnp.stack([x, 2 * x], 1), axis=1)
    return out(pooled(a + jnp.flip(b, 1)))


@pytest.mark.parametrize(("module", "shape", "free", "frozen"), case)
def test_layer(module, shape, free, frozen):
    check(module, shape, free, frozen, ("half", "one"))
