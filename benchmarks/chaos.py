"""Kills runs at random moments and resumes them with the same command: `python -m benchmarks.chaos --roads 9`.

Each "road" is a whole run of a tiny network (teacher, search, cut, retraining, export, table and report) whose
experiment is this file. It is killed in every stage at a random moment, by SIGKILL with all its children or by SIGTERM;
each time the same command is given again, until it finishes. In the end the directory must contain exactly the files of
an undisturbed run, with the same networks, gates, history, selection and metrics, bit for bit. With `--kills 1` each
run is killed only once, one stage after another.

Processes are forked from this one, which has imported everything and computed nothing, and XLA's compilations are
cached in the scratch directory, so a start takes seconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs.config import Experiment, ModelConfig
from kdsearch_jax.training.settings import RunConfig, StageConfig

STAGES = ("teacher", "search", "cut", "retrain", "export", "report")
NETWORKS = ("teacher/network", "search/kept/network", "search/network", "retrain/network", "student")
LIMIT = 3600  # seconds for a run, on a machine with much else to do


def experiment(quick: bool = False) -> Experiment:
    """A multilayer perceptron on 160 digits, a checkpoint every other update."""
    stage = StageConfig(steps=12, batch_size=16, learning_rate=0.05)
    return Experiment(
        name="chaos",
        model=ModelConfig("mlp", {"hidden": [16, 16]}),
        data=DataConfig("digits", train_limit=160),
        teacher=stage,
        search=stage,
        retrain=stage,
        budget=BudgetConfig(macs=0.6),
        baselines=(),
        run=RunConfig(
            steps_per_dispatch=2, checkpoint_every=2, checkpoint_share=None, evaluate_every=12, eval_batch_size=256
        ),
    )


# --- one run --------------------------------------------------------------------------------------------------------


def started(work: Callable[[], int], log: Path) -> int:
    """The number of a new process that does the work, at the head of a group of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX is not started here yet, so its threads cannot be in the way
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = work()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def setup(directory: Path) -> int:
    """The command, in this process."""
    from kdsearch_jax.runs import command_line
    from kdsearch_jax.search.__main__ import main

    sys.argv = ["kdsearch_jax.search", "--config", str(Path(__file__).resolve()), "--workdir", str(directory)]
    command_line.run(main)


