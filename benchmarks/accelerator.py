"""What ten minutes on one accelerator can show: ResNet-56 on CIFAR-10 at 2.13 and 2.57 times fewer MACs; CIFAR-100.

    python -m benchmarks.accelerator pack CIFAR.npz SMALL.npz                   # where the data are
    python -m benchmarks.accelerator run --data SMALL.npz --teacher resnet56.safetensors --out DIR [--minutes 9]

`pack` shrinks a file of `benchmarks.cifar_split` to about 40 MB so that it can travel: training images as WebP of
quality 80, test images lossless. `run` unpacks it and runs the jobs below one after the other with the package's own
commands, in bfloat16 and several hundred updates a dispatch. Every few seconds it writes DIR/results.json: for each job
its command, state, newest metrics, and table. When the time is over it ends the running job by SIGTERM, which saves a
checkpoint, and packs all runs into DIR/runs.tar.0, .1, … of at most 15 MiB. With these in DIR, `run` continues.
`--quick` is a rehearsal with a few updates a stage.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUALITY, EVERY = 80, 5  # of WebP; seconds between two writings of results.json
PART = 15 << 20  # bytes of a part of the archive
SHARED = (
    "--run.precision bf16 --run.keep 1 --run.steps-per-dispatch 390 --run.checkpoint-every 3900 "
    "--run.evaluate-every 3900"
)
STAGES = ("teacher", "search", "retrain", "at-*", "uniform*", "seed-*/*/search", "seed-*/*/retrain")

# name: (data, command, settings); sized by a guess, 7 ms an update of ResNet-56 with batch 128; not measured.
JOBS: dict[str, tuple[str, str, str]] = {
    "cifar10-resnet56": (
        "cifar10",
        "search",
        "--config cifar10_resnet56 --budgets 0.4695 0.3891 --baselines --search.steps 7800 --retrain.steps 23400",
    ),
    "cifar10-resnet56-uniform": (
        "cifar10",
        "compare",
        "--config cifar10_resnet56 --rows uniform --seeds 0 --no-latency --budget.macs 0.4695 --match macs "
        "--search.steps 7800 --retrain.steps 23400",
    ),
    "cifar100-resnet56": (
        "cifar100",
        "search",
        "--config cifar100_resnet56 --budget.macs 0.5 --baselines uniform --teacher.steps 39000 --search.steps 7800 "
        "--retrain.steps 23400",
    ),
}
QUICK = "--teacher.steps 4 --search.steps 24 --retrain.steps 4 --run.steps-per-dispatch 2"


def pack(source: Path, target: Path) -> None:
    """Writes the small file: WebP images one after the other, where each begins, and the labels."""
    with np.load(source) as arrays:
        packed: dict[str, np.ndarray] = {}
        for split in ("train", "validation", "test"):
            images = [_webp(image, split == "train") for image in arrays[f"{split}_images"]]
            packed[f"{split}_bytes"] = np.frombuffer(b"".join(images), np.uint8)
            packed[f"{split}_starts"] = np.cumsum([0, *map(len, images)])
            packed[f"{split}_labels"] = arrays[f"{split}_labels"]
    np.savez(target, **packed)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


def _webp(image: np.ndarray, lossy: bool) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", **({"quality": QUALITY} if lossy else {"lossless": True}))
    return buffer.getvalue()


def unpack(source: Path, target: Path) -> None:
    """The inverse of `pack`."""
    from PIL import Image

    with np.load(source) as packed:
        arrays: dict[str, np.ndarray] = {}
        for split in ("train", "validation", "test"):
            content, starts = packed[f"{split}_bytes"].tobytes(), packed[f"{split}_starts"]
            parts = (content[a:b] for a, b in itertools.pairwise(starts))
            arrays[f"{split}_images"] = np.stack([np.asarray(Image.open(io.BytesIO(part))) for part in parts])
            arrays[f"{split}_labels"] = packed[f"{split}_labels"]
    np.savez(target, **arrays)


def run(data: Sequence[Path], teacher: Path, out: Path, minutes: float, quick: bool) -> int:
    """Runs the jobs whose data are given, until the time is over; returns the number of jobs that failed."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        _restore(out, folder)
        runs.mkdir(exist_ok=True)
        files = {}
        for path in data:
            name = "cifar100" if "cifar100" in path.name else "cifar10"
            files[name] = Path(folder) / f"{name}.npz"
            unpack(path, files[name])
        records: dict[str, dict[str, Any]] = {}
        for name, (images, command, settings) in JOBS.items():
            if images not in files or time.monotonic() > end - 20:
                continue
            line = f"-m kdsearch_jax.{command} {settings} {SHARED} --data.name npz:{files[images].name}"
            line += f" --teacher-from {teacher}" if images == "cifar10" else ""
            line += f" --workdir runs/{name} --resume" + (f" {QUICK}" if quick else "")
            records[name] = {"command": f"python {line}", "state": "running"}
            _watch(line, runs / name, records[name], end, lambda: _write(out / "results.json", records))
            _write(out / "results.json", records)
        _keep(runs, out)
    print(json.dumps({name: record["state"] for name, record in records.items()}))
    return sum(record["state"] == "failed" for record in records.values())


