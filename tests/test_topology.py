"""Topology and gates: gate semantics, exact costs, and reports."""

import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st
from proof import image, random_gates, random_keep, reasons, traced, variables_of
from test_models import SMALL, small

from kdsearch_jax.adapters import registry
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.network import count, trace

pytestmark = pytest.mark.usefixtures("quick_compilation")

NETWORKS = {}


def network_of(case):
    """Traced once per session."""
    if case not in NETWORKS:
        module, shape = small(case)
        NETWORKS[case] = traced(module, image(*shape))
    return NETWORKS[case]


# --- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_ones_are_the_identity(case):
    topology = network_of(case).topology
    variables = variables_of(network_of(case).module, *network_of(case).inputs)
    folded = gates_lib.fold(variables, gates_lib.init(topology), topology)
    jax.tree.map(np.testing.assert_array_equal, folded, variables)


@pytest.mark.parametrize("case", ["cifar_resnet B", "vgg flattened", "vit", "mlp"])
def test_fold_is_linear_in_every_gate(case):
    """f(g) with one group's gates moved along a line moves every leaf along a line."""
    network = network_of(case)
    topology = network.topology
    variables = variables_of(network.module, *network.inputs)
    rng = np.random.default_rng(0)
    gates = random_gates(topology, rng)
    fold = jax.jit(lambda gates: gates_lib.fold(variables, gates, topology))
    for group in topology.groups:
        low, high = (rng.uniform(0, 2, group.size).astype(np.float32) for _ in range(2))
        ends = [fold({**gates, group.name: end}) for end in (low, high)]
        middle = fold({**gates, group.name: 0.25 * low + 0.75 * high})
        expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, *ends)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), middle, expected)
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), *ends)
        assert any(jax.tree.leaves(moved))


def test_fold_keeps_dtypes():
    network = network_of("mlp")
    variables = jax.tree.map(jnp.bfloat16, variables_of(network.module, *network.inputs))
    folded = gates_lib.fold(variables, gates_lib.init(network.topology), network.topology)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("case", ["cifar_resnet", "resnet bottleneck", "wide_resnet", "vit", "vgg flattened"])
def test_what_has_a_gate_of_zero_has_no_influence(case):
    """Weights, biases and statistics of a unit whose gate is 0 do not affect the logits."""
    network = network_of(case)
    topology = network.topology
    images = image(*SMALL[case][2])
    variables = variables_of(network.module, images)
    keep = random_keep(topology, np.random.default_rng(2), "half")
    gates = gates_lib.mask(gates_lib.init(topology), keep)
    apply = jax.jit(lambda v: network.module.apply(gates_lib.fold(v, gates, topology), images))
    flat = traverse_util.flatten_dict(variables, sep="/")
    other, touched = dict(flat), 0
    for (path, axis), mask in topology.masks(keep).items():
        shape = [1] * flat[path].ndim
        shape[axis] = -1
        other[path] = np.where(mask.reshape(shape), other[path], 3 * other[path] + 0.5).astype(np.float32)
        touched += int((~mask).sum())
    for group in topology.groups:
        if group.kind == "branches" and not keep[group.name].all():
            for member in group.members:
                other[member.leaf] = other[member.leaf] - 2
    assert touched
    expected, got = apply(variables), apply(traverse_util.unflatten_dict(other, sep="/"))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_gates_of_another_network_are_refused():
    topology = network_of("mlp").topology
    with pytest.raises(ValueError, match="the groups differ from the topology's in dense1"):
        gates_lib.fold({}, {"dense2": jnp.ones(6)}, topology)
    with pytest.raises(ValueError, match=r"gates\['dense2'\]: shape .*5.*6"):
        gates_lib.fold({}, {"dense1": jnp.ones(8), "dense2": jnp.ones(5)}, topology)
    with pytest.raises(ValueError, match="the groups differ"):
        topology.flatten({"dense1": np.ones(8)})


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_costs_are_those_of_a_fresh_trace(case):
    """The polynomials equal the costs of the student's own code, at random sizes and without branches."""
    network = network_of(case)
    rng = np.random.default_rng(4)
    for how in ("half", "one"):
        keep = random_keep(network.topology, rng, how)
        fresh = count(network.student(keep), *network.inputs)
        assert network.topology.cost(keep) == (fresh.macs, fresh.params)
    whole = count(network.module, *network.inputs)
    assert network.topology.total() == (whole.macs, whole.params)


@given(case=st.sampled_from(list(SMALL)), seed=st.integers(0, 999))
def test_marginal_costs_are_differences(case, seed):
    """Costs are at most quadratic in one unit, so a central difference is exact."""
    topology = network_of(case).topology
    rng = np.random.default_rng(seed)
    keep = topology.flatten(random_keep(topology, rng, "half")).astype(float)
    unit = rng.integers(topology.units)
    step = np.zeros(topology.units)
    step[unit] = 0.5
    for cost in (topology.macs, topology.params):
        difference = cost.total(keep + step) - cost.total(keep - step)
        assert cost.marginal(keep)[unit] == pytest.approx(difference, rel=1e-9, abs=1e-6)


