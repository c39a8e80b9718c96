"""Measures what the search adds to a real step: `python benchmarks/transform_step.py` (ResNet-20, batch 128).

The same network and loss, updated by optax.sgd alone and by `GatedSearch.optimizer(optax.sgd)` with `fold` in the loss.
The two alternate, and the ratio is taken turn by turn, because other load on the machine slows both.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kdsearch_jax as kd
from kdsearch_jax.adapters import registry


def measure(depth: int = 20, batch: int = 128, rounds: int = 30) -> dict[str, float]:
    """Milliseconds a step and the ratio's median with a 95% interval; controller calls are in it, one in 10 updates."""
    model = registry.build("cifar_resnet", {"depth": depth, "num_classes": 10})
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
    variables = model.init(jax.random.key(0), x[:1], train=False)
    search = kd.GatedSearch(kd.trace(model, x, train=False), kd.Budget(macs=0.5), steps=1000)
    sgd = optax.sgd(0.01, momentum=0.9)

    def updated(tx: Any, fold: Any) -> Any:
        def step(params: Any, stats: Any, state: Any) -> Any:
            def loss(params: Any) -> Any:
                folded = fold(params, batch_stats=stats)
                logits, new = model.apply(folded, x, train=True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

            grads, stats = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), stats, state

        return jax.jit(step, donate_argnums=(0, 1, 2))

    def plain(params: Any, **collections: Any) -> Any:
        return {**params, **collections}

    carries, steps = {}, {"plain": updated(sgd, plain), "search": updated(search.optimizer(sgd), search.fold)}
    for name, tx in (("plain", sgd), ("search", search.optimizer(sgd))):
        params = search.init(variables)
        params = {"params": params["params"]} if name == "plain" else params
        carries[name] = (params, jax.tree.map(jnp.copy, variables["batch_stats"]), tx.init(params))
    times: dict[str, list[float]] = {"plain": [], "search": []}
    for turn in range(rounds + 2):
        for name in ("plain", "search") if turn % 2 else ("search", "plain"):
            begin = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](*carries[name]))
            times[name].append(time.perf_counter() - begin)
    ratios = np.sort(np.array(times["search"][2:]) / np.array(times["plain"][2:]))
    half = int(np.ceil(0.98 * np.sqrt(len(ratios))))
    middle = len(ratios) // 2
    return {
        "plain_ms": 1e3 * float(np.median(times["plain"][2:])),
        "search_ms": 1e3 * float(np.median(times["search"][2:])),
        "ratio": float(np.median(ratios)),
        "low": float(ratios[max(middle - half, 0)]),
        "high": float(ratios[min(middle + half, len(ratios) - 1)]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("depth", 20), ("batch", 128), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    print(measure(**vars(parser.parse_args())))
