"""Tests the commands with bad input: `python -m benchmarks.fuzz [--seed 0] [--only KIND …] [--names PART]`.

Every case is a command line as a user would type it, in its own directory, run by the command's real entry point in a
process forked from one that has imported everything. An invalid case must exit with a non-zero status and one line that
begins with "error:", without a traceback, leave no new files, and stay within limits of time and of memory above a
valid run. A random mutant may be harmless: then it exits with 0 and prints the output of the valid file.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.fuzz import arrays, lines, networks, runs, seeds
from benchmarks.fuzz.cases import EVALUATE, IMAGES, TRAIN, UNTAUGHT, Case, Write, both, copied

COMMANDS = {
    "search": "kdsearch_jax.search.__main__",
    "teacher": "kdsearch_jax.teacher",
    "evaluate": "kdsearch_jax.evaluate",
    "export": "kdsearch_jax.export",
    "report": "kdsearch_jax.report",
}
LIBRARIES = (
    "sklearn.datasets", "tyro", "PIL.Image", "tensorflow_datasets", "torch", "safetensors.numpy", "orbax.checkpoint",
)  # fmt: skip
KINDS: dict[str, Callable[[Path, np.random.Generator], Iterator[Case]]] = {
    "settings": lines.settings,
    "configurations": lines.configurations,
    "paths": lines.paths,
    "networks": networks.networks,
    "npz": arrays.npz,
    "safetensors": arrays.safetensors,
    "others": arrays.others,
    "images": arrays.images,
    "runs": runs.runs,
}
MISSING = "teacher_from: no-such-teacher does not exist"  # where settings and configurations have been accepted
SECONDS, CPU, MEBIBYTES = 600, 60, 256  # by the clock, for a machine that does other things; of computing; of memory


class Ended(NamedTuple):
    """How a command ended. status: None where it took too long; peak: KiB; new: what is in its directory since."""

    status: int | None
    peak: int
    out: str
    err: str
    new: set[str]


def forked(function: Callable[[], Any], seconds: int = SECONDS) -> tuple[int | None, int]:
    """(exit status of a child that runs it, None where it took too long; its peak memory in KiB)."""
    child = os.fork()
    if not child:
        status = 70
        try:
            function()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 70
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return None, os.wait4(child, 0)[2].ru_maxrss


def run(case: Case, box: Path) -> tuple[int | None, int, str, str]:
    """(status, KiB, stdout, stderr) of a command in a directory."""
    logs = [box.parent / f"{box.name}.{name}" for name in ("out", "err")]

    def command() -> None:
        for number, log in enumerate(logs, 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(box)
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU))
        resource.setrlimit(
            resource.RLIMIT_AS, (virtual + (12 << 30), virtual + (12 << 30))
        )  # so that the machine survives a failure
        sys.argv = [case.command, *case.argv]
        module = importlib.import_module(COMMANDS[case.command])
        from kdsearch_jax.runs import command_line

        command_line.run(module.main)

    status, peak = forked(command)
    texts = [log.read_text(errors="replace") for log in logs]
    for log in logs:
        log.unlink()
    return status, peak, texts[0], texts[1]


def listing(box: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time of the last change)} of everything below a directory."""
    every = list(box.rglob("*"))
    return {str(path): ((found := path.lstat()).st_size, 0 if path.is_dir() else found.st_mtime_ns) for path in every}


def same(end: Ended, expected: Ended | None) -> bool:
    """Whether a command ended as the valid one; what a library has to say on stderr meanwhile may differ."""
    if expected is None:
        return False
    return (end.status, end.out) == (expected.status, expected.out) and (not end.status or end.err == expected.err)


def judged(case: Case, end: Ended, expected: Ended | None) -> str:
    """What is wrong with how a case ended; "" for nothing."""
    status, err, lines = end.status, end.err, end.err.splitlines()
    if status is None:
        return f"took more than {SECONDS} s"
    if "Traceback" in err:
        return f"traceback: {err!r:.3000}"
    if same(end, expected):
        return ""
    if status == 0 or MISSING in err:
        return "accepted" if expected is None else f"accepted, with another output: {end.out!r:.200}"
    if status < 0 or status == 70:
        return f"status {status}: {err[-200:]!r}"
    if sum(line.startswith("error: ") for line in lines) != 1 or not lines[-1].startswith("error: "):
        return f"not one error line: {err[-300:]!r}"
    if len(lines) > 1:
        return f"more than the error line: {err[:300]!r}"
    if len(lines[0]) > 2000 or not lines[0].isprintable():
        return f"the line is no line: {lines[0]!r:.200}"
    return f"left behind: {sorted(end.new)[:3]}" if end.new else ""