def test_known_costs():
    """ResNet-20 on CIFAR-10, as published: 41 million MACs, .27 million parameters."""
    network = trace(
        registry.build("cifar_resnet", {"num_classes": 10}), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    )
    assert network.topology.total() == (40_551_040, 269_722)
    shares = network.topology.shares()
    assert shares["stage1/block1/conv1"][0] == pytest.approx(2 * 16 * 16 * 9 * 32 * 32 / 40_551_040)
    assert shares["stage3/block3:branch"][1] == pytest.approx((2 * 64 * 64 * 9 + 4 * 64) / 269_722)


def test_flatten_and_unflatten_are_inverse():
    topology = network_of("vit").topology
    gates = random_gates(topology, np.random.default_rng(0))
    jax.tree.map(np.testing.assert_array_equal, topology.unflatten(topology.flatten(gates)), gates)


# --- choosing and describing ----------------------------------------------------------------------------------------


def test_select_freezes_the_rest_with_a_reason():
    network = network_of("vit")
    chosen = network.select(["heads", "values"], include=["block1/*", "block2/*"], exclude=["*/attention/value"])
    assert {group.name: group.kind for group in chosen.topology.groups} == {
        "block1/attention/key": "heads",
        "block2/attention/key": "heads",
    }
    assert chosen.topology.total() == network.topology.total()
    why = reasons(chosen)
    assert why["block1/dense1/kernel[1]"] == "excluded: kind neurons"
    assert why["block1/attention/value/kernel[2]"] == "excluded by the pattern '*/attention/value'"
    assert chosen.topology.excluded["block1:branch"] == "excluded: kind branches"
    keep = random_keep(chosen.topology, np.random.default_rng(0), "one")
    fresh = count(chosen.student(keep), *chosen.inputs)
    assert chosen.topology.cost(keep) == (fresh.macs, fresh.params)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"kinds": ["chanels"]}, ["gates.kinds: 'chanels'", "channels, neurons, heads"]),
        ({"kinds": ["heads"], "include": ["block9/*"]}, ["'block9/*' matches no group", "block1/attention/key"]),
        ({"kinds": ["heads"], "exclude": ["*"]}, ["nothing in this network can be pruned", "excluded by the pattern"]),
        ({"kinds": ["groups"]}, ["nothing in this network can be pruned", "excluded: kind"]),
    ],
)
def test_select_refuses_with_the_way_out(arguments, parts):
    with pytest.raises(ValueError) as raised:
        network_of("vit").select(**arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("case", SMALL)
def test_the_description_names_every_group_and_every_reason(case):
    """`traced` has already checked that each index is in a group or frozen."""
    topology = network_of(case).topology
    text, record = topology.describe(), json.loads(json.dumps(topology.to_json()))
    assert all(group.name in text and group.kind in text for group in topology.groups)
    assert all(frozen.reason in text for frozen in topology.frozen)
    assert [group["name"] for group in record["groups"]] == [group.name for group in topology.groups]
    assert [(f["name"], f["axis"], f["size"], f["reason"]) for f in record["frozen"]] == [
        (f.leaf, f.axis, f.count, f.reason) for f in topology.frozen
    ]
    assert (record["macs"], record["params"]) == topology.total()


def test_option_a_frees_the_first_stream_only():
    """The first stage's channels are free; the channels that later stages append are joined to padding zeros."""
    names = [{group.name for group in network_of(case).topology.groups} for case in ("cifar_resnet", "cifar_resnet B")]
    blocks = {f"stage{i}/block1{end}" for i in (1, 2, 3) for end in ("/conv1", ":branch")}
    assert names[0] == blocks | {"conv"}
    assert names[1] == blocks | {"conv", "stage2/block1/conv2", "stage3/block1/conv2"}
    assert "fixed index (padding" in reasons(network_of("cifar_resnet"))["stage2/block1/conv2/kernel[3]"]


def test_nothing_to_prune_says_why():
    with pytest.raises(ValueError) as raised:
        trace(nn.Dense(3), image(4))
    for part in ("nothing in this network can be pruned", "params/kernel: the network's output", "params/bias"):
        assert part in str(raised.value)


def test_inputs_need_a_batch():
    with pytest.raises(ValueError, match="inputs: .*batch axis"):
        trace(nn.Dense(3))


def test_groups_are_named_by_the_layer_that_makes_them():
    assert {group.name: (group.kind, group.size) for group in network_of("vgg flattened").topology.groups} == {
        **{f"stage{i}/conv1": ("channels", 4 * 2 ** min(i - 1, 3)) for i in range(1, 6)},
        **{f"dense{i}": ("neurons", 8) for i in (1, 2)},
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet", {"depth": 50}),
        ("vit", {"patch": 16, "width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}),
    ],
)
def test_published_networks_are_traced_in_seconds(name, arguments):
    """Takes about 0.5 and 1 second on one core; the bound allows for a slow one. Nothing is computed."""
    module = registry.build(name, {"num_classes": 1000, **arguments})
    start = time.process_time()
    network = trace(module, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
    assert time.process_time() - start < 6
    assert network.topology.units > 10_000
