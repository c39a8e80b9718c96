"""Pruning in rounds: students are cut again, verified, saved, loaded, and searched again."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from proof import image, random_gates, random_keep, traced, variables_of

import kdsearch_jax as kd
from kdsearch_jax import evaluate, export
from kdsearch_jax.adapters.architecture import Architecture, StudentModule, base_module
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import surgery
from kdsearch_jax.report import main as report_main
from kdsearch_jax.search.__main__ import main as search_main
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.networks import load_network

pytestmark = pytest.mark.usefixtures("quick_compilation")

DATA = {"x": image(6, batch=40), "labels": np.arange(40) % 5}
FEW = {"search_steps": 6, "retrain_steps": 2, "batch_size": 8}


class Residual(nn.Module):
    """A residual stream with blocks of two layers."""

    blocks: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        for i in range(self.blocks):
            x = x + nn.Dense(16, name=f"down{i}")(nn.relu(nn.Dense(10, name=f"up{i}")(x)))
        return nn.Dense(5, name="head")(nn.relu(x))


class Held(nn.Module):
    """Layers whose attributes are not plain widths: groups, cells, embeddings."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), name="stem")(x)
        y = nn.GroupNorm(num_groups=4, name="norm")(nn.Conv(24, (3, 3), feature_group_count=4, name="grouped")(x))
        y = nn.relu(nn.Conv(24, (3, 3), feature_group_count=24, name="depthwise")(y))
        x = x + nn.Conv(12, (1, 1), name="back")(y)
        x = nn.RNN(nn.GRUCell(10, name="cell"), name="rnn")(x.mean(1))
        return nn.DenseGeneral((2, 3), name="head")(x)


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.up, self.down = nnx.Linear(width, 10, rngs=rngs), nnx.Linear(10, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class ResidualNnx(nnx.Module):
    """The same network in NNX, with an attribute that is not a size."""

    def __init__(self, features: int = 6, *, rngs):
        self.stem = nnx.Linear(features, 16, rngs=rngs)
        self.blocks = nnx.List([Block(16, rngs=rngs) for _ in range(3)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)
        self.scale = 1.0

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.scale * self.head(nnx.relu(self.dropout(x)))


def functional(module: nnx.Module) -> tuple[FunctionalModule, dict]:
    """The functional module, and random variables for it."""
    function, variables = FunctionalModule.split(module)
    random = np.random.default_rng(0)
    return function, jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32) / 3, variables)


def run(module, variables, x):
    return jax.tree.leaves(jax.jit(module.apply)(variables, x))[0]


def cut(module, variables, x, architecture, rng, how="half", branches=None):
    """One verified round: (student, its variables, its architecture). branches: numbers of those to drop."""
    network = traced(module, x)
    gates, keep = random_gates(network.topology, rng), random_keep(network.topology, rng, how)
    if branches is not None:
        names = [group.name for group in network.topology.groups if group.kind == "branches"]
        keep |= {name: np.array([number not in branches]) for number, name in enumerate(names)}
    sliced, architecture = surgery.slice_network(variables, gates, keep, network, architecture)
    surgery.verify(network, variables, gates, keep, sliced, x)
    return network.student(keep), sliced, architecture


CASES = {
    "linen": (lambda: (Residual(), variables_of(Residual(), image(6))), image(6)),
    "linen, sizes held otherwise": (lambda: (Held(), variables_of(Held(), image(8, 8, 3))), image(8, 8, 3)),
    "nnx": (lambda: functional(ResidualNnx(rngs=nnx.Rngs(0))), image(6)),
}