def _keep(runs: Path, out: Path) -> None:
    """Packs the runs into the parts of an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(runs, "runs")
    content = buffer.getvalue()
    for path in out.glob("runs.tar.*"):
        path.unlink()
    for number, start in enumerate(range(0, len(content), PART)):
        (out / f"runs.tar.{number}").write_bytes(content[start : start + PART])


def _restore(out: Path, folder: str) -> None:
    """The inverse of `_keep`."""
    if paths := sorted(out.glob("runs.tar.*"), key=lambda path: int(path.suffix[1:])):
        content = b"".join(path.read_bytes() for path in paths)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(folder, filter="data")


def _watch(line: str, directory: Path, record: dict[str, Any], end: float, write: Any) -> None:
    """Runs a command until it ends or the time is over, and keeps its record current."""
    log = directory.with_suffix(".log")
    # Relative paths in a folder of its own: a run resumes only with the settings that it began with.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    folder, environment = directory.parent.parent, {**os.environ, "PYTHONPATH": path}
    start = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, *line.split()], stdout=stream, stderr=stream, cwd=folder, env=environment
        )
        while process.poll() is None:
            if time.monotonic() > end:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
            else:
                time.sleep(EVERY if end - time.monotonic() > EVERY else 0.2)
            record |= _progress(directory) | {"seconds": round(time.monotonic() - start, 1)}
            write()
    stopped = time.monotonic() > end
    record |= _progress(directory) | {"seconds": round(time.monotonic() - start, 1)}
    record["state"] = "finished" if process.returncode == 0 else "out of time" if stopped else "failed"
    record["log"] = log.read_text(errors="replace")[-4000:]


def _progress(directory: Path) -> dict[str, Any]:
    """The last metrics of each stage, the results of the rows of a comparison, and the table of a run."""
    newest = {}
    for pattern in STAGES:
        for path in sorted(directory.glob(f"{pattern}/metrics.jsonl")):
            lines = path.read_text().splitlines()
            whole = (record for line in reversed(lines) if (record := _parsed(line)) is not None)
            newest[str(path.parent.relative_to(directory))] = next(whole, None)
    results = [directory / "results.json", *sorted(directory.glob("seed-*/*/result.json"))]
    done = {str(path.relative_to(directory)): _parsed(path.read_text()) for path in results if path.is_file()}
    return {"stages": newest, "results": done}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # half a line, which is being written
        return None


def _write(path: Path, records: Any) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(records, indent=1))
    os.replace(temporary, path)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing, running = commands.add_parser("pack"), commands.add_parser("run")
    packing.add_argument("source", type=Path)
    packing.add_argument("target", type=Path)
    running.add_argument("--data", type=Path, nargs="+", required=True)
    running.add_argument("--teacher", type=Path, required=True, help="of CIFAR-10, .safetensors")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.source, options.target)
        return 0
    return run(options.data, options.teacher.absolute(), options.out, options.minutes, options.quick)


if __name__ == "__main__":
    sys.exit(main())
