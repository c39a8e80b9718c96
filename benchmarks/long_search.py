"""A long search: its memory stays flat, and what it tells and keeps costs next to no time.

python benchmarks/long_search.py memory [--steps 20000]     a small network, metrics and checkpoints as by default
python benchmarks/long_search.py ratio [--batch 4]          a ResNet whose steps take some milliseconds
python benchmarks/long_search.py parts [--depth 20]         what a row of metrics and a checkpoint cost by themselves

`memory` prints the resident memory of the process and the arrays on its devices after every twentieth of the search.

`ratio` runs one search by `train.fit`, with metrics, progress and checkpoints as by default. After each of its blocks,
of `checkpoint_every` updates, a quarter as many run without all that, by the same compiled call and with the same
controller, on a state of its own; blocks end halfway between two checkpoints that may fall due, so that whatever one
does behind the scenes is its block's own. Both kinds take turns in one process. Printed: an update of all blocks, over
an update of all that runs without, in time by the clock and in processor time of all threads, which other work on the
machine changes little; which checkpoints there were, without those that were left out; and the milliseconds of an
update of each block, of which the first has also what a process needs for its first save. As the clock that spaces
checkpoints goes on in both kinds of block, there are up to a quarter more than in a search by itself.

`parts` writes rows and checkpoints of a search's state one by one: what the loop waits for (processor time of its
thread) and what goes on behind (of the others).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters import devices, registry
from kdsearch_jax.data.batches import batch_indices
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.data.progress import Progress
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import search_step
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.shrinking import Part
from kdsearch_jax.pruning import budget, budget_path
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.training import loop
from kdsearch_jax.training.checkpoints import Checkpointer
from kdsearch_jax.training.metrics import MetricsWriter
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import TrainState

DATA = DataConfig(crop=1, flip=True)


class Search:
    """All that `train.fit` wants of a search of random images into the network itself."""

    def __init__(self, name: str, arguments: dict[str, Any], size: int, stage: StageConfig):
        self.stage, self.run, config = stage, RunConfig(), GatesConfig()
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (512, size, size, 3), dtype=np.uint8)
        split = Split.of(images, random.integers(0, 10, len(images), dtype=np.int32))
        self.dataset = Dataset("random", split, split, split, 10, (0.5,) * 3, (0.25,) * 3, ())
        module = registry.build(name, {**arguments, "num_classes": 10})
        shape = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        self.variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros(shape.shape))
        network, task = trace(module, shape, train=False), classification(DistillConfig())
        limits = budget.resolve(BudgetConfig(macs=0.5), network.topology)
        pressure = limits.pressure(network.topology, np.ones(network.topology.units))
        path = budget_path.legs(
            (limits,), (1.0,), pressure, stage.steps, config.ramp, config.warmup, self.run.steps_per_dispatch
        )
        tx = search_step.make_transformation(stage, config)
        self.step = search_step.search_step(network, module, tx, task, config, self.run)
        self.between = search_step.controller(Part.of(network), path, stage, config, self.run)
        self.state = search_step.begin(self.variables, network.topology, tx, stage)

    def fit(self, directory: Path, between: Callable[[TrainState], Any]) -> TrainState:
        """The search in the loop of every run."""
        return loop.fit(
            self.state, self.step, self.dataset, DATA, self.stage, self.run,
            directory=directory, name="search", meta={}, constants=self.variables, between=between,
        )  # fmt: skip

    def bare(self) -> Callable[[int], None]:
        """A function that does so many updates, with the controller and nothing else, and waits for them."""
        mesh = devices.data_mesh()
        mean, std = (np.asarray(getattr(self.dataset, name), np.float32) for name in ("mean", "std"))
        resident, constants = devices.replicate(
            ({"arrays": self.dataset.train.arrays, "mean": mean, "std": std}, self.variables), mesh
        )
        dispatch = loop.make_dispatch(self.step, mesh, DATA, 0, scanned=jax.default_backend() != "cpu")
        held, size = [devices.owned(self.state, mesh), 0], self.run.steps_per_dispatch

        def updates(number: int) -> None:
            for _ in range(number // size):
                indices = batch_indices(0, len(self.dataset.train), self.stage.batch_size, held[1], size)
                state, metrics, _ = dispatch(held[0], indices, resident, constants)
                jax.block_until_ready(metrics)
                held[:] = devices.replicate(self.between(state)[0], mesh), held[1] + size

        return updates


def resident_memory() -> float:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def memory(steps: int) -> dict[str, Any]:
    """{"rows": (step, MB, arrays on the devices), …} of one search, and how much it grew after a tenth of it."""
    search = Search("small_cnn", {"width": 4}, 8, StageConfig(steps=steps, batch_size=16, learning_rate=0.005))
    rows: list[tuple[int, float, int]] = []

    def between(state: TrainState) -> Any:
        done = int(state.step)
        if done % (steps // 20) == 0:
            rows.append((done, round(resident_memory(), 1), len(jax.live_arrays())))
            print(*rows[-1], flush=True)
        return search.between(state)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        search.fit(Path(directory), between)
        written = len((Path(directory) / "metrics.jsonl").read_text().splitlines())
        kept = sum(f.stat().st_size for f in (Path(directory) / "checkpoints").rglob("*") if f.is_file())
    settled = [row for row in rows if row[0] >= steps // 10]
    return {
        "rows": rows,
        "grown_mb": round(settled[-1][1] - settled[0][1], 1),
        "arrays": sorted({row[2] for row in settled}),
        "metrics_rows": written,
        "checkpoints_kept_bytes": kept,
        "seconds": round(time.perf_counter() - start),
    }


def ratio(blocks: int, depth: int, batch: int) -> dict[str, Any]:
    """What an update costs with metrics, progress and checkpoints, over one without."""
    every = RunConfig().checkpoint_every
    stage = StageConfig(steps=(blocks + 1) * every, batch_size=batch, learning_rate=0.005)
    search = Search("cifar_resnet", {"depth": depth}, 32, stage)
    bare, full, plain = search.bare(), [], []
    since: list[tuple[float, float]] = []
    saved: set[int] = set()

    def clock() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def spent(start: tuple[float, float]) -> tuple[float, float]:
        return tuple(b - a for a, b in zip(start, clock(), strict=True))  # type: ignore

    with tempfile.TemporaryDirectory() as directory:

        def between(state: TrainState) -> Any:
            found, step = search.between(state), int(state.step)
            if step % every == every // 2 - search.run.steps_per_dispatch:
                saved.update(int(path.name) for path in Path(directory, "checkpoints").glob("[0-9]*"))
            if step % every == every // 2:
                if since:
                    full.append(spent(since.pop()))
                start = clock()
                bare(every // 4)
                if step > every:  # the first block, which compiles, does not count
                    plain.append(spent(start))
                since.append(clock())
            return found

        search.fit(Path(directory), between)
    updates = {"with": len(full) * every, "without": len(plain) * (every // 4)}
    rates = [
        [sum(each[i] for each in kind) / count for i in range(2)]
        for kind, count in zip((full, plain), updates.values(), strict=True)
    ]
    return {
        "network": f"cifar_resnet {depth}, batch {batch}",
        "step_ms": round(1000 * rates[1][1], 2),
        "updates": updates,
        "ratio_clock": round(rates[0][0] / rates[1][0], 4),
        "ratio_processor": round(rates[0][1] / rates[1][1], 4),
        "checkpoints": sorted(step for step in saved if step > every // 2),
        "ms_processor": [round(1000 * each[1] / every, 2) for each in full],
        "ms_processor_without": [round(1000 * each[1] / (every // 4), 2) for each in plain],
    }


def parts(depth: int, rows: int = 500, saves: int = 10) -> dict[str, Any]:
    """Milliseconds of a row and of a checkpoint: in the thread of the loop, and in all others."""
    search = Search("cifar_resnet", {"depth": depth}, 32, StageConfig(steps=1000, batch_size=32, learning_rate=0.005))
    state = devices.replicate(search.state)
    names = ("loss", "accuracy", "agreement", "images_per_second", "macs", "params", "lambda2", "alive")
    row = dict.fromkeys(names, 0.1234567)

    def cost(number: int, call: Callable[[int], Any], end: Callable[[], Any]) -> dict[str, float]:
        call(1)
        end()
        own, everything = time.thread_time(), time.process_time()
        for i in range(2, number + 2):
            call(i)
        own = time.thread_time() - own
        end()
        everything = time.process_time() - everything
        return {"waits_ms": round(1e3 * own / number, 3), "behind_ms": round(1e3 * (everything - own) / number, 3)}

    with tempfile.TemporaryDirectory() as directory:
        with MetricsWriter(directory) as writer, Progress("search", rows + 2) as progress:

            def report(step: int) -> None:
                writer.write(step, row)
                progress.update(step, row)

            of_rows = cost(rows, report, lambda: None)
        with Checkpointer(Path(directory) / "checkpoints", search.run.keep) as checkpoints:

            def save(step: int) -> None:
                checkpoints.save(step, state, {}, row)

            of_saves = cost(saves, save, checkpoints.wait)
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    return {"network": f"cifar_resnet {depth}", "state_mb": round(size / 1e6, 1), "row": of_rows, "save": of_saves}


def main() -> None:
    """Prints what is asked for, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["memory", "ratio", "parts"])
    for name, default in (("steps", 20_000), ("blocks", 16), ("depth", 8), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    arguments = parser.parse_args()
    if arguments.what == "memory":
        print(json.dumps(memory(arguments.steps)))
    elif arguments.what == "parts":
        print(json.dumps(parts(arguments.depth)))
    else:
        print(json.dumps(ratio(arguments.blocks, arguments.depth, arguments.batch)))


if __name__ == "__main__":
    main()
