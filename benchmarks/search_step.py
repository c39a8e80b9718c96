"""What a search step costs, over a plain distillation step of the same network: the ratio should be at most 1.05.

python benchmarks/search_step.py [--depth 20] [--batch 128] [--rounds 15] [--steps 4]

Both distil a network into itself on random images, by the loop's own compiled calls, which take turns (A B A B …), so
that whatever else the machine does meets both alike. The search's time has the host's part in it as well: the
controller that moves λ2 once a call. Prints the median of both and the ratio of the medians, and the median of the
ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters import devices, registry
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import search_step
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.shrinking import Part
from kdsearch_jax.distill.steps import distill_step
from kdsearch_jax.pruning import budget, budget_path
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.training import loop, optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import Step, TrainState, create_state

IMAGES = 1024


def calls(depth: int, batch: int, steps: int) -> dict[str, Callable[[int], None]]:
    """{"search", "distill"}: functions that do so many updates from wherever they are, and wait for them."""
    module = registry.build("cifar_resnet", {"depth": depth, "num_classes": 10})
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    stage = StageConfig(steps=100_000, batch_size=batch, learning_rate=0.01, schedule="constant")
    run, config, mesh = RunConfig(steps_per_dispatch=steps), GatesConfig(), devices.data_mesh()
    network = trace(module, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32), train=False)
    task = classification(DistillConfig())
    limits = budget.resolve(BudgetConfig(macs=0.5), network.topology)
    pressure = limits.pressure(network.topology, np.ones(network.topology.units))
    path = budget_path.legs((limits,), (1.0,), pressure, stage.steps, config.ramp, config.warmup, steps)
    random = np.random.default_rng(0)
    resident: Any = {
        "arrays": {
            "images": random.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8),
            "labels": random.integers(0, 10, IMAGES, dtype=np.int32),
        },
        "mean": np.full(3, 0.5, np.float32),
        "std": np.full(3, 0.25, np.float32),
    }
    resident, constants = devices.replicate(resident, mesh), devices.replicate(variables, mesh)

    def caller(state: TrainState, step: Step, between: Any) -> Callable[[int], None]:
        dispatch = loop.make_dispatch(
            step, mesh, DataConfig(crop=4, flip=True), 0, scanned=jax.default_backend() != "cpu"
        )
        held = [jax.tree.map(jnp.copy, devices.replicate(state, mesh))]

        def call(number: int) -> None:
            indices = np.random.default_rng(number).integers(0, IMAGES, (steps, batch)).astype(np.int32)
            state, metrics, _ = dispatch(held[0], indices, resident, constants)
            jax.block_until_ready(metrics)
            held[0] = devices.replicate(between(state)[0], mesh) if between else state

        return call

    tx = search_step.make_transformation(stage, config)
    search = caller(
        search_step.begin(variables, network.topology, tx, stage),
        search_step.search_step(network, module, tx, task, config, run),
        search_step.controller(Part.of(network), path, stage, config, run),
    )
    plain = optimizer.make_optimizer(stage)
    distill = caller(
        create_state(variables, plain),
        distill_step(module, module, plain, stage, run, task),
        None,
    )
    return {"search": search, "distill": distill}


def measure(depth: int, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step of both, and their ratio."""
    both = calls(depth, batch, steps)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for number in range(rounds + 2):  # two rounds compile and warm up
        for name in both if number % 2 else reversed(both):
            start = time.perf_counter()
            both[name](number)
            seconds[name].append(time.perf_counter() - start)
    measured = {name: times[2:] for name, times in seconds.items()}
    medians = {name: statistics.median(times) for name, times in measured.items()}
    pairs = [a / b for a, b in zip(measured["search"], measured["distill"], strict=True)]
    return {
        "network": f"cifar_resnet {depth}",
        "batch": batch,
        "rounds": rounds,
        "steps_a_call": steps,
        "device": jax.devices()[0].device_kind,
        "search_ms": 1000 * medians["search"] / steps,
        "distill_ms": 1000 * medians["distill"] / steps,
        "ratio": medians["search"] / medians["distill"],
        "ratio_of_neighbours": statistics.median(pairs),
    }


def main() -> None:
    """Prints what `measure` finds, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("depth", 20), ("batch", 128), ("rounds", 15), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
