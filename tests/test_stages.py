"""Whole runs and their commands: what they write, where they start and stop, and what they refuse."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import kdsearch_jax
from kdsearch_jax import retrain, teacher
from kdsearch_jax.adapters import registry
from kdsearch_jax.evaluate import main as evaluate_main
from kdsearch_jax.export import main as export_main
from kdsearch_jax.models.pretrained import tensor_mapping, torchvision
from kdsearch_jax.report import main as report_main
from kdsearch_jax.runs import command_line
from kdsearch_jax.runs.config import load_experiment
from kdsearch_jax.runs.results import format_table
from kdsearch_jax.search.__main__ import main as search_main
from kdsearch_jax.storage import arrays, networks

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = str(Path(__file__).parent / "tiny.py")
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # for processes: what `quick_compilation` is for this one
SHORT = ("--teacher.steps", "0", "--search.steps", "4", "--retrain.steps", "0", "--baselines")


def tiny(workdir, *argv, command=search_main) -> int:
    """Runs a command on the tiny experiment, in this process."""
    return command(["--config", TINY, "--workdir", str(workdir), *map(str, argv)])


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compilation) -> Path:
    """A finished run; do not write into it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert tiny(directory, "--baselines", "uniform", "magnitude") == 0
    return directory


def contents(directory: Path) -> dict[str, str]:
    """{path: digest} of everything in a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in sorted(directory.rglob("*"))
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def arrays_of(network: Path) -> dict[str, np.ndarray]:
    """The leaves of a network directory."""
    _, variables = kdsearch_jax.load(network)
    return {name: np.asarray(leaf) for name, leaf in arrays.flatten(variables).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_describes_itself(run):
    assert load_experiment(str(run / "config.json")).name == "tiny"
    assert {"versions", "git_revision", "devices", "command", "started"} <= set(read(run / "environment.json"))
    for stage, steps in {"teacher": 16, "search": 12, "retrain": 8, "uniform": 20, "magnitude": 20}.items():
        rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == steps and {"loss", "validation_accuracy", "time"} <= set(rows[-1])
        assert list((run / stage / "tensorboard").iterdir())
        assert (run / stage / "checkpoints" / str(steps)).is_dir()
        kdsearch_jax.load(run / stage / "network")
    assert {"macs", "params", "lambda2", "alive"} <= set(
        json.loads((run / "search" / "metrics.jsonl").read_text().splitlines()[-1])
    )


def test_the_search_explains_what_it_chose(run):
    topology, selection = read(run / "search" / "topology.json"), read(run / "search" / "selection.json")
    sizes = {group["name"]: group["size"] for group in topology["groups"]}
    assert set(sizes) == set(selection["kept"]) and topology["frozen"] and topology["macs"] == 30_112
    with np.load(run / "search" / "history.npz") as history, np.load(run / "search" / "gates.npz") as gates:
        assert {"steps", "cost_macs", "cost_params", "lambda2"} <= set(history)
        assert history["steps"].tolist() == [4, 8, 12]
        for name, size in sizes.items():
            assert history[f"gate/{name}"].shape == (3, size) and gates[name].shape == (size,)
            assert (gates[name] >= 0).all()
    assert selection["budget"]["macs"] == 0.6 and selection["budget"]["params"] is None and selection["step"] == 12
    assert 0.98 * 0.6 * 30_112 <= selection["macs"] <= 0.6 * 30_112
    assert selection["proof"]["difference"] <= 1e-5
    assert read(run / "search" / "architecture.json") == read(run / "search" / "network" / "architecture.json")


def test_the_table_compares_students_of_equal_cost(run):
    results = read(run / "results.json")
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["teacher", "student", "uniform", "magnitude"]
    assert (results["dataset"], results["split"], results["examples"]) == ("digits", "test", 359)
    assert results["budget"]["macs"] == 0.6 and results["budget"]["params"] is None
    for name, row in rows.items():
        assert 0 <= row["accuracy"] <= row["accuracy_top5"] <= 1 and row["ms_per_image"] > 0 and row["ms_batch"] > 0
        leaves = arrays_of(run / {"student": "retrain"}.get(name, name) / "network")
        assert row["bytes"] == sum(leaf.nbytes for leaf in leaves.values())
        assert row["params"] == sum(leaf.size for path, leaf in leaves.items() if path.startswith("params/"))
        if name != "teacher":
            assert 0.98 * 0.6 * 30_112 <= row["macs"] <= 0.6 * 30_112
            assert 0 <= row["agreement"] <= 1 and row["kl"] >= 0 and row["steps"] == 20
    table = format_table(results).splitlines()
    assert [line.split()[0] for line in table[1:]] == list(rows) and len(set(map(len, table))) == 1


def test_the_student_is_delivered_in_every_form(run, tmp_path, python):
    manifest = read(run / "student" / "manifest.json")
    assert set(manifest["files"]) == {"student.safetensors", "student.stablehlo"}
    assert same(arrays_of(run / "student"), arrays_of(run / "retrain" / "network"))
    flat = safetensors.numpy.load_file(run / "student" / "student.safetensors")
    assert same(flat, arrays_of(run / "student"))
    code = (
        "import sys, numpy, kdsearch_jax\n"
        "module, variables = kdsearch_jax.load(sys.argv[1])\n"
        "numpy.save('logits.npy', module.apply(variables, numpy.load('images.npy')))\n"
    )
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    subprocess.run([python, "-c", code, str(run / "student")], cwd=tmp_path, check=True, timeout=120)
    module, variables = kdsearch_jax.load(run / "student")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), module.apply(variables, images), atol=1e-5)
    assert isinstance(read(run / "student" / "architecture.json")["layers"], dict)
    info = read(run / "student" / "network.json")["payload"]["info"]
    assert (info["dataset"], info["scale"]) == ("digits", 16)  # what whoever reads scikit-learn's digits divides by


def test_baselines_have_layers_of_the_same_share(run):
    """Uniform keeps the same part of every layer, and both start from the teacher's weights."""
    sizes = {group["name"]: group for group in read(run / "search" / "topology.json")["groups"]}
    layers = read(run / "uniform" / "network" / "architecture.json")["layers"]
    shares = [
        layers[name]["features"] / group["size"]
        for name, group in sizes.items()
        if group["kind"] == "channels" and name in layers and group["size"] >= 8
    ]
    assert shares and max(shares) - min(shares) <= 0.3
    teacher_kernel = arrays_of(run / "teacher" / "network")["params/dense/bias"]
    for name in ("uniform", "magnitude"):
        assert not read(run / name / "network" / "architecture.json")["dropped"]
        assert same({"": teacher_kernel}, {"": arrays_of(run / name / "start")["params/dense/bias"]})


