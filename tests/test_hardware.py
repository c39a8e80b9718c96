"""Widths that a device pads: counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kdsearch_jax.adapters import registry
from kdsearch_jax.pruning import budgets, hardware
from kdsearch_jax.pruning.budgets import Budget, Limits
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.rules import Rule, apply_rules
from kdsearch_jax.pruning.search import GatedSearch
from kdsearch_jax.pruning.selection import choose
from kdsearch_jax.pruning.settings import BudgetConfig


def network(hidden):
    module = registry.build("mlp", {"hidden": hidden, "num_classes": 10})
    return trace(module, np.zeros((2, 4, 4, 1), np.float32), train=False)


def topology(hidden):
    return network(hidden).topology


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("tpu", [128, 128, 8, 1]), ("gpu", [8, 8, 8, 1]), ("cpu", [1, 1, 1, 1]), ("abacus", [1, 1, 1, 1])],
)
def test_a_group_keeps_to_the_largest_multiple_that_it_holds(platform, expected):
    found = topology([512, 128, 100, 6])
    by_size = {g.size: hardware.multiples(found, platform)[g.name] for g in found.groups}
    assert [by_size[size] for size in (512, 128, 100, 6)] == expected


def test_padding_is_counted_as_the_device_pads():
    found = topology([256, 40])  # 16 → 256 → 40 → 10
    first, second = (next(g.name for g in found.groups if g.size == size) for size in (256, 40))
    keep = found.flatten({first: np.arange(256) < 130, second: np.arange(40) < 33}).astype(float)
    assert found.macs.total(keep) == 16 * 130 + 130 * 33 + 33 * 10
    assert hardware.padded_macs(found, keep, "tpu") == 16 * 256 + 256 * 40 + 40 * 10
    assert hardware.padded_macs(found, keep, "gpu") == 16 * 136 + 136 * 40 + 40 * 10
    assert hardware.padded_share(found, keep, "cpu") == 1.0
    assert hardware.padded_share(found, np.ones(found.units), "tpu") == 1.0


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_widths_for_the_hardware_waste_nothing(platform):
    found = topology([512, 128, 100])
    multiples = hardware.multiples(found, platform)
    limits = Limits(0.6 * found.total()[0], None, multiples)
    chosen = choose(found, limits, np.random.default_rng(0).exponential(1.0, found.units))
    keep = chosen.keep
    assert chosen.pressure <= 1.0 and (chosen.landed or platform == "tpu")  # steps of a quarter of a layer
    for group in found.groups:
        assert keep[group.name].all() or keep[group.name].sum() % multiples[group.name] == 0
    if platform == "gpu":
        flat = found.flatten(keep).astype(float)
        untouched = any(
            g.size == 100 and keep[g.name].all() for g in found.groups
        )  # the only width not a multiple of 8
        assert untouched or hardware.padded_share(found, flat, platform) == 1.0


def test_an_int_is_for_all_groups_alike():
    found = topology([64, 32])
    limits = budgets.resolve(BudgetConfig(0.5, round_to=4), found)
    keep = choose(found, limits, np.random.default_rng(0).exponential(1.0, found.units)).keep
    assert all(mask.sum() % 4 == 0 for mask in keep.values())


def test_a_budget_and_rules_take_the_multiples_of_the_device():
    """Those of the current platform; a rule's own multiple comes first."""
    found = network([64, 32])
    multiples = hardware.multiples(found.topology)
    budget = Budget(macs=0.5, round_to="hardware")
    assert budget.limits(found.topology).round_to == multiples
    assert budgets.resolve(BudgetConfig(0.5, round_to="hardware"), found.topology).round_to == multiples
    name = found.topology.groups[0].name
    ruled = apply_rules(found, [Rule(name, round_to=16)], "hardware")
    assert ruled.round_to == {**multiples, name: 16}
    search = GatedSearch(found, budget, steps=10, rules=[Rule(name, round_to=16)])
    assert search.limits[0].round_to == ruled.round_to
