"""What two savings save: teachers' outputs computed once, and a search that goes on without what has died.

python benchmarks/savings.py [--depth 20] [--batch 64] [--rounds 9] [--left 0.7 0.5 0.3]

On random images of CIFAR-10's shape, from a ResNet, by the loop's own compiled calls of `STEPS` updates:

    retraining   a student of half the MACs, with the teacher in every update, and with its outputs cached
    search       the search's update when `--left` of the MACs are alive: of the whole network, and of what is left
                 (`kdsearch_jax.distill.shrinking`); the teacher, which does not shrink, and the controller are part
                 of both

The two of a pair take turns in one process (A B B A …). Printed: the median ratio of neighbours, by the clock and in
processor time of all threads, which other work on the machine does not change; what the saving costs once, in updates
without it: the pass that fills the cache; cutting and proving what is left; compiling its update.

Asserted on the way: after `EQUAL` updates the same parameters with and without the cache, to 1e-5 (of their scale, if
that is above 1); after `STEPS` the same gates in the whole network and in what was left of it, to 1e-5. Printed: how
many units have died after `EQUAL`, and how many not in both, for α, a power of 8, enlarges differences of rounding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters import devices, registry
from kdsearch_jax.data.batches import batch_indices
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import distiller, search_step, shrinking
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.shrinking import Subnetwork
from kdsearch_jax.distill.steps import distill_step
from kdsearch_jax.pruning import baselines, budgets, surgery
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.control import HOLD
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.training import loop
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import TrainState, create_state

STEPS, EQUAL = 2, 8  # updates a call; updates after which results are compared
GATES = GatesConfig(warmup=0.0)
CallSpec = Callable[[], Any]  # does a call of updates, waits for it, and gives the state, which the next call frees


def started(module: Any, batch: int) -> Any:
    """First variables of a network, with the statistics of random images: it is no wilder than a trained one."""
    images = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
    variables = jax.jit(module.init)(jax.random.key(0), images)
    seen = jax.jit(lambda v: {**v, **module.apply(v, images, train=True, mutable=["batch_stats"])[1]})
    for _ in range(40):
        variables = seen(variables)
    return variables


class Bench:
    """A network, images to learn it on, and how updates are called."""

    def __init__(self, depth: int, batch: int):
        self.module = registry.build("cifar_resnet", {"depth": depth, "num_classes": 10})
        shape = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        self.variables = started(self.module, batch)
        self.network, self.task = trace(self.module, shape, train=False), classification(DistillConfig())
        self.stage = StageConfig(steps=EQUAL, batch_size=batch, learning_rate=0.001, schedule="constant")
        self.run = RunConfig(steps_per_dispatch=STEPS, eval_batch_size=4 * batch)
        random = np.random.default_rng(0)
        split = Split.of(
            random.integers(0, 256, (4 * batch, 32, 32, 3), np.uint8), random.integers(0, 10, 4 * batch, np.int32)
        )
        self.dataset = Dataset("random", split, split, split, 10, (0.5,) * 3, (0.25,) * 3, ())
        self.mesh = devices.data_mesh()

    def keep(self, rule: str, share: float) -> Any:
        """A hand-made choice of units with so much of the MACs."""
        limits = budgets.resolve(BudgetConfig(macs=share), self.network.topology)
        return baselines.select(rule, self.variables, self.network.topology, limits)

    def caller(self, state: TrainState, step: Any, dataset: Dataset, constants: Any, progress: Any = None) -> CallSpec:
        """The call that goes on from a state."""
        resident: Any = {"arrays": dataset.train.arrays, "mean": np.full(3, 0.5, np.float32)}
        resident["std"] = resident["mean"] / 2
        resident, constants = devices.replicate((resident, constants), self.mesh)
        scanned = jax.default_backend() != "cpu"
        dispatch = loop.make_dispatch(step, self.mesh, DataConfig(), 0, scanned=scanned)
        held = [devices.donatable_copy(state, self.mesh)]

        def call() -> TrainState:
            first = int(held[0].step)
            indices = batch_indices(0, len(dataset.train), self.stage.batch_size, first, STEPS)
            state, metrics, _ = dispatch(held[0], indices, resident, constants)
            jax.block_until_ready((state, metrics))
            held[0] = state
            if progress is not None:
                progress(state)
            return state

        return call


def timed(call: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """(seconds by the clock and of processors, what the call gives)."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = call()
    return np.array([time.perf_counter(), time.process_time()]) - start, result


def compared(whole: CallSpec, less: CallSpec, rounds: int, **once: np.ndarray) -> dict[str, Any]:
    """The ratio less/whole of calls that take turns; seconds spent `once` in updates of `whole`."""
    times: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for number in range(rounds):
        for cheap in (False, True) if number % 2 else (True, False):
            times[cheap].append(timed(less if cheap else whole)[0])
    found = {"ratio": np.median(np.array(times[True]) / np.array(times[False]), axis=0)}
    for name, seconds in once.items():
        found[f"{name}, in updates"] = seconds / np.median(times[False], axis=0) * STEPS
    return {
        name: dict(zip(("clock", "processor"), pair.round(3).tolist(), strict=True)) for name, pair in found.items()
    }


