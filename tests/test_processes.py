"""Detection of other processes, and how a run of two processes starts and fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from kdsearch_jax.training.processes import ProcessSpec, detect

JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
FLAGS = {"coordinator": "b:2", "num_processes": "4", "process_id": "0"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("flags", "environment", "place"),
    [
        ({}, {}, ProcessSpec()),  # only JAX can tell a Cloud TPU VM
        (FLAGS, {}, ProcessSpec("b:2", 4, 0, "the command line")),
        ({}, JAX, ProcessSpec("a:1", 3, 2, "the environment")),
        ({"process_id": "1"}, JAX, ProcessSpec("a:1", 3, 1, "the command line")),
        ({"num_processes": "1"}, {**SLURM, "SLURM_NTASKS": "4"}, None),
        ({}, {**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"coordinator": "[::1]:8482"}, JAX, ProcessSpec("[::1]:8482", 3, 2, "the command line")),
        ({}, {**SLURM, "SLURM_NTASKS": "4"}, ProcessSpec(None, 4, 1, "Slurm")),
        ({}, {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            {},
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            ProcessSpec(),
        ),  # a batch script is no task
        ({"coordinator": "b:2"}, {**SLURM, "SLURM_NTASKS": "4"}, ProcessSpec("b:2", 4, 1, "the command line")),
        ({}, {**OMPI, "OMPI_COMM_WORLD_SIZE": "2"}, ProcessSpec(None, 2, 1, "Open MPI")),
        ({}, {**OMPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({}, {"PMI_SIZE": "2", "PMI_RANK": "0"}, ProcessSpec(None, 2, 0, "MPI")),
        ({}, POD, None),
        ({}, {**POD, "JOB_COMPLETION_INDEX": "0"}, ProcessSpec()),
        ({}, {**POD, "JOB_COMPLETION_INDEX": "2"}, ProcessSpec(launcher="a Kubernetes Job")),
        ({}, {**POD, "TPU_WORKER_HOSTNAMES": "localhost"}, ProcessSpec()),
        ({}, {**POD, "TPU_WORKER_HOSTNAMES": "a,b"}, ProcessSpec(launcher="a TPU slice")),
    ],
)
def test_detection(flags, environment, place):
    assert detect(flags, environment) == place


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({"coordinator": "b:2"}, {}, r"--coordinator .*--num-processes .*--process-id"),
        ({"process_id": "0"}, {}, "--coordinator"),
        ({}, {"JAX_NUM_PROCESSES": "2"}, r"JAX_NUM_PROCESSES .*--coordinator \(or JAX_COORDINATOR_"),
        ({**FLAGS, "process_id": "4"}, {}, "--process-id: 4 .*4 processes"),
        ({**FLAGS, "process_id": "-1"}, {}, "--process-id: '-1'"),
        ({**FLAGS, "num_processes": "0"}, {}, "--num-processes: '0'"),
        ({**FLAGS, "num_processes": "two"}, {}, "--num-processes: 'two'"),
        ({}, {**JAX, "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID: 'x'"),
        ({**FLAGS, "coordinator": "host"}, {}, "--coordinator: 'host'.*HOST:PORT"),
        ({**FLAGS, "coordinator": ":80"}, {}, "HOST:PORT"),
        ({**FLAGS, "coordinator": "host:99999"}, {}, "HOST:PORT"),
    ],
)  # fmt: skip
def test_invalid_settings_are_named(flags, environment, message):
    with pytest.raises(ValueError, match=message) as refusal:
        detect(flags, environment)
    assert "\n" not in str(refusal.value)


COMMAND = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from kdsearch_jax.runs import command_line as cli
from kdsearch_jax.storage.networks import save_network
from kdsearch_jax.training.checkpoints import Checkpointer
from kdsearch_jax.adapters.architecture import Architecture

def main(argv):
    options = cli.parse_options(argv, cli.Options, "x", "What it does.")
    import jax
    from jax.experimental import multihost_utils
    rank, count = jax.process_index(), jax.process_count()
    if count > 1:
        latest = time.monotonic() + 2 * rank
        while time.monotonic() < latest and not Path("network").exists():
            time.sleep(0.05)
        if not Path("network").exists():
            save_network("network", Architecture("mlp"), {"params": {"x": np.ones(2)}}, {})
        total = multihost_utils.process_allgather(jax.numpy.asarray(rank + 1.0)).sum()
        Path(f"{rank}.json").write_text(json.dumps([count, float(total)]))
        with Checkpointer("checkpoints"):
            if rank == 1:
                raise OSError("only here")
            multihost_utils.process_allgather(jax.numpy.zeros(1000))
    else:
        Path("alone.json").write_text(json.dumps(jax.distributed.is_initialized()))
    return 0

cli.run(main)
"""