def ended(process: int, seconds: float) -> int | None:
    """The exit status, minus the signal that ended it; None where it still runs after so long."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def stage_of(directory: Path) -> str:
    """The stage that a run is in, by what it has left so far; "" before it has begun, "ended" after all."""

    def there(name: str) -> bool:
        return (directory / name).exists()

    if not there("config.json"):
        return ""
    if not there("teacher/network/network.json"):
        return "teacher"
    if not there("search/kept/network/network.json"):
        return "search"
    if not there("search/network/network.json"):
        return "cut"
    if not there("retrain/network/network.json"):
        return "retrain"
    if not there("student/manifest.json"):
        return "export"
    return "report" if '"finished": false' in (directory / "run.json").read_text() else "ended"


def killed(
    directory: Path, log: Path, stage: str, seconds: dict[str, float], share: float, number: signal.Signals
) -> tuple[str, int]:
    """Starts the road, and sends the signal after this share of the stage: (stage then, exit status).

    seconds: that a stage takes; learns where it took less, so that a machine that is less busy is hit as well.
    """
    process = started(lambda: setup(directory), log)
    deadline = time.monotonic() + LIMIT
    while place(directory) < STAGES.index(stage):
        if ended(process, 0.002) is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{directory} ended before it came to {stage}; see {log}")
    began = time.monotonic()
    while (left := began + share * seconds[stage] - time.monotonic()) > 0:
        if (status := ended(process, min(left, 0.002))) is not None:
            return stage_of(directory), status
        if place(directory) > STAGES.index(stage):
            seconds[stage] = time.monotonic() - began
            break
    if number == signal.SIGKILL:
        os.killpg(process, number)  # as when a machine is lost
    else:
        os.kill(process, number)
    status = ended(process, LIMIT)
    if status is None:
        raise RuntimeError(f"{directory}: {number.name} did not end it")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what its end has left running
    return stage_of(directory), status


def place(directory: Path) -> int:
    """The number of the stage that a run is in; -1 before it has begun."""
    now = stage_of(directory)
    return STAGES.index(now) if now in STAGES else -1 if not now else len(STAGES)


# --- what it left ---------------------------------------------------------------------------------------------------


def digest(directory: Path) -> dict[str, Any]:
    """All that results are, and the names of all files, but those that Orbax and TensorBoard number by the clock."""
    import numpy as np

    from kdsearch_jax.storage.arrays import flatten
    from kdsearch_jax.storage.files import read_arrays
    from kdsearch_jax.storage.networks import load_network

    found: dict[str, Any] = {}
    for name in NETWORKS:
        _, variables, architecture, info = load_network(directory / name)
        arrays = {leaf: np.asarray(value).tobytes().hex() for leaf, value in flatten(variables).items()}
        found[name] = _hash([arrays, architecture.to_json(), info])
    for name in ("search/gates", "search/history", "evidence"):
        arrays = read_arrays(directory / f"{name}.npz")
        found[name] = _hash({key: value.tobytes().hex() for key, value in arrays.items()})
    for stage in ("teacher", "search", "retrain"):
        rows = [json.loads(line) for line in (directory / stage / "metrics.jsonl").read_text().splitlines()]
        measured = ("time", "images_per_second")  # by the clock
        found[f"{stage}/metrics"] = _hash([{k: v for k, v in row.items() if k not in measured} for row in rows])
    table = json.loads((directory / "results.json").read_text())["rows"]
    found["results"] = [{k: v for k, v in row.items() if k != "memory" and k[:3] != "ms_"} for row in table]
    found["selection"] = (directory / "search" / "selection.json").read_text()
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    found["files"] = sorted({re.sub(r"events\.out\.tfevents.*|/d/[0-9a-f]{32}$", "/…", name) for name in files})
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digested(directory: Path, log: Path) -> dict[str, Any]:
    """`digest`, by a process of its own: this one must not start JAX."""
    path = directory.with_name(f"{directory.name}.digest")

    def work() -> int:
        path.write_text(json.dumps(digest(directory)))
        return 0

    if ended(started(work, log), LIMIT) != 0:
        raise RuntimeError(f"{directory} cannot be read; see {log}")
    return json.loads(path.read_text())


# --- the proof ------------------------------------------------------------------------------------------------------


def straight(directory: Path, log: Path) -> dict[str, float]:
    """An undisturbed run: the seconds that each stage takes."""
    process, began = started(lambda: setup(directory), log), {}
    while (status := ended(process, 0.002)) is None:
        began.setdefault(stage_of(directory), time.monotonic())
    if status:
        raise RuntimeError(f"the undisturbed run failed with status {status}; see {log}")
    times = [began.get(stage, 0.0) for stage in STAGES] + [time.monotonic()]
    return {stage: max(times[i + 1] - times[i], 0.01) for i, stage in enumerate(STAGES)}


def undisturbed(scratch: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """(seconds of each stage, digest) of a run that nothing disturbs, equal to another one."""
    _import_all()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    known = scratch / "seconds.json"
    if not known.is_file():
        straight(scratch / "first", scratch / "first.log")  # compiles
        known.write_text(json.dumps(straight(scratch / "straight", scratch / "straight.log")))
    seconds = json.loads(known.read_text())
    expected = digested(scratch / "straight", scratch / "straight.log")
    if expected != digested(scratch / "first", scratch / "first.log"):
        raise RuntimeError("two undisturbed runs differ")
    print("seconds of each stage:", {stage: round(each, 1) for stage, each in seconds.items()}, flush=True)
    return seconds, expected


def gone_on(directory: Path, log: Path) -> None:
    """The same command once more, to its end."""
    status = ended(started(lambda: setup(directory), log), LIMIT)
    if status != 0:
        raise RuntimeError(f"{directory}: the same command ended with {status}; see {log}")


def compared(directory: Path, log: Path, expected: Mapping[str, Any]) -> None:
    """Says that a road ended as the undisturbed one, and removes it; RuntimeError where it did not."""
    actual = digested(directory, log)
    if different := [key for key in expected if actual[key] != expected[key]]:
        raise RuntimeError(f"{directory}: {', '.join(different)} differ; see {log}")
    print(f"{directory.name}: bit-identical", flush=True)
    shutil.rmtree(directory)


def prove(roads: int, kills: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Kills so many roads so often and compares each with an undisturbed one; RuntimeError where one differs."""
    seconds, expected = undisturbed(scratch)
    chance, hits = random.Random(seed), collections.Counter()
    for number in range(roads):
        directory, log = scratch / f"road-{number}", scratch / f"road-{number}.log"
        stages = STAGES if kills >= len(STAGES) else [STAGES[(number * kills + i) % len(STAGES)] for i in range(kills)]
        for stage in sorted(stages, key=STAGES.index):
            how = chance.choice((signal.SIGKILL, signal.SIGTERM))
            hit, status = killed(directory, log, stage, seconds, chance.uniform(0, 0.9), how)
            if hit == "ended" and stage == "report":  # the signal came too late
                break
            if status not in (-how, 143):
                raise RuntimeError(f"road {number}, {how.name} in {hit}: status {status}; see {log}")
            hits[hit, how.name] += 1
            print(f"road {number}: {how.name} in {hit}", flush=True)
        else:
            gone_on(directory, log)
        compared(directory, log, expected)
    return {f"{how} in {stage or 'the start'}": count for (stage, how), count in sorted(hits.items())}


def _import_all() -> None:
    """Everything a run needs, so that its process has it at once."""
    import matplotlib

    matplotlib.use("agg")
    for name in ("matplotlib.pyplot", "tensorboardX", "tyro", "kdsearch_jax.search.__main__"):
        importlib.import_module(name)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--roads", type=int, default=9)
    parser.add_argument("--kills", type=int, default=len(STAGES), help="of each road")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="a directory to work in; a temporary one if left out")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        scratch.mkdir(parents=True, exist_ok=True)
        found = prove(options.roads, options.kills, options.seed, scratch)
    killed_ = sum(found.values())
    print(json.dumps({"roads": options.roads, "killed": killed_, "seed": options.seed, **found, "differing": 0}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
