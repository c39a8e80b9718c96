"""Baselines: they cost what the searched student does, and keep what their rule says."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.call_spec import mode_keywords
from kdsearch_jax.pruning import baselines, budgets, surgery
from kdsearch_jax.pruning.budgets import FLOOR, BudgetError, Limits
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

NETWORKS = {
    "cnn": ("small_cnn", {"width": 8}, (8, 8, 1)),
    "resnet": ("cifar_resnet", {"depth": 14, "width": 16, "shortcut": "B"}, (16, 16, 3)),
    "vit": ("vit", {"patch": 4, "width": 16, "depth": 2, "heads": 4, "mlp_dim": 32}, (8, 8, 3)),
}


KEEPING = ("uniform", "magnitude", "random", "bn_scale")  # these keep every branch
BUDGETS = [BudgetConfig(0.5), BudgetConfig(None, 0.6), BudgetConfig(0.6, 0.7, 2)]


@cache
def network(name):
    """(traced network, random variables, architecture) of one of NETWORKS."""
    model, arguments, shape = NETWORKS[name]
    architecture = Architecture(model, {"num_classes": 10, **arguments}, input_shape=shape)
    module, random = architecture.module(), np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: random.uniform(0.5, 1.5, x.shape).astype(np.float32), shapes)
    return trace(module, images, **mode_keywords(module, train=False)), variables, architecture


@pytest.mark.parametrize("bounds", BUDGETS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("baseline", KEEPING)
def test_a_baseline_costs_what_the_searched_student_may(baseline, name, bounds):
    traced, variables, _ = network(name)
    found = traced.topology
    limits = budgets.resolve(bounds, found)
    baselines.check(found, limits)
    if (baseline, name) == ("bn_scale", "vit"):
        with pytest.raises(BudgetError, match="BatchNorm"):
            baselines.select(baseline, variables, found, limits)
        return
    keep = baselines.select(baseline, variables, found, limits)
    assert list(keep) == [group.name for group in found.groups]
    assert FLOOR <= limits.pressure(found, found.flatten(keep).astype(float)) <= 1
    for group in found.groups:
        assert keep[group.name].all() if group.kind == "branches" else keep[group.name].any()
        assert keep[group.name].all() or keep[group.name].sum() % bounds.round_to == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_uniform_keeps_the_same_share_of_every_layer(name):
    traced, variables, _ = network(name)
    keep = baselines.select("uniform", variables, traced.topology, budgets.resolve(BudgetConfig(), traced.topology))
    groups = [group for group in traced.topology.groups if group.kind != "branches"]
    shares = {group.name: keep[group.name].mean() for group in groups}
    smallest = min(group.size for group in groups)
    assert max(shares.values()) - min(shares.values()) <= 2 / smallest + 0.05, shares


def test_the_units_of_largest_norm_stay():
    """With known norms: unit i of a layer has weights i + 1, in a random order."""
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
    for baseline in ("uniform", "magnitude"):
        keep = baselines.select(baseline, variables, found, budgets.resolve(BudgetConfig(0.6), found))
        for name, ranks in order.items():
            if not keep[name].all():
                assert ranks[keep[name]].min() > ranks[~keep[name]].max()


def test_magnitude_compares_layers_by_norms_over_their_mean():
    """A layer of equal norms, however small, loses few units before the smallest norms of other layers are removed."""
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
    keep = baselines.select("magnitude", level, found, budgets.resolve(BudgetConfig(0.9), found))
    assert keep[flat_group.name].mean() >= 0.5  # although its weights are tiny
    assert sum((~mask).sum() for name, mask in keep.items() if name != flat_group.name) > 0


def test_the_largest_batch_norm_scales_stay_over_all_layers():
    """Scales are all different, some negative: the largest stay, except for the last unit of a layer."""
    traced, variables, _ = network("resnet")
    found, random = traced.topology, np.random.default_rng(3)
    variables = jax.tree.map(np.array, variables)
    scales = {}
    for path, leaf in flatten_dict(variables["params"], sep="/").items():
        if path.endswith("/scale"):
            leaf[...] = random.uniform(0.1, 1, leaf.shape) * random.choice([-1, 1], leaf.shape)
            scales[path] = np.abs(leaf)
    keep = baselines.select("bn_scale", variables, found, budgets.resolve(BudgetConfig(0.6), found))
    stays, goes = [], []
    for group in found.groups:
        if group.kind == "branches":
            continue
        own = [(m, scales[m.leaf.split("/", 1)[1]]) for m in group.members if m.leaf.endswith("/scale")]
        each = np.mean([values[np.argsort(m.units)[-group.size :]] for m, values in own], axis=0)
        assert own and (np.sort(own[0][0].units)[-group.size :] == np.arange(group.size)).all()
        stays += each[keep[group.name]].tolist() if keep[group.name].sum() > 1 else []
        goes += each[~keep[group.name]].tolist()
    # Units that were restored to fill the budget are in between.
    assert goes and np.quantile(goes, 0.95) <= min(stays) and np.quantile(stays, 0.05) >= np.median(goes)


def test_random_units_are_others_each_time():
    traced, variables, _ = network("cnn")
    limits = budgets.resolve(BudgetConfig(), traced.topology)

    def drawn(seed):
        keep = baselines.select("random", variables, traced.topology, limits, np.random.default_rng(seed))
        return traced.topology.flatten(keep).tolist()

    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(5)}) == 5


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_even_choices_are_even(size):
    total, count = size
    choices = list(baselines.even(total, count))
    assert choices and len(set(choices)) == len(choices)
    for places in choices:
        assert len(places) == len(set(places)) == count and places[0] >= 0 and places[-1] < total
        gaps = np.diff([*places, places[0] + total])
        assert gaps.max() - gaps.min() <= 1
    covered = set().union(*choices)
    assert covered == set(range(total))  # no place is always spared


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_fewer_layers_are_as_few_branches_as_meet_the_budget(name):
    traced, variables, _ = network(name)
    found = traced.topology
    limits = budgets.resolve(BudgetConfig(0.5), found)
    keep = baselines.select("layers", variables, found, limits)
    gone = [g.name for g in found.groups if g.kind == "branches" and not keep[g.name].all()]
    assert gone and all(keep[g.name].all() for g in found.groups if g.kind != "branches")
    assert limits.pressure(found, found.flatten(keep).astype(float)) <= 1
    for places in baselines.even(sum(g.kind == "branches" for g in found.groups), len(gone) - 1):
        names = [g.name for g in found.groups if g.kind == "branches"]
        fewer = {g.name: np.full(g.size, g.name not in [names[i] for i in places]) for g in found.groups}
        assert limits.pressure(found, found.flatten(fewer).astype(float)) > 1


@pytest.mark.parametrize("bounds", [BudgetConfig(0.4), BudgetConfig(0.4, 0.5)], ids=str)
def test_fewer_layers_and_channels_share_the_reduction(bounds):
    traced, variables, architecture = network("resnet")
    found = traced.topology
    limits = budgets.resolve(bounds, found)
    keep = baselines.select("both", variables, found, limits)
    assert FLOOR <= limits.pressure(found, found.flatten(keep).astype(float)) <= 1
    branches = {g.name: keep[g.name] if g.kind == "branches" else np.ones(g.size, bool) for g in found.groups}
    share = np.log(limits.pressure(found, found.flatten(branches).astype(float)))
    assert 0.25 <= share / np.log(limits.pressure(found, np.ones(found.units))) <= 0.75
    assert any((~keep[g.name]).any() for g in found.groups if g.kind != "branches")
    gates = {group.name: np.ones(group.size, np.float32) for group in found.groups}
    sliced, _ = surgery.slice_network(variables, gates, keep, traced, architecture)
    assert (
        surgery.verify(traced, variables, gates, keep, sliced, jnp.ones((2, 16, 16, 3)))["macs"] == found.cost(keep)[0]
    )


def test_a_baseline_is_a_network_that_runs():
    traced, variables, architecture = network("cnn")
    keep = baselines.select("uniform", variables, traced.topology, budgets.resolve(BudgetConfig(), traced.topology))
    gates = {group.name: np.ones(group.size, np.float32) for group in traced.topology.groups}
    sliced, student = surgery.slice_network(variables, gates, keep, traced, architecture)
    logits = student.module().apply(sliced, np.zeros((1, 8, 8, 1), np.float32))
    assert logits.shape == (1, 10) and not student.dropped and student.layers


def test_impossible_baselines_are_named():
    traced, variables, _ = network("cnn")
    found = traced.topology
    limits = budgets.resolve(BudgetConfig(), found)
    with pytest.raises(ValueError, match="'unifrom'.*'uniform'"):
        baselines.select("unifrom", variables, found, limits)
    with pytest.raises(BudgetError, match=r"gates\.kinds"):
        baselines.select("layers", variables, found.select(("channels",)), limits)
    branches = found.select(("branches",))
    with pytest.raises(BudgetError, match="--baselines"):
        baselines.check(branches, limits)
    least = found.cost({g.name: np.arange(g.size) < (g.kind != "branches") for g in found.groups})[0]
    with pytest.raises(BudgetError, match="--baselines"):
        baselines.check(found, Limits(0.99 * least, None))
    with pytest.raises(BudgetError, match="branches"):
        baselines.select("both", variables, found, Limits(1.0, None))


@pytest.mark.parametrize("baseline", [*KEEPING, "both", "layers"])
def test_if_no_student_of_a_rule_lands_the_closest_below_is_chosen_with_a_note(baseline):
    traced, variables, _ = network("cnn")
    found = traced.topology
    least = found.cost({g.name: np.arange(g.size) < 1 for g in found.groups})[0]
    limits = Limits(1.03 * least if baseline in KEEPING else 0.5 * found.total()[0], None)
    keep = baselines.select(baseline, variables, found, limits)
    pressure = limits.pressure(found, found.flatten(keep).astype(float))
    assert pressure <= 1 and (pressure < FLOOR) == bool(baselines.note(baseline, found, limits, keep))
    if baseline in KEEPING:
        assert found.cost(keep)[0] == least
    else:  # its only branch is most of the network
        assert pressure < FLOOR and not all(mask.all() for mask in keep.values())
