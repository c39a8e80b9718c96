"""Trials: what the model's own code can shrink, and which of its numbers must follow.

Small networks as authors write them, with the groups that must be found, and proof that random students are exact.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from proof import groups, image, prove, reasons, traced, variables_of

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.base import integer_attributes, replace_integer
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.student import cut_student

pytestmark = pytest.mark.usefixtures("quick_compilation")


def proved(module, x, kind=nn.Module):
    """The network, of which random cuts are exact."""
    if kind is nnx.Module:
        module, variables = FunctionalModule.split(module)
    else:
        variables = variables_of(module, x)
    found = traced(module, x)
    prove(found, variables, x, hows=("half", "one"))
    return found


def sizes(found):
    return {name: size for name, (kind, size) in groups(found).items() if kind != "branches"}


# --- operands of size 1 -----------------------------------------------------------------------------------------------


class Weighed(nn.Module):
    """Features times something that has one channel."""

    how: str

    @nn.compact
    def __call__(self, x):
        score = nn.Dense(4, name="score")(x)
        one = {
            "slice": lambda: nn.sigmoid(score)[..., 1:2],
            "split": lambda: jnp.split(nn.softmax(score), 4, -1)[2],
            "input": lambda: x[..., 3:4],
            "dynamic": lambda: jax.lax.dynamic_slice_in_dim(x, 1, 1, -1),
            "taken": lambda: jnp.take(score, jnp.array([0]), -1),
            "top": lambda: jax.lax.top_k(score, 2)[0][..., :1],
            "kept": lambda: score.mean(-1, keepdims=True),
            "weight": lambda: self.param("weight", nn.initializers.ones, (1, x.shape[-2], 1)),
        }[self.how]()
        y = nn.Dense(12, name="a")(x)
        y = jnp.where(one > 0, y, 0.1 * y) + jnp.minimum(y, one) * one
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(9, name="b")(y)))


HOWS = ["slice", "split", "input", "dynamic", "taken", "top", "kept", "weight"]


@pytest.mark.parametrize("how", HOWS)
def test_an_operand_of_size_1_freezes_nothing(how):
    found = proved(Weighed(how), image(5, 7))
    assert sizes(found).items() >= {"a": 12, "b": 9}.items()


# --- frozen for its own fault -----------------------------------------------------------------------------------------


class Numbered(nn.Module):
    """Layers with Flax's automatic names; a literal in the code holds the third."""

    @nn.compact
    def __call__(self, x):
        for i in range(5):
            x = nn.relu(nn.Dense(14)(x))
            if i == 2:
                x = jnp.concatenate([x[:, :5], jnp.tanh(x[:, 5:])], -1)
        return nn.Dense(3)(x)


def test_layers_that_are_named_alike_are_not_frozen_with_one():
    found = proved(Numbered(), image(6))
    assert sizes(found) == {f"Dense_{i}": 14 for i in (0, 1, 3, 4)}
    why = {axis: reason for axis, reason in reasons(found).items() if "needs this size" in reason}
    assert why and all(axis.startswith(("Dense_2/", "Dense_3/kernel[0]")) for axis in why)
    assert all("test_trials.py:" in reason for reason in why.values())


# --- sizes held in the user's own modules -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    heads: int = 4
    size: int = 3


class Attention(nn.Module):
    """Multi-head attention by hand; its sizes are fields, a configuration, or made in `setup`."""

    config: Config = Config()
    heads: int = 4
    where: str = "field"

    def setup(self):
        self.size = self.config.size
        self.own = self.heads
        self.q, self.k, self.v = (nn.Dense(self.heads * self.size) for _ in "qkv")
        self.o = nn.Dense(8)

    def __call__(self, x):
        n = {"field": self.heads, "config": self.config.heads, "setup": self.own, "rest": -1}[self.where]
        q, k, v = (layer(x).reshape(*x.shape[:-1], n, self.size) for layer in (self.q, self.k, self.v))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / self.size**0.5)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:-1], n * self.size if n > 0 else -1))


class Blocks(nn.Module):
    where: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="stem")(x)
        for _ in range(2):
            x = x + Attention(where=self.where)(nn.LayerNorm()(x))
        return nn.Dense(3, name="out")(x)


@pytest.mark.parametrize("where", ["field", "config", "setup", "rest"])
def test_a_number_of_heads_follows(where):
    found = proved(Blocks(where), image(5, 6))
    assert {name: kind for name, (kind, size) in groups(found).items() if kind == "heads"}.keys() == {
        "Attention_0/k",
        "Attention_1/k",
    }
    assert len(found.size_attributes) == (0 if where == "rest" else 2)


class Shared(nn.Module):
    """One number for two layers, both reshaped by it; a third layer has a size of its own."""

    width: int = 12

    @nn.compact
    def __call__(self, x):
        n = x.shape[0]
        x = nn.relu(nn.Dense(self.width, name="a")(x)).reshape(n, 5, self.width)
        x = nn.relu(nn.Dense(self.width, name="b")(x)).reshape(n, 5 * self.width).reshape(n, 5, self.width)
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(7, name="c")(x)).mean(1))


