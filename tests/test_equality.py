"""Equality by the scale of each output: wrong students are caught whatever the network returns, right ones pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from proof import ANY, random_gates, traced, variables_of

from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import equality, surgery
from kdsearch_jax.pruning.network import trace

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 12)).astype(np.float32)
LEGAL = RNG.random((8, 5)) < 0.7
LEGAL[:, 0], LEGAL[:, 4] = True, False
SMALLEST = float(np.finfo(np.float32).min)


def masked(value, legal):
    """A head that replaces the logits of illegal classes."""
    return lambda z, w: jnp.where(legal, z[:, :5], value)


def top(z):
    return jax.lax.top_k(z, 2)


# Each from two heads of six numbers near 1, z and w, behind trunks of their own.
OUTPUTS = {
    "logits": lambda z, w: (z, w),
    "masked by -1e9": lambda z, w: (masked(-1e9, LEGAL)(z, w), w),
    "masked by -inf": lambda z, w: (masked(-jnp.inf, LEGAL)(z, w), w),
    "masked by the smallest float": lambda z, w: (masked(SMALLEST, LEGAL)(z, w), w),
    "masked by adding -1e9": lambda z, w: (z[:, :5] - 1e9 * ~LEGAL, w),
    "a row that is a mask": lambda z, w: jnp.stack([z[:, :5], w[:, :5], jnp.where(LEGAL, 0.0, -jnp.inf)], 1),
    "boxes and scores": lambda z, w: {"boxes": 1280 * nn.sigmoid(z), "scores": nn.sigmoid(w - 9)},
    "boxes and scores in one array": lambda z, w: jnp.concatenate([1280 * nn.sigmoid(z), nn.sigmoid(w - 9)], -1),
    "boxes and scores in rows": lambda z, w: jnp.stack([1280 * nn.sigmoid(z), nn.sigmoid(w - 9)], 1),
    "tiny probabilities": lambda z, w: (nn.softmax(30 * z), nn.sigmoid(w - 40)),
    "saturated": lambda z, w: (nn.sigmoid(30 * z), nn.sigmoid(200 + w)),
    "a large offset": lambda z, w: (z + 1e4, w * 1e-3 + 1e4),
    "an offset out of reach": lambda z, w: (z + 1e8, w * 1e-3 + 1e8),
    "integers next to floats": lambda z, w: (z.argmax(-1), top(w)),
    "integers alone": lambda z, w: (z.argmax(-1), w > 0),
    "a constant next to others": lambda z, w: (jnp.ones((4, 2)), z, 0.0, w, None, "a name"),
    "NaN in some places": lambda z, w: (jnp.where(LEGAL, z[:, :5], jnp.nan), w),
    "empty arrays": lambda z, w: (z[:, :0], z, w),
    "no axis of the batch": lambda z, w: (z.mean(), w.max(0)),
    "bfloat16": lambda z, w: (z.astype(jnp.bfloat16), w.astype(jnp.bfloat16).astype(jnp.float32)),
    "float16": lambda z, w: (z.astype(jnp.float16), w),
    "complex": lambda z, w: jnp.stack([jnp.fft.fft(z), 1e6 * jnp.fft.fft(w)]),
    "an embedding": lambda z, w: tuple(v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (z, nn.relu(w))),
    "per pixel": lambda z, w: z[:, :, None, None] * jnp.sin(w[:, None, :, None] + jnp.arange(3.0)[None, None, None]),
}


class Two(nn.Module):
    """Two trunks of two layers, and a head each."""

    end: str

    @nn.compact
    def __call__(self, x):
        heads = []
        for name in "zw":
            h = nn.relu(nn.Dense(12, name=f"{name}_first")(x))
            h = jnp.tanh(nn.Dense(12, name=f"{name}_second")(h))
            heads.append(nn.Dense(6, name=f"{name}_head")(h))
        return OUTPUTS[self.end](*heads)


def noise(value):
    """Another kernel of the same standard deviation."""
    return np.random.default_rng(1).normal(size=value.shape).astype(np.float32) * np.std(value)


WRONG = {"noise": noise, "transposed": lambda value: value.T, "lost": lambda value: 0 * value}


def students(module, *inputs):
    """(network, its variables, gates, keep, the student's variables)."""
    network, rng = traced(module, *inputs), np.random.default_rng(3)
    variables, gates = variables_of(module, *inputs), random_gates(network.topology, rng)
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in network.topology.groups}
    return network, variables, gates, keep, surgery.slice_network(variables, gates, keep, network, ANY)[0]


