"""Residual branches as third-party code writes them: found, removed, proved, and absent from the compiled student."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import groups, image, network, norm, out, pooled, prove, reasons, traced, variables_of

from kdsearch_jax.pruning import gates, surgery
from kdsearch_jax.tracing.program import flatten_jaxpr

pytestmark = pytest.mark.usefixtures("quick_compilation")

normal = nn.initializers.normal()
CASES = []


def case(left, *branches):
    """A network with the names of its branches, and the number of products that remain without them."""

    def register(function):
        CASES.append(pytest.param(network(function), branches, left, id=function.__name__))
        return function

    return register


def mlp(name, x, width=8):
    return nn.Dense(width, name=f"{name}2")(nn.gelu(nn.Dense(5, name=f"{name}1")(x)))


def attention(name, x, *context):
    return nn.MultiHeadDotProductAttention(num_heads=2, name=name)(x, *context)


def layer_norm(name, x):
    return nn.LayerNorm(name=name)(x)


@case(2, "a/key+n1", "f1+n2")
def norm_first(m, x):
    x = nn.Dense(8, name="e")(x)
    x = x + attention("a", layer_norm("n1", x))
    return out(pooled(x + mlp("f", layer_norm("n2", x))))


@case(2, "a", "f1+f2")
def norm_last(m, x):
    x = nn.Dense(8, name="e")(x)
    x = layer_norm("n1", x + attention("a", x))
    return out(pooled(layer_norm("n2", x + mlp("f", x))))


@case(2, "a/key+n1", "f1+n2")
def norm_at_the_end_of_the_branch(m, x):
    x = nn.Dense(8, name="e")(x)
    x = x + layer_norm("n1", attention("a", x))
    return out(pooled(x + layer_norm("n2", mlp("f", x))))


@case(2, "a0", "f01+f02", "a1", "f11+f12")
def parallel_attention_and_mlp(m, x):
    """As in GPT-J and PaLM: attention and MLP read the same normalised input."""
    x = nn.Dense(8, name="e")(x)
    for i in range(2):
        h = layer_norm(f"n{i}", x)
        x = x + attention(f"a{i}", h) + mlp(f"f{i}", h)
    return out(pooled(x))


@case(2, "a", "a/key+n")
def attention_and_mlp_summed_first(m, x):
    x = nn.Dense(8, name="e")(x)
    h = layer_norm("n", x)
    return out(pooled((attention("a", h) + mlp("f", h)) + x))


@case(2, "a/key+n1", "f1+n2")
def layer_scale(m, x):
    x = nn.Dense(8, name="e")(x)
    x = x + m.param("g1", normal, (1, 1, 8)) * attention("a", layer_norm("n1", x))
    return out(pooled(x + m.param("g2", normal, (1, 1, 8)) * mlp("f", layer_norm("n2", x))))


@case(2, "a/key+n1", "f1+n2")
def stochastic_depth(m, x):
    x = nn.Dense(8, name="e")(x)
    drop = nn.Dropout(0.1, broadcast_dims=(1, 2), deterministic=True)
    x = x + 0.9 * drop(attention("a", layer_norm("n1", x)))
    return out(pooled((x + mlp("f", layer_norm("n2", x)) * 0.5) / np.sqrt(2.0)))


@case(2, "b1+s2")
def squeeze_and_excitation_at_the_end(m, x):
    x = nn.relu(nn.Conv(8, (1, 1), name="e")(x.reshape(x.shape[0], 2, 2, -1)))
    y = nn.relu(norm("b1")(nn.Conv(6, (3, 3), name="c1")(x)))
    y = norm("b2")(nn.Conv(x.shape[-1], (3, 3), name="c2")(y))
    s = nn.sigmoid(nn.Dense(y.shape[-1], name="s2")(nn.relu(nn.Dense(4, name="s1")(pooled(y)))))
    return out(pooled(nn.relu(x + y * s[:, None, None])))


@case(2, "f1+f2", "c1")
def gated_by_a_number_and_by_itself(m, x):
    x = nn.Dense(8, name="e")(x)
    x = x + jnp.tanh(m.param("g", normal, (1, 1, 1))) * mlp("f", x)
    a, b = jnp.split(nn.Dense(16, name="c1")(x), 2, -1)
    return out(pooled(x + a * nn.sigmoid(b)))


@case(2, "c1+tp")
def with_another_input(m, x):
    """As in diffusion models: a time embedding is added inside the branch."""
    time = nn.silu(nn.Dense(6, name="t")(x[:, 0]))
    x = nn.Dense(8, name="e")(x)
    h = nn.Dense(8, name="c1")(nn.silu(layer_norm("n1", x))) + nn.Dense(8, name="tp")(time)[:, None]
    return out(pooled(x + nn.Dense(8, name="c2")(nn.silu(layer_norm("n2", h)))))


@case(2, "a/key+n1")
def attention_to_another_input(m, x):
    context = nn.Dense(8, name="c")(x[:, :2])
    x = nn.Dense(8, name="e")(x)
    return out(pooled(x + attention("a", layer_norm("n1", x), context)))


@case(1, "f1+n")
def around_the_networks_input(m, x):
    return out(pooled(x + mlp("f", layer_norm("n", x))))


@case(5)
def dense_connections(m, x):
    x = nn.relu(nn.Dense(8, name="e")(x))
    for i in range(3):
        x = jnp.concatenate([x, nn.relu(nn.Dense(4, name=f"c{i}")(x))], -1)
    return out(pooled(x))


class UserTeacher(nn.Module):
    """A custom layer with a transposed kernel."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", normal, (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", nn.initializers.zeros, (self.features,))[None, None]


@case(2, "c1+n")
def custom_layers(m, x):
    x = UserTeacher(8, name="e")(x)
    return out(pooled(x + UserTeacher(8, name="c2")(nn.gelu(UserTeacher(8, name="c1")(layer_norm("n", x))))))


class Whole(nn.Module):
    """A custom layer that contains the addition, so it cannot be left out."""

    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(x) @ self.param("k", normal, (x.shape[-1],) * 2)


@case(3)
def addition_inside_a_layer(m, x):
    return out(pooled(Whole(name="r")(nn.Dense(8, name="e")(x))))


@pytest.mark.parametrize(("module", "names", "left"), CASES)
def test_branches(module, names, left):
    x = image(4, 8)
    found = traced(module, x)
    branches = [name for name, (kind, _) in groups(found).items() if kind == "branches"]
    assert sorted(branches) == sorted(f"{name}:branch" for name in names)
    variables = variables_of(module, x)
    prove(found, variables, x, hows=("half", "one"))
    keep = gates.keep_all(found.topology)
    keep |= {group.name: np.zeros(1, bool) for group in found.topology.groups if group.kind == "branches"}
    student, left_over = found.student(keep), surgery.slice_variables(variables, found, keep)
    program = flatten_jaxpr(jax.make_jaxpr(student.apply)(left_over, x))
    assert sum(op.name in ("dot_general", "conv_general_dilated") for op in program.ops) == left


def test_a_branch_that_nothing_scales_is_named():
    @network
    def net(m, x):
        x = nn.Dense(6, name="a")(x)
        return out(x + jnp.tanh(nn.Dense(6, name="b")(x)))

    assert "a residual branch that no parameters scale" in reasons(traced(net, image(12)))["net"]