def test_one_number_for_two_groups_keeps_them_equal():
    assert sizes(proved(Shared(), image(5, 6))) == {"a": 12, "c": 7}


class Literals(nn.Module):
    """Kernels, biases and a statistic whose shapes are literals in the code."""

    @nn.compact
    def __call__(self, x):
        for i, shape in enumerate([(6, 12), (12, 12)]):
            kernel = self.param(f"kernel{i}", nn.initializers.lecun_normal(), shape)
            x = jnp.tanh(x @ kernel + self.param(f"bias{i}", nn.initializers.zeros, (1, 12)))
        scale = self.variable("batch_stats", "scale", lambda: jnp.ones((1, 12)))
        return (x * scale.value) @ self.param("out", nn.initializers.lecun_normal(), (12, 3))


def test_a_literal_shape_of_a_parameter_is_no_obstacle():
    found = proved(Literals(), image(6))
    assert sorted(sizes(found).values()) == [12, 12]
    keep = {group.name: np.arange(group.size) < 5 for group in found.topology.groups}
    fresh = found.student(keep).init(jax.random.key(0), image(6))  # a student can be initialised, too
    assert {leaf.shape for leaf in jax.tree.leaves(fresh)} == {(6, 5), (5, 5), (1, 5), (5, 3)}


class Hand(nnx.Module):
    """NNX: numbers as attributes, of which one is the product of two."""

    def __init__(self, rngs, heads=4, size=3, width=10):
        self.heads, self.inner, self.config = heads, heads * size, SimpleNamespace(width=width)
        self.size = size
        self.qkv = nnx.Linear(6, 3 * heads * size, rngs=rngs)
        self.o = nnx.Linear(heads * size, width, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        q, k, v = (y.reshape(*x.shape[:-1], self.heads, self.size) for y in jnp.split(self.qkv(x), 3, -1))
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / self.size**0.5)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:-1], self.inner)
        return self.out(nnx.relu(self.o(y)).reshape(x.shape[0], -1, self.config.width).mean(1))


def test_numbers_of_nnx_modules_follow_and_are_true():
    x = image(5, 6)
    module = Hand(nnx.Rngs(0))
    found = proved(module, x, nnx.Module)
    assert sorted(sizes(found).values()) == [4, 10]
    functional, variables = FunctionalModule.split(module)
    keep = {g.name: np.arange(g.size) < g.size // 2 for g in found.topology.groups}
    ones = {g.name: np.ones(g.size, np.float32) for g in found.topology.groups}
    sliced, architecture = surgery.slice_network(variables, ones, keep, found, Architecture("none", input_shape=(5, 6)))
    student = Architecture.from_json(architecture.to_json()).module(functional).bind(sliced)
    assert (student.heads, student.inner, student.config.width) == (2, 6, 5)
    assert module.config.width == 10  # the teacher's own record is not shared with the student
    np.testing.assert_allclose(student(x), found.student(keep).apply(sliced, x), rtol=1e-6)


def test_numbers_are_found_and_replaced_wherever_they_are_held():
    held = {"a": 3, "b": (4, True, 1), "c": {"d": 5, "e": "6"}, "f": Config(), "_g": 7, "h": jnp.ones(3)}
    found = integer_attributes(held)
    assert found == {"a": 3, "b.0": 4, "c.d": 5, "f.layers": 4, "f.heads": 4, "f.size": 3}
    for name, number in found.items():
        attribute, _, inside = name.partition(".")
        changed = {**held, attribute: replace_integer(held[attribute], inside, number + 1)}
        assert integer_attributes(changed) == {**found, name: number + 1}
    assert integer_attributes(held) == found
    for name in ("f.none", "b.7", "c.e", "b.1"):
        attribute, _, inside = name.partition(".")
        with pytest.raises((KeyError, IndexError, AttributeError, TypeError)):
            replace_integer(held[attribute], inside, 2)


class ConfiguredAttention(nn.Module):
    """As in GPT-2: `setup` copies sizes of the configuration to the module, whose call reads the copies."""

    config: Any

    def setup(self):
        self.width, self.heads = self.config.width, self.config.heads
        self.size = self.width // self.heads
        self.qkv, self.o = nn.Dense(3 * self.width), nn.Dense(6)

    def __call__(self, x):
        q, k, v = (y.reshape(*x.shape[:2], self.heads, self.size) for y in jnp.split(self.qkv(x), 3, -1))
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)
        return jnp.tanh(self.o(y.reshape(*x.shape[:2], self.width)))


def test_a_module_follows_its_own_attributes_rather_than_its_configuration():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(ConfiguredAttention(SimpleNamespace(width=24, heads=4), name="attention")(x))

    found = proved(Model(), image(5, 6))
    assert sizes(found)["attention/qkv"] == 4
    assert sorted((each.path, each.name) for each in found.size_attributes) == [
        ("attention", "heads"),
        ("attention", "width"),
    ]


