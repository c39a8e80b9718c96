"""Networks that nobody thought of: put together at random, cut at random, and proved exact, or frozen with a reason.

30 networks without further ado; `KDSEARCH_RANDOM=500 pytest -s tests/test_random_networks.py -k any_network` for 500,
other ones each time. What once failed stands below as a network of its own.
"""

import os
from collections import Counter

import flax.linen as nn
import jax.numpy as jnp
import pytest
import random_networks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from proof import image, prove, traced, variables_of
from random_networks import HOWS, Nothing, check

from kdsearch_jax.pruning.network import trace

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEW = 20
NETWORKS = int(os.environ.get("KDSEARCH_RANDOM", FEW))


def test_any_network_is_exact_or_says_why_not():
    outcomes = Counter()

    @settings(
        max_examples=NETWORKS, derandomize=NETWORKS <= FEW, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(random_networks.programs(), st.sampled_from(HOWS), st.integers(0, 7))
    def proved(program, how, number):
        try:
            outcome = check(program, [how] if NETWORKS <= FEW else ["half", how], seed=number, gradient=number == 0)
        except Nothing:
            outcome = "nothing can be pruned"
        outcomes[outcome] += 1
        event(outcome)

    proved()
    print(dict(outcomes))
    assert outcomes["nothing can be pruned"] <= 0.2 * outcomes.total()  # else the promise would be an empty one
    assert outcomes["outgrown"] <= 0.05 * outcomes.total()


# --- what once failed -------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    """The right half is read by a layer; where it begins is a whole number of half the units."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="a")(x))
        left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        right = nn.relu(nn.Dense(5, name="b")(right))
        return nn.Dense(3, name="out")(jnp.concatenate([left, right], -1))


class TwoAtOnce(nn.Module):
    """x + (left + right), all of one input: the outer branch holds both."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="a")(x)
        left = nn.Dense(4, name="left")(nn.relu(nn.Dense(9, name="l")(x)))
        right = nn.Dense(4, name="right")(jnp.tanh(nn.Dense(8, name="r")(x)))
        return nn.Dense(3, name="out")(x + (left + right))


class Highway(nn.Module):
    """A gate mixes a branch and what it read; the branch ends in a GELU, which has a third power in it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(1, name="b")(nn.Dense(4, name="a")(x))
        gate = nn.sigmoid(nn.Dense(1, name="gate")(x))
        return nn.Dense(3, name="out")(gate * nn.gelu(nn.Dense(1, name="h")(x)) + (1 - gate) * x)


class PartUnused(nn.Module):
    """A slice of a concatenation leaves one of two layers out."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="a")(x)
        left, right = nn.Dense(8, name="left")(x), nn.Dense(8, name="right")(jnp.tanh(nn.Dense(9, name="r")(x)))
        return nn.Dense(3, name="out")(jnp.concatenate([left, right], -1)[..., 1:3])


@pytest.mark.parametrize(
    "module", [Halved(), TwoAtOnce(), Highway(), PartUnused()], ids=lambda module: type(module).__name__
)
def test_what_once_failed(module):
    """Halved: one unit less went unnoticed. TwoAtOnce, Highway, PartUnused: XLA does not count what has no effect."""
    x = image(7)
    prove(traced(module, x), variables_of(module, x), x, hows=("half", "one", "branches"))


def test_a_network_without_parameters_says_so():
    with pytest.raises(ValueError, match="nothing in this network can be pruned"):
        trace(nn.Sequential([nn.relu]), image(7))