def valid_cases(root: Path) -> dict[str, Case]:
    """The commands of the mutants on files that are whole."""
    check = ("net", "--out", "out", "--check", "--formats", "safetensors")
    taught, pictures = (*TRAIN, "--teacher-from"), [seeds.encoded("PNG")] * 24

    def case(name: str, command: str, argv: tuple[str, ...], *writes: Write) -> Case:
        return Case("valid", name, command, argv, both(*writes))

    config, net = copied(root, "config.json"), copied(root, "net")
    return {
        each.name: each
        for each in (
            case("configurations", "teacher", UNTAUGHT, config),
            case("evaluate", "evaluate", EVALUATE, net),
            case("npz", "evaluate", ("net", "--data", "npz:x.npz"), net, copied(root, "data.npz", to="x.npz")),
            case("images", "evaluate", IMAGES, net, lambda box: seeds.tfds_images(box / "tfds", pictures)),
            case("check", "export", check, net, copied(root, "out")),
            case("msgpack", "teacher", (*taught, "x.msgpack"), config, copied(root, "weights.msgpack", to="x.msgpack")),
            case("report", "report", runs.REPORT, runs.run(root)),
            case("resume", "search", runs.RESUME, runs.run(root)),
            case("orbax", "teacher", (*taught, "teacher"), config, copied(root, "orbax", to="teacher")),
        )
    }


def ready() -> None:
    """Imports all that the commands do, and nothing of the caller's counts: they run as on a fresh machine."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg", "KDSEARCH_TRACEBACK": "0", "TQDM_DISABLE": "1"}
    for module in (*COMMANDS.values(), *LIBRARIES):
        importlib.import_module(module)
    compiled = tempfile.mkdtemp(prefix="kdsearch-fuzz-xla-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def attempt(case: Case, box: Path) -> Ended:
    """How a case ends in a directory of its own, which is made for it and removed."""
    box.mkdir()
    if forked(lambda: case.write(box))[0] != 0:
        raise SystemExit(f"{case.kind}, {case.name}: its files could not be made")
    before = listing(box)
    status, peak, out, err = run(case, box)
    after = listing(box)
    outside = {path.name for path in box.parent.iterdir()} - {"seeds", "compiled", box.name}
    new = {path for path in after.keys() | before.keys() if before.get(path) != after.get(path)} | outside
    shutil.rmtree(box)
    return Ended(status, peak, out, err, new)


def valid_ends(root: Path, folder: Path, cases: Sequence[Case]) -> dict[str, Ended]:
    """How the valid commands end that these cases are compared with, by name."""
    found = {}
    for name, case in valid_cases(root).items():
        if name in {"evaluate", *(each.valid for each in cases)}:
            found[name] = end = attempt(case, folder / "box0")
            if end.status != 0 and MISSING not in end.err:
                raise SystemExit(f"the valid case {name} ended with {end.status}: {end.err}")
    return found


def main() -> int:
    """Runs all cases; prints what is wrong with which, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--names", default="", help="only cases whose names have this in them")
    parser.add_argument("--seeds", type=Path, help="a directory that keeps the valid files for the next time")
    parser.add_argument("--lines", action="store_true", help="print every error line")
    options = parser.parse_args()
    ready()
    counts: collections.Counter[str] = collections.Counter()
    wrong, bad, started = 0, 0, time.time()
    with tempfile.TemporaryDirectory(prefix="kdsearch-fuzz-") as name:
        folder = Path(name)
        root = (options.seeds or folder / "seeds").absolute()
        if not root.exists():
            root.mkdir()
            if forked(lambda: seeds.make(root), 3600)[0] != 0:
                raise SystemExit("the valid files could not be made")
        every = (case for kind in options.only for case in KINDS[kind](root, np.random.default_rng(options.seed)))
        chosen = [case for case in every if options.names in case.name]
        expected = valid_ends(root, folder, chosen)
        most = max(end.peak for end in expected.values())
        for number, case in enumerate(chosen, 1):
            end = attempt(case, folder / f"box{number}")
            problem = judged(case, end, expected.get(case.valid or ""))
            if not problem and end.peak > most + (MEBIBYTES << 10):
                problem = f"took {end.peak >> 10} MiB, a valid run at most {most >> 10}"
            counts[f"{case.kind}: {'as valid' if same(end, expected.get(case.valid or '')) else 'refused'}"] += 1
            bad = max(bad, end.peak)
            if problem:
                wrong += 1
                print(f"WRONG {case.kind}: {case.name!r:.80}: {problem}", flush=True)
            elif options.lines:
                print(f"{case.kind}: {case.name!r:.60}: {end.err.strip() or 'accepted'}"[:300], flush=True)
    told = {"wrong": wrong, "MiB valid": most >> 10, "MiB bad": bad >> 10, "seed": options.seed}
    seconds = round(time.time() - started)
    print(json.dumps({"cases": sum(counts.values()), **counts, **told, "seconds": seconds}, indent=1))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
