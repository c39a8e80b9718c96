"""Fills the disk of runs at random moments and resumes them once there is room again.

    unshare -rm python -m benchmarks.disk_full --roads 3     (`unshare` allows mounting a file system without root)

Uses the runs of benchmarks/chaos.py on their own file system. In every stage, at a random moment, all but a few bytes
are taken. The command must exit with a non-zero status and one line that begins with "error:", without a traceback, and
every network on disk must be complete. Then the space is freed and the same command is given. In the end the directory
must contain exactly what an undisturbed run leaves, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import chaos
from benchmarks.chaos import LIMIT, NETWORKS, STAGES, ended, place, setup, stage_of, started

ROOM = 64 << 20  # bytes of the file system


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of `ROOM` bytes, mounted there until the end."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "disk_full", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise SystemExit(f"{mounted.stderr.strip()}; start it by `unshare -rm`, or as root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


class Filler:
    """A file that takes what room there is, but for `left` bytes, whenever it is asked to."""

    def __init__(self, disk: Path, left: int):
        self.path, self.left = disk / "filler", left
        self._descriptor, self._size = os.open(self.path, os.O_CREAT | os.O_WRONLY), 0

    def fill(self) -> None:
        """Takes it."""
        found = os.statvfs(self.path)
        if (free := found.f_bavail * found.f_frsize - self.left) > 0:
            with contextlib.suppress(OSError):  # the run was faster
                os.posix_fallocate(self._descriptor, self._size, free)
                self._size += free

    def remove(self) -> None:
        """Gives it back."""
        os.close(self._descriptor)
        self.path.unlink()


def filled(
    directory: Path, log: Path, stage: str, seconds: dict[str, float], share: float, left: int
) -> tuple[str, int, str]:
    """Starts the road, and fills the disk after this share of the stage: (stage at the end, status, output).

    seconds: that a stage takes; learns where it took less.
    """
    before = log.stat().st_size if log.exists() else 0
    process, status = started(lambda: setup(directory), log), None
    while status is None and place(directory) < STAGES.index(stage):
        status = ended(process, 0.002)
    began = time.monotonic()
    while (
        status is None and place(directory) == STAGES.index(stage) and time.monotonic() < began + share * seconds[stage]
    ):
        status = ended(process, 0.002)
    if place(directory) > STAGES.index(stage):
        seconds[stage] = time.monotonic() - began
    filler = Filler(directory.parent, left)
    while status is None and time.monotonic() < began + LIMIT:
        filler.fill()
        status = ended(process, 0.002)
    filler.remove()
    if status is None:
        raise RuntimeError(f"{directory} did not end with its disk full; see {log}")
    return stage_of(directory), status, log.read_bytes()[before:].decode(errors="replace")


def whole(directory: Path, log: Path) -> None:
    """Reads every network that is there; RuntimeError where one is none."""

    def work() -> int:
        from kdsearch_jax.storage.networks import load_network

        for name in NETWORKS:
            if (directory / name / "network.json").exists():
                load_network(directory / name)
        return 0

    if ended(started(work, log), LIMIT) != 0:
        raise RuntimeError(f"{directory} has a network that is not whole; see {log}")


def prove(roads: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Fills the disk under so many roads, in each stage; RuntimeError where something else than asked comes."""
    seconds, expected = chaos.undisturbed(scratch)
    chance, hits = random.Random(seed), collections.Counter()
    with small_disk(scratch / "disk") as disk:
        for number in range(roads):
            directory, log = disk / f"road-{number}", scratch / f"full-{number}.log"
            for stage in STAGES:
                if place(directory) > STAGES.index(stage):
                    continue
                left = chance.choice((0, 1000, chance.randrange(1 << 16)))
                hit, status, output = filled(directory, log, stage, seconds, chance.uniform(0, 0.9), left)
                if status == 0:  # nothing was written any more
                    break
                errors = [line for line in output.splitlines() if line.startswith("error: ")]
                if status < 0 or len(errors) != 1 or "Traceback" in output:
                    raise RuntimeError(
                        f"road {number}, full in {hit}: status {status}, {len(errors)} error lines; {log}"
                    )
                whole(directory, log)
                hits[hit or "the start"] += 1
                print(f"road {number}, {stage} to {hit}: {errors[0]}", flush=True)
            else:
                chaos.gone_on(directory, log)
            chaos.compared(directory, log, expected)
            (disk / f"road-{number}.digest").unlink()
    return dict(sorted(hits.items()))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--roads", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="a directory to work in; a temporary one if left out")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disk-full-")))
        scratch.mkdir(parents=True, exist_ok=True)
        found = prove(options.roads, options.seed, scratch)
    print(json.dumps({"roads": options.roads, "filled": sum(found.values()), "seed": options.seed, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
