"""Compares `kdsearch_jax.adapters.convolution.dispatch` with XLA's grouped and depthwise convolutions on this CPU.

python benchmarks/grouped_convolution.py [--rounds 5] [--batch 8] [--only NAME]

Each case is compiled both ways in float32, and the two alternate so that other load on the machine affects both alike.
Prints the shortest times in milliseconds (forward, and forward with both gradients), their ratios, and the seconds that
compilation took. Some of XLA's gradients take half a minute per call; a call longer than `--patience` seconds is not
repeated. `network` is one SGD step of an unmodified MobileNetV2-like network with batch normalisation, with and without
`fast_convolutions`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kdsearch_jax.adapters.convolution.dispatch import conv_general_dilated, fast_convolutions

# name: (height and width, inputs, outputs, groups, kernel, stride)
CASES = {
    "MobileNetV2 depthwise 3x3": (56, 144, 144, 144, 3, 1),
    "MobileNetV2 depthwise 3x3 /2": (56, 144, 144, 144, 3, 2),
    "MobileNetV2 depthwise 3x3 14": (14, 384, 384, 384, 3, 1),
    "EfficientNet depthwise 5x5": (28, 240, 240, 240, 5, 1),
    "ConvNeXt depthwise 7x7": (56, 96, 96, 96, 7, 1),
    "ConvNeXt depthwise 7x7 14": (14, 384, 384, 384, 7, 1),
    "ResNeXt 32 groups of 4": (56, 128, 128, 32, 3, 1),
    "ResNeXt 32 groups of 8 /2": (56, 256, 256, 32, 3, 2),
    "ResNeXt 32 groups of 16": (14, 512, 512, 32, 3, 1),
    "8 groups of 8": (32, 64, 64, 8, 3, 1),
    "2 groups of 32": (32, 64, 64, 2, 3, 1),
    "ShuffleNet 1x1, 8 groups": (28, 240, 240, 8, 1, 1),
}
CallSpec = Callable[[], Any]


class Network(nn.Module):
    """MobileNetV2's blocks at 32×32, 8 of them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Logits of 10 classes."""
        x = nn.relu6(nn.BatchNorm(not train)(nn.Conv(32, (3, 3), use_bias=False)(x)))
        for features, stride in [(16, 1), (24, 1), (24, 1), (32, 2), (32, 1), (64, 2), (64, 1), (96, 1)]:
            y = nn.relu6(nn.BatchNorm(not train)(nn.Conv(6 * x.shape[-1], (1, 1), use_bias=False)(x)))
            wide = y.shape[-1]
            y = nn.Conv(wide, (3, 3), stride, feature_group_count=wide, use_bias=False)(y)
            y = nn.Conv(features, (1, 1), use_bias=False)(nn.relu6(nn.BatchNorm(not train)(y)))
            y = nn.BatchNorm(not train)(y)
            x = x + y if x.shape == y.shape else y
        return nn.Dense(10)(x.mean((1, 2)))


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[CallSpec, float]:
    """A call of the compiled function that waits for its end, and the seconds that compiling took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments)), time.perf_counter() - start


def compare(
    native: tuple[CallSpec, float], fast: tuple[CallSpec, float], rounds: int, patience: float
) -> dict[str, float]:
    """Shortest times of both, taking turns after one call that is not counted, and their ratio."""
    shortest = {"native": float("inf"), "fast": float("inf")}
    for turn in range(rounds + 1):
        for name, (call, _) in (("native", native), ("fast", fast)):
            if name == "native" and patience < shortest[name] < float("inf"):
                continue
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if turn or seconds > patience:
                shortest[name] = min(shortest[name], seconds)
    return {
        "native_ms": round(1000 * shortest["native"], 2),
        "fast_ms": round(1000 * shortest["fast"], 2),
        "ratio": round(shortest["native"] / shortest["fast"], 1),
        "native_compile_s": round(native[1], 2),
        "fast_compile_s": round(fast[1], 2),
    }


def convolution(case: tuple[int, ...], batch: int, rounds: int, patience: float) -> dict[str, Any]:
    """Both times of one convolution: forward, and forward with gradients."""
    size, inputs, outputs, groups, kernel, stride = case
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, size, size, inputs)), jnp.float32)
    w = jnp.asarray(random.normal(size=(kernel, kernel, inputs // groups, outputs)), jnp.float32)

    def forward(function: Any) -> Callable[..., Any]:
        return lambda x, w: function(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    def both(function: Any) -> Callable[..., Any]:
        def run(x: jax.Array, w: jax.Array) -> Any:
            y, pullback = jax.vjp(forward(function), x, w)
            return y, pullback(y)

        return run

    functions = (lax.conv_general_dilated, conv_general_dilated)
    return {
        name: compare(*(compiled(what(function), x, w) for function in functions), rounds, patience)
        for name, what in (("forward", forward), ("forward+backward", both))
    }


def network(batch: int, rounds: int, patience: float) -> dict[str, Any]:
    """Both times of one SGD step."""
    module, x = Network(), jnp.asarray(np.random.default_rng(0).normal(size=(batch, 32, 32, 3)), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    def step(variables: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, changed = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return -nn.log_softmax(logits)[:, 0].mean(), changed

        gradient, changed = jax.grad(loss, has_aux=True)(variables["params"])
        return {"params": jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradient), **changed}

    calls = []
    for context in (nullcontext, fast_convolutions):
        with context():
            calls.append(compiled(lambda variables, x: step(variables, x), variables, x))
    return {"step": compare(*calls, rounds, patience)}


def main() -> None:
    """Prints what is found, one case a line, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns, after one that is not counted (default: 5)")
    parser.add_argument("--batch", type=int, default=8, help="images (default: 8; the network's: 4 times as many)")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds; slower calls are made once (default: 2)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    given = parser.parse_args()
    for name, case in CASES.items():
        if given.only in name:
            print(json.dumps({name: convolution(case, given.batch, given.rounds, given.patience)}), flush=True)
    if given.only in "network":
        print(json.dumps({"network": network(4 * given.batch, given.rounds, given.patience)}), flush=True)


if __name__ == "__main__":
    main()
