"""Hand-made students: the units of largest norm, at the cost of the searched one, and every branch stays."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsearch_jax import baselines, budget, surgery
from kdsearch_jax.budget import FLOOR, BudgetError, Limits
from kdsearch_jax.call import mode
from kdsearch_jax.config import BudgetConfig
from kdsearch_jax.network import trace
from kdsearch_jax.student import Architecture

pytestmark = pytest.mark.usefixtures("quick_compilation")

NETWORKS = {
    "cnn": ("small_cnn", {"width": 8}, (8, 8, 1)),
    "resnet": ("cifar_resnet", {"depth": 14, "width": 16, "shortcut": "B"}, (16, 16, 3)),
    "vit": ("vit", {"patch": 4, "width": 16, "depth": 2, "heads": 4, "mlp_dim": 32}, (8, 8, 3)),
}


@cache
def network(name):
    """(traced network, random variables, architecture) of one of NETWORKS."""
    model, arguments, shape = NETWORKS[name]
    architecture = Architecture(model, {"num_classes": 10, **arguments}, input_shape=shape)
    module, random = architecture.module(), np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: random.uniform(0.5, 1.5, x.shape).astype(np.float32), shapes)
    return trace(module, images, **mode(module, train=False)), variables, architecture


@pytest.mark.parametrize("bounds", [BudgetConfig(0.5), BudgetConfig(None, 0.6), BudgetConfig(0.6, 0.7, 2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("baseline", baselines.NAMES)
def test_a_baseline_costs_what_the_searched_student_may(baseline, name, bounds):
    traced, variables, _ = network(name)
    found = traced.topology
    limits = budget.resolve(bounds, found)
    baselines.check(found, limits)
    keep = baselines.keep(baseline, variables, found, limits)
    assert list(keep) == [group.name for group in found.groups]
    assert FLOOR <= limits.pressure(found, found.flatten(keep).astype(float)) <= 1
    for group in found.groups:
        assert keep[group.name].all() if group.kind == "branches" else keep[group.name].any()
        assert keep[group.name].all() or keep[group.name].sum() % bounds.round_to == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_uniform_keeps_the_same_share_of_every_layer(name):
    traced, variables, _ = network(name)
    keep = baselines.keep("uniform", variables, traced.topology, budget.resolve(BudgetConfig(), traced.topology))
    groups = [group for group in traced.topology.groups if group.kind != "branches"]
    shares = {group.name: keep[group.name].mean() for group in groups}
    smallest = min(group.size for group in groups)
    assert max(shares.values()) - min(shares.values()) <= 2 / smallest + 0.05, shares


def test_the_units_of_largest_norm_stay():
    """Norms that are known: unit i of a layer is made of weights i + 1, in an order of its own."""
    traced, variables, _ = network("cnn")
    found, random = traced.topology, np.random.default_rng(1)
    order = {group.name: random.permutation(group.size) for group in found.groups if group.kind != "branches"}
    variables = jax.tree.map(np.ones_like, variables)
    for group in found.groups:
        for member in group.members:
            if group.name in order and not member.consumes and member.leaf.endswith("/kernel"):
                leaf = variables["params"]
                for part in member.leaf.split("/")[1:]:
                    leaf = leaf[part]
                leaf *= 1 + order[group.name][member.units]
    for baseline in baselines.NAMES:
        keep = baselines.keep(baseline, variables, found, budget.resolve(BudgetConfig(0.6), found))
        for name, ranks in order.items():
            if not keep[name].all():
                assert ranks[keep[name]].min() > ranks[~keep[name]].max()


def test_magnitude_compares_layers_by_norms_over_their_mean():
    """A layer of equal norms, however small, loses little before the least of other layers has gone."""
    traced, variables, _ = network("resnet")
    found = traced.topology
    flat_group = next(group for group in found.groups if group.kind == "channels")
    level = jax.tree.map(np.array, variables)
    for member in flat_group.members:
        if not member.consumes and member.leaf.endswith("/kernel"):
            leaf = level["params"]
            for part in member.leaf.split("/")[1:]:
                leaf = leaf[part]
            leaf[...] = 1e-3
    keep = baselines.keep("magnitude", level, found, budget.resolve(BudgetConfig(0.9), found))
    assert keep[flat_group.name].mean() >= 0.5  # tiny as its weights are
    assert sum((~mask).sum() for name, mask in keep.items() if name != flat_group.name) > 0


def test_a_baseline_is_a_network_that_runs():
    traced, variables, architecture = network("cnn")
    keep = baselines.keep("uniform", variables, traced.topology, budget.resolve(BudgetConfig(), traced.topology))
    gates = {group.name: np.ones(group.size, np.float32) for group in traced.topology.groups}
    sliced, student = surgery.prune(variables, gates, keep, traced, architecture)
    logits = student.module().apply(sliced, np.zeros((1, 8, 8, 1), np.float32))
    assert logits.shape == (1, 10) and not student.dropped and student.layers


def test_what_cannot_be_is_named():
    traced, variables, _ = network("cnn")
    found = traced.topology
    limits = budget.resolve(BudgetConfig(), found)
    with pytest.raises(ValueError, match="baselines: 'unifrom' is unknown; did you mean 'uniform'"):
        baselines.keep("unifrom", variables, found, limits)
    branches = found.select(("branches",))
    with pytest.raises(BudgetError, match="gates allow nothing else; leave --baselines empty"):
        baselines.check(branches, limits)
    least = found.cost({g.name: np.arange(g.size) < (g.kind != "branches") for g in found.groups})[0]
    with pytest.raises(BudgetError, match="baselines: they drop no branches: budget: the nearest student"):
        baselines.check(found, Limits(1.01 * least, None))
