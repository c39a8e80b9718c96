"""The command line, and how a command fails."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from kdsearch_jax.runs import command_line, directories
from kdsearch_jax.runs.config import Experiment, ModelConfig, load_experiment


@dataclass(frozen=True)
class Flags(command_line.RunOptions):
    """The flags of a command of these tests."""

    stop_after: Literal["teacher", "search"] | None = None
    """Stop when this stage is done."""


def parse(*argv: str) -> tuple[Flags, Experiment]:
    return command_line.parse(list(argv), Flags, "kdsearch_jax.x", "What it does.")


class TestCommandLine:
    def test_nothing_given_is_the_default_experiment(self):
        flags, experiment = parse()
        assert experiment == load_experiment("digits")
        assert flags == Flags(workdir=Path("runs/digits"))

    def test_overrides_of_every_type(self):
        flags, experiment = parse(
            "--config", "cifar10_resnet56", "--budget.macs", "0.4", "--budget.params=None", "--search.steps", "100",
            "--data.no-flip", "--data.mean", "None", "--data.std", "None", "--gates.kinds", "channels", "branches",
            "--retrain.batch_size", "64", "--retrain.ema", "0.99", "--stop-after", "search", "--resume",
            "--workdir", "there", "--baselines",
        )  # fmt: skip
        assert (experiment.budget.macs, experiment.budget.params, experiment.search.steps) == (0.4, None, 100)
        assert (experiment.data.flip, experiment.data.mean, experiment.baselines) == (False, None, ())
        assert experiment.gates.kinds == ("channels", "branches")
        assert (experiment.retrain.batch_size, experiment.retrain.ema) == (64, 0.99)
        assert experiment.teacher == load_experiment("cifar10_resnet56").teacher
        assert (flags.stop_after, flags.resume, flags.workdir) == ("search", True, Path("there"))

    def test_quick_is_a_variant_that_can_be_overridden(self):
        _, experiment = parse("--quick", "--search.steps", "3")
        quick = load_experiment("digits", quick=True)
        assert experiment == dataclasses.replace(quick, search=dataclasses.replace(quick.search, steps=3))

    @pytest.mark.parametrize(
        ("given", "model"),
        [
            (("depth=56", "shortcut=B"), ModelConfig("cifar_resnet", {"depth": 56, "shortcut": "B"})),
            (("width=8",), ModelConfig("cifar_resnet", {"depth": 20, "shortcut": "A", "width": 8})),
            (('{"depth": 8}',), ModelConfig("cifar_resnet", {"depth": 8})),
        ],
    )
    def test_model_arguments_change_some_or_replace_all(self, given, model):
        assert parse("--config", "cifar10_resnet20", "--model.arguments", *given)[1].model == model

    def test_another_model_takes_no_arguments_over(self):
        first = ("--config", "cifar10_resnet20", "--model.name", "mlp")
        assert parse(*first)[1].model == ModelConfig("mlp", {})
        given = (*first, "--model.arguments", "hidden=[64, 32]")
        assert parse(*given)[1].model == ModelConfig("mlp", {"hidden": [64, 32]})

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--budget.mac", "0.4"], r"--budget\.mac is not an option; did you mean '--budget\.macs'"),
            (["--mcas", "0.4"], r"did you mean '--budget\.macs'"),
            (["--stop-afer", "search"], "did you mean '--stop-after'"),
            (["--model.arguments.depth", "8"], r"write --model\.arguments depth=VALUE"),
            (["--model.arguments", "depth"], "neither KEY=VALUE nor a JSON"),
            (["--model.arguments", '{"depth": '], r"--model\.arguments"),
            (["--search.steps", "many"], r"--search\.steps.*'many'"),
            (["--search.steps"], r"Missing value for argument '--search\.steps'"),
            (["--search.steps", "-3"], r"search\.steps: -3 is not possible"),
            (["--search.optimizer", "adam"], r"'adam' for argument '--search\.optimizer'.*sgd"),
            (["--budget.macs", "half"], r"^--budget\.macs: 'half' cannot be read; give None or FLOAT"),
            (["--budget.macs", "0"], r"budget\.macs: 0\.0 is not possible"),
            (["--budget.macs", "None"], "all None"),
            (["--config", "digit"], "did you mean 'digits'"),
            (["--config"], "--config: no value"),
            (["--config", "none/such.py"], "no such file"),
            (["stray"], "stray"),
        ],
    )
    def test_a_mistake_is_one_line_that_says_the_way_out(self, argv, message, capfd):
        with pytest.raises((command_line.UsageError, FileNotFoundError), match=message) as refusal:
            parse(*argv)
        assert "\n" not in str(refusal.value)
        assert capfd.readouterr() == ("", "")

    def test_help_lists_every_setting(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            parse("--help")
        assert end.value.code == 0
        text = capsys.readouterr().out.replace("-", "_")
        from kdsearch_jax.runs.config import SETTINGS

        missing = [name for name in SETTINGS if f"__{name}" not in text]
        assert not missing
        assert all(f"__{f.name}" in text for f in dataclasses.fields(Flags))

    def test_resuming_a_named_directory_takes_its_experiment(self, tmp_path):
        _, experiment = parse("--search.steps", "7")
        directories.new_run_directory(tmp_path, experiment)
        assert parse("--workdir", str(tmp_path), "--resume")[1] == experiment
        assert parse("--workdir", str(tmp_path))[1] != experiment


COMMAND = """
import sys
from pathlib import Path
from kdsearch_jax.runs import command_line as cli
from kdsearch_jax.runs import directories