def test_a_student_whose_sizes_coincide_by_chance_is_refused():
    """The model adds a shortcut where two sizes are equal, which they are in this student only."""

    class Compared(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(24, name="a")(x))
            y = nn.Dense(32, name="b")(x)
            return nn.Dense(3, name="out")(nn.relu(x + y if x.shape[-1] == y.shape[-1] else y))

    found = trace(Compared(), image(6))
    keep = {group.name: np.arange(group.size) < 16 for group in found.topology.groups}
    ones = {group.name: np.ones(group.size, np.float32) for group in found.topology.groups}
    with pytest.raises(surgery.SurgeryError):
        cut_student(found, variables_of(Compared(), image(6)), ones, keep, (image(6),))


class Scaled(nn.Module):
    """A parameter that `setup` makes, as in the networks of transformers."""

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (1, 1, 6))

    def __call__(self, x):
        return x * self.scale


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.Dense(6, name="down")(nn.relu(nn.Dense(9, name="up")(Scaled(name="scaled")(x))))
        return nn.Dense(3, name="out")(x)


def test_a_dropped_layer_makes_no_parameters_in_setup():
    x = image(5, 6)
    module = Residual()
    prove(traced(module, x), variables_of(module, x), x, hows=("branches",))


# --- parts that belong together ---------------------------------------------------------------------------------------


class Parts(nn.Module):
    """A layer whose two or three parts are used apart."""

    how: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(12, name="a")(x)
        n = y.shape[-1] // 2
        if self.how == "split":
            left, right = jnp.split(y, 2, -1)
        elif self.how == "slices":
            left, right = y[..., :n], y[..., n:]
        elif self.how == "every other":
            left, right = y[..., ::2], y[..., 1::2]
        elif self.how == "dynamic":
            left, right = (jax.lax.dynamic_slice_in_dim(y, i * n, n, -1) for i in range(2))
        elif self.how == "reshaped":
            both = y.reshape(*y.shape[:-1], 2, n)
            left, right = both[..., 0, :], both[..., 1, :]
        else:
            left, middle, right = jnp.split(y, 3, -1)
            left = left * nn.sigmoid(middle)
        y = jnp.concatenate([nn.relu(left), nn.Dense(4, name="b")(jnp.tanh(right))], -1)
        return nn.Dense(3, name="out")(y)


@pytest.mark.parametrize("how", ["split", "slices", "every other", "dynamic", "reshaped", "thirds"])
def test_parts_are_paired_index_by_index(how):
    assert sizes(proved(Parts(how), image(5, 6))) == {"a": 4 if how == "thirds" else 6, "b": 4}


class Concatenated(nn.Module):
    """Two concatenated layers, read by a convolution in two groups, which is a layer or written by hand."""

    how: str

    @nn.compact
    def __call__(self, x):
        y = jnp.concatenate([nn.relu(nn.Conv(6, (3,), name=name)(x)) for name in "ab"], -1)
        if self.how == "by hand":
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 6, 8))
            dimensions = ("NWC", "WIO", "NWC")
            y = jax.lax.conv_general_dilated(
                y, kernel, (1,), "SAME", dimension_numbers=dimensions, feature_group_count=2
            )
        else:
            y = nn.Conv(8, (3,), feature_group_count=2, name="grouped")(y)
        return nn.Dense(3, name="out")(nn.relu(y).mean(1))


@pytest.mark.parametrize("how", ["layer", "by hand"])
def test_groups_of_a_convolution_lose_the_same_channels(how):
    assert sorted(sizes(proved(Concatenated(how), image(5, 6))).values()) == [4, 6]


class GroupedNNX(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Conv(6, 6, (3,), rngs=rngs) for _ in "ab")
        self.grouped = nnx.Conv(12, 8, (3,), feature_group_count=2, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.grouped(nnx.relu(jnp.concatenate([self.a(x), self.b(x)], -1))))
        return self.out(y).mean(1)


def test_groups_of_an_nnx_convolution_lose_the_same_channels():
    found = proved(GroupedNNX(nnx.Rngs(0)), image(5, 6), nnx.Module)
    assert sorted(sizes(found).values()) == [4, 6]
    keep = {g.name: np.arange(g.size) < 3 for g in found.topology.groups}
    assert found.student(keep).skeleton().grouped.feature_group_count == 2


def test_pairing_that_does_not_help_is_undone():
    """A literal holds the first part: the second loses units by itself, as it could without a pair."""

    class Written(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, name="a")(x))
            return nn.Dense(3, name="out")(nn.Dense(5, name="b")(x[:, :4]) * nn.Dense(5, name="c")(x[:, 4:]))

    found = trace(Written(), image(6))
    assert sizes(found) == {"a#2": 4, "b": 5}
