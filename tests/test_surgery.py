"""Surgery: every network, however cut, equals the gated network and costs what was counted; wrong students fail."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from proof import ANY, image, prove, random_gates, random_keep, traced, variables_of
from test_models import SMALL, small

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import count, trace

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def cnn():
    """A network, its random variables and a batch."""
    module, shape = small("small_cnn")
    images = image(*shape)
    return traced(module, images), variables_of(module, images), images


@pytest.mark.parametrize("case", SMALL)
def test_every_network_however_cut(case):
    """Half of everything; one unit of each group and no branch; and each kind of group by itself."""
    module, shape = small(case)
    images = image(*shape)
    network = traced(module, images)
    variables = variables_of(module, images)
    prove(network, variables, images, hows=("half", "one"))
    kinds = sorted({group.kind for group in network.topology.groups})
    for kind in kinds if len(kinds) > 1 else ():
        prove(network.select([kind]), variables, images, hows=("branches" if kind == "branches" else "half",), seed=1)


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_large_resnets(depth):
    module = registry.build("resnet", {"depth": depth, "num_classes": 5, "stem": "small", "width": 4})
    images = image(8, 8, 3, batch=2)
    prove(traced(module, images), variables_of(module, images), images)


def test_keeping_everything_changes_nothing(cnn):
    network, variables, _ = cnn
    ones = gates_lib.init(network.topology)
    sliced, architecture = surgery.slice_network(variables, ones, gates_lib.keep_all(network.topology), network, ANY)
    jax.tree.map(np.testing.assert_array_equal, sliced, variables)
    assert architecture == ANY


def test_a_student_has_the_gates_folded_in(cnn):
    """Its own gates are ones, so a second search starts from the student."""
    network, variables, images = cnn
    rng = np.random.default_rng(0)
    gates, keep = random_gates(network.topology, rng), random_keep(network.topology, rng)
    sliced, _ = surgery.slice_network(variables, gates, keep, network, ANY)
    student = network.student(keep)
    again = trace(student, images)
    sizes = {group.name: group.size for group in again.topology.groups if group.kind != "branches"}
    kept = {g.name: int(keep[g.name].sum()) for g in network.topology.groups if g.kind != "branches"}
    assert sizes == {name: size for name, size in kept.items() if size > 1 and name in sizes}
    prove(again, sliced, images)


def test_emptying_a_group_is_refused(cnn):
    network, variables, _ = cnn
    keep = gates_lib.keep_all(network.topology)
    keep["block/conv2"] = np.zeros_like(keep["block/conv2"])
    with pytest.raises(ValueError, match=r"block/conv2"):
        surgery.slice_network(variables, gates_lib.init(network.topology), keep, network, ANY)


@pytest.mark.parametrize("group", ["stage1/conv", "block/conv2", "block/conv1"])
def test_a_wrong_leaf_is_found_and_its_layer_named(cnn, group):
    """Every leaf of the student matters to the proof; the first layer that differs is the layer of the leaf."""
    network, variables, images = cnn
    keep = random_keep(network.topology, np.random.default_rng(3), "branches")
    keep = {name: np.ones_like(mask) if "branch" in name else mask for name, mask in keep.items()}
    keep[group][0] = False
    gates = gates_lib.init(network.topology)
    sliced, _ = surgery.slice_network(variables, gates, keep, network, ANY)
    flat = traverse_util.flatten_dict(sliced, sep="/")
    path = f"params/{group}/kernel"
    wrong = traverse_util.unflatten_dict({**flat, path: flat[path] * 1.001}, sep="/")
    with pytest.raises(surgery.SurgeryError, match=rf"{group}$"):
        surgery.verify(network, variables, gates, keep, wrong, images)


def test_a_wrong_statistic_and_a_nan_are_found(cnn):
    network, variables, images = cnn
    keep = random_keep(network.topology, np.random.default_rng(3), "half")
    gates = gates_lib.init(network.topology)
    sliced, _ = surgery.slice_network(variables, gates, keep, network, ANY)
    flat = traverse_util.flatten_dict(sliced, sep="/")
    for path, change in [("batch_stats/stage1/bn/mean", 0.01), ("params/dense/bias", jnp.nan)]:
        wrong = traverse_util.unflatten_dict({**flat, path: flat[path] + change}, sep="/")
        with pytest.raises(surgery.SurgeryError, match="gated network"):
            surgery.verify(network, variables, gates, keep, wrong, images)


def test_a_wrong_count_is_found(cnn):
    network, _, _ = cnn
    keep = random_keep(network.topology, np.random.default_rng(3), "half")
    other = {**keep, "stage1/conv": ~keep["stage1/conv"] | (np.arange(4) == 0)}
    assert keep["stage1/conv"].sum() != other["stage1/conv"].sum()
    with pytest.raises(surgery.SurgeryError, match=r"[\d,]+ MACs and [\d,]+ parameters"):
        surgery.verify_cost(network, keep, network.student(other))


def test_a_product_that_xla_counts_differently_is_found(cnn):
    network, _, images = cnn
    counted = count(network.module, images)
    assert counted.miscounted() is None
    wrong = [counted.products[0], counted.products[1]._replace(flops=counted.products[1].flops + 2)]
    message = dataclasses.replace(counted, products=wrong).miscounted()
    assert message is not None and wrong[1].op.scope in message


def test_architecture_builds_the_student_from_json(cnn):
    """What `slice_network` returns is sufficient: through JSON, to a module of equal logits with the same paths."""
    network, variables, images = cnn
    rng = np.random.default_rng(5)
    gates, keep = random_gates(network.topology, rng), random_keep(network.topology, rng)
    base = Architecture("small_cnn", {"num_classes": 5, "width": 4}, input_shape=(8, 8, 1))
    sliced, architecture = surgery.slice_network(variables, gates, keep, network, base)
    module = Architecture.from_json(architecture.to_json()).module()
    gated = gates_lib.fold(variables, gates_lib.mask(gates, keep), network.topology)
    expected = jax.jit(network.module.apply)(gated, images)
    np.testing.assert_allclose(jax.jit(module.apply)(sliced, images), expected, rtol=1e-4, atol=1e-5)


class Projects(nn.Module):
    """Projects if the channels differ, as many residual networks do, so other sizes may change the code path."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(7, name="a")(x))
        z = nn.Dense(16, name="b")(y)
        if y.shape != z.shape:
            y = nn.Dense(16, name="p")(y)
        return nn.Dense(3, name="out")(nn.relu(y + z))


def test_code_that_decides_by_its_sizes_is_found_by_the_proof():
    x = image(12)
    network = traced(Projects(), x)
    variables = variables_of(network.module, x)
    prove(network, variables, x, hows=("branches",))
    gates, keep = gates_lib.init(network.topology), gates_lib.keep_all(network.topology)
    keep["b"][:9] = False  # 7 and 7: no projection
    sliced, _ = surgery.slice_network(variables, gates, keep, network, ANY)
    with pytest.raises(surgery.SurgeryError) as raised:
        surgery.verify(network, variables, gates, keep, sliced, x)
    assert "'p'" in str(raised.value) and "\n" not in str(raised.value)
