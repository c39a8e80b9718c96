"""Compares a distillation step and inference with PyTorch on this CPU, on the same networks, interleaved in one run.

python benchmarks/against_torch.py [--rounds 15] [--cores 1 2] [--batches 64 128] [--networks whole half]
                                   [--what step inference] [--precision fp32 bf16]
                                   [--weights resnet20.safetensors]

Needs PyTorch (`pip install torch`). The teacher is a CIFAR ResNet-20 with option A shortcuts, the student either the
same network ("whole") or one at half of the MACs ("half"), whose units were drawn at random over all layers, so that it
has the odd widths that a search gives. Both sides do the same step: normalise uint8 images, teacher in inference mode,
student in training mode, KL of the softened logits, SGD with Nesterov's momentum. Here it is the training loop's own
compiled update; PyTorch has `channels_last` and as many threads as cores. With `--precision bf16`, steps have
`run.precision = "bf16"` here and `torch.autocast("cpu", torch.bfloat16)` there; inference is always in float32.

Each side is a process bound to the cores; they alternate, `--seconds` each, so that other load on the machine affects
both alike. Printed per configuration: the median over rounds of the milliseconds per call, the median ratio of
neighbouring turns with its interquartile range, and the median ratio of processor time, which other load disturbs less.
Losses of both sides are compared first. If the cores are shared, set OMP_WAIT_POLICY=passive, because PyTorch's threads
spin otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, TEMPERATURE, LEARNING_RATE, MOMENTUM = 512, 4.0, 0.01, 0.9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CallSpec = Callable[[], float]  # one call; returns the loss


def images() -> np.ndarray:
    """Smooth random images, uint8."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (IMAGES, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    return np.clip(coarse + random.integers(-20, 21, coarse.shape), 0, 255).astype(np.uint8)


# --- this package -----------------------------------------------------------------------------------------------------


def networks(weights: str | None) -> dict[str, tuple[Any, Any]]:
    """{"whole", "half"}: (module, variables) of the teacher and of a student at half of its MACs."""
    import jax
    import jax.numpy as jnp

    from kdsearch_jax.adapters import registry
    from kdsearch_jax.adapters.architecture import Architecture
    from kdsearch_jax.models.pretrained import load_torch
    from kdsearch_jax.pruning import baselines, budgets, gates, surgery
    from kdsearch_jax.pruning.network import trace
    from kdsearch_jax.pruning.settings import BudgetConfig

    arguments = {"depth": 20, "num_classes": 10}
    module = registry.build("cifar_resnet", arguments)
    if weights:
        variables = load_torch(weights, module, (32, 32, 3))
    else:
        variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    network = trace(module, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32), train=False)
    limits = budgets.resolve(BudgetConfig(macs=0.5), network.topology)
    keep = baselines.select("random", variables, network.topology, limits, np.random.default_rng(0))
    whole = Architecture("cifar_resnet", arguments, input_shape=(32, 32, 3))
    small, architecture = surgery.slice_network(variables, gates.init(network.topology), keep, network, whole)
    return {"whole": (module, variables), "half": (architecture.module(), small)}


