"""Wrong calls, and modules with unusual outputs or variables: each works, or the error says what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from proof import groups, image, network, out, prove, traced, variables_of

from kdsearch_jax.pruning.network import trace

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Trained(nn.Module):
    """A network with a required training switch."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(6, name="a")(x))
        x = nn.BatchNorm(use_running_average=not train, name="n")(x)
        return out(nn.Dropout(0.5, deterministic=not train, name="drop")(x))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "the call does not fit Trained.*'train'.*keywords by name"),
        ({"train": False, "mask": None}, "the call does not fit Trained.*'mask'"),
        ({"train": True}, "layer 'n' writes to its variables.*train=False"),
    ],
)
def test_a_call_that_does_not_fit_says_what_to_do(keywords, message):
    with pytest.raises(ValueError, match=message):
        trace(Trained(), image(12), **keywords)
    assert groups(trace(Trained(), image(12), train=False)) == {"a": ("neurons", 6)}


def test_a_random_layer_is_named():
    @network
    def net(m, x):
        return out(nn.Dropout(0.5, deterministic=False, name="drop")(nn.relu(nn.Dense(6, name="a")(x))))

    with pytest.raises(ValueError, match="layer 'drop' .*deterministic=True"):
        trace(net, image(12))


@network
def several(m, x):
    """Outputs without a batch axis, an integer, a boolean, a string and None."""
    x = nn.relu(nn.Dense(6, name="a")(x))
    y = out(x)
    return {"mean": y.mean(), "class": y.argmax(-1), "sure": y.max(-1) > 1, "name": "net", "none": None, "logits": y}


@network
def writes_and_sows(m, x):
    """Sown values are not among the variables that a call reads."""
    x = nn.relu(nn.Dense(6, name="a")(x))
    m.sow("intermediates", "hidden", x)
    m.sow("losses", "size", jnp.square(x).mean())
    return out(x)


class Reader(nn.Module):
    """Reads a layer that another module owns."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.relu(self.layer(x))


@network
def shared_between_two_modules(m, x):
    layer = nn.Dense(12, name="d")
    x = Reader(layer, name="first")(x)
    return out(nn.relu(nn.Dense(6, name="a")(Reader(layer, name="second")(x))))


@network
def no_batch_axis(m, x):
    return out(nn.relu(nn.Dense(6, name="a")(x))).sum(0)


@pytest.mark.parametrize(
    "module",
    [several, writes_and_sows, shared_between_two_modules, no_batch_axis],
    ids=lambda module: type(module).__name__,
)
def test_unusual_modules_work(module):
    x = image(12)
    found = traced(module, x)
    assert groups(found)["a"] == ("neurons", 6)
    prove(found, variables_of(module, x), x, hows=("half", "one"))


def test_a_network_without_parameters_cannot_be_pruned():
    with pytest.raises(ValueError, match="it has no parameters"):
        trace(network(lambda m, x: jax.nn.relu(x)), image(12))
