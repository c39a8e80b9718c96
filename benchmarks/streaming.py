"""Streamed data: as fast as a step needs, in flat memory, resumed bit by bit, the same on several processes.

python benchmarks/streaming.py [--images 2000] [--parts speed memory resume processes] [--kills 3] [--workdir DIR]

Writes a data set of JPEGs as TFDS writes ImageNet (array_record), of sizes around 300x300 and about 50 kB each, then:

    speed       images a second of the feed at 224x224, random crops, by threads and by --workers processes, and of a
                distillation step of a ResNet-50 at 224x224; they take turns, so that whatever else the machine does
                meets all alike. Also the share of training that waits for data
    memory      resident memory over an epoch of training, after its first tenth and at its end
    resume      the whole road, killed (kill -9) at random moments and begun again by the same command: every network
                and every metric bit by bit that of an undisturbed run
    processes   what each of two processes is given is its half of the batch that one is given, bit by bit; after 20
                updates of the teacher, parameters within 1e-5

Prints one JSON object; status 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import kdsearch_jax
from kdsearch_jax.adapters import devices, registry
from kdsearch_jax.data import device_feed
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.data.streaming import reader_of
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.steps import distill_step
from kdsearch_jax.storage.arrays import flatten
from kdsearch_jax.training import optimizer
from kdsearch_jax.training import processes as kdsearch_processes
from kdsearch_jax.training.loop import make_dispatch
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import create_state

LAUNCHER = Path(__file__).resolve().parent.parent / "launch" / "local.py"
CLASSES = 10
TOLERANCE = 1e-5
NETWORKS = ("teacher/network", "search/network", "retrain/network", "student")

EXPERIMENT = """
from kdsearch_jax.runs.config import BudgetConfig, DataConfig, Experiment, ModelConfig, RunConfig, StageConfig

def experiment(quick=False):
    return Experiment(
        name="streamed",
        model=ModelConfig("small_cnn", {{"width": 8}}),
        data=DataConfig("pictures", {directory!r}, image_size=32, framing="crop", flip=True, workers={workers},
                        train_limit={limit}),
        teacher=StageConfig(steps={steps}, batch_size=32, learning_rate={rate}),
        search=StageConfig(steps={steps}, batch_size=32, learning_rate={rate}),
        retrain=StageConfig(steps={steps}, batch_size=32, learning_rate={rate}),
        budget=BudgetConfig(macs=0.6), baselines=(),
        run=RunConfig(steps_per_dispatch=5, checkpoint_every=10, checkpoint_share=None, evaluate_every=20,
                      eval_batch_size=64),
    )
"""


def picture(number: int) -> tuple[bytes, int]:
    """A JPEG of its class's colours, with texture, as many bytes a pixel as photographs have."""
    chance = np.random.default_rng(number)
    width, height = chance.integers(240, 400, 2).tolist()
    label = number % CLASSES
    small = chance.integers(0, 200, (6, 6, 3)) + np.random.default_rng(label).integers(0, 56, 3)
    smooth = Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = chance.normal(0, 12, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), label


