"""Half of the MACs against half of the time on a TPU that is not here, for students of random importance.

python benchmarks/targets.py [--target tpu:v5e:1x1] [--model vit --arguments '{"patch": 16}'] [--size 224] [--batch 128]

Both students are cut from the same random importances: one by a budget on MACs, one by a budget on the time that the
TPU compiler estimates, with widths rounded to what that TPU pads. Nothing is trained or measured. Needs libtpu
(`pip install 'kdsearch-jax[tpu-compiler]'`). Estimates are cached, so the second time is fast. Not yet run to its end.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any


def compare(model: str, arguments: dict[str, Any], size: int, batch: int, target: str, share: float) -> list[list[str]]:
    """Rows (network, MACs, share of the MACs, estimated ms, share of the time) of teacher and both students."""
    import jax
    import numpy as np

    from kdsearch_jax.adapters.call_spec import CallSpec
    from kdsearch_jax.adapters.registry import build
    from kdsearch_jax.pruning import budgets, selection
    from kdsearch_jax.pruning.network import adapter_for, trace
    from kdsearch_jax.pruning.settings import BudgetConfig
    from kdsearch_jax.runs import latency

    module, call = build(model, arguments), CallSpec.of_image((size, size, 3))
    keywords = call.keywords(module, train=False)
    network = trace(module, *call.example(2), **keywords)
    topology = network.topology
    shapes = adapter_for(module).abstract_variables(module, network.inputs, network.kwargs)
    variables = jax.tree.map(lambda x: np.broadcast_to(np.ones((), x.dtype), x.shape), shapes)
    importance = np.random.default_rng(0).exponential(1.0, topology.units)

    def choose(limits: Any) -> Any:
        return selection.choose(topology, limits, importance)

    by_macs = choose(budgets.resolve(BudgetConfig(macs=share), topology)).keep
    config = BudgetConfig(macs=None, latency=share, round_to="hardware", batch_size=batch, target=target)
    record = latency.calibrate(network, variables, config, call)
    limits = budgets.resolve(config, topology, latency.target_multiples(config, topology))
    by_time = latency.land(choose, latency.with_measured(limits, config, record), network, variables, config, call)[
        0
    ].keep
    ones = {group.name: np.ones(group.size, bool) for group in topology.groups}
    keeps = {"teacher": ones, f"{share} of the MACs": by_macs, f"{share} of the time": by_time}
    networks = {
        name: latency.sliced_student(network, variables, topology.flatten(keep).astype(float))
        for name, keep in keeps.items()
    }
    times = latency.instruments_for(config).timer(networks, batch, call)()
    macs = {name: topology.cost(keep)[0] for name, keep in keeps.items()}
    return [
        [name, f"{macs[name]:,}", f"{macs[name] / macs['teacher']:.3f}", f"{times[name]:.3f}",
         f"{times[name] / times['teacher']:.3f}"]
        for name in keeps
    ]  # fmt: skip


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", default="tpu:v5e:1x1")
    parser.add_argument("--model", default="resnet")
    parser.add_argument("--arguments", type=json.loads, default={"depth": 50, "num_classes": 1000})
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.5)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    rows = compare(asked.model, asked.arguments, asked.size, asked.batch, asked.target, asked.share)
    print(f"{asked.model} {asked.arguments} at {asked.size}, batch {asked.batch}, bf16, {asked.target}: estimated")
    heads = ["network", "MACs", "share of MACs", "ms", "share of time"]
    for row in [heads, ["---"] * 5, *rows]:
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
