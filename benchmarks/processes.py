"""The same run by 1, 2 and 4 processes of 2 devices each and by a single device: equal students, equal parameters.

python benchmarks/processes.py [--processes 1 2 4] [--devices 2] [--steps 50] [--workdir DIR] [-- overrides of search]

Each run is the whole road (teacher, search, cut, retraining, delivery), so many updates a stage, at equal global batch,
started by launch/local.py. Compared with the run of one device: the units that are kept, exactly; of every network that
a run leaves the largest difference of a parameter or statistic (at most 1e-5); the counts and scores of results.json;
and that one process wrote: each step of the metrics once. Prints a table as Markdown; status 1 where anything differs.
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
from kdsearch_jax.checkpoint import flatten
from kdsearch_jax.files import read_object

LAUNCHER = Path(__file__).resolve().parent.parent / "launch" / "local.py"
TOLERANCE = 1e-5
NETWORKS = {"teacher": "teacher/network", "cut": "search/network", "student": "student", "uniform": "uniform/network"}


def start(directory: Path, processes: int, devices: int, steps: int, overrides: list[str]) -> None:
    """Runs the road in `directory`; raises CalledProcessError where it fails, with what it printed."""
    argv = ["--config", "digits", "--workdir", str(directory)]
    for stage in ("teacher", "search", "retrain"):
        argv += [f"--{stage}.steps", str(steps)]
    command = [
        sys.executable, str(LAUNCHER), "-n", str(processes), "--devices", str(devices), "--logs", str(directory.parent),
        *("--", "python", "-m", "kdsearch_jax.search", *argv, *overrides),
    ]  # fmt: skip
    done = subprocess.run(command, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout)
        done.check_returncode()


def difference(one: Path, other: Path) -> float:
    """The largest absolute difference between two networks' variables; infinite where their shapes are not the same."""
    left, right = (flatten(jax.tree.map(np.asarray, kdsearch_jax.load(path)[1])) for path in (one, other))
    if {name: leaf.shape for name, leaf in left.items()} != {name: leaf.shape for name, leaf in right.items()}:
        return float("inf")
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def steps_written(run: Path) -> list[int]:
    """Steps of the rows of the search's metrics."""
    return [json.loads(line)["step"] for line in (run / "search" / "metrics.jsonl").read_text().splitlines()]


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How a run differs from that of one device."""
    kept = [read_object(run / "search" / "selection.json")["kept"] for run in (one, other)]
    moved = sum(len(set(kept[0][group]) ^ set(kept[1][group])) for group in kept[0])
    rows = [read_object(run / "results.json")["networks"] for run in (one, other)]
    scores = [{name: (row["accuracy"], row["macs"], row["params"]) for name, row in table.items()} for table in rows]
    found: dict[str, Any] = {name: difference(one / path, other / path) for name, path in NETWORKS.items()}
    return {
        **found,
        "units of another choice": moved,
        "metrics": steps_written(one) == steps_written(other),
        "results": scores[0] == scores[1],
        "processes": read_object(other / "environment.json")["processes"],
    }


def main() -> int:
    """Runs, compares, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--devices", type=int, default=2, help="of each process; default: 2")
    parser.add_argument("--steps", type=int, default=50, help="updates a stage; default: 50")
    parser.add_argument("--workdir", type=Path, help="where the runs go; default: a temporary directory")
    parser.add_argument("overrides", nargs="*", help="of the search, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.workdir or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        start(root / "one", 1, 1, options.steps, options.overrides)
        good = True
        print("| processes × devices | " + " | ".join(NETWORKS) + " | units of another choice | metrics, results |")
        print("|" + "---|" * (len(NETWORKS) + 3))
        for count in options.processes:
            run = root / f"{count}x{options.devices}"
            start(run, count, options.devices, options.steps, options.overrides)
            found = compare(root / "one", run)
            cells = [f"{found[name]:.1e}" for name in NETWORKS]
            same = "equal" if found["metrics"] and found["results"] else "DIFFERENT"
            print(f"| {count} × {options.devices} | {' | '.join(cells)} | {found['units of another choice']} | {same} |")
            good &= all(found[name] <= TOLERANCE for name in NETWORKS) and not found["units of another choice"]
            good &= same == "equal" and found["processes"] == count
    print("equal to one device" if good else "NOT equal to one device")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