def jax_calls(options: argparse.Namespace, folder: Path) -> Callable[[str, str, int, str], CallSpec]:
    """(what, network, batch, precision) → a call of this package's; leaves the networks' arrays in the folder."""
    from kdsearch_jax.runs import heap

    heap.keep_freed()  # as every command of this package does

    import jax
    from flax import traverse_util

    from kdsearch_jax.adapters import devices
    from kdsearch_jax.adapters.call_spec import CallSpec as CallSpec
    from kdsearch_jax.data.settings import DataConfig
    from kdsearch_jax.distill.objective import classification
    from kdsearch_jax.distill.settings import DistillConfig
    from kdsearch_jax.distill.steps import distill_step
    from kdsearch_jax.runs import measurement
    from kdsearch_jax.training import loop, optimizer
    from kdsearch_jax.training.settings import RunConfig, StageConfig
    from kdsearch_jax.training.state import create_state

    both, mesh = networks(options.weights), devices.data_mesh()
    for name, (_, variables) in both.items():
        flat = traverse_util.flatten_dict(dict(variables), sep="/")
        arrays: Any = {key: np.asarray(value) for key, value in flat.items()}
        np.savez(folder / f"{name}.npz", **arrays)
    teacher, teacher_variables = both["whole"]
    task = classification(DistillConfig(temperature=TEMPERATURE))
    resident = {"arrays": {"images": images(), "labels": np.zeros(IMAGES, np.int32)}}
    resident |= {"mean": np.asarray(MEAN, np.float32), "std": np.asarray(STD, np.float32)}
    resident, constants = devices.replicate(resident, mesh), devices.replicate(teacher_variables, mesh)

    def step(name: str, batch: int, precision: str) -> CallSpec:
        module, variables = both[name]
        stage = StageConfig(
            steps=10**6,
            batch_size=batch,
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=0.0,
            schedule="constant",
        )
        tx = optimizer.make_optimizer(stage)
        update = distill_step(module, teacher, tx, stage, RunConfig(steps_per_dispatch=1, precision=precision), task)
        dispatch = loop.make_dispatch(update, mesh, DataConfig(crop=0, flip=False), 0, scanned=False)
        held = [devices.donatable_copy(create_state(variables, tx), mesh)]
        rows = np.arange(batch, dtype=np.int32)[None]

        def call() -> float:
            held[0], metrics, _ = dispatch(held[0], rows, resident, constants)
            return float(metrics["loss"][-1])

        return call

    def inference(name: str, batch: int, _: str) -> CallSpec:
        module, variables = both[name]
        run, arguments = measurement.compile_inference(module, variables, batch, CallSpec.of_image((32, 32, 3)))
        return lambda: float(np.asarray(run(*arguments)).std())

    jax.block_until_ready(constants)
    kinds = {"step": step, "inference": inference}
    return lambda what, name, batch, precision: kinds[what](name, batch, precision)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_network(arrays: dict[str, np.ndarray]) -> Any:
    """The CIFAR ResNet whose arrays these are, as github.com/akamaster/pytorch_resnet_cifar10 has it."""
    import torch
    from torch import nn
    from torch.nn import functional

    def conv(path: str, stride: int = 1) -> nn.Conv2d:
        kernel = torch.tensor(arrays[f"params/{path}/kernel"]).permute(3, 2, 0, 1)
        layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, stride, 1, bias=False)
        layer.weight.data.copy_(kernel)
        return layer

    def norm(path: str) -> nn.BatchNorm2d:
        layer = nn.BatchNorm2d(len(arrays[f"params/{path}/scale"]))
        layer.weight.data.copy_(torch.tensor(arrays[f"params/{path}/scale"]))
        layer.bias.data.copy_(torch.tensor(arrays[f"params/{path}/bias"]))
        layer.running_mean.data.copy_(torch.tensor(arrays[f"batch_stats/{path}/mean"]))
        layer.running_var.data.copy_(torch.tensor(arrays[f"batch_stats/{path}/var"]))
        return layer

    class Block(nn.Module):
        def __init__(self, path: str, stride: int, pad: int):
            super().__init__()
            self.stride, self.pad, self.empty = stride, pad, f"params/{path}/conv2/kernel" not in arrays
            if not self.empty:
                self.conv1, self.bn1 = conv(f"{path}/conv1", stride), norm(f"{path}/bn1")
                self.conv2, self.bn2 = conv(f"{path}/conv2"), norm(f"{path}/bn2")

        def forward(self, x: Any) -> Any:
            short = x
            if self.pad:
                short = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
            if self.empty:
                return functional.relu(short)
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            return functional.relu(short + y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv("conv"), norm("bn")
            places = [(stage, block, stage > 1 and block == 1) for stage in (1, 2, 3) for block in (1, 2, 3)]
            blocks = [Block(f"stage{s}/block{b}", 2 if new else 1, 8 * (s - 1) if new else 0) for s, b, new in places]
            self.blocks = nn.Sequential(*blocks)
            kernel = torch.tensor(arrays["params/dense/kernel"])
            self.dense = nn.Linear(*kernel.shape)
            self.dense.weight.data.copy_(kernel.T)
            self.dense.bias.data.copy_(torch.tensor(arrays["params/dense/bias"]))

        def forward(self, x: Any) -> Any:
            x = self.blocks(functional.relu(self.bn(self.conv(x))))
            return self.dense(x.mean((2, 3)))

    return Net().to(memory_format=torch.channels_last)


def torch_calls(options: argparse.Namespace, folder: Path) -> Callable[[str, str, int, str], CallSpec]:
    """(what, network, batch, precision) → a call of PyTorch's."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(options.worker_cores)
    resident = torch.tensor(images())
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def load(name: str) -> Any:
        with np.load(folder / f"{name}.npz") as file:
            return torch_network(dict(file))

    teacher = load("whole").eval()

    def step(name: str, batch: int, precision: str) -> CallSpec:
        student = load(name).train()
        optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True)
        rows = torch.arange(batch)

        def call() -> float:
            x = ((resident[rows].float() / 255 - mean) / std).permute(0, 3, 1, 2)  # channels_last
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                with torch.no_grad():
                    logits = teacher(x)
                outputs = student(x)
            target, own = (functional.log_softmax(z.float() / TEMPERATURE, 1) for z in (logits, outputs))
            loss = TEMPERATURE**2 * functional.kl_div(own, target, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return call

    def inference(name: str, batch: int, _: str) -> CallSpec:
        network = load(name).eval()
        x = np.random.default_rng(0).normal(size=(batch, 32, 32, 3)).astype(np.float32)
        x = torch.tensor(x).permute(0, 3, 1, 2)

        def call() -> float:
            with torch.inference_mode():
                return float(network(x).numpy().std())

        return call

    kinds = {"step": step, "inference": inference}
    return lambda what, name, batch, precision: kinds[what](name, batch, precision)


# --- taking turns -----------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """A worker: one JSON line in, one out. {"what", "network", "batch", "precision"} prepares, {"seconds"} measures."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.worker_cores])
    make = (jax_calls if options.worker == "jax" else torch_calls)(options, Path(options.folder))
    call: CallSpec = lambda: 0.0  # noqa: E731
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "what" in asked:
            call = make(asked["what"], asked["network"], asked["batch"], asked["precision"])
            answer = {"values": [call() for _ in range(3)]}
        else:
            begin, used, times = time.perf_counter(), time.process_time(), []
            while not times or time.perf_counter() - begin < asked["seconds"]:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            spent = (time.process_time() - used) / len(times)
            answer = {"ms": 1000 * statistics.median(times), "cpu_ms": 1000 * spent}
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that answers lines."""

    def __init__(self, kind: str, cores: int, folder: str, weights: str | None):
        given = ["--worker", kind, "--worker-cores", str(cores), "--folder", folder]
        given += ["--weights", weights] if weights else []
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        """What the process says next."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, **what: Any) -> dict[str, Any]:
        """Its answer to this."""
        assert self.process.stdin
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self.answer()


@contextlib.contextmanager
def workers(cores: int, weights: str | None) -> Iterator[dict[str, Worker]]:
    """{"jax", "torch"}, bound to so many cores."""
    made: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for kind in ("jax", "torch"):
                made[kind] = Worker(kind, cores, folder, weights)
            yield made
        finally:
            for worker in made.values():
                worker.process.kill()
                worker.process.wait()


def measure(both: dict[str, Worker], rounds: int, seconds: float, **what: Any) -> dict[str, Any]:
    """One configuration: median milliseconds of both sides, median and middle half of the ratios of neighbours."""
    values = {kind: worker.ask(**what)["values"] for kind, worker in both.items()}
    tolerance = 2e-2 if what["precision"] == "fp32" else 5e-2
    if not np.allclose(values["jax"], values["torch"], rtol=tolerance, atol=1e-5):
        raise SystemExit(f"{what}: the sides compute something else: {values}")
    turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in both}
    for number in range(rounds):
        for kind in both if number % 2 else reversed(both):
            turns[kind].append(both[kind].ask(seconds=seconds))

    def ratios(unit: str) -> list[float]:
        values = [a[unit] / b[unit] for a, b in zip(turns["jax"], turns["torch"], strict=True)]
        return np.percentile(values, (25, 50, 75)).round(3).tolist()

    medians = {f"{kind}_ms": round(statistics.median(turn["ms"] for turn in each), 1) for kind, each in turns.items()}
    low, middle, high = ratios("ms")
    return {**what, **medians, "ratio": middle, "middle_half": [low, high], "ratio_of_cpu_time": ratios("cpu_ms")[1]}


def main() -> None:
    """Prints one JSON line a configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (default: 15)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn, at least one call (default: 0.5)")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128], help="default: 64 128")
    parser.add_argument("--networks", nargs="+", default=["whole", "half"], choices=["whole", "half"])
    parser.add_argument("--what", nargs="+", default=["step", "inference"], choices=["step", "inference"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"], help="of steps")
    parser.add_argument("--weights", help="the teacher's, in PyTorch's format; random if left out")
    for name, kind in (("--worker", str), ("--worker-cores", int), ("--folder", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    for cores in options.cores:
        with workers(cores, options.weights) as both:
            for what, network, batch, precision in itertools.product(
                options.what, options.networks, options.batches, options.precision
            ):
                if what == "step" or precision == options.precision[0]:
                    asked = {"what": what, "network": network, "batch": batch}
                    asked |= {"precision": precision if what == "step" else "fp32"}
                    found = measure(both, options.rounds, options.seconds, **asked)
                    print(json.dumps({"cores": cores, **found}), flush=True)
    return None


if __name__ == "__main__":
    main()
