"""Students that were made elsewhere as rows of a comparison, and rows that share the teacher's outputs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.compare import main
from kdsearch_jax.runs.comparison import jobs
from kdsearch_jax.runs.comparison.rows import select_rows
from kdsearch_jax.storage import arrays
from kdsearch_jax.storage.files import read_sealed
from kdsearch_jax.storage.networks import load_network, save_network
from kdsearch_jax.teacher import main as train_teacher

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = str(Path(__file__).parent / "tiny.py")


def compare(directory: Path, *argv) -> int:
    fixed = (
        "--config",
        TINY,
        "--workdir",
        directory,
        "--data.crop",
        1,
        "--seeds",
        0,
        "--no-latency",
        "--match",
        "macs",
    )
    return main([str(token) for token in (*fixed, *argv)])


def network(directory: Path, width: int = 3, classes: int = 10, shape=(8, 8, 1), seed: int = 5, **info) -> Path:
    """A small network of its own width, not cut from any teacher."""
    arguments = {"width": width, "num_classes": classes}
    module = registry.build("small_cnn", arguments)
    variables = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((2, *shape)))
    save_network(directory, Architecture("small_cnn", arguments, input_shape=shape), variables, info)
    return directory


def rows_of(directory: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((directory / "comparison.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, quick_compilation) -> Path:
    """A uniform and an external row, under augmentation; do not write into it."""
    directory = tmp_path_factory.mktemp("external")
    network(directory / "by hand", name="the width of 3")
    assert train_teacher(["--config", TINY, "--workdir", str(directory / "teacher")]) == 0
    rows = ("--rows", "uniform", f"external:{directory / 'by hand'}")
    assert compare(directory / "here", "--teacher-from", directory / "teacher", *rows) == 0
    return directory


def test_an_external_student_is_a_row_like_any_other(comparison):
    rows, here = rows_of(comparison / "here"), comparison / "here"
    row, other = rows["external-by-hand"], rows["uniform"]
    assert row["label"] == "the width of 3" and row["steps"] == other["steps"] and row["seeds"] == [0]
    _, variables, architecture, info = load_network(comparison / "by hand")
    assert architecture.arguments["width"] == 3 and "macs" not in info
    assert row["params"] == [sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))]
    trained = load_network(here / "seed-0" / "external-by-hand" / "retrain" / "network")[1]
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, variables)
    assert not np.allclose(*(jax.tree.leaves(tree)[-1] for tree in (trained, variables)))
    digest = read_sealed(here / "seed-0" / "external-by-hand" / "result.json")["external"]["digest"]
    assert digest in row["note"] and len(digest) == 64
    for text in ((here / "comparison.md").read_text(), (here / "report" / "index.html").read_text("utf-8")):
        assert "the width of 3" in text and digest in text
    assert "external-by-hand,0," in (here / "comparison.csv").read_text()


def test_rows_share_the_teachers_outputs(comparison, tmp_path, caplog):
    """The first row stored them all; a row that is made again from them has the same bits."""
    directory = tmp_path / "copy"
    shutil.copytree(comparison / "here", directory)
    before = arrays.flatten(load_network(directory / "seed-0" / "uniform" / "retrain" / "network")[1])
    shutil.rmtree(directory / "seed-0" / "uniform")
    with caplog.at_level("INFO", "kdsearch_jax"):
        assert (
            main(["--workdir", str(directory), "--rows", "uniform", "--seeds", "0", "--match", "macs", "--no-latency"])
            == 0
        )
    assert re.search("outputs are cached by update .*; 20 of 20 updates are stored", caplog.text)
    again = arrays.flatten(load_network(directory / "seed-0" / "uniform" / "retrain" / "network")[1])
    assert all(np.array_equal(before[name], leaf) for name, leaf in again.items())
    assert "external-by-hand" in rows_of(directory)  # although it was not named this time


def test_a_changed_student_is_refused(comparison, tmp_path):
    shutil.copytree(comparison / "here", tmp_path / "here")
    other = network(tmp_path / "by hand", seed=6)
    old = read_sealed(tmp_path / "here" / "seed-0" / "external-by-hand" / "result.json")["external"]["digest"]
    before = sorted(tmp_path.rglob("*"))
    for state in ("finished", "begun"):
        if state == "begun":
            (tmp_path / "here" / "seed-0" / "external-by-hand" / "result.json").unlink()
            before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=rf"rows: .* has the digest [0-9a-f]{{64}}, .* {old}"):
            compare(tmp_path / "here", "--teacher-from", comparison / "teacher", "--rows", f"external:{other}")
        assert sorted(tmp_path.rglob("*")) == before


def damaged(directory: Path) -> Path:
    network(directory)
    (directory / "network.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "rows: external:.*: there is no directory"),
        (damaged, "rows: external:.* cannot be read: .*network.json"),
        (lambda path: network(path, classes=7), "rows: external:.* has 7 classes"),
        (lambda path: network(path, shape=(16, 16, 1)), r"rows: external:.* takes images \(16, 16, 1\)"),
        (lambda path: network(path, width=8), "rows: external:.* MACs, more than the budget"),
        (lambda path: network(path, mean=[0.5], std=[0.5]), r"rows: external:.* normalised with mean \(0.5,\)"),
    ],
)
def test_what_cannot_be_a_row_leaves_nothing_behind(comparison, tmp_path, make, message):
    student, teacher = make(tmp_path / "student"), comparison / "teacher"
    with pytest.raises(ValueError, match=message) as error:
        compare(tmp_path / "new", "--teacher-from", teacher, "--rows", "uniform", f"external:{student}")
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_names_of_external_rows(tmp_path):
    for place in ("a/x y", "b/x y", "b/z"):
        (tmp_path / place).mkdir(parents=True)
    rows = select_rows([f"external:{tmp_path}/b/z/", "uniform", f"external:{tmp_path}/a/x y"])
    assert [(row.name, row.label) for row in rows[1:]] == [("external-z", "z"), ("external-x-y", "x y")]
    assert [row.name for row in select_rows([f"external:{tmp_path}/b/z"])] == ["external-z"]
    with pytest.raises(ValueError, match="rows: .*a/x y and .*b/x y have the same name"):
        select_rows([f"external:{tmp_path}/a/x y", f"external:{tmp_path}/b/x y"])
    with pytest.raises(ValueError, match="rows: 'extrenal:z' is unknown; did you mean"):
        select_rows(["extrenal:z"])


# --- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # it starts two processes
def test_rows_made_side_by_side_are_the_same(comparison, tmp_path, capfd, monkeypatch):
    """By two processes, each with its share of the cores, from nothing but the comparison's directory."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as in this process
    rows = ("--rows", "uniform", f"external:{comparison / 'by hand'}")
    assert compare(tmp_path / "here", "--teacher-from", comparison / "teacher", "--jobs", 2, *rows) == 0
    assert "2 done · 0 left" in capfd.readouterr().err
    for row in ("uniform", "external-by-hand"):
        one, other = (
            arrays.flatten(load_network(directory / "here" / "seed-0" / row / "retrain" / "network")[1])
            for directory in (comparison, tmp_path)
        )
        assert all(np.array_equal(one[name], leaf) for name, leaf in other.items())
    made, expected = rows_of(tmp_path / "here"), rows_of(comparison / "here")
    for name, row in expected.items():
        assert {**made[name], "seconds": None} == {**row, "seconds": None}


def test_a_row_that_fails_side_by_side_is_named(tmp_path, capfd):
    """The others are made, and the error has the last line of its output."""
    results = []
    for number, code in enumerate(("print('all well')", "raise SystemExit('error: the disk is full')", "pass")):
        results.append(
            jobs.RowJob(f"row {number}", tmp_path / str(number), [sys.executable, "-c", code], {"retrain": 4})
        )
    (tmp_path / "0" / "retrain").mkdir(parents=True)
    (tmp_path / "0" / "retrain" / "metrics.jsonl").write_text('{"step": 3, "loss": 0.25}\n{"step": 4, "lo')
    assert results[0].progress() == "retrain 3/4, loss 0.25" and results[1].progress() == "starting"
    with pytest.raises(ValueError, match="jobs: 1 of 3 rows failed .row 1: error: the disk is full"):
        jobs.run(results, 2, ())
    assert [job.status for job in results] == [0, 1, 0]
    assert (tmp_path / "0" / "log.txt").read_text() == "all well\n"
