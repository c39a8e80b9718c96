"""Estimates what a step of ResNet-50 on ImageNet needs from accelerators, and which resource limits it.

python benchmarks/scaling.py [--devices 8] [--batch 1024] [--size 224] [--steps search distill] [--out FILE]

Counts, by compiling the loop's updates for an abstract batch on virtual CPU devices (nothing is computed): the
collectives of the compiled program by kind, number, bytes and replica groups; XLA's count of operations and bytes; and,
from the jaxpr, the bytes that convolutions, products and reductions over activations read and write, which is the
memory traffic that remains if everything elementwise is fused into them.

Estimates, from these counts and the vendors' peaks in `MACHINES`, each times an assumed `EFFICIENCY`: the time of a
step by matrix unit, memory, communication and input, for each machine and batch size. docs/scaling.md has the results
and the assumptions. Nothing was measured on such a machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
RESULT = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
GROUPS = re.compile(r"replica_groups=(.*?), [a-z_]+=")
SMALL = 1 << 16  # bytes up to which an exchange is one of BatchNorm's, which the next layer waits for
ARRAY = re.compile(r"(pred|bf16|[suf]\d+)\[([\d,]*)\]")


# --- what is counted ------------------------------------------------------------------------------------------------


def collectives(hlo: str) -> dict[str, dict[str, Any]]:
    """{kind: {"count", "arrays", "bytes" of the results, "small", "largest", "groups"}} of a program's text."""
    found: dict[str, dict[str, Any]] = {}
    for line in hlo.splitlines():
        if not (match := RESULT.search(line)):
            continue
        sizes = [_bytes(kind, dimensions) for kind, dimensions in ARRAY.findall(match.group(1))]
        entry = found.setdefault(match.group(2), dict.fromkeys(("count", "arrays", "bytes", "small", "largest"), 0))
        entry["count"] += 1
        entry["arrays"] += len(sizes)
        entry["bytes"] += sum(sizes)
        entry["small"] += sum(sizes) <= SMALL
        entry["largest"] = max(entry["largest"], *sizes)
        groups = GROUPS.search(line)
        entry["groups"] = sorted({*entry.get("groups", ()), groups.group(1) if groups else "all"})
    return found


def _bytes(kind: str, dimensions: str) -> int:
    width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8
    return width * math.prod(int(d) for d in dimensions.split(",") if d)


def traffic(jaxpr: Any, batch: int) -> int:
    """Bytes read and written by what cannot be fused away: convolutions, products, reductions over activations."""
    total = 0
    for equation in _equations(jaxpr):
        name, arrays = equation.primitive.name, [v.aval for v in (*equation.invars, *equation.outvars)]
        if name in ("conv_general_dilated", "dot_general"):
            total += sum(a.size * a.dtype.itemsize for a in arrays)
        elif name.startswith("reduce_") and name != "reduce_precision" and arrays[0].size >= batch * 1024:
            total += arrays[0].size * min(arrays[0].dtype.itemsize, 2)  # kept in bfloat16, widened on the way
    return total