def retraining(bench: Bench, rounds: int) -> dict[str, Any]:
    """The teacher's outputs cached against computed."""
    keep, ones = bench.keep("uniform", 0.5), gates_lib.init(bench.network.topology)
    start = surgery.slice_variables(surgery.gated(bench.variables, ones, keep, bench.network), bench.network, keep)
    student, tx = bench.network.student(keep), make_optimizer(bench.stage)
    teacher, calls, ends, filled = (
        distiller.Teacher(bench.module, bench.variables, bench.task.call),
        [],
        [],
        np.zeros(2),
    )
    for cache in (False, True):
        config = DistillConfig(cache=cache)
        about = bench.task, [teacher], bench.dataset, config, DataConfig(), bench.run, bench.stage, student, start
        filled, distillation = timed(lambda about=about: distiller.make_distillation(*about, retraining=True))
        assert distillation.distiller.cached == cache
        step = distill_step(
            student, bench.module, tx, bench.stage, bench.run, distillation.objective, distillation.distiller
        )
        calls.append(bench.caller(create_state(start, tx), step, distillation.dataset, distillation.constants))
        ends.append(jax.device_get([calls[-1]() for _ in range(EQUAL // STEPS)][-1].variables))
    moved, worst = (
        np.max(
            [np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in zip(*map(jax.tree.leaves, two), strict=True)]
        )
        for two in ((start["params"], ends[0]["params"]), ends)
    )
    assert worst < 1e-5 < 1e-4 < moved, f"cached: parameters differ by {worst:.1e}, after a way of {moved:.1e}"
    return {
        **compared(calls[0], calls[1], rounds, filling=filled),
        "parameters differ by": float(worst),
        "have moved by": float(moved),
    }


def search(bench: Bench, share: float, rounds: int) -> dict[str, Any]:
    """What is left of a network, so much of whose MACs are alive, against all of it; on to four fifths of that."""
    topology, keep = bench.network.topology, bench.keep("random", share)
    goal = budgets.resolve(BudgetConfig(macs=0.8 * share), topology)
    gated = search_step.gated_search(bench.network, [goal], bench.stage, GATES, bench.run)
    subnetwork, tx = Subnetwork.of(gated), gated.optimizer(make_optimizer(bench.stage))

    def searcher(subnetwork: Subnetwork, state: TrainState) -> CallSpec:
        step = search_step.search_step(subnetwork, bench.module, tx, bench.stage, bench.task, GATES, bench.run)
        return bench.caller(
            state, step, bench.dataset, bench.variables, lambda state: search_step.progress(gated, state)
        )

    state = search_step.begin(gated, bench.variables, tx)
    gates = gates_lib.mask(state.params["gates"], keep)
    penalty = jnp.where(jnp.concatenate([gates[group.name] for group in topology.groups]) > 0, 0.0, HOLD)
    opt_state = state.opt_state._replace(penalty=penalty)  # so that from the first update on no removed unit returns
    state = state.replace(params={**state.params, "gates": gates}, opt_state=opt_state)
    whole = searcher(subnetwork, state)

    def cut() -> tuple[Subnetwork, CallSpec]:
        smaller, left = shrinking.shrink(subnetwork, state, tx)
        folded = smaller.fold(left.params, left.model_state)
        images = np.random.default_rng(1).normal(size=(64, 32, 32, 3)).astype(np.float32)
        surgery.verify(bench.network, bench.variables, gates, smaller.keep, folded, images)
        return smaller, searcher(smaller, left)

    cutting, (smaller, less) = timed(cut)
    (first, b), a = timed(less), whole()
    apart = float(np.abs(search_step.flat_gates(gated, a) - search_step.flat_gates(gated, b)).max())
    assert apart < 1e-5, f"shrunk: gates differ by {apart:.1e} after {STEPS} updates"
    for _ in range(EQUAL // STEPS - 1):
        (warm, b), a = timed(less), whole()
    alive, same = (search_step.flat_gates(gated, state) > 0 for state in (a, b))
    ends = {"gates differ by": apart, "died since": int((topology.flatten(keep) > alive).sum())}
    ends["of these not in both"] = int((alive != same).sum())
    macs = topology.cost(smaller.keep)[0] / topology.total()[0]
    return {"macs": round(macs, 3), **ends, **compared(whole, less, rounds, cutting=cutting, compiling=first - warm)}


def main() -> None:
    """Prints what is found, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("depth", 20), ("batch", 64), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--left", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="default: 0.7 0.5 0.3")
    options = parser.parse_args()
    bench = Bench(options.depth, options.batch)
    print(json.dumps({**vars(options), "retraining": retraining(bench, options.rounds)}), flush=True)
    for share in options.left:
        print(json.dumps({"left": share, "search": search(bench, share, options.rounds)}), flush=True)


if __name__ == "__main__":
    main()
