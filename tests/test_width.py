"""The width of a residual stream, query and key sizes: exact although norms and products of activations mix them."""

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from proof import groups, image, out, prove, reasons, traced, variables_of

import kdsearch_jax as kd
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.tracing.masking import masked

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::kdsearch_jax.pruning.budgets.BudgetWarning"),
]

X = image(5, 4)


class ByHand(nn.Module):
    """Norms as third-party models write them."""

    how: str

    @nn.compact
    def __call__(self, x):
        y = {
            "variance": lambda: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1),
            "rms": lambda: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1),
            "einsum": lambda: x / jnp.sqrt(jnp.einsum("...d,...d->...", x, x)[..., None] * (1 / x.shape[-1]) + 0.1),
            "length": lambda: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
            "literal": lambda: x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) / 12 + 0.1),
        }[self.how]()
        return self.param("scale", nn.initializers.ones, (1, 1, x.shape[-1])) * y


class Layer(nn.Module):
    """A layer of a transformer."""

    norm: type = nn.LayerNorm
    post: bool = False
    attention: bool = True
    width: int = 12

    @nn.compact
    def __call__(self, x):
        def residual(norm, function):
            return norm(x + function(x)) if self.post else x + function(norm(x))

        if self.attention:
            attend = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")
            x = residual(self.norm(name="norm1"), lambda y: attend(y, y, y))
        up, down = nn.Dense(9, name="up"), nn.Dense(self.width, name="down")
        return residual(self.norm(name="norm2"), lambda y: down(nn.gelu(up(y))))


class Step(nn.Module):
    """A layer as the body of a loop."""

    layer: Any

    @nn.compact
    def __call__(self, x, _):
        return self.layer(name="layer")(x), None


class Transformer(nn.Module):
    layer: Any
    loop: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(12, name="embed")(x) + self.param("position", nn.initializers.normal(), (1, 5, 12))
        if self.loop:
            stack = nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack(self.layer, name="layers")(x, None)
        else:
            for name in ("a", "b"):
                x = self.layer(name=name)(x)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return out(self.layer().norm(name="last")(x).mean(1))


def layers(norm=nn.LayerNorm, post=False, attention=False):
    return partial(Layer, norm, post, attention)


@pytest.mark.parametrize(
    "layer",
    [
        layers(attention=True), layers(nn.RMSNorm, post=True), layers(post=True), layers(partial(nn.GroupNorm, 1)),
        *(layers(partial(ByHand, how)) for how in ("variance", "rms", "einsum", "length")),
    ],
    ids=["layer", "rms after", "layer after", "group", "variance", "rms", "einsum", "length"],
)  # fmt: skip
def test_a_residual_stream_is_one_group(layer):
    net = Transformer(layer)
    found = traced(net, X)
    streams = [group for group in found.topology.groups if group.size == 12]
    assert len(streams) == 1 and streams[0].masked
    assert {"params/embed/kernel", "params/b/down/kernel", "params/out/kernel"} <= {m.leaf for m in streams[0].members}
    assert not any("mixed by" in reason for reason in reasons(found).values())
    prove(found, variables_of(net, X), X, hows=("half",))


def test_a_size_written_into_a_norm_freezes_the_stream():
    found = traced(Transformer(layers(partial(ByHand, "literal"))), X)
    assert 12 not in [group.size for group in found.topology.groups]
    assert "equals its size" in reasons(found)["embed/kernel[1]"]


def test_a_norm_inside_of_a_loop():
    net = Transformer(layers(nn.RMSNorm), loop=True)
    found = traced(net, X)
    assert ("width", 12) in groups(found).values()
    prove(found, variables_of(net, X), X)


def test_tied_embeddings_follow_the_stream():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 12, name="embed")
            return embed.attend(nn.RMSNorm(name="last")(Layer(nn.RMSNorm, attention=False, name="a")(embed(tokens))))

    tokens = np.random.default_rng(0).integers(0, 11, (3, 5)).astype(np.int32)
    found = traced(Decoder(), tokens)
    (stream,) = (group for group in found.topology.groups if group.kind == "width")
    assert [m.gated and m.consumes for m in stream.members if m.leaf == "params/embed/embedding"] == [True]
    prove(found, variables_of(Decoder(), tokens), tokens)