def test_evaluate_export_and_report_work_on_a_run(run, tmp_path, capsys):
    before = contents(run)
    assert evaluate_main([str(run / "student"), "--teacher", str(run / "teacher" / "network")]) == 0
    out = capsys.readouterr().out
    rows = {row["name"]: row for row in read(run / "results.json")["rows"]}
    assert f"{rows['student']['accuracy']:.2%}" in out and f"{rows['student']['agreement']:.2%}" in out
    assert f"{rows['teacher']['accuracy']:.2%}" in out
    assert export_main([str(run / "student"), "--out", str(tmp_path / "out"), "--formats", "safetensors"]) == 0
    assert (tmp_path / "out" / "student.safetensors").is_file()
    assert contents(run) == before
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "report"))
    assert report_main([str(copy)]) == 0
    assert (copy / "report" / "index.html").is_file()


# --- several budgets ------------------------------------------------------------------------------------------------

FRONT = ("--teacher.steps", "0", "--search.steps", "24", "--retrain.steps", "4", "--gates.shrink", "0.9", "--baselines")


@pytest.fixture(scope="module")
def several(tmp_path_factory, quick_compilation) -> Path:
    """A run of two budgets with a third one added; do not write into it."""
    directory = tmp_path_factory.mktemp("front") / "run"
    assert tiny(directory, *FRONT, "--budgets", "0.5,0.8") == 0
    search, two = contents(directory / "search"), contents(directory / "student-0.5")
    assert search_main(["--from", str(directory), "--budgets", "0.6"]) == 0
    after = contents(directory / "search")
    assert {name: after[name] for name in search} == search  # the search was not run again
    assert {name for name in after.keys() - search.keys() if name.count("/") == 0} == {"at-0.6"}
    assert contents(directory / "student-0.5") == two
    return directory


