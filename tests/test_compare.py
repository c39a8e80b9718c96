"""A comparison from start to end: what it makes, how it goes on, what it refuses, and what its numbers are."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from scipy import stats

import kdsearch_jax
from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.compare import check_same_comparison, main
from kdsearch_jax.distill import losses
from kdsearch_jax.runs.comparison import make_rows, table
from kdsearch_jax.runs.comparison.rows import ROWS, check_seeds, select_rows
from kdsearch_jax.runs.config import load_experiment
from kdsearch_jax.runs.setup import prepare_run
from kdsearch_jax.storage import arrays
from kdsearch_jax.storage.files import read_sealed

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = str(Path(__file__).parent / "tiny.py")
STEPS = 12 + 8  # of search and retraining
MADE = ("searched", "layers", "uniform", "both", "slimming", "scratch2")


def compare(directory, *argv) -> int:
    return main(["--config", TINY, "--workdir", str(directory), *map(str, argv)])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, quick_compilation) -> Path:
    """One row of each kind, then one at another seed, in a directory that is finished; do not write into it."""
    directory = tmp_path_factory.mktemp("comparison") / "here"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compare(directory, "--seeds", 0, "--no-latency", "--rows", *MADE) == 0
    # Its one branch is most of the network.
    assert [re.findall(r"baselines: (\w+) ", str(w.message))[0] for w in caught] == ["layers", "both"]
    before = networks(directory)
    assert main(["--workdir", str(directory), "--seeds", "1", "--rows", "uniform"]) == 0
    assert {path: digest for path, digest in networks(directory).items() if path in before} == before
    return directory


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def leaves(network: Path) -> dict[str, np.ndarray]:
    _, variables = kdsearch_jax.load(network)
    return {name: np.asarray(leaf) for name, leaf in arrays.flatten(variables).items()}


def networks(directory: Path) -> dict[str, tuple]:
    """{path: (when it was written, its arrays' digests)} of the students."""
    found = directory.glob("seed-*/*/retrain/network/network.json")
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


# --- what is made ---------------------------------------------------------------------------------------------------


def test_every_row_is_made_or_says_why(comparison):
    found = read(comparison / "comparison.json")
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == set(MADE) and [name for name in ROWS if name in rows] == list(rows)
    assert found["seeds"] == [0, 1] and found["match"] == "both" and found["steps"] == STEPS
    assert (found["dataset"], found["split"], found["examples"]) == ("digits", "test", 359)
    for name, row in rows.items():
        assert row["seeds"] == ([0, 1] if name == "uniform" else [0])
        for key in ("accuracy", "agreement", "kl", "macs", "params", "bytes", "ms_per_image", "seconds"):
            assert len(row[key]) == len(row["seeds"]) and all(value > 0 for value in row[key])
        assert row["steps"] == (2 * STEPS if name == "scratch2" else STEPS)
        for i, seed in enumerate(row["seeds"]):
            stored = leaves(comparison / f"seed-{seed}" / name / "retrain" / "network")
            assert row["params"][i] == sum(v.size for path, v in stored.items() if path.startswith("params/"))
            assert row["bytes"][i] == sum(v.nbytes for v in stored.values())


def test_the_table_says_how_fast_students_are(comparison):
    found = read(comparison / "comparison.json")
    lines = (comparison / "comparison.md").read_text().splitlines()
    for row in found["rows"]:
        if "why" not in row:
            times = found["teacher"]["ms_per_image"] / np.mean(row["ms_per_image"])
            assert any(row["label"] in line and f"({times:.2f}×)" in line for line in lines)


def test_no_row_has_more_than_the_uniform_student(comparison):
    found = read(comparison / "comparison.json")
    rows = {row["name"]: row for row in found["rows"] if "why" not in row}
    bound = found["budget"]["params"]
    assert bound == rows["uniform"]["params"][0] == rows["uniform"]["params"][1]
    for row in rows.values():
        pressure = max(max(row["macs"]) / (0.6 * found["teacher"]["macs"]), max(row["params"]) / bound)
        assert pressure <= 1
        assert ("note" in row) == (pressure < 0.98), row  # a branch is a large piece
    assert "note" in rows["layers"] and "note" in rows["both"]


def test_from_scratch_is_the_searched_shape_and_nothing_else_of_it(comparison):
    found = leaves(comparison / "seed-0" / "searched" / "search" / "network")
    fresh = leaves(comparison / "seed-0" / "scratch2" / "start")
    assert {path: leaf.shape for path, leaf in fresh.items()} == {path: leaf.shape for path, leaf in found.items()}
    kernels = [path for path in fresh if path.endswith("kernel")]
    assert kernels and not any(np.allclose(fresh[path], found[path]) for path in kernels)


def test_the_search_without_the_teacher_looks_at_labels_alone(comparison):
    setup = prepare_run(load_experiment(TINY), comparison, resume=True)
    place = make_rows.row_setup(setup, "slimming", 0, setup.experiment.budget)
    random = np.random.default_rng(0)
    student, *teachers = (jnp.asarray(random.normal(size=(5, 10)), jnp.float32) for _ in range(3))
    batch = {"labels": jnp.arange(5)}
    supervised = make_rows._supervised(place)
    for teacher in teachers:
        np.testing.assert_allclose(
            supervised.objective.distance(student, teacher, batch),
            losses.cross_entropy(student, batch["labels"]),
            rtol=1e-6,
        )
    assert supervised.objective.call == place.objective.call and supervised.directory == place.directory
    assert place.experiment.distill.cross_entropy == 0  # which is what it is retrained by


# --- going on -------------------------------------------------------------------------------------------------------


def test_an_interrupted_row_ends_as_if_nothing_had_been(comparison, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(comparison, directory)
    row = directory / "seed-0" / "uniform"
    (row / "result.json").rename(row / ".result.json.17.part")
    shutil.rmtree(row / "retrain" / "network")
    shutil.rmtree(row / "retrain" / "checkpoints" / str(STEPS))  # what is left is the state before the last steps
    assert compare(directory, "--seeds", 0, "--rows", "uniform", "--no-latency") == 0
    assert not list(row.glob(".*.part"))
    for path in ("seed-0/uniform/retrain/network", "seed-0/searched/retrain/network"):
        assert same(leaves(directory / path), leaves(comparison / path))
    results = [read_sealed(each / "seed-0" / "uniform" / "result.json") for each in (directory, comparison)]
    assert results[0].pop("seconds") >= results[1].pop("seconds") and results[0] == results[1]


# --- its numbers ----------------------------------------------------------------------------------------------------


def test_help_names_every_row(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│]", " ", capsys.readouterr().out).split())
    assert f"{', '.join(ROWS)}." in told


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"match": "both", "data": "other"}, r"data: .*fingerprint other, now ours"),
        ({"match": "macs", "data": "ours"}, "holds a comparison with --match macs"),
        ({}, "holds a comparison with --match None"),
    ],
)
def test_a_directory_of_another_comparison_is_refused(tmp_path, setup, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "setup.json").write_text(json.dumps(setup))
    with pytest.raises(ValueError, match=message):
        check_same_comparison(tmp_path, "both", "ours")
    (tmp_path / "setup.json").write_text(json.dumps({"match": "both"}))  # of an older version
    check_same_comparison(tmp_path, "both", "ours")