def write(directory: Path, counts: dict[str, int]) -> int:
    """The data set, if it is not there; returns the bytes of its training split."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Pictures(tfds.core.GeneratorBasedBuilder):
            """JPEGs and labels."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(num_classes=CLASSES),
                        "file_name": tfds.features.Text(),
                    }
                )
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

            def _split_generators(self, dl_manager: Any) -> Any:
                return {split: self._examples(split) for split in counts}

            def _generate_examples(self) -> Any:
                raise NotImplementedError

            def _examples(self, split: str) -> Any:
                for i in range(counts[split]):
                    content, label = picture(10**6 * list(counts).index(split) + i)
                    yield i, {"image": io.BytesIO(content), "label": label, "file_name": f"{i}.jpg"}

    builder = Pictures(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare()
    return builder.info.splits["train"].num_bytes


# --- speed ----------------------------------------------------------------------------------------------------------


def speed(directory: Path, depth: int, workers: int, rounds: int, batch: int = 8) -> dict[str, Any]:
    """Images a second of feed and step, in turns; each feed starts anew, and is timed once its buffers are full."""
    mesh = devices.data_mesh()
    config = DataConfig("pictures", str(directory), image_size=224, framing="crop", flip=True)
    dataset = load(config)

    def fed(workers: int) -> Callable[[], float]:
        split = load(dataclasses.replace(config, workers=workers))

        def turn() -> float:
            with closing(device_feed.make(split, 4 * batch, mesh, 10**6)) as feed:
                list(feed.take(0, 4 + 4 * workers, 0))
                start = time.perf_counter()
                list(feed.take(4 + 4 * workers, 12, 0))
                return 12 * 4 * batch / (time.perf_counter() - start)

        return turn

    update = _update(depth, batch, mesh, config)
    resident = {
        "arrays": load(dataclasses.replace(config, framing="stretch", stream=False, train_limit=batch)).train.arrays
    }
    constants = {name: np.asarray(getattr(dataset, name), np.float32) for name in ("mean", "std")}
    resident = devices.replicate({**resident, **constants}, mesh)

    def step() -> float:
        start = time.perf_counter()
        update(np.arange(2 * batch, dtype=np.int32).reshape(2, batch) % batch, resident)
        return 2 * batch / (time.perf_counter() - start)

    turns = {"threads": fed(0), **({f"{workers} processes": fed(workers)} if workers else {}), "step": step}
    seen: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):  # the first compiles and warms up
        for name, turn in turns.items():
            seen[name].append(turn())
    rates = {name: statistics.median(each[1:]) for name, each in seen.items()}
    with closing(device_feed.make(dataset, batch, mesh, 10**6)) as feed:
        update(feed.take(0, 2, 0), feed.resident)  # compiles
        waited, start = feed.waited, time.perf_counter()
        update(feed.take(2, 4, 0), feed.resident)
        wait = (feed.waited - waited) / (time.perf_counter() - start)
    reader = reader_of(dataset.train.arrays)
    assert reader is not None
    start = time.process_time()
    for index in range(200):
        reader(index, np.random.default_rng(index))
    return {
        "images a second": rates,
        "feed over step": {name: rates[name] / rates["step"] for name in rates if name != "step"},
        "share of training that waits for data": wait,
        "images a second of one core": 200 / (time.process_time() - start),
        "network": f"resnet {depth}, distilled into itself, 224x224, float32",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def _update(depth: int, batch: int, mesh: Any, config: DataConfig) -> Callable[[Any, Any], None]:
    """Updates of a ResNet by distillation, on batches or on indices into what is resident."""
    module = registry.build("resnet", {"depth": depth, "num_classes": CLASSES})
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((2, 224, 224, 3), np.float32))
    chance = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: (0.02 * chance.normal(size=leaf.shape)).astype(np.float32) ** 2, shapes)
    stage = StageConfig(steps=10**6, batch_size=batch, learning_rate=1e-4, schedule="constant")
    tx = optimizer.make_optimizer(stage)
    step = distill_step(module, module, tx, stage, RunConfig(), classification(DistillConfig()))
    held = [devices.owned(create_state(variables, tx), mesh)]
    variables = devices.replicate(variables, mesh)
    dispatch = make_dispatch(step, mesh, config, 0, scanned=False)

    def update(sent: Any, resident: Any) -> None:
        held[0], metrics, _ = dispatch(held[0], sent, resident, variables)
        jax.block_until_ready(metrics)

    return update


# --- memory ---------------------------------------------------------------------------------------------------------


