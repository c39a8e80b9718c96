"""Measures tracing and surgery of large networks on this CPU: `python benchmarks/trace.py`.

Prints seconds of CPU time, the least of five. Copying the kept parameters is timed separately.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import Network, trace

NETWORKS = {
    "ResNet-152": ("resnet", {"depth": 152}),
    "ViT-L/16": ("vit", {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}),
}


def least(function: Callable[[], object], times: int = 5) -> float:
    """Seconds of CPU time of the quickest run."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        jax.block_until_ready(function())
        seconds.append(time.process_time() - start)
    return min(seconds)


def halved(network: Network) -> dict[str, np.ndarray]:
    """Every other unit of each group, and every branch."""
    return {g.name: np.arange(g.size) % 2 == 0 for g in network.topology.groups}


def main() -> None:
    """Prints a line for each network."""
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    for name, (model, arguments) in NETWORKS.items():
        module = registry.build(model, {"num_classes": 1000, **arguments})
        tracing = least(lambda module=module: trace(module, x))
        network = trace(module, x)
        spec = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(x.shape))
        variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec)
        keep = halved(network)
        gates = {group: np.ones(mask.shape, np.float32) for group, mask in keep.items()}
        base = Architecture(model, {}, input_shape=x.shape[1:])
        cutting = least(lambda: surgery.slice_network(variables, gates, keep, network, base)[0], 3)  # noqa: B023
        copying = least(lambda: jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), variables), 3)  # noqa: B023
        print(f"{name}: trace {tracing:.2f} s, surgery {cutting:.2f} s, a copy of the parameters {copying:.2f} s")


if __name__ == "__main__":
    main()