def test_the_interval_is_that_of_a_paired_t_test():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(0.9, 0.01, 4), random.normal(0.88, 0.01, 4)
    rows = [
        {"name": "searched", "seeds": [0, 1, 2, 3], "accuracy": ours.tolist()},
        {"name": "uniform", "seeds": [1, 3, 0, 2], "accuracy": theirs[[1, 3, 0, 2]].tolist()},
        {"name": "layers", "why": "there is none"},
    ]
    (found,) = table.differences(rows)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found["name"] == "uniform" and found["metric"] == "accuracy" and found["level"] == 0.95
    np.testing.assert_allclose(found["each"], ours - theirs)
    np.testing.assert_allclose([found["low"], found["high"]], [expected.low, expected.high])
    np.testing.assert_allclose([found["mean"], found["std"]], [(ours - theirs).mean(), (ours - theirs).std(ddof=1)])


def test_differences_are_of_the_seeds_that_both_have():
    rows = [
        {"name": "searched", "seeds": [0, 2], "accuracy": [0.9, 0.7]},
        {"name": "uniform", "seeds": [1, 2], "accuracy": [0.1, 0.5]},
        {"name": "random", "seeds": [1], "accuracy": [0.1]},
    ]
    (found,) = table.differences(rows)
    assert found["seeds"] == [2] and math.isclose(found["mean"], 0.2) and found["low"] is found["std"] is None


