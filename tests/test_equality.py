"""The proof by each output's own scale: wrong students are caught whatever the network returns, right ones pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from proof import ANY, random_gates, traced, variables_of

from kdsearch_jax import equality, surgery
from kdsearch_jax.network import trace

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 12)).astype(np.float32)
LEGAL = RNG.random((8, 5)) < 0.7
LEGAL[:, 0], LEGAL[:, 4] = True, False
SMALLEST = float(np.finfo(np.float32).min)


def masked(value, legal):
    """A head that replaces the logits of what is not legal."""
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
    """A kernel of the same spread, that of another network."""
    return np.random.default_rng(1).normal(size=value.shape).astype(np.float32) * np.std(value)


WRONG = {"noise": noise, "transposed": lambda value: value.T, "lost": lambda value: 0 * value}


def students(module, *inputs):
    """(network, its variables, gates, what stays, the student's variables)."""
    network, rng = traced(module, *inputs), np.random.default_rng(3)
    variables, gates = variables_of(module, *inputs), random_gates(network.topology, rng)
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in network.topology.groups}
    return network, variables, gates, keep, surgery.prune(variables, gates, keep, network, ANY)[0]


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
            with pytest.raises(surgery.SurgeryError, match=f"first in {head}_second"):
                surgery.verify(*cut, wrong, X)