def test_each_budget_has_a_student_from_one_search(several):
    record = read(several / "front.json")
    assert [point["name"] for point in record["points"]] == ["at-0.8", "at-0.6", "at-0.5"]
    assert read(several / "config.json")["budgets"] == [0.8, 0.6, 0.5] and not record["baselines"]
    for point, budget in zip(record["points"], (0.8, 0.6, 0.5), strict=True):
        assert 0.98 * budget * 30_112 <= point["macs"] <= budget * 30_112
        assert point["budget"]["macs"] == budget and point["path"] == f"student-{budget}" and point["steps"] == 28
        selection = read(several / "search" / point["name"] / "selection.json")
        assert selection["proof"]["difference"] <= 1e-5 and selection["step"] == point["search_steps"]
        trained = [json.loads(line) for line in (several / point["name"] / "metrics.jsonl").read_text().splitlines()]
        assert trained[-1]["step"] + point["search_steps"] == 28  # equal steps in all
        assert same(arrays_of(several / point["path"]), arrays_of(several / point["name"] / "network"))
        assert (several / point["path"] / "student.stablehlo").is_file()
    steps = [point["search_steps"] for point in record["points"]]
    assert steps[0] < steps[2] == 24 and steps[1] == steps[0]  # 0.6 starts from the state next above it
    names = [row["name"] for row in read(several / "results.json")["rows"]]
    assert names == ["teacher", "at-0.8", "at-0.6", "at-0.5"]
    assert same(arrays_of(several / "search" / "network"), arrays_of(several / "search" / "at-0.5" / "network"))
    assert (several / "report" / "index.html").is_file()


