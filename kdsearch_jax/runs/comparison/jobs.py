"""Makes the rows of a comparison side by side, each in a process of its own, and shows how far they are.

A process is the same command for one row and seed, bound to its share of the cores; locks, checkpoints and results are
those of a comparison whose rows are made one after another. Its output goes to DIR/seed-SEED/ROW/log.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kdsearch_jax.runs.comparison.external import ExternalStudent
from kdsearch_jax.runs.comparison.rows import Row
from kdsearch_jax.runs.setup import RunSetup
from kdsearch_jax.storage.files import DamagedError, read_sealed

POLL = 1.0  # seconds between looks at the processes
LINE = 30.0  # seconds between lines where there is no terminal
_TAIL = 1 << 14  # bytes at the end of a file of metrics


@dataclass
class RowJob:
    """A row and seed to make.

    Attributes:
      name: for people.
      directory: of the row.
      argv: of the command that makes it.
      stages: {its directory in `directory`: updates}, in the order in which they run.
    """

    name: str
    directory: Path
    argv: Sequence[str]
    stages: dict[str, int]
    process: subprocess.Popen[bytes] | None = None
    status: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether its result is stored."""
        try:
            return "why" not in read_sealed(self.directory / "result.json")
        except (OSError, DamagedError):
            return False

    def progress(self) -> str:
        """`search 120/234, loss 0.5`; empty before the first update."""
        for stage, updates in reversed(self.stages.items()):
            if (row := _last_row(self.directory / stage / "metrics.jsonl")) and updates:
                loss = "" if row.get("loss") is None else f", loss {row['loss']:.3g}"
                return f"{stage} {row['step']}/{updates}{loss}"
        return "starting"


def pending(
    setup: RunSetup,
    rows: Sequence[Row],
    students: Mapping[str, ExternalStudent],
    seeds: Sequence[int],
    flags: Sequence[str],
) -> list[RowJob]:
    """A job for each row and seed that is not finished yet.

    Args:
      students: of the external rows, by name.
      flags: further flags of the commands. The experiment is that of the comparison's directory.
    """
    search, retrain = setup.experiment.search.steps, setup.experiment.retrain.steps
    command = [sys.executable, "-m", "kdsearch_jax.compare", "--workdir", str(setup.directory), *flags]
    jobs = []
    for seed in seeds:
        for row in rows:
            label = students[row.name].label if row.name in students else row.label
            argv = [*command, "--seeds", str(seed), "--rows", row.argument, "--no-latency", "--no-table"]
            stages = {"retrain": row.times * (search + retrain)}
            if row.how == "search":
                stages = {"search": search, "retrain": retrain}
            jobs.append(RowJob(f"{label}, seed {seed}", setup.directory / f"seed-{seed}" / row.name, argv, stages))
    return [job for job in jobs if not job.is_done]


def run(jobs: Sequence[RowJob], count: int, cores: Sequence[int], show: Callable[[str], None] | None = None) -> None:
    """Runs all jobs, at most `count` at a time; ends the processes if this one is interrupted.

    Args:
      cores: that this process may use, divided among the jobs that run at a time; () if they cannot be bound.
      show: shows a line about the state of all jobs; by default `StatusLine`.

    Raises:
      ValueError: some failed, after all others have run.
    """
    waiting, running, ended = list(jobs), {}, []
    shares = [tuple(cores[place::count]) for place in range(count)]
    with contextlib.ExitStack() as stack:
        show = show or stack.enter_context(StatusLine()).show
        stack.callback(lambda: _stop(job for job in running.values()))
        while waiting or running:
            for place in range(count):
                if place not in running and waiting:
                    running[place] = waiting.pop(0)
                    _start(running[place], shares[place])
            time.sleep(POLL)
            for place, job in list(running.items()):
                assert job.process is not None
                job.status = job.process.poll()
                if job.status is not None:
                    ended.append(running.pop(place))
            show(_summary(ended, list(running.values()), waiting))
    if failed := [job for job in ended if job.status]:
        lines = "; ".join(f"{job.name}: {_last_line(job.directory / 'log.txt')}" for job in failed)
        raise ValueError(f"jobs: {len(failed)} of {len(jobs)} rows failed ({lines}); the same command resumes them")


def _start(job: RowJob, cores: tuple[int, ...]) -> None:
    job.directory.mkdir(parents=True, exist_ok=True)
    with (job.directory / "log.txt").open("ab") as output, _bound_to(cores):
        job.process = subprocess.Popen(job.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


@contextlib.contextmanager
def _bound_to(cores: tuple[int, ...]) -> Iterator[None]:
    """Binds this thread to some cores, and so the processes that it starts meanwhile."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _stop(jobs: Iterator[RowJob]) -> None:
    """Ends processes as SIGTERM does: they save their state first."""
    processes = [job.process for job in jobs if job.process is not None and job.process.poll() is None]
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _summary(ended: Sequence[RowJob], running: Sequence[RowJob], waiting: Sequence[RowJob]) -> str:
    parts = [f"{len(ended)} done", *(f"{job.name}: {job.progress()}" for job in running), f"{len(waiting)} left"]
    if failed := sum(bool(job.status) for job in ended):
        parts.insert(1, f"{failed} failed")
    return " · ".join(parts)


class StatusLine:
    """A line that is rewritten on a terminal; elsewhere lines, at most one every `LINE` seconds and a last one."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic):
        self._stream, self._clock = stream or sys.stderr, clock
        self._rewrites = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._line, self._shown_at = "", -LINE
        self._pending = False

    def __enter__(self) -> StatusLine:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the line, or writes the last one."""
        if self._rewrites or self._pending:
            print(f"\r{self._line}" if self._rewrites else self._line, file=self._stream, flush=True)

    def show(self, line: str) -> None:
        """Shows the newest state."""
        if line == self._line:
            return
        before, self._line, self._pending = self._line, line, True
        if self._rewrites:
            width = os.get_terminal_size(self._stream.fileno()).columns - 1
            print(f"\r{line[:width]:{min(len(before), width)}}", end="", file=self._stream, flush=True)
        elif self._clock() - self._shown_at >= LINE:
            print(line, file=self._stream, flush=True)
            self._shown_at, self._pending = self._clock(), False


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last complete row of a file of metrics, None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                return row
    return None


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return "no output"
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