def main(argv):
    options, experiment = cli.parse(argv, cli.RunOptions, "kdsearch_jax.x", "What it does.")
    if experiment.name == "usage-of-a-number":
        return 1 // 0
    if experiment.name == "interrupted":
        raise KeyboardInterrupt
    if experiment.name == "preempted":
        class Stopped(RuntimeError):
            exit_status = 143
        raise Stopped("saved at step 3")
    if experiment.name == "of-another-package":
        import numpy
        numpy.zeros(3).reshape(2)
    directories.new_run_directory(options.workdir, experiment, options.resume)
    import json, pathlib, jax
    found = {"processes": jax.process_count(), "devices": jax.device_count()}
    pathlib.Path(f"process-{jax.process_index()}.json").write_text(json.dumps(found))  # stdout is the runtime's as well
    return 0

cli.run(main)
"""


@pytest.fixture
def command(tmp_path, python):
    """Start a command in a process of its own; gives (status, stdout, stderr)."""
    (tmp_path / "command.py").write_text(COMMAND)

    def start(*argv: str, launcher: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [python, *launcher, "command.py", *argv],
            cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return start


class TestFailing:
    def test_a_mistake_ends_in_one_line(self, command):
        status, out, err = command("--budget.mac", "0.4")
        assert (status, out) == (2, "")
        assert err == "error: --budget.mac is not an option; did you mean '--budget.macs'?\n"

    def test_a_used_directory_ends_in_one_line(self, command, tmp_path):
        directories.new_run_directory(tmp_path / "run", Experiment())
        status, _, err = command("--workdir", "run")
        assert status == 1
        assert err == "error: run already holds a run; add --resume to go on with it, or choose another --workdir\n"

    def test_a_traceback_is_there_for_the_asking(self, command):
        for arguments, environment in [(("--traceback",), {}), ((), {"KDSEARCH_TRACEBACK": "1"})]:
            status, _, err = command("--budget.macs", "0", *arguments, **environment)
            assert status == 2
            assert err.startswith("Traceback") and "budget.macs: 0.0 is not possible" in err

    def test_our_own_mistakes_keep_their_traceback(self, command):
        status, _, err = command("--name", "usage-of-a-number")
        assert status == 1
        assert err.startswith("Traceback") and err.endswith("ZeroDivisionError: integer division or modulo by zero\n")

    def test_an_error_of_another_package_says_how_to_find_it(self, command):
        status, _, err = command("--name", "of-another-package")
        assert status == 1
        assert err.count("\n") == 1 and err.endswith("(--traceback shows where)\n")

    def test_an_interruption_has_its_own_status(self, command):
        status, _, err = command("--name", "interrupted")
        assert status == 130
        assert "the same command goes on" in err and "Traceback" not in err

    def test_an_exception_may_choose_its_status(self, command):
        assert command("--name", "preempted") == (143, "", "error: saved at step 3\n")


COMMANDS = ("compare", "evaluate", "export", "inspect", "report", "retrain", "search", "teacher")
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "scipy", "sklearn", "matplotlib", "tensorboardX", "safetensors")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_nothing_that_takes_long_to_import(name, python, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try: runpy.run_module(f'kdsearch_jax.{sys.argv[0]}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"kdsearch_jax.{name}" in done.stdout and "--traceback" in done.stdout
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_share_one_run_directory(command, repository, tmp_path):
    launcher = (str(repository / "launch" / "local.py"), "-n", "2", "--devices", "2", "--", "python")
    status, _, err = command("--workdir", "run", launcher=launcher)
    assert status == 0, err
    for process in range(2):
        assert json.loads((tmp_path / f"process-{process}.json").read_text()) == {"processes": 2, "devices": 4}
    assert (tmp_path / "launch-1.log").is_file()
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    status, _, err = command("--workdir", "run", launcher=launcher)
    assert status == 1
    assert "error: run already holds a run" in err
    assert "error: refused by process 0" in (tmp_path / "launch-1.log").read_text()
