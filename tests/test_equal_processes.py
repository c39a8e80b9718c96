"""A run of several processes with several devices equals that of a single device, started from the command line.

`python benchmarks/processes.py` holds 1, 2 and 4 processes to the same, for 50 updates a stage.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from kdsearch_jax.search.__main__ import main as search_main

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def processes(monkeypatch):
    """benchmarks/processes.py, as a module; its network can be found."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of processes: what `quick_compilation` is for this one
    spec = importlib.util.spec_from_file_location("processes_of_benchmarks", BENCHMARKS / "processes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("smooth", None)


@pytest.mark.slow
def test_two_processes_of_two_devices_equal_one_device(processes, tmp_path):
    """359 images, which 4 devices cannot share evenly, are evaluated; training has batches of 16."""
    short = ("--quick", "--teacher.steps", "40", "--baselines")
    config = ["--config", str(BENCHMARKS / "smooth_digits.py"), *short]
    assert search_main([*config, "--workdir", str(tmp_path / "one")]) == 0
    given = ("--teacher-from", str(tmp_path / "one" / "teacher" / "network"))
    processes.start(tmp_path / "two", 2, 2, *short, *given)
    found = processes.compare(tmp_path / "one", tmp_path / "two")
    assert processes.equal(found, 2), found
    assert (tmp_path / "two" / "report" / "index.html").is_file()