def test_tables_say_what_was_measured(comparison):
    found = read(comparison / "comparison.json")
    lines = list(csv.DictReader(io.StringIO((comparison / "comparison.csv").read_text())))
    assert len(lines) == sum(len(row.get("seeds", ())) for row in found["rows"])
    for row in found["rows"]:
        own = [line for line in lines if line["row"] == row["name"]]
        assert [float(line["accuracy"]) for line in own] == row.get("accuracy", [])
    text = (comparison / "comparison.md").read_text()
    assert text.count("\n| ") == 1 + 1 + len(MADE)  # rule, teacher and the rows that could be made, after the head
    uniform = next(row for row in found["rows"] if row["name"] == "uniform")
    mean, std = 100 * np.mean(uniform["accuracy"]), 100 * np.std(uniform["accuracy"], ddof=1)
    assert f"| fewer channels (uniform) | {mean:.2f} ± {std:.2f} |" in text
    searched = next(row for row in found["rows"] if row["name"] == "searched")
    assert re.search(rf"\| \*\*searched\*\* \[\d\] \| {100 * searched['accuracy'][0]:.2f} \|", text)
    assert "searched: seeds 0 only" in text and "fewer layers: costs" in text
    for told in ("359 images", "seeds 0 1", "python -m kdsearch_jax.compare", found["hardware"], "minutes"):
        assert told in text
    rows = [*found["rows"], {"name": "bn_scale", "label": "BatchNorm scale", "why": "there is none"}]
    assert "BatchNorm scale: not made: there is none" in table.markdown({**found, "rows": rows})
    assert "made by different versions" not in text and all(uniform["made_by"])
    mixed = [{**row, "made_by": ["jax 1"] if row["name"] == "searched" else ["jax 2", None]} for row in found["rows"]]
    assert "different versions: searched by jax 1; fewer layers," in table.markdown({**found, "rows": mixed})


# --- refusals -------------------------------------------------------------------------------------------------------


def test_seeds_and_rows_are_checked():
    with pytest.raises(ValueError, match="seeds: "):
        check_seeds(())
    with pytest.raises(ValueError, match="seeds: 3 "):
        check_seeds((3, 1, 3))
    with pytest.raises(ValueError, match="seeds: -1 is not possible"):
        check_seeds((-1,))
    with pytest.raises(ValueError, match="rows: 'unifrom' is unknown; did you mean 'uniform'"):
        select_rows(["unifrom"])
    assert [row.name for row in select_rows(["uniform", "searched"])] == ["searched", "uniform"]
    assert [row.name for row in select_rows(())] == list(ROWS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--seeds",), "seeds: "),
        (("--seeds", "1", "1"), "seeds: 1 "),
        (("--rows", "slimimng"), "did you mean 'slimming'"),
        (("--budgets", "0.5", "0.3"), "budgets: "),
        (("--budget.latency", "0.5"), "budget.latency: "),
    ],
)
def test_a_wrong_line_leaves_nothing_behind(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        compare(tmp_path / "here", *argv)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_something_else_is_left_alone(comparison, tmp_path):
    with pytest.raises(ValueError, match="holds a run of another experiment .*search.steps: 12, not 13"):
        compare(comparison, "--search.steps", 13)
    with pytest.raises(ValueError, match="match: .* holds a comparison with --match both"):
        compare(comparison, "--match", "macs")
    shutil.copy(comparison / "config.json", tmp_path)  # as a run has one, and nothing of a comparison
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds a run, not a comparison"):
        compare(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_teacher_worse_than_chance_is_refused_before_any_work(tmp_path):
    """One that always says the same."""
    module = registry.build("small_cnn", {"width": 4, "num_classes": 10})
    shapes = jax.eval_shape(module.init, jax.random.key(0), *CallSpec.of_image((8, 8, 1)).example(1))
    zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in arrays.flatten(shapes).items()}
    safetensors.numpy.save_file(zeros, tmp_path / "zeros.safetensors")
    with pytest.raises(ValueError, match="teacher: "):
        compare(tmp_path / "here", "--teacher-from", tmp_path / "zeros.safetensors")
    assert not (tmp_path / "here").exists()