@pytest.mark.parametrize("name", CASES)
def test_rounds_of_cuts(name):
    """Each student equals the gated network and is described relative to the first model; JSON restores it."""
    make, x = CASES[name]
    base, variables = make()
    module, architecture, rng = base, Architecture.of(base, x.shape[1:]), np.random.default_rng(0)
    for _ in range(3):
        before = sum(leaf.size for leaf in jax.tree.leaves(variables))
        module, variables, architecture = cut(module, variables, x, architecture, rng)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables)) <= before
        assert base_module(module) == base and Architecture.of(module, x.shape[1:]) == architecture
        made = Architecture.from_json(json.loads(json.dumps(architecture.to_json()))).module(base)
        np.testing.assert_array_equal(run(made, variables, x), run(module, variables, x))


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_the_stream_stays_free_where_branches_were_dropped(name):
    """The zeros of a dropped layer follow the size of the residual stream that they are added to, round by round."""
    make, x = CASES[name]
    module, variables = make()
    architecture, rng = Architecture.of(module, x.shape[1:]), np.random.default_rng(0)
    for dropped in (2, 4, 6):
        before = variables["params"]["stem"]["bias"].size
        module, variables, architecture = cut(module, variables, x, architecture, rng, branches=[0])
        assert variables["params"]["stem"]["bias"].size < before and len(architecture.dropped) == dropped
    bound = module.bind(variables) if name == "nnx" else None
    if bound is not None:
        bound.eval()
        np.testing.assert_allclose(bound(x), run(module, variables, x), atol=1e-6)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_rounds_of_pruning_and_training(name, tmp_path):
    """By `kd.prune`, with weights that change in between; each student is saved, loaded, and pruned again."""
    x = image(6)
    base = ResidualNnx(rngs=nnx.Rngs(0)) if name == "nnx" else Residual()
    module, variables = base, base if name == "nnx" else variables_of(base, x)
    for number in range(3):
        student = kd.prune(kd.trace(module, x), variables, kd.magnitude(), kd.Budget(macs=0.75), x)
        assert student.difference <= surgery.TOLERANCE
        kd.save(student, tmp_path / str(number))
        loaded = kd.load(tmp_path / str(number), base)
        described = Architecture.of(_function(loaded.module), (), student.architecture.custom_call)
        assert loaded.architecture == student.architecture and described.layers == student.architecture.layers
        assert (described.model, described.dropped) == (student.architecture.model, student.architecture.dropped)
        module, variables = loaded
        if name == "nnx":
            nnx.update(module, jax.tree.map(lambda leaf: 1.1 * leaf, nnx.state(module, nnx.Param)))
            variables = module
        else:
            variables = jax.tree.map(lambda leaf: 1.1 * leaf, variables)
    assert base_module(_function(module)) == _function(base)


def _function(module):
    return FunctionalModule.split(module)[0] if isinstance(module, nnx.Module) else module


def test_a_student_as_a_part_of_another_model():
    """Its layers are cut again, and its variables keep their paths."""

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="last")(nn.relu(self.inner(nn.relu(nn.Dense(6, name="first")(x)))))

    x = image(6)
    base, rng = Residual(), np.random.default_rng(0)
    inner, _, _ = cut(base, variables_of(base, x), x, Architecture.of(base), rng, branches=[1])
    assert inner.dropped == ("down1", "up1")
    module: nn.Module = Outer(inner)
    variables = variables_of(module, x)
    for _ in range(3):
        module, variables, _ = cut(module, variables, x, Architecture.of(module), rng, branches=[0])
    assert set(variables["params"]) == {"first", "inner", "last"}
    assert set(variables["params"]["inner"]) == {"head", "stem"}


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_parts_of_parts_are_parts_of_the_whole(name):
    """A network that is restricted twice, as in a search that shrinks, equals the network cut once."""
    make, x = CASES[name]
    module, variables = make()
    module, _, _ = cut(module, variables, x, Architecture.of(module), np.random.default_rng(0), branches=[0])
    network, rng = traced(module, x), np.random.default_rng(1)
    first = random_keep(network.topology, rng)
    part = network.restricted(first)
    assert part.module == network.student(first)
    second = random_keep(part.topology, rng)
    both = {group: mask.copy() for group, mask in first.items()}
    for group, mask in second.items():
        both[group][first[group]] = mask
    assert part.student(second) == part.restricted(second).module == network.student(both)
    assert part.topology.cost(second) == network.topology.cost(both)


