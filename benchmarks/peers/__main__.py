"""Prunes a CIFAR ResNet of PyTorch with Torch-Pruning and writes the students for `kdsearch_jax.compare`.

    python -m benchmarks.peers --weights cifar10-resnet20.safetensors --out DIR [--macs 0.5] [--match macs both]
        [--rules group-l2 taylor bn-scale group-sl tas] [--data cifar10] [--data-dir TFDS]
    python -m kdsearch_jax.compare --config cifar10_resnet20 --teacher-from cifar10-resnet20.safetensors --match macs
        --rows searched uniform external:DIR/group-l2-macs

Needs `pip install 'kdsearch-jax[peers]'` (torch, torch-pruning 1.6.0). Each student is written as DIR/RULE-MATCH, a
network directory whose logits equal PyTorch's to 1e-4. DIR/RULE-MATCH.json beside it has its widths and costs, what was
tuned (stage 3's share of the ratio, or the factor of a shape's widths), and the CPU seconds that the rule took, in all
threads and without the reading of data.

Budgets are those of a comparison: `macs` bounds the MACs by a share of the teacher's, `both` also bounds the parameters
by those of the uniform student within these MACs. `benchmarks.peers.pruning` says how they are met.

    group-l2    group L2 norm (`GroupMagnitudeImportance(p=2)`), no data
    bn-scale    BatchNorm scale (`BNScaleImportance`), no data
    taylor      weight times gradient of the cross-entropy, over `--taylor-batches` batches of augmented training images
    group-sl    `--sl-steps` updates on augmented training images with `GroupNormPruner`'s regulariser (two epochs here,
                100 in its benchmark), then group-l2 of the result, whose weights the student keeps. These updates come
                on top of those of the comparison
    tas         the shape found by TAS, see `benchmarks.peers.shapes`; not of Torch-Pruning

Two of its importances are left out: `GroupHessianImportance` keeps the squared gradient of the last sample only, and
`OBDCImportance` raises an exception.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.peers import conversion, networks, pruning, shapes
from kdsearch_jax.adapters import registry
from kdsearch_jax.models.pretrained import load_torch, read_tensors
from kdsearch_jax.pruning import baselines, budgets
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig

RULES = (*pruning.TITLES, *shapes.TITLES)


def main() -> None:
    """Makes every student that is asked for."""
    options = parse()
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    teacher = networks.load(read_tensors(options.weights))
    bounds = limits(options, teacher)
    needs_data = any(rule in ("taylor", "group-sl") for rule in options.rules)
    data = networks.training_data(options.data, options.data_dir) if needs_data else None
    for rule in options.rules:
        start = time.process_time()
        scored = teacher if rule in shapes.TITLES else pruning.prepare(rule, teacher, data, options)
        preparation = time.process_time() - start
        for match in options.match:
            make(rule, match, scored, bounds[match], preparation, options)


def make(
    rule: str, match: str, network: Any, bounds: tuple[float, float | None], preparation: float, options: Any
) -> None:
    """Prunes to a budget, and writes the student and what is known about it."""
    start = time.process_time()
    if rule in shapes.TITLES:
        student, tuned = shapes.within(network, *bounds)
        title = shapes.TITLES[rule]
    else:
        student, tuned = pruning.within(network, rule, *bounds)
        title = f"Torch-Pruning, {pruning.TITLES[rule]}"
    seconds = preparation + time.process_time() - start
    name = title if match == "macs" else f"{title}, also parameters"
    updates = options.sl_steps if rule == "group-sl" else 0
    directory = options.out / f"{rule}-{match}"
    written = conversion.save(student, directory, name, options.data, rule=rule, match=match, updates_before=updates)
    record = {
        "name": name, "rule": rule, "match": match, **written, "bounds": bounds, "tuned": tuned,
        "widths": student.widths, "cpu_seconds": round(seconds, 2), "cpu_seconds_scoring": round(preparation, 2),
        "updates_before": updates, "batch_size": options.batch_size, "seed": options.seed,
        "torch": torch.__version__, "weights": str(options.weights),
    }  # fmt: skip
    (options.out / f"{rule}-{match}.json").write_text(json.dumps(record, indent=1) + "\n")
    params = "" if bounds[1] is None else f" (at most {bounds[1]:,.0f})"
    print(
        f"{directory}: {written['macs']:,} MACs (at most {bounds[0]:,.0f}), {written['params']:,} parameters{params}, "
        f"logits equal to {written['difference']:.1e}, {seconds:.1f} CPU seconds",
        flush=True,
    )


def limits(options: Any, teacher: networks.CifarResNet) -> dict[str, tuple[float, float | None]]:
    """{match: (most MACs, most parameters)}, as `kdsearch_jax.compare` has them."""
    arguments = {"depth": 6 * len(teacher.widths[0]) + 2, "num_classes": teacher.linear.out_features}
    module, shape = registry.build("cifar_resnet", arguments), (networks.SIZE, networks.SIZE, 3)
    network = trace(module, jax.ShapeDtypeStruct((16, *shape), jnp.float32), train=False)
    bounds = budgets.resolve(BudgetConfig(macs=options.macs), network.topology)
    variables = load_torch(options.weights, module, shape)
    keep = baselines.select("uniform", variables, network.topology, bounds, np.random.default_rng(0))
    assert bounds.macs is not None
    return {"macs": (bounds.macs, None), "both": (bounds.macs, float(network.topology.cost(keep)[1]))}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="safetensors or .th of pytorch_resnet_cifar10")
    parser.add_argument("--out", type=Path, required=True, help="directory of the students")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the teacher's MACs")
    parser.add_argument("--match", nargs="+", choices=("macs", "both"), default=("macs", "both"))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--data", default="cifar10", help="cifar10 or cifar100")
    parser.add_argument("--data-dir", help="directory of TFDS data sets")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--taylor-batches", type=int, default=50)
    parser.add_argument("--sl-steps", type=int, default=1500)
    parser.add_argument("--sl-rate", type=float, default=0.01)
    parser.add_argument("--sl-reg", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch; by default its own choice")
    options = parser.parse_args()
    if not 0 < options.macs < 1:
        parser.error(f"--macs: {options.macs} is not a share between 0 and 1")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
