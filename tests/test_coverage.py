"""A part of the coverage that docs/coverage.md reports, as much as is quick; and that a trial can say no."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks.coverage import prove
from benchmarks.coverage.document import document
from benchmarks.coverage.own import CI
from benchmarks.coverage.packages import PACKAGES
from benchmarks.coverage.variant import CallSpec, Package, Record, Variant, images

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Body(nn.Module):
    """A small network that ends as it is told to."""

    end: str = "as it is"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4, name="out")(nn.relu(nn.Dense(12, name="inner")(x)))
        if self.end == "deaf":  # the parameters matter, the input does not
            x = nn.Dense(4, name="out2")(nn.relu(nn.Dense(12, name="inner2")(jnp.ones_like(x))))
        if self.end == "small":  # what is removed does not matter
            x = 1e-6 * x + jnp.sum(jnp.square(x - x)) + 1.0
        return x


class Bare(nn.Module):
    """Nothing that could go."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="out")(x)


def tried(module: nn.Module) -> Record:
    return prove.trial("test", Variant("it", lambda: CallSpec(module, (images(6),), {})))


@pytest.mark.parametrize("variant", CI, ids=lambda variant: variant.name)
def test_own_networks(variant):
    record = prove.trial("kdsearch_jax", variant)
    assert (record.status, record.reason) == ("passed", "")
    assert record.half is not None and record.half <= 1e-5 and record.share > 0.3


def test_a_pass_needs_an_answer_to_the_input_and_something_removed_that_mattered():
    assert tried(Body()).status == "passed"
    deaf, small = tried(Body("deaf")), tried(Body("small"))
    assert (deaf.status, small.status) == ("failed", "failed")
    assert "another input changed" in deaf.reason
    assert "what was removed changed" in small.reason


def test_nothing_to_prune_is_not_a_pass():
    record = tried(Bare())
    assert record.status == "nothing" and "nothing in this network can be pruned" in record.reason


def test_a_network_that_does_not_run_by_itself():
    def make() -> CallSpec:
        raise AttributeError("module 'jax.numpy' has no attribute 'DeviceArray'")

    record = prove.trial("test", Variant("it", make))
    assert (record.status, record.reason) == (
        "broken",
        "AttributeError: module 'jax.numpy' has no attribute 'DeviceArray'",
    )


def test_full_size_is_traced_only():
    record = prove.trial("test", Variant("it", lambda: CallSpec(Body(), (images(6),), {}), full=True))
    assert (record.status, record.half, record.branches) == ("traced", None, None)


def test_the_document_counts_what_passed_and_what_did_not():
    names = [Variant(name, partial(CallSpec, None, (), {})) for name in "abcde"]
    records = [
        Record("p", "a", "passed", version="1.0", macs=12345, share=0.5, kinds={"heads": 2}, half=1e-7, branches=0.0),
        Record("p", "b", "failed", "ValueError: a|b"),
        Record("p", "c", "broken", "ImportError: no"),
        Record("p", "d", "traced", kinds={"heads": 1}, trace_seconds=1.25),
        Record("p", "of an earlier time", "passed"),
    ]
    text = document([Package("p", (), tuple(names))], records)
    assert "| p | 1.0 | 4 | 3 | 2 | 1 | 50.0% | 1 |" in text
    assert "| a | passed |  | 12.3k | 50% | 2 heads | 1e-07 | 0 |" in text
    assert r"| b | **failed**: ValueError: a\|b |" in text
    assert "| d | traced | 1.2 s |" in text
    assert "of an earlier time" not in text


def test_names_are_unique():
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert len({variant.name for variant in package.variants}) == len(package.variants)