def changed(variables, path, change):
    flat = traverse_util.flatten_dict(variables, sep="/", keep_empty_nodes=True)
    return traverse_util.unflatten_dict({**flat, path: jnp.asarray(change(np.asarray(flat[path])))}, sep="/")


@pytest.mark.parametrize("end", OUTPUTS)
def test_wrong_students_are_caught_whatever_the_network_returns(end):
    *cut, sliced = students(Two(end), X)
    proof = surgery.verify(*cut, sliced, X)
    assert proof["difference"] <= surgery.TOLERANCE
    for head in "zw":
        for leaf, change in (("kernel", "noise"), ("kernel", "transposed"), ("bias", "lost")):
            wrong = changed(sliced, f"params/{head}_second/{leaf}", WRONG[change])
            with pytest.raises(surgery.SurgeryError, match=f"{head}_second"):
                surgery.verify(*cut, wrong, X)


# --- proofs that would be empty ---------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two layers whose input or output may be replaced."""

    zero: bool = False
    deaf: bool = False
    broken: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8, name="first")(0 * x if self.deaf else x))
        x = nn.Dense(3, name="second")(x)
        return x * jnp.nan if self.broken else 0 * x if self.zero else x


def test_a_batch_of_one_and_examples_that_are_alike_prove_as_much():
    for x in (X[:1], np.zeros((4, 12), np.float32), np.ones((4, 12), np.float32)):
        *cut, sliced = students(Small(), x)
        assert surgery.verify(*cut, sliced, x)["responding"] == 1
        for path, change in (("first/kernel", "noise"), ("second/kernel", "noise"), ("first/bias", "lost")):
            with pytest.raises(surgery.SurgeryError, match=path.split("/")[0]):
                surgery.verify(*cut, changed(sliced, f"params/{path}", WRONG[change]), x)


def test_layers_are_compared_where_the_outputs_say_nothing():
    """As for a head whose kernel is initialised with zeros."""
    *cut, sliced = students(Small(zero=True), X)
    assert surgery.verify(*cut, sliced, X)["responding"] == 0
    for layer in ("first", "second"):
        with pytest.raises(surgery.SurgeryError, match=layer):
            surgery.verify(*cut, changed(sliced, f"params/{layer}/kernel", noise), X)


def test_an_empty_proof_is_refused():
    *cut, sliced = students(Small(deaf=True), X)
    with pytest.raises(surgery.SurgeryError, match="empty"):
        surgery.verify(*cut, sliced, X)


def test_a_network_of_nan_is_refused():
    *cut, sliced = students(Small(broken=True), X)
    with pytest.raises(surgery.SurgeryError, match="NaN"):
        surgery.verify(*cut, sliced, X)


def test_integers_of_an_nnx_module_are_proved_by_its_layers():
    class Classifier(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(12, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x))).argmax(-1)

    functional, variables = FunctionalModule.split(Classifier(nnx.Rngs(0)))
    network = trace(functional, X)
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in network.topology.groups}
    cut = network, variables, random_gates(network.topology, np.random.default_rng(3)), keep
    sliced, _ = surgery.slice_network(*cut[1:], network, ANY)
    surgery.verify(*cut, sliced, X)
    with pytest.raises(surgery.SurgeryError, match="first in first"):
        surgery.verify(*cut, changed(sliced, "params/first/kernel", lambda value: 1.001 * value), X)


# --- the measure ------------------------------------------------------------------------------------------------------


