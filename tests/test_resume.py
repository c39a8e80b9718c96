"""A run interrupted at any moment resumes and ends bit for bit where an undisturbed one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kdsearch_jax
from kdsearch_jax.search.__main__ import main as search_main
from kdsearch_jax.storage import arrays

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = str(Path(__file__).parent / "tiny.py")
# Many short dispatches with a checkpoint each, so that signals arrive both during training and during saves.
LONG = ("--teacher.steps", "0", "--search.steps", "40", "--retrain.steps", "40", "--retrain.ema", "0.9", "--baselines",
        "--run.steps-per-dispatch", "2", "--run.checkpoint-every", "2")  # fmt: skip


def setup(directory, *argv) -> int:
    """Runs or resumes the search in this process; returns the exit status."""
    return search_main(["--config", TINY, "--workdir", str(directory), *LONG, *argv])


def same_results(a: Path, b: Path) -> None:
    """Asserts that two runs have equal networks, gates, history, selection and metrics."""
    for name in ("teacher/network", "search/network", "retrain/network", "student"):
        left, right = (arrays.flatten(kdsearch_jax.load(run / name).variables) for run in (a, b))
        assert left.keys() == right.keys()
        for leaf in left:
            assert np.asarray(left[leaf]).tobytes() == np.asarray(right[leaf]).tobytes(), (name, leaf)
    for name in ("gates.npz", "history.npz"):
        with np.load(a / "search" / name) as left, np.load(b / "search" / name) as right:
            assert left.keys() == right.keys()
            for key in left:
                np.testing.assert_array_equal(left[key], right[key], err_msg=key)
    for stage in ("search", "retrain"):
        left, right = (
            [(row["step"], row["loss"], row.get("lambda2")) for row in map(json.loads, text.splitlines())]
            for text in ((run / stage / "metrics.jsonl").read_text() for run in (a, b))
        )
        assert left == right and len(left) == 20
    for name in ("architecture.json", "network.json", "manifest.json", "student.safetensors", "student.stablehlo"):
        assert (a / "student" / name).read_bytes() == (b / "student" / name).read_bytes(), name
    for name in ("selection.json", "topology.json", "architecture.json", "gates.npz", "history.npz"):
        assert (a / "search" / name).read_bytes() == (b / "search" / name).read_bytes(), name
    assert (a / "evidence.npz").read_bytes() == (b / "evidence.npz").read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quick_compilation) -> Path:
    """An undisturbed run; read-only."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert setup(directory) == 0
    return directory


def started(python, directory: Path, *argv: str) -> subprocess.Popen[str]:
    """Starts or resumes the search in a process of its own."""
    command = [python, "-m", "kdsearch_jax.search", "--config", TINY, "--workdir", str(directory), *LONG, *argv]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in this process, or results would differ
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)


def interrupted(python, directory: Path, stage: str, rows: int, number: signal.Signals) -> tuple[int, str]:
    """Starts or resumes a run and sends a signal once `stage` has this many rows of metrics: (status, stderr)."""
    process, metrics = started(python, directory), directory / stage / "metrics.jsonl"
    until(process, lambda: metrics.exists() and metrics.read_text().count("\n") >= rows)
    time.sleep(np.random.default_rng().uniform(0, 0.1))
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def test_killed_and_stopped_run_equals_an_undisturbed_one(straight, tmp_path, python):
    """kill -9 in the search, SIGTERM in retraining, at random moments; `benchmarks.chaos` kills in every stage."""
    directory, random = tmp_path / "run", np.random.default_rng()
    status, _ = interrupted(python, directory, "search", int(random.integers(1, 14)), signal.SIGKILL)
    assert status == -signal.SIGKILL and not (directory / "search" / "network").exists()
    status, errors = interrupted(python, directory, "retrain", int(random.integers(1, 14)), signal.SIGTERM)
    assert status == 143, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: retrain: ") and "SIGTERM" in last
    assert "Traceback" not in errors and not (directory / "retrain" / "network").exists()
    assert setup(directory) == 0
    same_results(directory, straight)
    assert not list(directory.rglob("*.tmp*")), "leftovers of a save that was killed"
    assert len(json.loads((directory / "environment.json").read_text())["earlier"]) == 2