def test_an_nnx_student_that_was_changed_is_a_model_of_its_own():
    """Except for its mode: the model that it was cut from would not have the change."""
    x = image(6)
    base, variables = functional(ResidualNnx(rngs=nnx.Rngs(0)))
    student, variables, _ = cut(base, variables, x, Architecture.of(base), np.random.default_rng(0))

    def found(change) -> FunctionalModule:
        module = student.bind(variables)
        change(module)
        return FunctionalModule.split(module)[0]

    def shrink(module):
        module.head = nnx.Linear(module.head.in_features, 2, rngs=nnx.Rngs(0))

    assert found(lambda module: None) == student
    assert found(lambda module: module.eval()).base == base
    assert found(lambda module: module.train()).layers == student.layers
    assert FunctionalModule.split(nnx.clone(student.bind(variables)))[0] == student
    for change in (shrink, lambda module: setattr(module, "scale", 2.0)):
        assert found(change).base is None
        other = FunctionalModule.split(_changed(student.bind(variables), change))[1]
        cut(found(change), other, x, Architecture.of(base), np.random.default_rng(0))


def _changed(module, change):
    change(module)
    return module


# --- searched -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # those of NNX are, below
def test_linen_students_are_searched_again(tmp_path):
    """As loaded, with the first model as a second teacher; the files alone restore each student."""
    first, second = tmp_path / "first", tmp_path / "second"
    module, variables = Residual(), variables_of(Residual(), DATA["x"][:2])
    found = kd.search(module, variables, DATA, budget=0.7, workdir=first, **FEW)
    module, variables = kd.load(first / "student")
    assert isinstance(found.module, StudentModule) and module == found.module
    more = {"distill.teachers": (str(first / "teacher" / "network"),)}
    found = kd.search(module, variables, DATA, budget=0.7, workdir=second, settings=more, **FEW)
    module, variables = kd.load(second / "student")
    assert module == found.module and module.base == Residual()
    np.testing.assert_array_equal(run(module, variables, DATA["x"]), run(found.module, found.variables, DATA["x"]))
    assert found.architecture["model"].endswith(":Residual")


def test_nnx_students_are_searched_again(tmp_path):
    """As modules of the user's class; the architecture is relative to the first module, which restores each of them."""
    x = DATA["x"]
    module = ResidualNnx(rngs=nnx.Rngs(0))
    for number in range(2):
        workdir = tmp_path / str(number)
        found = kd.search(module, None, DATA, budget=0.7, workdir=workdir, **FEW)
        module = found.module
        module.eval()
        again, _ = kd.load(workdir / "student")
        again.eval()
        assert type(module) is ResidualNnx and FunctionalModule.split(again)[0] == FunctionalModule.split(module)[0]
        np.testing.assert_array_equal(again(x), module(x))
    assert found.architecture["model"] == "test_rounds:ResidualNnx"


TINY = ("--search.steps", "6", "--retrain.steps", "2", "--teacher.steps", "0", "--baselines")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["small_cnn", "test_nnx:Cnn"])
def test_students_are_searched_again_by_command(model, tmp_path, repository, capsys):
    """From a student's directory and from its exported file; what follows a run works on the second student."""
    config = ("--config", str(repository / "tests" / "tiny.py"), "--budget.macs", "0.7", *TINY)
    arguments = ("width=8",) if model == "small_cnn" else ("width=24", "channels=1", "depth=1")
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert search_main([*config, "--model", model, "--model.arguments", *arguments, "--workdir", one]) == 0
    assert search_main([*config, "--teacher-from", f"{one}/student", "--workdir", two]) == 0
    assert search_main([*config, "--teacher-from", f"{two}/student/student.safetensors", "--workdir", three]) == 0
    for run_ in (two, three):
        assert evaluate.main([f"{run_}/student", "--teacher", f"{run_}/teacher/network"]) == 0
        assert export.main([f"{run_}/student", "--out", f"{run_}/out", "--formats", "safetensors"]) == 0
        assert report_main([run_]) == 0
        described = json.loads((tmp_path / run_ / "student" / "architecture.json").read_text())
        assert described["model"] == model
    module, variables, *_ = load_network(f"{three}/student")
    smaller, *_ = load_network(f"{two}/student")
    assert base_module(module) == base_module(smaller) and module != smaller
    other, arrays = export_formats.load_safetensors(f"{three}/out/student.safetensors")
    x = image(8, 8, 1)
    np.testing.assert_array_equal(run(other, arrays, x), run(module, variables, x))