@pytest.mark.slow
def test_a_killed_run_of_several_budgets_resumes(several, tmp_path):
    """Killed in its second, shrunk part; the result is the same bit for bit."""
    copy = tmp_path / "run"
    shutil.copytree(several, copy)
    parts = sorted((copy / "search").glob("checkpoints-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert parts, "the search has shrunk"
    for name in ("network", "at-0.5", "at-0.8/network", "selection.json", "history.npz"):
        path = copy / "search" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (*parts, copy / "at-0.5", copy / "student-0.5", copy / "report"):
        shutil.rmtree(name)
    values = read(copy / "config.json")  # as before the third was added: checkpoints tell what they were made with
    values["budgets"] = [0.8, 0.5]
    (copy / "config.json").write_text(json.dumps(values))
    (copy / "run.json").unlink()  # which knows that config.json was another
    assert search_main(["--resume", "--workdir", str(copy)]) == 0
    for name in ("search/network", "search/at-0.8/network", "search/at-0.5/kept/network", "at-0.5/network"):
        assert same(arrays_of(copy / name), arrays_of(several / name)), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--budgets", "0.7", "0.7"), "budgets: "),
        (("--budgets",), "--budgets: "),
        (("--budgets", "0.7", "0.001"), "budget.macs: 0.001 "),
        (("--budgets", "0.7", "nought"), "budgets"),
        (("--budgets", "1.0", "0.5"), "budget.macs: 1"),
        (("--budgets", "0.8", "0.6", "0.5", "0.4"), "budgets: .*search.steps 12"),
        (("--budgets", "0.7", "--budget.macs", "0.5"), "--budgets and --budget.macs"),
        (("--budgets", "0.7", "--search-from", "nowhere"), "search_from: nowhere "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_impossible_budgets_are_refused(tmp_path, argv, message):
    with refused(message, tmp_path):
        tiny(tmp_path / "run", *argv)


def test_budgets_that_cannot_be_added_are_refused(several, tmp_path):
    for argv, message in [
        (("--budgets", "0.9"), "budgets: "),
        (("--budgets", "0.5"), "budgets: 0.5 "),
        (("--budgets", "0.01"), "budget.macs: 0.01 "),
        (("--budgets", "0.4", "--retrain.steps", "5"), "retrain.steps: 5, not 4"),
        (("--budgets", "0.4", "--workdir", tmp_path), "--workdir"),
        ((), "--budgets"),
    ]:
        with refused(message, several):
            search_main(["--from", str(several), *map(str, argv)])
    with refused("front_from: nowhere "):
        search_main(["--from", "nowhere", "--budgets", "0.4"])


# --- where a run may start and stop ---------------------------------------------------------------------------------


def test_a_finished_run_trains_nothing(run, tmp_path):
    """--resume of a finished run only rewrites table and report."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    networks = {name: contents(copy / name) for name in ("teacher", "search", "retrain", "uniform")}
    (copy / "results.json").unlink()
    assert search_main(["--resume", "--workdir", str(copy)]) == 0
    assert (copy / "results.json").is_file()
    assert networks == {name: contents(copy / name) for name in networks}
    assert len(read(copy / "environment.json")["earlier"]) == 1


@pytest.mark.slow
def test_stages_one_by_one_give_the_same_run(run, tmp_path, capsys):
    """`teacher`, `search --stop-after search` and the rest give bit for bit what one command does."""
    directory = tmp_path / "run"
    both = ("--baselines", "uniform", "magnitude")
    assert tiny(directory, *both, command=teacher.main) == 0
    assert str(directory / "teacher" / "network") in capsys.readouterr().out
    assert not (directory / "search").exists()
    assert search_main(["--workdir", str(directory), "--resume", "--stop-after", "search"]) == 0
    assert "--resume" in capsys.readouterr().out
    assert (directory / "report" / "index.html").is_file() and not (directory / "retrain").exists()
    assert search_main(["--workdir", str(directory), "--resume"]) == 0
    for name in ("teacher", "search", "retrain", "uniform"):
        assert same(arrays_of(directory / name / "network"), arrays_of(run / name / "network")), name
    assert same(arrays_of(directory / "student"), arrays_of(run / "student"))


def test_stop_after_retrain_exports_nothing(tmp_path):
    assert tiny(tmp_path / "run", *SHORT, "--stop-after", "retrain") == 0
    assert (tmp_path / "run" / "retrain" / "network").is_dir() and not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize("source", ["run", "network"])
def test_a_teacher_of_another_run(run, tmp_path, source):
    path = run if source == "run" else run / "teacher" / "network"
    directory = tmp_path / "run"
    assert tiny(directory, *SHORT, "--teacher-from", path, "--stop-after", "search") == 0
    assert same(arrays_of(directory / "teacher" / "network"), arrays_of(run / "teacher" / "network"))
    info = [networks.load_network(d / "teacher" / "network")[3] for d in (directory, run)]
    assert info[0] == info[1]


def test_a_teacher_from_pytorch(tmp_path):
    """A state dict under PyTorch's names: the network has its numbers, and no teacher is trained."""
    module = registry.build("cifar_resnet", {"depth": 8, "width": 4, "num_classes": 10})
    random, naming = np.random.default_rng(0), torchvision.naming(module, (8, 8, 1))
    tensors = {
        source.names[0]: random.uniform(0.1, 0.5, source.shape).astype(np.float32)
        for source in tensor_mapping.leaf_sources(module, (8, 8, 1), naming).values()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    status = tiny(
        tmp_path / "run", *SHORT, "--stop-after", "search", "--teacher-from", tmp_path / "teacher.safetensors",
        "--model.name", "cifar_resnet", "--model.arguments", "depth=8", "width=4",
    )  # fmt: skip
    assert status == 0
    found = arrays_of(tmp_path / "run" / "teacher" / "network")
    np.testing.assert_array_equal(
        found["params/stage2/block1/conv1/kernel"], tensors["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)
    )
    assert not (tmp_path / "run" / "teacher" / "metrics.jsonl").exists()
    assert read(tmp_path / "run" / "search" / "architecture.json")["layers"]


@pytest.mark.parametrize(
    "command", [search_main, pytest.param(retrain.main, marks=pytest.mark.slow)], ids=["search", "retrain"]
)
def test_a_search_of_another_run(run, tmp_path, command):
    """Without --config the run's experiment is used; the new directory does not depend on the old one."""
    directory, before = tmp_path / "run", contents(run)
    source = run if command is search_main else run / "search"
    argv = ["--search-from", str(source), "--workdir", str(directory), "--retrain.steps", "4", "--baselines"]
    assert command(argv) == 0
    assert contents(run) == before
    for name in ("teacher", "search"):
        assert same(arrays_of(directory / name / "network"), arrays_of(run / name / "network"))
        assert not (directory / name / "checkpoints").exists()
    rows = {row["name"]: row for row in read(directory / "results.json")["rows"]}
    assert rows["student"]["steps"] == 16 and set(rows) == {"teacher", "student"}
    assert (directory / "report" / "index.html").is_file()
    if command is retrain.main:  # the copy is enough to resume
        assert command(["--workdir", str(directory), "--resume"]) == 0


@pytest.mark.slow  # `test_resume` kills in retraining and resumes
def test_retraining_resumes_with_its_own_copy_of_the_search(run, tmp_path):
    directory = tmp_path / "run"
    for name in ("teacher", "search"):
        shutil.copytree(run / name, directory / name)
    shutil.copy(run / "config.json", directory)
    (directory / "environment.json").write_text("{}")
    assert retrain.main(["--workdir", str(directory), "--resume"]) == 0
    assert same(arrays_of(directory / "student"), arrays_of(run / "student"))


@pytest.mark.parametrize(
    "changes",
    [
        ("--budget.macs", "None", "--budget.params", "0.7", "--gates.exclude", "stage1/*"),
        ("--run.precision", "bf16", "--retrain.ema", "0.9", "--retrain.optimizer", "adamw", "--teacher.steps", "4"),
        ("--search.steps", "0", "--distill.cross-entropy", "0.5", "--run.seed", "4294967295"),
    ],
    ids=lambda changes: changes[0],
)
def test_settings_reach_every_stage(tmp_path, changes):
    assert tiny(tmp_path / "run", *SHORT, "--retrain.steps", "4", "--stop-after", "retrain", *changes) == 0
    network = networks.load_network(tmp_path / "run" / "retrain" / "network")
    full = networks.load_network(tmp_path / "run" / "teacher" / "network")[3]
    bound = "params" if "--budget.params" in changes else "macs"
    share = network[3][bound] / full[bound]
    asked = 0.7 if bound == "params" else 0.6
    assert 0.98 * asked <= share <= asked
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(network[1]))


def test_two_processes_run_every_stage(repository, tmp_path, python):
    launcher = [
        python,
        repository / "launch" / "local.py",
        *["-n", "2", "--devices", "1", "--", "python", "-m", "kdsearch_jax.search"],
    ]
    steps = [option for stage in ("teacher", "search", "retrain") for option in (f"--{stage}.steps", "4")]
    argv = ["--config", TINY, "--workdir", tmp_path / "run", *steps, "--baselines"]
    done = subprocess.run(
        [*map(str, [*launcher, *argv])], cwd=tmp_path, env={**os.environ, **QUICK}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run" / "environment.json")["processes"] == 2
    assert 0.98 * 0.6 * 30_112 <= read(tmp_path / "run" / "search" / "selection.json")["macs"] <= 0.6 * 30_112
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    student, retrained = arrays_of(tmp_path / "run" / "student"), arrays_of(tmp_path / "run" / "retrain" / "network")
    assert same(student, retrained) and not same(student, arrays_of(tmp_path / "run" / "search" / "network"))


def test_processes_with_different_inputs_refuse_together(tmp_path, python):
    """First with another data file, then with another setting. Nothing is left behind."""
    rng = np.random.default_rng(0)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        images = rng.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8)
        np.savez(tmp_path / str(rank) / "x.npz", images=images, labels=np.arange(60) % 3)
    for what, others in (("data", []), ("settings", ["--teacher.learning-rate", "0.011"])):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            place = ["--coordinator", f"localhost:{listener.getsockname()[1]}", "--num-processes", "2"]
        both = [
            subprocess.Popen(
                [python, "-m", "kdsearch_jax.search", "--config", TINY, "--workdir", str(tmp_path / "run"),
                 "--data.name", "npz:x.npz",
                 *place, "--process-id", str(rank), *(others if rank else [])],
                cwd=tmp_path / (str(rank) if what == "data" else "0"), env={**os.environ, **QUICK},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        for process in both:
            _, err = process.communicate(timeout=200)
            assert process.returncode == 1 and "Traceback" not in err
            assert f"error: {what}: " in err and "process 1 " in err
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(repository, tmp_path, python):
    """SIGTERM in the search; all save and end; the same command, by one process with as many devices."""
    options = ["--run.steps-per-dispatch", "2", "--run.checkpoint-every", "2", "--run.checkpoint-share", "None"]
    argv = ["--config", TINY, *options, "--search.steps", "40", "--baselines", "--workdir"]
    launcher = [python, str(repository / "launch" / "local.py"), "-n", "2", "--devices", "1", "--"]
    environment = {**os.environ, **QUICK}
    command = ["python", "-m", "kdsearch_jax.search", *argv, str(tmp_path / "run")]
    process = subprocess.Popen([*launcher, *command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    saved, deadline = tmp_path / "run" / "search" / "checkpoints", time.monotonic() + 200
    while not (saved / "6").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143 and "search: stopped by SIGTERM and saved at step" in err
    for name in ("run", "straight"):
        status, _, err = start(python, "kdsearch_jax.search", *argv, tmp_path / name, JAX_NUM_CPU_DEVICES="2")
        assert status == 0, err
    assert read(tmp_path / "run" / "environment.json")["earlier"][0]["processes"] == 2
    assert (
        read(tmp_path / "run" / "search" / "selection.json")["kept"]
        == read(tmp_path / "straight" / "search" / "selection.json")["kept"]
    )
    found, expected = (arrays_of(tmp_path / name / "search" / "network") for name in ("run", "straight"))
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-5, err_msg=name)


# --- refusals -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(message: str, directory: Path | None = None, lines: int = 1):
    """A command refuses with so many clear lines and a status of its own, and `directory` is as before."""
    before, caught = None if directory is None else contents(directory), []
    with pytest.raises(Exception, match=message) as refusal:
        yield caught
    caught.append(refusal.value)
    assert command_line.exit_status(refusal.value) in (1, 2), repr(refusal.value)
    assert command_line.error_line(refusal.value).count("\n") + 1 <= lines
    if directory is not None:
        assert contents(directory) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model.name", "cifar_resnt"), "'cifar_resnt' .*'cifar_resnet'"),
        (("--model.name", "no_such_package:net"), "no_such_package"),
        (("--model.arguments", "depth=3"), "'depth'"),
        (("--model.arguments", "width=0"), "width"),
        (("--data.name", "digit"), "digit.*digits"),
        (("--data.name", "npz:none.npz"), "none.npz"),
        (("--budgt.macs", "0.4"), "'--budget.macs'"),
        (("--budget.macs", "0"), "budget.macs: 0"),
        (("--budget.macs", "1.5"), "budget.macs: 1.5 "),
        (("--budget.macs", "1.0"), "budget.macs: 1"),
        (("--budget.macs", "0.001"), "budget.macs: 0.001 "),
        (("--budget.macs", "500"), "budget.macs: 500.0 "),
        (("--budget.params", "1e9"), "budget.params: .*2,886"),
        (("--budget.round-to", "8", "--budget.macs", "0.5"), "baselines: .*budget.macs 0.92"),
        (("--gates.include", "nothing/*"), "'nothing/.' .*block/conv1"),
        (("--gates.kinds", "heads"), "nothing in this network can be pruned"),
        (("--gates.kinds", "branches", "--budget.macs", "0.39"), "--baselines"),
        (("--gates.exclude", "*"), "nothing in this network can be pruned"),
        (("--teacher-from", "nowhere"), "teacher_from: nowhere "),
        (("--search-from", "nowhere"), "search_from: nowhere "),
        (("--stop-after", "serach"), "stop-after"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_invalid_settings_are_refused_before_anything_is_written(tmp_path, argv, message):
    with refused(message, tmp_path):
        tiny(tmp_path / "run", *argv)


def test_retraining_needs_a_search(tmp_path):
    with refused("--search-from", tmp_path):
        tiny(tmp_path / "run", command=retrain.main)


def npz(path: Path, classes: int = 10, side: int = 8, channels: int = 1, images: int = 60) -> str:
    """Images with every class present, and `npz:PATH`."""
    random = np.random.default_rng(0)
    labels = np.arange(images) % classes
    np.savez(path, images=random.integers(0, 256, (images, side, side, channels), dtype=np.uint8), labels=labels)
    return f"npz:{path}"


def test_teachers_of_other_data_are_refused(run, tmp_path):
    seven = npz(tmp_path / "seven.npz", classes=7)
    large = npz(tmp_path / "large.npz", side=12)
    for argv, message in [
        (("--teacher-from", run, "--data.name", seven), "teacher_from: .* 10 classes.* 7"),
        (("--teacher-from", run, "--data.name", large), r"teacher_from: .*\(8, 8, 1\).*\(12, 12, 1\)"),
        (("--teacher-from", run / "report"), "teacher_from: "),
        (("--search-from", run, "--data.name", seven), "teacher_from: .* 10 classes"),
        (("--search-from", run, "--budget.macs", "0.5"), "budget: "),
        (("--search-from", run / "teacher"), "search_from: "),
    ]:
        with refused(message, tmp_path):
            tiny(tmp_path / "run", *argv)


def test_weights_of_another_architecture_list_both_trees(tmp_path):
    tensors = {"conv1.weight": np.ones((3, 3), np.float32), "layer9.0.conv1.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    resnet = ("--model.name", "cifar_resnet", "--model.arguments", "depth=8", "width=4")
    with refused("other.safetensors", tmp_path, lines=40) as refusal:
        tiny(tmp_path / "run", "--teacher-from", tmp_path / "other.safetensors", *resnet)
    for part in (
        "in the network but not in the file",
        "in the file but not in the network",
        "layer9.0.conv1.weight",
        "conv1.weight: 3x3 in the file, 4x1x3x3 in the network",
    ):
        assert part in str(refusal[0])
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:60])
    with refused("cannot be read as safetensors", tmp_path):
        tiny(tmp_path / "run", "--teacher-from", tmp_path / "half.safetensors", *resnet)
    with refused("SmallCNN", tmp_path):
        tiny(tmp_path / "run", "--teacher-from", tmp_path / "other.safetensors")


def test_a_directory_that_holds_a_run_stays_as_it_is(run):
    with refused("already holds a finished run; add --resume", run):
        tiny(run)
    with refused(r"another experiment \(search.steps: 12, not 13\)", run):
        tiny(run, "--baselines", "uniform", "magnitude", "--search.steps", "13", "--resume")
    with refused("already holds a", run):
        search_main(["--search-from", str(run), "--workdir", str(run)])


@pytest.mark.parametrize("damage", ["missing array", "flipped byte", "half of network.json", "no architecture"])
def test_a_damaged_network_is_named(run, tmp_path, damage):
    """A teacher whose files have suffered is refused by every command that reads it."""
    network = tmp_path / "network"
    shutil.copytree(run / "teacher" / "network", network)
    files = sorted((path for path in (network / "variables").rglob("*") if path.is_file()), key=os.path.getsize)
    if damage == "missing array":
        files[-1].unlink()
    elif damage == "flipped byte":
        content = bytearray(files[-1].read_bytes())
        content[len(content) // 2] ^= 1
        files[-1].write_bytes(content)
    elif damage == "half of network.json":
        text = (network / "network.json").read_text()
        (network / "network.json").write_text(text[: len(text) // 2])
    else:
        (network / "architecture.json").unlink()
    with refused("network", tmp_path):
        tiny(tmp_path / "run", "--teacher-from", network)
    with refused("network", tmp_path):
        evaluate_main([str(network)])
    with refused("network", tmp_path):
        export_main([str(network), "--out", str(tmp_path / "out")])


def test_a_run_with_a_missing_part_says_which(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / "search" / "network" / "network.json").unlink()
    with refused("search_from: .*network.json", tmp_path):
        tiny(tmp_path / "run", "--search-from", copy)
    (copy / "search" / "network" / "network.json").write_text("{}")
    (copy / "search" / "selection.json").write_text("[")
    with refused("search_from: .*selection.json", tmp_path):
        tiny(tmp_path / "run", "--search-from", copy)
    with refused("not a run", tmp_path):
        report_main([str(tmp_path)])


def test_images_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "broken.npz").write_bytes(Path(npz(tmp_path / "whole.npz")[4:]).read_bytes()[:300])
    with refused("broken.npz", tmp_path):
        tiny(tmp_path / "run", "--data.name", f"npz:{tmp_path / 'broken.npz'}")
    few = npz(tmp_path / "few.npz", images=12)
    with refused("batch_size: 16 is more than the"):
        tiny(tmp_path / "run", "--data.name", few)


def start(python, *argv, **environment):
    """A command in a process of its own: (status, stdout, stderr)."""
    done = subprocess.run(
        [python, "-m", *map(str, argv)], env={**os.environ, **QUICK, **environment}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_command_of_its_own_process_refuses_in_one_line(run, tmp_path, python):
    config = ("--config", TINY, "--workdir", tmp_path / "run")
    status, out, err = start(python, "kdsearch_jax.search", *config, "--budget.macs", "0.001")
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith("error: budget.macs: 0.001 ")
    status, out, err = start(python, "kdsearch_jax.search", "--config", TINY, "--workdir", run)
    assert (status, out, err.count("\n")) == (1, "", 1) and "--resume" in err
    status, out, err = start(python, "kdsearch_jax.teacher", *config, "--data.name", "npz:/dev/null")
    assert (status, out, err.count("\n")) == (1, "", 1) and "/dev/null" in err
    assert contents(tmp_path) == {}


@contextlib.contextmanager
def mounted(directory: Path, size: str):
    """The directory, made for this, on a file system of so many bytes."""
    directory.mkdir()
    done = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], capture_output=True
    )
    if not done or done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture
def little_space(tmp_path):
    """A directory on a file system of one MiB."""
    with mounted(tmp_path / "little", "1m") as directory:
        yield directory


def test_no_space_left_ends_in_one_line_and_what_was_saved_is_good(little_space, python, tmp_path):
    directory = little_space / "run"
    status, _, err = start(python, "kdsearch_jax.teacher", "--config", TINY, "--workdir", directory)
    assert status == 1 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "No space left" in last
    # With room again, the run goes on.
    shutil.copytree(directory, tmp_path / "moved")
    assert teacher.main(["--workdir", str(tmp_path / "moved"), "--resume"]) == 0
    kdsearch_jax.load(tmp_path / "moved" / "teacher" / "network")


def test_a_directory_that_is_read_only_is_refused_in_one_line(run, tmp_path):
    """Also to root, whom permissions do not stop."""
    with mounted(tmp_path / "disk", "64m") as disk:
        shutil.copytree(run, disk / "run", ignore=shutil.ignore_patterns("tensorboard"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with refused("Read-only file system", disk):
            tiny(disk / "new")
        with refused("Read-only file system", disk):
            search_main(["--resume", "--workdir", str(disk / "run")])
        with refused("Read-only file system", disk):
            export_main([str(disk / "run" / "student"), "--out", str(disk / "out"), "--formats", "safetensors"])
        with refused("Read-only file system", disk):
            report_main([str(disk / "run")])
        assert evaluate_main([str(disk / "run" / "student")]) == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path, python):
    (tmp_path / "file").write_text("mine")
    with refused("file", tmp_path):
        tiny(tmp_path / "file" / "run")
    with refused("proc"):
        tiny("/proc/run")


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    """config.json edited between two starts: the checkpoints say what they were trained with."""
    directory = tmp_path / "run"
    assert tiny(directory, *SHORT, "--teacher.steps", "4", command=teacher.main) == 0
    shutil.rmtree(directory / "teacher" / "network")
    values = read(directory / "config.json")
    values["teacher"]["learning_rate"] = 0.2
    (directory / "config.json").write_text(json.dumps(values))
    with refused("config.json: "):
        teacher.main(["--workdir", str(directory), "--resume"])
    (directory / "environment.json").unlink()
    (directory / "run.json").unlink()
    with refused(r"teacher.learning_rate: 0.1 .*0.2"):
        teacher.main(["--workdir", str(directory), "--resume"])
    assert not (directory / "teacher" / "network").exists()
    assert dataclasses.asdict(load_experiment(str(directory / "config.json")).teacher)["learning_rate"] == 0.2