def test_query_and_key_sizes_go_together_and_keep_the_scores():
    net = Transformer(layers(nn.RMSNorm, attention=True))
    network, variables = traced(net, X), variables_of(net, X)
    (first, _) = (group for group in network.topology.groups if group.kind == "queries")
    assert {m.leaf.split("/")[3] for m in first.members} == {"query", "key"}
    gates, keep = gates_lib.init(network.topology), gates_lib.keep_all(network.topology)
    keep[first.name] = np.arange(4) < 2
    for leaf in ("kernel", "bias"):  # the size that goes contributes nothing, so the student is the network itself
        variables["params"]["a"]["attention"]["query"][leaf][..., 2:] = 0
    student = network.student(keep)
    from kdsearch_jax.pruning.surgery import slice_variables

    sliced = slice_variables(variables, network, keep)
    expected = net.apply(variables, X)
    np.testing.assert_allclose(student.apply(sliced, X), expected, atol=1e-5 * np.abs(expected).max())
    assert gates[first.name].shape == (4,)
    prove(network, variables_of(net, X), X, hows=("half",))


# --- searches ---------------------------------------------------------------------------------------------------------

STEPS = 24
WHOLE = kd.Rule(".*", kinds=("width", "queries", "neurons"))  # heads and layers stay


def _loss(outputs):
    return jnp.mean(jnp.square(outputs - jnp.sin(X[:, 0, :3])))


@cache
def linen_search():
    net = Transformer(layers(attention=True))
    return net, kd.GatedSearch(kd.trace(net, X), kd.Budget(macs=0.4), steps=STEPS, every=3, rules=[WHOLE])


def test_a_linen_search_removes_width():
    net, search = linen_search()
    variables = variables_of(net, X)
    params = search.init(variables)
    np.testing.assert_allclose(search.apply(params, X), net.apply(variables, X), rtol=1e-5, atol=1e-6)
    tx = search.optimizer(optax.adam(3e-3))

    @jax.jit
    def step(params, state, key):
        rngs = {"dropout": key}
        grads = jax.grad(lambda params: _loss(search.apply(params, X, train=True, rngs=rngs)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in range(STEPS):
        params, state = step(params, state, jax.random.key(number))
    student = search.finish(params, state, X)
    assert min(mask.sum() for mask in student.keep.values() if mask.size == 12) < 12
    expected = search.apply({**params, "gates": gates_lib.mask(params["gates"], student.keep)}, X)
    np.testing.assert_allclose(student.module.apply(student.variables, X), expected, atol=1e-4)


def test_variables_alone_are_not_the_gated_network():
    net, search = linen_search()
    params = search.init(variables_of(net, X))
    with pytest.raises(ValueError, match=r"search\.apply"):
        search.fold(params)
    gates = {name: gate * (jnp.arange(len(gate)) > 0) for name, gate in params["gates"].items()}
    with pytest.raises(ValueError, match=r"GatedSearch\.apply"):
        kd.fold({"params": params["params"]}, gates, search.network)


def test_what_the_trace_did_not_see_is_refused():
    """A call in another mode of the model, in which its channels are sorted."""

    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x, order=False):
            x = nn.LayerNorm(name="norm")(nn.Dense(6, name="a")(x))
            return out(jnp.sort(x, -1) if order else x)

    network, variables = kd.trace(Sorted(), X), variables_of(Sorted(), X)
    (group,) = network.topology.groups
    run = masked(Sorted().apply, network.topology, {group.name: np.arange(6) > 2})
    run(variables, X)
    with pytest.raises(ValueError, match="sort"):
        run(variables, X, order=True)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, 8, decode=False, dropout_rate=0.1, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 9, rngs=rngs), nnx.Linear(9, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.block = nnx.Linear(4, 12, rngs=rngs), Block(12, rngs)
        self.statistics = nnx.BatchNorm(12, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(12, rngs=rngs), nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.block(self.statistics(self.stem(x)))).mean(1))


def test_an_nnx_search_removes_width():
    model = Encoder(nnx.Rngs(0, dropout=1))
    model.eval()
    search = kd.GatedSearch(kd.trace(model, X), kd.Budget(macs=0.4), steps=STEPS, every=3, rules=[WHOLE])
    assert {group.kind for group in search.topology.groups} == {"width", "queries", "neurons"}
    gated = search.init(model)
    np.testing.assert_allclose(gated(X), model(X), rtol=1e-5, atol=1e-6)
    gated.train()
    optimizer = nnx.Optimizer(gated, search.optimizer(optax.adam(3e-3)), wrt=nnx.Param)

    @nnx.jit
    def step(gated, optimizer):
        optimizer.update(gated, nnx.grad(lambda gated: _loss(gated(X)))(gated))

    before = gated.model.statistics.mean.get_value()
    for _ in range(STEPS):
        step(gated, optimizer)
    assert not np.array_equal(before, gated.model.statistics.mean.get_value())
    gated.eval()
    student = search.finish(gated, optimizer, X)
    assert type(student.module) is Encoder and student.module.stem.out_features < 12
    with pytest.raises(ValueError, match="masked"):
        gated.folded()