@pytest.fixture
def start(tmp_path, python):
    (tmp_path / "command.py").write_text(COMMAND)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COORD", "JAX_NUM_PROC", "SLURM_", "OMPI_"))}

    def start(*argv: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [python, *launcher, "command.py", *argv],
            cwd=tmp_path, env={**clean, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def test_two_processes_of_which_one_fails(start, tmp_path):
    """One is late, and finds what the other is about to write: both write it. Then one fails alone, in training: its
    own status comes out, and nobody waits for minutes."""
    port = 14000 + os.getpid() % 1000
    flags = ("--coordinator", f"127.0.0.1:{port}", "--num-processes=2")
    zero, one = (start(*flags, "--process-id", str(rank)) for rank in range(2))
    try:
        _, err = one.communicate(timeout=120)
        assert one.returncode == 1 and err.splitlines()[-1] == "error: only here"
        zero.communicate(timeout=60)  # was waiting for the other
        assert zero.returncode != 0
    finally:
        zero.kill()
        zero.wait()
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[2, 3.0]] * 2


STAGES = """
import time
from pathlib import Path
from kdsearch_jax.runs import command_line as cli
from kdsearch_jax.training import preemption

def main(argv):
    import jax
    options = cli.parse_options(argv, cli.Options, "x", "What it does.")
    for stage in range(1200):
        preemption.check_preemption(f"stage {stage}")
        Path(f"ready-{jax.process_index()}").touch()
        time.sleep(0.05)
    return 0

cli.run(main)
"""


def test_sigterm_outside_of_training_ends_all_processes_together(start, tmp_path):
    """The signal is sent to one of them."""
    (tmp_path / "command.py").write_text(STAGES)
    port = 15000 + os.getpid() % 1000
    flags = ("--coordinator", f"127.0.0.1:{port}", "--num-processes=2")
    both = [start(*flags, "--process-id", str(rank)) for rank in range(2)]
    try:
        deadline = time.monotonic() + 100
        while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        both[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=100)[1] for process in both]
        assert [process.returncode for process in both] == [143, 143]
        lines = [[line for line in text.splitlines() if line.startswith("error: ")] for text in errors]
        assert len(lines[0]) == 1 and lines[0] == lines[1]
        assert "error: stopped by SIGTERM before stage " in lines[0][0] and "Traceback" not in "".join(errors)
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_alone_in_a_slurm_step_of_one_task(start, tmp_path):
    process = start(**{**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads((tmp_path / "alone.json").read_text()) is False


@pytest.mark.parametrize(
    ("rank", "host", "message"),
    [
        ("1", "127.0.0.1", "127.0.0.1:"),
        ("0", "127.0.0.1", "0 to 1"),
        ("0", "192.0.2.1", "192.0.2.1"),  # of a range that nobody has
    ],
)
def test_missing_processes_are_reported(start, rank, host, message):
    address = f"{host}:{13000 + os.getpid() % 1000}"
    process = start("--coordinator", address, "--num-processes", "2", "--process-id", rank, "--join-timeout", "1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "within 1 s" in line and message in line
    assert "stack trace" not in err  # JAX's own end


def test_a_launcher_that_jax_does_not_support(start):
    process = start(PMI_SIZE="2", PMI_RANK="0")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: ") and "MPI" in err
    assert err.count("\n") == 1 and "--num-processes 1 to run alone" in err


def test_alone_if_jax_cannot_detect_others(start, tmp_path):
    """The only pod of a Job, without permission to query Kubernetes: the run continues with a warning."""
    (tmp_path / "kubernetes.py").write_text(
        "class config:\n"
        "    @staticmethod\n"
        "    def load_incluster_config(): raise RuntimeError('no account')\n"
    )  # fmt: skip
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    process = start(**POD, JOB_COMPLETION_INDEX="0", PYTHONPATH=path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads((tmp_path / "alone.json").read_text()) is False
    assert "running alone" in err and "(no account)" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--coordinator"], "--coordinator"),
        (["--num-processes", "--process-id", "0"], "--num-processes"),
        (["--join-timeout", "0"], "--join-timeout: 0 "),
    ],
)
def test_usage_errors(argv, message, monkeypatch):
    from kdsearch_jax.runs import command_line

    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(command_line.UsageError, match=message):
        command_line.join_processes(argv)
