"""What teaches a student: layers are taken without touching the model, gates are seen, nothing of it is delivered."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from kdsearch_jax.adapters import apply, registry
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import distiller, ensemble, features, teacher_cache
from kdsearch_jax.distill.distiller import Distiller, Teacher, make_distillation
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.steps import distill_step
from kdsearch_jax.pruning import gates, surgery
from kdsearch_jax.pruning.network import adapter_for, shapes_of, trace
from kdsearch_jax.runs import command_line
from kdsearch_jax.runs.config import Experiment, check
from kdsearch_jax.search.__main__ import main as search
from kdsearch_jax.storage.networks import load_network
from kdsearch_jax.training import loop
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import create_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE = CallSpec.of_image((8, 8, 1))
LEARNED = ("hint:0.5", "crd:0.1", "kl")


def settings(experiment):
    """What a distillation takes of an experiment."""
    return experiment.distill, experiment.data, experiment.run


def _cnn(seed: int = 0):
    module = registry.build("small_cnn", {"width": 4, "num_classes": 10})
    return module, jax.jit(module.init)(jax.random.key(seed), jnp.zeros((2, 8, 8, 1)))


def _batch(size: int = 5) -> dict:
    rng = np.random.default_rng(0)
    return {
        "images": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
        "labels": rng.integers(0, 10, size, dtype=np.int32),
    }


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "side", "expected"),
    [
        ("cifar_resnet", {"depth": 8}, 32, ["stage1", "stage2", "stage3"]),
        ("wide_resnet", {"depth": 10, "width": 1}, 32, ["stage1", "stage2", "bn"]),  # the last BatchNorm
        ("mobilenet_v2", {}, 64, ["stage1", "stage2", "stage3", "stage5", "last_bn", "dropout"]),
        ("mlp", {"hidden": [7, 9]}, 8, ["dense2"]),  # no stages: what the classifier sees
    ],
)
def test_the_ends_of_stages_are_found(name, arguments, side, expected):
    module = registry.build(name, {**arguments, "num_classes": 10})
    call = CallSpec.of_image((side, side, 3))
    variables = adapter_for(module).abstract_variables(module, call.example(2), call.keywords(module, train=False))
    assert list(features.find_layers(module, variables, call)) == expected


def test_features_are_those_that_flax_captures():
    module, variables = _cnn()
    images, paths = _batch()["images"], ["stage1/bn", "block", "stage3"]
    with features.record_features(module) as seen:
        outputs = apply.apply_eval(module, variables, images)
    expected, captured = module.apply(variables, images, capture_intermediates=True)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    for path, value in features.select_features(seen, paths).items():
        inner = captured["intermediates"]
        for part in path.split("/"):
            inner = inner[part]
        np.testing.assert_allclose(value, inner["__call__"][0], atol=1e-6)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_features_of_an_nnx_module():
    model = Net(nnx.Rngs(0))
    module, variables = FunctionalModule.split(model)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    call = CallSpec(("x",), {"x": jax.ShapeDtypeStruct((6,), jnp.float32)})
    assert features.find_layers(module, variables, call) == {"first": (features.BATCH, 8)}
    with features.record_features(module) as seen:
        apply.apply_eval(module, variables, x)
    np.testing.assert_allclose(features.select_features(seen, ["first"])["first"], model.first(x), rtol=1e-5)


class Looped(nn.Module):
    """A stack under `nn.scan` and a layer under `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(6, name="dense")(x)), None

        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        x = nn.Dense(8, name="plain")(x)
        x = nn.remat(nn.Dense)(6, name="again")(x)
        return nn.Dense(10, name="head")(x)


def test_layers_inside_of_loops_are_out_of_reach_and_named():
    module, call = Looped(), CallSpec(("x",), {"x": jax.ShapeDtypeStruct((6,), jnp.float32)})
    variables = module.init(jax.random.key(0), jnp.zeros((2, 6)))
    assert list(features.find_layers(module, variables, call)) == ["plain"]
    for path in ("stack/dense", "again"):
        with pytest.raises(ValueError, match=f"distill.features: {path!r} is no layer.*outside of loops"):
            features.find_layers(module, variables, call, [path])


def test_gated_features_are_those_of_the_student():
    """With gates at 0: exactly the channels of the student that is cut there, and zeros for those that it lacks."""
    module, variables = _cnn()
    network = trace(module, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32), train=False)
    topology, rng = network.topology, np.random.default_rng(1)
    gate, keep = {}, {}
    for group in topology.groups:
        keep[group.name] = rng.permutation(group.size) < max(1, group.size // 2) if group.size > 1 else np.ones(1, bool)
        gate[group.name] = np.where(keep[group.name], rng.uniform(0.5, 2.0, group.size), 0.0).astype(np.float32)
    sliced, architecture = surgery.slice_network(variables, gate, keep, network, Architecture("small_cnn"))
    student, images = architecture.module(module), _batch()["images"]
    paths = list(features.find_layers(module, variables, IMAGE))
    with features.record_features(module) as seen:
        apply.apply_eval(module, gates.fold(variables, gate, topology), images)
    units = features.channel_units(module, variables, IMAGE, paths, topology)
    found = features.mask_channels(features.select_features(seen, paths), units, gate)
    with features.record_features(student) as seen:
        apply.apply_eval(student, sliced, images)
    for path, expected in features.select_features(seen, paths).items():
        assert expected.shape[-1] < found[path].shape[-1]
        alive = np.abs(np.asarray(found[path])).reshape(-1, found[path].shape[-1]).any(0)
        (units_of,) = units[path].items()
        stays = keep[units_of[0]][units_of[1]]
        assert not alive[~stays].any()
        np.testing.assert_allclose(found[path][..., stays], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_tells_a_gate_what_its_channel_is_worth():
    """The slope at a gate g is that of the features' scale, over g."""
    units = {"layer": {"group": np.array([0, 1, -1])}}
    gate, x = {"group": jnp.array([0.5, 0.0])}, jnp.arange(6.0).reshape(2, 3) + 1

    def total(gate):
        return features.mask_channels({"layer": x}, units, gate)["layer"].sum()

    np.testing.assert_allclose(total(gate), x[:, [0, 2]].sum())
    np.testing.assert_allclose(jax.grad(total)(gate)["group"], [x[:, 0].sum() / 0.5, 0.0])


# --- a stage --------------------------------------------------------------------------------------------------------


def _experiment(**distill) -> Experiment:
    return Experiment(data=DataConfig("digits", train_limit=40), distill=DistillConfig(**distill))


STAGE = StageConfig(steps=6, batch_size=20, learning_rate=0.05, warmup=0)
RUN = RunConfig(steps_per_dispatch=3, checkpoint_every=10, evaluate_every=10)


def _distillation(experiment: Experiment, stage: StageConfig = STAGE, teachers: int = 1, **kwargs):
    dataset = load(experiment.data, 0)
    every = [Teacher(*_cnn(seed), IMAGE) for seed in range(teachers)]
    module, variables = _cnn(9)
    task = classification(experiment.distill, IMAGE)
    return make_distillation(
        task, every, dataset, *settings(experiment), stage, module, variables, retraining=True, **kwargs
    )


def _trained(distillation, directory):
    (module, variables), tx = _cnn(9), make_optimizer(STAGE)
    step = distill_step(module, None, tx, STAGE, RUN, distillation.objective, distillation.distiller)
    state = create_state(variables, tx, extra=distillation.extra)
    return loop.fit(
        state, step, distillation.dataset, DataConfig("digits"), STAGE, RUN, directory=directory, name="test", meta={},
        constants=distillation.constants,
    )  # fmt: skip


@pytest.mark.parametrize("teachers", [1, 2])
def test_cached_outputs_change_nothing(tmp_path, teachers):
    """Three epochs, with the teachers in every step and without them."""
    distillations = [_distillation(_experiment(cache=on), teachers=teachers) for on in (True, False)]
    assert distillations[0].distiller.cached and distillations[0].constants is None
    assert not distillations[1].distiller.cached
    with_, without = (_trained(distillation, tmp_path / str(n)) for n, distillation in enumerate(distillations))
    assert not np.allclose(*(jax.tree.leaves(t)[-1] for t in (with_.params, _cnn(9)[1]["params"])))
    for a, b in zip(jax.tree.leaves(with_.params), jax.tree.leaves(without.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "stage", "why"),
    [
        ({"distill": DistillConfig(cache=False)}, STAGE, "off"),
        ({"data": DataConfig("digits", crop=1)}, STAGE, "augmented"),
        ({"data": DataConfig("digits", flip=True)}, STAGE, "augmented"),
        ({}, dataclasses.replace(STAGE, steps=2), "no example comes twice"),
    ],
)
def test_where_outputs_are_not_cached(change, stage, why):
    experiment = dataclasses.replace(_experiment(), **change)
    assert why in (
        teacher_cache.reason_not_to_cache(experiment.distill, experiment.data, stage, load(_experiment().data, 0)) or ""
    )


@pytest.mark.parametrize("mask", [0.0, -1e9, -np.inf])
def test_a_teacher_that_mixes_its_batch_is_not_cached(mask):
    dataset = load(_experiment().data, 0)

    def teacher(mixes):
        def outputs(_, batch):
            own = batch["images"].mean((1, 2)) - batch["images"].mean() * mixes
            return jnp.concatenate([own, jnp.full_like(own, mask)], -1)

        return outputs

    found, line = teacher_cache.cache_outputs(teacher(1e-2), {}, dataset, 8)
    assert found is None and "the others in its batch" in line
    assert teacher_cache.cache_outputs(teacher(0), {}, dataset, 8)[0] is not None


def test_maps_are_learned_and_not_part_of_the_network(tmp_path):
    distillation = _distillation(_experiment(losses=LEARNED))
    state = _trained(distillation, tmp_path)
    before, after = distillation.learned["maps"], distillation.distiller.learned(state.extra)
    assert set(after) == {"hint", "crd"} and set(after["hint"]) == {"stage1", "block", "stage3"}
    moved = [not np.allclose(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert all(moved)
    assert jax.tree.map(jnp.shape, state.variables) == jax.tree.map(jnp.shape, _cnn()[1])


@pytest.mark.parametrize("name", ["at:1000", "hint", "rkd_distance", "rkd_angle"])
def test_losses_of_features_vanish_for_the_teacher_itself(name):
    """In the search's own step: same weights, gates of 1, statistics as the teacher's."""
    module, variables = _cnn()
    network = trace(module, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32), train=False)
    experiment = _experiment(losses=(name,))
    task, dataset = classification(experiment.distill, IMAGE), load(experiment.data, 0)
    distillation = make_distillation(
        task, [Teacher(module, variables, IMAGE)], dataset, *settings(experiment), STAGE, module, variables,
        retraining=False, topology=network.topology,
    )  # fmt: skip
    by, batch, params = distillation.distiller, _batch(), variables["params"]

    @jax.jit
    def distance(params, gate, maps):
        state = {"batch_stats": variables["batch_stats"]}
        folded = gates.fold({"params": params}, gate, network.topology)["params"]
        shown, _ = by.train(module, folded, state, batch, jax.random.key(0), gate, frozen=True)
        return by.distance(maps, shown, by.target(variables, batch), batch)

    maps = by.learned(distillation.extra)
    ones = gates.init(network.topology)
    np.testing.assert_allclose(distance(params, ones, maps), 0, atol=1e-8)
    fewer = {name: gate.at[0].set(0.0) for name, gate in ones.items()}
    assert (distance(params, fewer, maps) > 0).all()


# --- several teachers -----------------------------------------------------------------------------------------------


def test_the_mean_of_teachers():
    each = np.random.default_rng(0).normal(size=(3, 4, 10)).astype(np.float32) * 5
    found = ensemble.mean(list(each), "probabilities", 4.0)
    np.testing.assert_allclose(softmax(np.asarray(found) / 4, -1), softmax(each / 4, -1).mean(0), rtol=1e-4)
    np.testing.assert_allclose(ensemble.mean(list(each), "logits", 4.0), each.mean(0), rtol=1e-4, atol=1e-5)
    same = ensemble.mean([{"a": each[0]}, {"a": each[0]}], "probabilities", 2.0)["a"]
    np.testing.assert_allclose(softmax(np.asarray(same), -1), softmax(each[0], -1), rtol=1e-4)
    with pytest.raises(ValueError, match=r"distill.teachers.*\(4, 10\), \(4, 9\)"):
        ensemble.mean([each[0], each[0][:, :9]], "logits", 1.0)


def test_a_further_teacher_sees_images_as_it_knows_them():
    module, variables = _cnn(1)
    dataset, pixels = load(_experiment().data, 0), np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1))
    own = ensemble.TeacherModule.of(Teacher(module, variables, IMAGE, {"mean": [0.3], "std": [0.7]}), dataset)
    seen = (pixels / 255 - np.array(dataset.mean)) / np.array(dataset.std)
    found = own.outputs(variables, {"images": jnp.asarray(seen, jnp.float32)}, "fp32")
    expected = apply.apply_eval(module, variables, jnp.asarray((pixels / 255 - 0.3) / 0.7, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_further_teachers_may_stand_behind_the_first():
    """`--teacher-from X Y Z`, wherever it stands."""
    for line in (["--teacher-from", "x", "y", "z", "--quick"], ["--quick", "--teacher", "x", "y", "z"]):
        _, experiment = command_line.parse(line, command_line.RunOptions, "test", "")
        assert (experiment.teacher_from, experiment.distill.teachers) == ("x", ("y", "z"))
    with pytest.raises(command_line.UsageError, match="--teacher-from X Y .*--distill.teachers"):
        command_line.parse(["--teacher-from", "x", "y", "--distill.teachers", "z"], command_line.RunOptions, "test", "")


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_losses_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"distill.features: 'stage9' is no layer.*stage"):
        _distillation(_experiment(losses=("at",), features=("stage9",)))
    mlp = registry.build("mlp", {"hidden": [7], "num_classes": 10})
    variables = mlp.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
    experiment = _experiment(losses=("at",))
    with pytest.raises(ValueError, match=r"at compares positions.*dense1 have none"):
        make_distillation(
            classification(experiment.distill, IMAGE), [Teacher(mlp, variables, IMAGE)], load(experiment.data, 0),
            *settings(experiment), STAGE, mlp, variables, retraining=False,
        )  # fmt: skip
    for later in ({"losses": ("at",)}, {"retrain_losses": ("at",)}):  # and before any work
        with pytest.raises(ValueError, match=r"at compares positions.*dense1 have none"):
            distiller.check_losses(classification(DistillConfig(**later), IMAGE), mlp, variables)
    distiller.check_losses(classification(DistillConfig(losses=("hint", "rkd_angle")), IMAGE), mlp, variables)
    with pytest.raises(ValueError, match=r"distill.losses: at compares features"):
        Distiller.of(classification(DistillConfig(losses=("at",))), mlp, RUN)
    with pytest.raises(ValueError, match=r"distill.loss and distill.losses: a:b "):
        check(_experiment(loss="a:b", losses=("at",)))
    with pytest.raises(ValueError, match=r"distill.retrain_losses.*'kk'"):
        check(_experiment(retrain_losses=("kk",)))


def test_a_classifier_that_nothing_trains_is_told(caplog):
    """Where the loss of retraining has no slope at the classifier; not where it has one."""
    module, dataset, batch = (
        registry.build("mlp", {"hidden": [7], "num_classes": 10}),
        load(_experiment().data, 0),
        _batch(),
    )
    variables, other = (module.init(jax.random.key(seed), jnp.zeros((2, 8, 8, 1))) for seed in range(2))
    told, slopes = [], []
    for losses, later, labels in (
        ("kl", "rkd_angle", 0.0),
        ("rkd_angle", "kl", 0.0),
        ("kl", "hint", 0.1),
        ("crd", "dkd", 0.0),
    ):
        experiment = _experiment(losses=(losses,), retrain_losses=(later,), cross_entropy=labels, cache=False)
        task = classification(experiment.distill, IMAGE)
        caplog.clear()
        distiller.check_losses(task, module, variables)
        told.append("the classifier behind dense1 is not trained" in caplog.text)
        if len(slopes) == 2:
            continue
        teacher = [Teacher(module, other, IMAGE)]
        distillation = make_distillation(
            task, teacher, dataset, *settings(experiment), STAGE, module, variables, retraining=True
        )

        def loss(params, by=distillation.distiller):
            shown, _ = by.train(module, params, {}, batch, jax.random.key(0))
            return by.distance(None, shown, by.target(other, batch), batch).mean()

        slopes.append(bool(jnp.any(jax.jit(jax.grad(loss))(variables["params"])["dense"]["kernel"])))
    assert told == [True, False, False, False] and slopes == [False, True]


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_road_with_every_loss_delivers_a_plain_student(tmp_path, repository):
    """Search and retraining by all losses at once; the student's arrays are those that its own code makes."""
    config = ["--config", str(repository / "tests" / "tiny.py"), "--baselines"]
    every = ["kl", "dkd:0.1", "dist", "at:1000", "hint", "rkd_distance", "rkd_angle", "crd:0.1"]
    assert search([*config, "--workdir", str(tmp_path / "run"), "--distill.losses", *every]) == 0
    for place in ("search/network", "student"):
        module, variables, architecture, _ = load_network(tmp_path / "run" / place)
        shapes = shapes_of(module, *architecture.call_spec.example(2), train=False)
        leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
        assert {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves} == shapes
    assert json.loads((tmp_path / "run" / "config.json").read_text())["distill"]["losses"] == every
    assert distiller.PREDICTIONS == ("kl", "dkd", "dist")


@pytest.mark.slow
def test_the_road_with_two_teachers_learns_from_their_mean(tmp_path, repository, caplog):
    """The second is a student of the first; with it, the student ends elsewhere, and the log says so."""
    config, ends, told = ["--config", str(repository / "tests" / "tiny.py"), "--baselines"], [], []
    teachers = [str(tmp_path / "one" / place) for place in ("teacher/network", "student")]
    caplog.set_level("INFO", "kdsearch_jax")
    for name, more in (("one", []), ("two", ["--teacher-from", *teachers])):
        caplog.clear()
        assert search([*config, "--workdir", str(tmp_path / name), *more]) == 0
        told.append("2 teachers: the mean of their probabilities is learned from" in caplog.text)
        end = jax.tree.leaves(load_network(tmp_path / name / "student")[1])
        ends.append(np.concatenate([np.ravel(leaf) for leaf in end]))
    assert told == [False, True]
    assert ends[0].shape != ends[1].shape or not np.allclose(*ends, atol=1e-3)
