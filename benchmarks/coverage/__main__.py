"""The command: `python -m benchmarks.coverage [PACKAGE …] [--variants PATTERN] [--again STATUS …] [--only-document]`.

Installs missing packages, runs every variant that has no record yet in a process with limits on time and memory,
appends a line for each to `--records`, and writes `docs/coverage.md` from all of them. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.coverage.document import document
from benchmarks.coverage.packages import PACKAGES, package
from benchmarks.coverage.variant import Package, Record

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"USE_TORCH": "0", "USE_TF": "0", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}


def main(argv: Sequence[str]) -> int:
    """Tries what has not been tried, and writes the document."""
    names = [p.name for p in PACKAGES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(names)}; all of them if left out")
    parser.add_argument("--variants", default="*", help="pattern of variants' names")
    parser.add_argument("--again", nargs="*", default=[], help="statuses whose variants are tried anew, or `all`")
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks" / "coverage" / "records.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/coverage"), help="where packages are installed")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one variant")
    parser.add_argument("--memory", type=float, default=12.0, help="GB for one process")
    parser.add_argument("--only-document", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.worker:
        return _work(given.worker[0], given.worker[1:], given.memory)
    unknown = set(given.packages) - set(names)
    if unknown:
        parser.error(f"no such package: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for item in PACKAGES if not given.only_document else ():
        if given.packages and item.name not in given.packages:
            continue
        done = {
            r.variant
            for r in read(given.records)
            if r.package == item.name and r.status not in given.again and "all" not in given.again
        }
        chosen = [v.name for v in item.variants if v.name not in done and fnmatch.fnmatchcase(v.name, given.variants)]
        if chosen:
            folder = install(item, given.folder)
            for record in run(item, chosen, folder, given.limit, given.memory):
                with given.records.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(record)) + "\n")
                print(f"{record.package} {record.variant}: {record.status} {record.reason} ({record.seconds} s)")
    (ROOT / "docs" / "coverage.md").write_text(document(PACKAGES, read(given.records)))
    return 0


def read(path: Path) -> list[Record]:
    """The last record of each variant."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [Record(**json.loads(line)) for line in lines]
    return list({(record.package, record.variant): record for record in records}.values())


def install(item: Package, folder: Path) -> Path:
    """The folder with the package's files, put there by pip if it is not there; no dependency comes with it."""
    target = (folder / item.name).resolve()
    if item.requirements and not target.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, *item.requirements], check=True)
    return target


def run(item: Package, variants: list[str], folder: Path, limit: float, memory: float) -> Iterable[Record]:
    """The records of these variants: one process tries them in turn, and the next goes on where one was ended."""
    left = list(variants)
    while left:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", "--memory", str(memory)]
        path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
        worker = subprocess.Popen(
            [*command, "--worker", item.name, *left],
            env={**os.environ, **QUIET, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(worker.stdout, lines), daemon=True).start()
        reason = f"took more than {limit:g} s"
        try:
            while left:
                line = lines.get(timeout=limit)
                if line is None:
                    reason = f"its process ended with status {worker.wait()}"
                    break
                if line.startswith("{"):
                    yield Record(**json.loads(line))
                    left.pop(0)
        except queue.Empty:
            pass
        finally:
            worker.kill()
            worker.wait()
        if left:
            yield Record(item.name, left.pop(0), "failed", reason)


def _pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _work(name: str, variants: Sequence[str], memory: float) -> int:
    """Tries the variants in turn, in this process, and prints a line of JSON for each."""
    import jax

    from benchmarks.coverage.prove import trial

    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 1e9),) * 2)
    jax.config.update("jax_disable_most_optimizations", True)  # much is compiled, and little computed
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    known = {variant.name: variant for variant in package(name).variants}
    for variant in variants:
        with tempfile.TemporaryDirectory(prefix="coverage-xla-") as cache:
            jax.config.update("jax_compilation_cache_dir", cache)
            record = trial(name, known[variant])
        record.version = _version(package(name))
        print(json.dumps(dataclasses.asdict(record)), flush=True)
        jax.clear_caches()
    return 0


def _version(item: Package) -> str:
    return "" if item.own else importlib.metadata.version(item.requirements[0].partition("==")[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