def delete(directory: Path, names: list[str]) -> None:
    for name in names:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing",
    [
        ["search/network", "search/selection.json", "search/gates.npz", "retrain", "student", "results.json"],
        ["retrain/network", "student"],
        ["student/manifest.json", "student/student.stablehlo", "report"],
        ["teacher/network", "search", "retrain", "student", "results.json"],
    ],
    ids=lambda paths: paths[0],
)
def test_killed_between_training_and_writing_its_result(straight, tmp_path, missing):
    """A killed process leaves everything up to some file; the rest is recreated bit for bit."""
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    delete(directory, missing)
    assert setup(directory, "--resume") == 0
    same_results(directory, straight)
    assert (directory / "student" / "student.stablehlo").is_file() and (directory / "results.json").is_file()


@pytest.mark.slow
def test_two_fresh_runs_are_equal_bit_by_bit(straight, tmp_path):
    """And everything that they depend on is recorded."""
    assert setup(tmp_path / "run") == 0
    same_results(tmp_path / "run", straight)
    one, other = (json.loads((run / "environment.json").read_text()) for run in (tmp_path / "run", straight))
    assert {"versions", "devices", "variables", "jax", "data"} <= one.keys()
    others = {"command", "started", "git_revision"}  # the checkout may change meanwhile
    assert all(one[key] == other[key] for key in one.keys() - others) and one.keys() == other.keys()


@pytest.mark.slow  # `test_processes` does so with two processes
def test_sigterm_outside_of_training_ends_a_run_at_once_and_cleanly(straight, tmp_path, python):
    """During the export, while a subprocess checks it."""
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    delete(directory, ["student", "results.json"])
    process = started(python, directory, "--resume")
    until(process, lambda: any(directory.glob("student/.export-*/student.stablehlo")))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and "SIGTERM" in last
    assert "Traceback" not in errors
    left = [path.name for path in directory.rglob(".*")]
    assert left == [] and not (directory / "student" / "manifest.json").exists()
    assert setup(directory) == 0  # resumes the run that had been complete
    same_results(directory, straight)


DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
import test_train as t
from kdsearch_jax.distill import steps
from kdsearch_jax.storage.arrays import flatten
from kdsearch_jax.training import optimizer
from kdsearch_jax.training import state as training_state

module, variables = t.network()
tx = optimizer.make_optimizer(t.STAGE)
state = training_state.create_state(variables, tx, ema=0.9)
step = steps.supervised_step(module, tx, t.STAGE, t.RUN, t.TASK)
directory, straight = sys.argv[2:4]
assert jax.device_count() == int(sys.argv[4])
if jax.device_count() == 2:
    t.fit(directory, state, step, until=lambda state: int(state.step) >= 4)
    whole = t.fit(straight + ".run", state, step)
    np.savez(straight, **{name: np.asarray(leaf) for name, leaf in flatten(whole).items()})
else:
    found = flatten(t.fit(directory, state, step, resume=True))
    with np.load(straight) as whole:
        assert whole.keys() == found.keys() and int(whole["step"]) == 12
        for name in whole:
            np.testing.assert_allclose(np.asarray(found[name]), whole[name], rtol=0, atol=1e-5, err_msg=name)
"""


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(tmp_path):
    """Started on 2 devices, resumed on 1 and 4: parameters, statistics, momentum and average equal those on 2."""
    for devices in (2, 1, 4):
        if devices != 2:
            shutil.copytree(tmp_path / "on-2", tmp_path / f"on-{devices}")
        arguments = [Path(__file__).parent, tmp_path / f"on-{devices}", tmp_path / "straight.npz", devices]
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-c", DEVICES, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_damaged_newest_checkpoint_costs_a_few_steps_only(straight, tmp_path, caplog):
    """Killed after the training of both stages, before their networks were written, with a damaged checkpoint."""
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    delete(directory, ["search/network", "search/selection.json", "search/gates.npz", "retrain", "student"])
    newest = directory / "search" / "checkpoints" / "40"
    for path in (newest / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(b"\xff\x00\xff\x00")
    assert setup(directory, "--resume") == 0
    assert "checkpoints/40" in caplog.text.replace(os.sep, "/")
    same_results(directory, straight)
    assert (directory / "student" / "student.stablehlo").is_file() and (directory / "results.json").is_file()