def memory(directory: Path, workers: int = 0) -> dict[str, Any]:
    """Resident MiB of training a small network at 224x224 over an epoch, and of the processes that decode for it."""
    mesh, batch = devices.data_mesh(), 16
    config = DataConfig("pictures", str(directory), image_size=224, framing="crop", flip=True, workers=workers)
    dataset = load(config)
    stage = StageConfig(steps=10**6, batch_size=batch, learning_rate=0.01, schedule="constant")
    module, tx = registry.build("small_cnn", {"width": 4, "num_classes": CLASSES}), optimizer.make_optimizer(stage)
    variables = jax.jit(partial(module.init, train=False))(jax.random.key(0), np.zeros((2, 224, 224, 3), np.float32))
    step = distill_step(module, module, tx, stage, RunConfig(), classification(DistillConfig()))
    state = devices.owned(create_state(variables, tx), mesh)
    dispatch, variables = make_dispatch(step, mesh, config, 0, scanned=False), devices.replicate(variables, mesh)
    updates, seen = len(dataset.train) // batch, []
    with closing(device_feed.make(dataset, batch, mesh, 10**6)) as feed:
        for update in range(updates):
            state, _, _ = dispatch(state, feed.take(update, 1, 0), feed.resident, variables)
            everyone = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in everyone]
            seen.append(sum(pages) * resource.getpagesize() / 2**20)
    warm = seen[updates // 10 :]
    tenth = len(warm) // 10
    first, last = statistics.mean(warm[:tenth]), statistics.mean(warm[-tenth:])
    return {
        "after a tenth of an epoch": first,
        "at its end": last,
        "largest": max(warm),
        "growth of what was read": (last - first) / (len(warm) * batch * 224 * 224 * 3 / 2**20),
        "images": len(warm) * batch,
    }


# --- resume and processes -------------------------------------------------------------------------------------------


def setup(
    experiment: Path, directory: Path, processes: int = 1, *, command: str = "search", start: bool = False
) -> Any:
    """The whole road, or one command, by so many processes of one device; with `start` the process, not waited for."""
    argv = ["-m", f"kdsearch_jax.{command}", "--config", str(experiment), "--workdir", str(directory)]
    if processes > 1:
        logs = directory.parent / "logs"
        logs.mkdir(exist_ok=True)
        argv = [str(LAUNCHER), "-n", str(processes), "--devices", "1", "--logs", str(logs), "--", "python", *argv]
    running = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    if start:
        return running
    output, _ = running.communicate()
    if running.returncode:
        sys.stderr.write(output)
        raise subprocess.CalledProcessError(running.returncode, argv)
    return None


def difference(one: Path, other: Path, networks: Sequence[str] = NETWORKS) -> float:
    """The largest absolute difference of two runs' parameters and statistics; infinite where shapes differ."""
    largest = 0.0
    for name in networks:
        left, right = (
            flatten(jax.tree.map(np.asarray, kdsearch_jax.load(run / name).variables)) for run in (one, other)
        )
        if {key: leaf.shape for key, leaf in left.items()} != {key: leaf.shape for key, leaf in right.items()}:
            return math.inf
        largest = max(largest, *(float(np.abs(left[key] - right[key]).max()) for key in left))
    return largest


def losses(run: Path) -> list[Any]:
    """Step and loss of every row of the metrics of teacher, search and retraining."""
    files = [(run / stage / "metrics.jsonl").read_text() for stage in ("teacher", "search", "retrain")]
    rows = [json.loads(line) for text in files for line in text.splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def resume(experiment: Path, directory: Path, kills: int) -> dict[str, Any]:
    """An undisturbed run, and one killed so many times at random moments."""
    begun = time.monotonic()
    setup(experiment, directory / "whole")
    seconds, done = time.monotonic() - begun, []
    for _ in range(kills):
        running = setup(experiment, directory / "killed", start=True)
        try:
            running.communicate(timeout=random.uniform(0.25, 0.7) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # whatever it has started included: nobody is left to end it
            running.communicate()
            done.append(_reached(directory / "killed"))
    setup(experiment, directory / "killed")
    worst = difference(directory / "whole", directory / "killed")
    same = losses(directory / "whole") == losses(directory / "killed")
    return {"killed after": done, "largest difference": worst, "equal metrics": same, "holds": worst == 0 and same}


def _reached(run: Path) -> str:
    """Where a run was killed."""
    found = {
        stage: (run / stage / "metrics.jsonl").read_text().count("\n")
        for stage in ("teacher", "search", "retrain")
        if (run / stage / "metrics.jsonl").is_file()
    }
    return ", ".join(f"{stage}: {rows} calls" for stage, rows in found.items()) or "nothing"


def share(directory: Path, out: Path) -> None:
    """Writes the rows of some batches that this process is given."""
    config = DataConfig("pictures", str(directory), image_size=64, framing="crop")
    mesh, rows = devices.data_mesh(), {}
    with closing(device_feed.make(load(config), 12, mesh, 100)) as feed:
        for number, batch in enumerate(feed.take(3, 5, 1)):
            for entry, leaf in batch.items():
                for shard in leaf.addressable_shards:
                    rows[f"{number}/{entry}/{shard.index[0].start or 0}"] = np.asarray(shard.data)
    np.savez(out / f"{jax.process_index()}-of-{jax.process_count()}.npz", **rows)


def processes(data: Path, experiment: Path, directory: Path) -> dict[str, Any]:
    """Two processes and one: what each is given, and what comes of it."""
    script = [str(Path(__file__).resolve()), "--share", str(data), str(directory)]
    launched = [str(LAUNCHER), "-n", "2", "--devices", "1", "--logs", str(directory), "--", "python", *script]
    for command in (script, launched):
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    whole, *parts = (dict(np.load(directory / name)) for name in ("0-of-1.npz", "0-of-2.npz", "1-of-2.npz"))
    disjoint = not parts[0].keys() & parts[1].keys() and parts[0].keys() and parts[1].keys()
    equal = True
    for key, value in whole.items():  # one device has all rows, from 0
        stem = key.rpartition("/")[0]
        found = sorted((int(k.rpartition("/")[2]), v) for p in parts for k, v in p.items() if k.startswith(f"{stem}/"))
        equal &= bool(np.array_equal(np.concatenate([v for _, v in found]), value))
    for count in (1, 2):
        setup(experiment, directory / f"teacher-{count}", count, command="teacher")
    worst = difference(directory / "teacher-1", directory / "teacher-2", ("teacher/network",))
    holds = bool(disjoint) and equal and worst <= TOLERANCE
    return {"disjoint": bool(disjoint), "union is the batch": equal, "largest difference": worst, "holds": holds}


def main() -> int:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts = ("speed", "memory", "resume", "processes")
    parser.add_argument("--images", type=int, default=2000, help="of the training split; default: 2000")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--depth", type=int, default=50, help="of the ResNet of which speed takes a step; default: 50")
    parser.add_argument("--rounds", type=int, default=3, help="of speed, which counts medians; default: 3")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="updates of each stage of resume; default: 40")
    parser.add_argument("--workers", type=int, default=0, help="data.workers; default: 0, threads")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--share", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        if place := kdsearch_processes.find({}, os.environ):
            kdsearch_processes.join(place, 120)
        share(*options.share)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.workdir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        size = write(directory / "data", {"train": options.images, "validation": 203, "test": 203})
        # Rounding, which the number of devices changes, is amplified threefold by each update at a rate of 0.05.
        for name, rate, steps in (("resume", 0.05, options.steps), ("processes", 0.002, 20)):
            text = EXPERIMENT.format(
                directory=str(directory / "data"),
                workers=options.workers,
                limit=min(options.images, 500),
                steps=steps,
                rate=rate,
            )
            (directory / f"{name}.py").write_text(text)
        found: dict[str, Any] = {"images": options.images, "bytes each": round(size / options.images)}
        for part in options.parts:
            if part == "speed":
                found[part] = speed(directory / "data", options.depth, options.workers, options.rounds)
            elif part == "memory":
                found[part] = memory(directory / "data", options.workers)
            elif part == "resume":
                found[part] = resume(directory / "resume.py", directory, options.kills)
            else:
                found[part] = processes(directory / "data", directory / "processes.py", directory)
            print(json.dumps({part: found[part]}), file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))
    return int(not all(found.get(part, {}).get("holds", True) for part in parts))


if __name__ == "__main__":
    raise SystemExit(main())
