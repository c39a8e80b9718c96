"""Cases of a run's directory: what a damaged one does to its report, and to the command that goes on with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.cases import Case, Write, mutated, replaced

SHOWN = (
    "config.json", "results.json", "evidence.npz", "search/selection.json", "search/topology.json",
    "search/metrics.jsonl", "search/history.npz", "search/gates.npz", "retrain/metrics.jsonl", "student/manifest.json",
)  # fmt: skip
STEERS = ("run.json", "config.json", "environment.json")
REPORT, RESUME = ("run",), ("--resume", "--workdir", "run", "--stop-after", "search")
EACH = 12  # mutants of a file


def runs(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """A report of a run, or going on with it, where one of its files has been damaged or says something else."""
    for command, argv, names in (("report", REPORT, SHOWN), ("search", RESUME, STEERS)):
        valid = {"report": "report", "search": "resume"}[command]
        for name in names:
            for what, change in _changes(name, random):
                yield Case("runs", f"{command}: {name}: {what}", command, argv, run(root, name, change), valid)


def run(root: Path, name: str | None = None, change: Callable[[bytes], bytes] | None = None) -> Write:
    """The finished run, with one file changed."""

    def write(box: Path) -> None:
        shutil.copytree(root / "run", box / "run")
        if name is not None and change is not None:
            path = box / "run" / name
            path.write_bytes(change(path.read_bytes()))

    return write


def _changes(name: str, random: np.random.Generator) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """{what: a change} of such a file."""
    for said in (b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff\xfe"):
        yield repr(said[:8]), lambda _, said=said: said
    for number in range(EACH):
        seed = int(random.integers(2**31))
        if number % 2 and not name.endswith("npz"):
            yield f"another value {number}", lambda content, s=seed: _another(content, np.random.default_rng(s))
        else:
            yield f"mutant {number}", lambda content, s=seed: mutated(content, np.random.default_rng(s))


def _another(content: bytes, random: np.random.Generator) -> bytes:
    """JSON, or a line of JSON among others, with one part replaced; its digest left out, as older files have none."""
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    at = int(random.integers(len(lines)))
    value: Any = json.loads(lines[at])
    value.pop("sha256", None)
    lines[at] = json.dumps(replaced(value, random))
    return "\n".join([*lines, ""]).encode()