def compared(function, variables, change, x=X):
    """The difference of a function's outputs from its outputs changed."""

    def named(variables, x):
        return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(function(variables, x)))}

    run = jax.jit(named)
    rounding = equality.rounding_of(run.trace(variables, x).jaxpr)
    expected = equality.reference_outputs(run, variables, (x,), rounding)
    return equality.difference(expected, {name: change(np.array(value)) for name, value in run(variables, x).items()})


KERNEL = {"params": {"kernel": RNG.normal(size=(12, 7)).astype(np.float32)}}


def product(variables, x):
    return x @ variables["params"]["kernel"]


def one_entry(by):
    def change(value):
        value[2, 3] += by
        return value

    return change


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_entry_may_differ_by_a_hundred_thousandth_of_its_own_scale(offset, scale):
    """Whatever is added to it and whatever is next to it, up to the rounding of the sum."""

    def function(variables, x):
        x = product(variables, x)
        columns = jnp.arange(7)[None] == 3
        return jnp.where(columns, scale * x + offset, 1e4 * x)

    rounding = 1e-6 * offset / scale
    size = np.linalg.norm(X[2] * KERNEL["params"]["kernel"][:, 3])
    assert compared(function, KERNEL, one_entry(1e-6 * scale * size)) <= equality.TOLERANCE
    if rounding < 1e-3:
        far = scale * size * (1e-4 + 100 * rounding)
        assert equality.TOLERANCE < compared(function, KERNEL, one_entry(far)) <= 1


def test_what_does_not_move_must_be_equal():
    for fill in (-1e9, -np.inf, np.nan, SMALLEST, 0.0, 1.0):
        assert compared(lambda v, x, fill=fill: product(v, x).at[2, 3].set(fill), KERNEL, lambda value: value) == 0
        for other in (-3e9, -np.inf, np.inf, np.nan, 3.0):
            if other != fill and not (np.isnan(other) and np.isnan(fill)):

                def change(value, other=other):
                    value[2, 3] = other
                    return value

                found = compared(lambda v, x, fill=fill: product(v, x).at[2, 3].set(fill), KERNEL, change)
                assert not found <= equality.TOLERANCE


def test_a_few_of_many_integers_may_flip():
    def function(variables, x):
        return jnp.repeat(product(variables, x) > 0, 1000, axis=0)

    def flipped(count):
        def change(value):
            value[:count, 0] = ~value[:count, 0]
            return value

        return change

    assert compared(function, KERNEL, flipped(5)) <= equality.TOLERANCE < compared(function, KERNEL, flipped(6))
    assert compared(lambda v, x: product(v, x) > 0, KERNEL, flipped(1)) > equality.TOLERANCE


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rounding_is_that_of_the_coarsest_type(dtype):
    """Found inside of loops and calls; a few last bits may differ, a tenth may not."""

    def function(variables, x):
        def body(carry, _):
            return carry, jax.jit(lambda k: (x.astype(dtype) @ k.astype(dtype)).astype(jnp.float32))(carry)

        return jax.lax.scan(body, variables["params"]["kernel"], None, length=2)[1]

    eps = float(jnp.finfo(dtype).eps)
    traced = jax.make_jaxpr(function)(KERNEL, X)
    assert equality.rounding_of(traced) == max(eps, equality.FLOAT32)
    assert compared(function, KERNEL, lambda value: value * (1 + eps)) <= equality.TOLERANCE
    assert compared(function, KERNEL, lambda value: value * 1.1) > equality.TOLERANCE


def test_another_structure_is_infinitely_different():
    expected = equality.reference_outputs(lambda v, x: {"a": product(v, x)}, KERNEL, (X,))
    assert equality.difference(expected, {"b": np.zeros((8, 7))}) == np.inf
    assert equality.difference(expected, {"a": np.zeros((8, 6))}) == np.inf
    found = equality.compare(lambda v, x: {"a": product(v, x)}, KERNEL, lambda v, x: {}, KERNEL, (X,))
    assert found.first == "a" and found.difference == np.inf
