"""Every experiment in configs/ loads, has a complete header, and its quick variant runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kdsearch_jax.adapters import registry
from kdsearch_jax.runs.config import check, config_names, from_json, load_experiment, to_json
from kdsearch_jax.search.__main__ import main as search_main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

# What the images of an experiment are like: (side, channels, classes).
SHAPES = {
    "digits": (8, 1, 10), "fashion_mnist": (28, 1, 10), "cifar10": (32, 3, 10), "cifar100": (32, 3, 100),
    "imagenet2012": (224, 3, 1000),
}  # fmt: skip


def test_all_experiments_are_here():
    wanted = (
        "digits cifar10_resnet20 cifar10_resnet56 cifar100_resnet56 cifar10_vgg16 cifar100_wrn40_2 imagenet_resnet50"
    )
    assert set(wanted.split()) <= set(NAMES) <= set(config_names())


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_possible_and_its_model_fits_its_data(name, quick):
    experiment = load_experiment(name, quick)
    assert experiment.name == name + ("-quick" if quick else "")
    assert from_json(json.loads(json.dumps(to_json(experiment)))) == check(experiment) == experiment
    side, channels, classes = SHAPES[experiment.data.name]
    side = experiment.data.image_size or side
    module = registry.build(experiment.model.name, {**experiment.model.arguments, "num_classes": classes})
    images = jax.ShapeDtypeStruct((2, side, side, channels), np.float32)
    logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, classes)
    for stage in (experiment.teacher, experiment.search, experiment.retrain):
        assert not quick or stage.steps * stage.batch_size <= 256


@pytest.mark.parametrize("name", NAMES)
def test_a_header_gives_command_hardware_time_and_result(name):
    header = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    fields = dict(line.split(":", 1) for line in header.splitlines() if ":" in line[:10])
    assert {"command", "hardware", "time", "result"} <= set(fields)
    assert all(fields[k].strip() for k in ("command", "hardware", "time", "result"))
    assert f"--config {name}" in fields["command"] or name in ("digits", "own")  # the defaults


def generated(path: Path, side: int, channels: int, classes: int, images: int = 240) -> Path:
    """An `.npz` of noisy images, each class around its own picture; every class is present."""
    random = np.random.default_rng(0)
    pictures = random.integers(40, 216, (classes, side, side, channels))
    labels = np.arange(max(images, 3 * classes)) % classes
    noise = random.integers(-40, 40, (len(labels), side, side, channels))
    np.savez(path, images=(pictures[labels] + noise).astype(np.uint8), labels=labels.astype(np.int32))
    return path


def quick_run(name: str, folder: Path, *options: str) -> Path:
    """The directory of a run of the quick variant on generated data."""
    experiment = load_experiment(name, quick=True)
    side, channels, classes = SHAPES[experiment.data.name]
    data = generated(folder / "data.npz", experiment.data.image_size or side, channels, min(classes, 10))
    line = ["--config", name, "--quick", "--data.name", f"npz:{data}", "--workdir", str(folder / "run"), *options]
    assert search_main(line) == 0
    return folder / "run"


# The first two are run below, and their quick variants are equal; the third has the digits' model. The others run up to
# retraining here, and test_stages runs every stage of a tiny experiment.
SAME = ("cifar10_resnet20", "cifar10_resnet20_short", "own")


def _slow(name: str):
    """Marks the largest models, whose architectures are tested elsewhere."""
    large = ("cifar10_resnet56", "cifar10_vgg16", "cifar100_resnet56", "cifar100_wrn40_2", "imagenet_resnet50")
    return pytest.param(name, marks=pytest.mark.slow) if name in large else name


@pytest.mark.parametrize("name", [_slow(name) for name in NAMES if name not in SAME])
def test_the_quick_variant_trains_searches_cuts_and_retrains(name, tmp_path):
    run = quick_run(name, tmp_path, "--baselines", "--stop-after", "retrain")
    budget = load_experiment(name).budget
    teacher, student = (
        json.loads((run / stage / "network" / "network.json").read_text())["payload"]["info"]
        for stage in ("teacher", "retrain")
    )
    for bound in ("macs", "params"):
        share = getattr(budget, bound)
        assert share is None or student[bound] <= share * teacher[bound]
    assert json.loads((run / "search" / "selection.json").read_text())["proof"]["difference"] <= 1e-5


@pytest.mark.slow
def test_a_quick_variant_runs_every_stage(tmp_path):
    run = quick_run("cifar10_resnet20", tmp_path, "--baselines", "uniform")
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    assert {"teacher", "student", "uniform"} <= set(rows)
    assert all(np.isfinite(value) for row in rows.values() for value in row.values() if isinstance(value, float))
    assert (run / "student" / "architecture.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_quick_changes_size_and_length_but_not_the_method(name):
    full, quick = load_experiment(name), load_experiment(name, quick=True)
    assert quick.model.name == full.model.name
    assert (quick.gates, quick.budget, quick.distill) == (full.gates, full.budget, full.distill)
    assert quick.search == dataclasses.replace(full.search, steps=8, batch_size=16)