def arithmetic(jaxpr: Any) -> float:
    """Operations of the matrix unit: two for each multiplication of convolutions and products."""
    import numpy as np

    total = 0.0
    for equation in _equations(jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            out, kernel, numbers = equation.outvars[0].aval, equation.invars[1].aval, equation.params
            spec = numbers["dimension_numbers"].rhs_spec
            taps = np.prod([kernel.shape[i] for i in spec[2:]]) * kernel.shape[spec[1]]
            # Zeros that a stride puts between pixels are no work; batch groups share the channels that come out.
            total += 2.0 * out.size * taps / np.prod(numbers["lhs_dilation"])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2.0 * out.size * np.prod([left.shape[i] for i in contracted])
    return total


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def updates(kinds: list[str], depth: int, size: int, batch: int) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name, the loop's compiled update, abstract arguments) of each kind of step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from kdsearch_jax.adapters import devices, registry
    from kdsearch_jax.data.settings import DataConfig
    from kdsearch_jax.distill import search_step
    from kdsearch_jax.distill.objective import classification
    from kdsearch_jax.distill.settings import DistillConfig
    from kdsearch_jax.distill.shrinking import Subnetwork
    from kdsearch_jax.distill.steps import distill_step, supervised_step
    from kdsearch_jax.pruning import budgets
    from kdsearch_jax.pruning.network import trace
    from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
    from kdsearch_jax.training import loop, optimizer
    from kdsearch_jax.training.settings import RunConfig, StageConfig
    from kdsearch_jax.training.state import create_state

    module = registry.build("resnet", {"depth": depth, "num_classes": 1000})
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    stage, run, config = StageConfig(batch_size=batch), RunConfig(precision="bf16"), GatesConfig()
    mesh, task, data = devices.data_mesh(), classification(DistillConfig()), DataConfig(flip=True)
    whole, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def lies(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    sent = {
        "images": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    resident = {name: jax.ShapeDtypeStruct((3,), jnp.float32) for name in ("mean", "std")}
    plain = optimizer.make_optimizer(stage)
    for kind in kinds:
        if kind == "search":
            network = trace(module, image, train=False)
            limits = budgets.resolve(BudgetConfig(macs=0.5), network.topology)
            search = search_step.gated_search(network, [limits], stage, config, run)
            tx = search.optimizer(plain)
            step = search_step.search_step(Subnetwork.of(search), module, tx, stage, task, config, run)
            state = jax.eval_shape(lambda v, s=search, t=tx: search_step.begin(s, v, t), variables)
        else:
            state = jax.eval_shape(lambda v: create_state(v, plain), variables)
            make = {"distill": distill_step, "teacher": supervised_step}[kind]
            step = make(*(module,) * (1 + (kind == "distill")), plain, stage, run, task)
        update = loop.make_update(step, mesh, data, 0, scanned=False)
        constants = None if kind == "teacher" else lies(variables, whole)
        yield kind, update, (lies(state, whole), lies(sent, shared), lies(resident, whole), constants)


def count(kinds: list[str], depth: int, size: int, batch: int) -> dict[str, dict[str, Any]]:
    """{step: what one update does}: a whole batch's arithmetic and traffic, and the exchange of one device."""
    import jax

    found = {}
    for name, update, arguments in updates(kinds, depth, size, batch):
        traced = update.trace(*arguments)
        compiled = traced.lower().compile()
        analysis: Any = compiled.cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list) else analysis
        memory = compiled.memory_analysis()
        found[name] = {
            "batch": batch,
            "devices": jax.device_count(),
            "flops": arithmetic(traced.jaxpr.jaxpr),
            "bytes": traffic(traced.jaxpr.jaxpr, batch),
            "parameters": sum(x.size for x in jax.tree.leaves(arguments[0].params)),
            "statistics": sum(x.size for x in jax.tree.leaves(arguments[0].model_state)),
            "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0])),
            "xla_flops_a_device": float(analysis.get("flops", 0.0)),
            "xla_bytes_a_device": float(analysis.get("bytes accessed", 0.0)),
            "temporary_bytes_a_device": int(getattr(memory, "temp_size_in_bytes", 0)),
            "collectives": collectives(compiled.as_text()),
        }
        print(f"{name}: counted", file=sys.stderr, flush=True)
    return found


# --- what is reckoned -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Peaks as the vendors state them, a chip each; the latency is assumed.

    flops: in bfloat16, dense; memory: bytes a second; links: bytes a second that a chip sends, over all its links;
    cores: vCPUs of the host; latency: seconds of one small all-reduce over all chips.
    """

    chips: int
    flops: float
    memory: float
    links: float
    cores: float
    latency: float


MACHINES = {
    "v5e-8": Machine(8, 197e12, 819e9, 200e9 / 2, 28, 10e-6),  # 2x4 is no torus: half of the links close no ring
    "v5e-256": Machine(256, 197e12, 819e9, 200e9, 28, 30e-6),
    "8×H100": Machine(8, 989e12, 3350e9, 450e9, 26, 15e-6),
}
EFFICIENCY = {"matrix": 0.5, "memory": 0.7, "exchange": 0.7}
IMAGES_A_CORE = (
    225.0  # JPEGs a second, decoded, cropped to 224 and flipped: half of what a core here does, see the page
)


def times(counted: dict[str, Any], machine: Machine, batch: int, images_a_core: float) -> dict[str, float]:
    """Milliseconds of a step by each bound, if nothing else took time."""
    share = batch / counted["batch"] / machine.chips
    reduced = counted["collectives"].get("all-reduce", {"bytes": 0, "small": 0})
    ring = 2 * (machine.chips - 1) / machine.chips * reduced["bytes"] / (machine.links * EFFICIENCY["exchange"])
    return {
        "matrix": 1e3 * counted["flops"] * share / (machine.flops * EFFICIENCY["matrix"]),
        "memory": 1e3 * counted["bytes"] * share / (machine.memory * EFFICIENCY["memory"]),
        "exchange": 1e3 * (ring + reduced["small"] * machine.latency),
        "input": 1e3 * batch / (images_a_core * machine.cores * machine.chips),
    }


def step(each: dict[str, float]) -> float:
    """Milliseconds of a step: the exchange hides behind nothing, the input behind everything."""
    return max(max(each["matrix"], each["memory"]) + each["exchange"], each["input"])


def input_limit(counted: dict[str, Any], machine: Machine, images_a_core: float) -> float:
    """The batch from which on the input takes longer than the rest of a step; infinite where it never does."""
    each = times(counted, machine, 1, images_a_core)
    slower = each["input"] - max(each["matrix"], each["memory"])
    return each["exchange"] / slower if slower > 0 else math.inf


def table(counted: dict[str, dict[str, Any]], images_a_core: float) -> str:
    """Markdown: for each machine, step and batch what each bound takes, which is the largest, and what input needs."""
    heads = "machine, step, batch, a chip, matrix, memory, exchange, input, bound, step ms, images/s, vCPUs a chip"
    lines = ["| " + heads.replace(", ", " | ") + " |", "|" + "---|" * 12]
    for name, machine in MACHINES.items():
        for kind, counts in counted.items():
            for batch in (b for b in BATCHES if 4 <= b / machine.chips <= 256):
                each = times(counts, machine, batch, images_a_core)
                bound, rate = max(each, key=lambda key: each[key]), batch / step(each) * 1e3
                free = batch / step({**each, "input": 0.0}) * 1e3 / machine.chips / images_a_core
                cells = [name, kind, batch, batch // machine.chips, *(f"{value:.1f}" for value in each.values())]
                cells += [bound, f"{step(each):.1f}", f"{rate:,.0f}", f"{free:.0f}"]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
            limit = input_limit(counts, machine, images_a_core)
            lines.append(f"| {name} | {kind} | input is the limit from a batch of {limit:,.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Counts, or reads what was counted, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("devices", 8), ("batch", 1024), ("size", 224), ("depth", 50)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--steps", nargs="+", default=["search", "distill"], choices=["search", "distill", "teacher"])
    parser.add_argument("--images-a-core", type=float, default=IMAGES_A_CORE, help=f"default: {IMAGES_A_CORE}")
    parser.add_argument("--out", type=Path, help="counts as JSON, written here, or read from here where it exists")
    arguments = parser.parse_args()
    if arguments.out and arguments.out.exists():
        counted = json.loads(arguments.out.read_text())
    else:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(arguments.devices)  # before jax is imported
        counted = count(arguments.steps, arguments.depth, arguments.size, arguments.batch)
        if arguments.out:
            arguments.out.write_text(json.dumps(counted, indent=1))
    print(json.dumps(counted, indent=1))
    print(table(counted, arguments.images_a_core))
    return 0


if __name__ == "__main__":
    sys.exit(main())
