"""Compares the same run on 1, 2 and 4 processes of 2 devices each with a run on a single device.

python benchmarks/processes.py [--processes 1 2 4] [--devices 2] [--workdir DIR] [-- options of the search]

A single device runs `benchmarks/smooth_digits.py`: teacher, 50 updates of search, cut, 50 of retraining, 100 of the
uniform student, export. The others, started by launch/local.py, start from the same teacher with the same global batch.
Compared with the first: the kept units, which must be equal; the largest difference of a parameter or statistic of
every network, at most 1e-5; scores and counts in results.json; and the rows of the metrics, each of which must occur
once. Prints a Markdown table; exits with status 1 if anything differs. With --workdir an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kdsearch_jax
from kdsearch_jax.storage.arrays import flatten
from kdsearch_jax.storage.files import read_json_object

HERE = Path(__file__).resolve().parent
LAUNCHER = HERE.parent / "launch" / "local.py"
TOLERANCE = 1e-5
NETWORKS = {"cut": "search/network", "student": "student", "uniform": "uniform/network"}


def start(directory: Path, processes: int, devices: int, *options: str) -> None:
    """Goes the road in `directory`; raises CalledProcessError where it fails, with what was printed."""
    argv = ["--config", str(HERE / "smooth_digits.py"), "--workdir", str(directory), "--resume", *options]
    command = [
        sys.executable, str(LAUNCHER), "-n", str(processes), "--devices", str(devices), "--logs", str(directory.parent),
        *("--", "python", "-m", "kdsearch_jax.search", *argv),
    ]  # fmt: skip
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}  # finds the network, and the package in a checkout
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout)
        done.check_returncode()


def difference(one: Path, other: Path) -> float:
    """The largest absolute difference between two networks' variables; infinite where their shapes are not the same."""
    loaded = (kdsearch_jax.load(path, trust_code=True).variables for path in (one, other))
    left, right = (flatten(jax.tree.map(np.asarray, variables)) for variables in loaded)
    if {name: leaf.shape for name, leaf in left.items()} != {name: leaf.shape for name, leaf in right.items()}:
        return float("inf")
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def rows(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row that search and retraining wrote."""
    files = (run / stage / "metrics.jsonl" for stage in ("search", "retrain"))
    return [(row["step"], row["loss"]) for file in files for row in map(json.loads, file.read_text().splitlines())]


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How a run differs from that of one device."""
    kept = [read_json_object(run / "search" / "selection.json")["kept"] for run in (one, other)]
    tables = [read_json_object(run / "results.json")["rows"] for run in (one, other)]
    scores = [[(row["name"], row["accuracy"], row["macs"], row["params"]) for row in table] for table in tables]
    written = [rows(run) for run in (one, other)]
    same = [step for step, _ in written[0]] == [step for step, _ in written[1]]
    close = same and np.allclose(*([loss for _, loss in each] for each in written), rtol=1e-4, atol=1e-5)
    return {
        **{name: difference(one / path, other / path) for name, path in NETWORKS.items() if (one / path).is_dir()},
        "moved": sum(len(set(kept[0][group]) ^ set(kept[1][group])) for group in kept[0]),
        "rows": bool(close),
        "scores": scores[0] == scores[1],
        "processes": read_json_object(other / "environment.json")["processes"],
    }


def equal(found: dict[str, Any], processes: int) -> bool:
    """Whether what `compare` found is no difference."""
    near = all(found[name] <= TOLERANCE for name in NETWORKS if name in found) and not found["moved"]
    return near and found["rows"] and found["scores"] and found["processes"] == processes


def main() -> int:
    """Runs, compares, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--devices", type=int, default=2, help="of each process; default: 2")
    parser.add_argument("--workdir", type=Path, help="where the runs go; default: a temporary directory")
    parser.add_argument("options", nargs="*", help="of the search, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.workdir or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        start(root / "one", 1, 1, *arguments.options)
        good, given = True, ("--teacher-from", str(root / "one" / "teacher" / "network"))
        print("| processes × devices | " + " | ".join(NETWORKS) + " | units of another choice | metrics, scores |")
        print("|" + "---|" * (len(NETWORKS) + 3))
        for count in arguments.processes:
            run = root / f"{count}x{arguments.devices}"
            start(run, count, arguments.devices, *given, *arguments.options)
            found = compare(root / "one", run)
            cells = " | ".join(f"{found[name]:.1e}" if name in found else "" for name in NETWORKS)
            same = "equal" if found["rows"] and found["scores"] else "different"
            print(f"| {count} × {arguments.devices} | {cells} | {found['moved']} | {same} |", flush=True)
            good = good and equal(found, count)
    print("equal to one device" if good else "not equal to one device")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
