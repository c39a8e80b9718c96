"""Students by Torch-Pruning: within the budget, equal to PyTorch's, and ready for a comparison."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.storage.networks import load_network

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("torch_pruning", reason="Torch-Pruning is not installed")

from benchmarks.peers import conversion, networks, pruning, shapes  # noqa: E402

MACS = 0.5
OPTIONS = argparse.Namespace(batch_size=4, taylor_batches=2, sl_steps=2, sl_rate=0.01, sl_reg=5e-4, seed=0)


def network(blocks: int = 1):
    """A network with random weights and statistics."""
    torch.manual_seed(0)
    made = networks.CifarResNet([[16 * 2**stage] * blocks for stage in range(3)], 10)
    for name, tensor in made.state_dict().items():
        if "bn" in name and tensor.ndim:
            tensor.uniform_(0.2, 1.0)
    return made.eval()


def data() -> Dataset:
    random = np.random.default_rng(0)
    split = Split.of(random.integers(0, 256, (16, 32, 32, 3), np.uint8), random.integers(0, 10, 16).astype(np.int32))
    return Dataset("cifar10", split, split, split, 10, networks.MEAN, networks.STD, ())


@pytest.mark.parametrize("rule", pruning.TITLES)
def test_students_of_every_rule(tmp_path, rule):
    teacher = network()
    whole = networks.costs(teacher.widths, 10)
    scored = pruning.prepare(rule, teacher, data(), OPTIONS)
    student, _ = pruning.within(scored, rule, MACS * whole[0], None)
    assert all(1 <= width[0] <= full[0] for width, full in zip(student.widths, teacher.widths, strict=True))
    written = conversion.save(student, tmp_path / "student", rule, "cifar10")
    assert (written["macs"], written["params"]) == networks.costs(student.widths, 10)
    assert 0.9 * MACS < written["macs"] / whole[0] <= MACS and written["difference"] <= 1e-5
    _, variables, architecture, info = load_network(tmp_path / "student")
    assert architecture.arguments["depth"] == 8 and info["name"] == rule
    assert variables["params"]["stage3"]["block1"]["conv1"]["kernel"].shape[-1] == student.widths[2][0]


def test_parameters_are_matched_as_well():
    teacher = network()
    whole = networks.costs(teacher.widths, 10)
    alone = pruning.within(teacher, "group-l2", MACS * whole[0], None)[0]
    bound = 0.8 * networks.costs(alone.widths, 10)[1]
    both = networks.costs(pruning.within(teacher, "group-l2", MACS * whole[0], bound)[0].widths, 10)
    assert both[0] <= MACS * whole[0] and 0.9 * bound < both[1] <= bound
    with pytest.raises(ValueError, match="macs: group-l2 has no student"):
        pruning.within(teacher, "group-l2", MACS * whole[0], 1000)


def test_the_shape_of_tas_keeps_the_largest_channels(tmp_path):
    teacher = network(3)
    whole = networks.costs(teacher.widths, 10)
    student, factor = shapes.within(teacher, MACS * whole[0], None)
    macs = networks.costs(student.widths, 10)[0]
    assert 0.95 * MACS < macs / whole[0] <= MACS and student.widths[0] == [round(factor * w) for w in (6, 4, 4)]
    kept, all_ = (net.get_submodule("layer2.0").conv1.weight.detach() for net in (student, teacher))
    assert all(any(torch.equal(row, other) for other in all_) for row in kept)
    assert conversion.save(student, tmp_path / "tas", "tas", "cifar10")["difference"] <= 1e-5


def test_weights_of_another_network_are_refused():
    state = {name: tensor.numpy() for name, tensor in network().state_dict().items()}
    assert networks.load(state).widths == [[16], [32], [64]]
    with pytest.raises(ValueError, match=r"weights: layer1\.0\.downsample\.weight"):
        networks.load({**state, "layer1.0.downsample.weight": np.zeros((16, 16, 1, 1))})
    with pytest.raises(ValueError, match="weights: not a CIFAR ResNet"):
        networks.load({"fc.weight": np.zeros((10, 4))})
