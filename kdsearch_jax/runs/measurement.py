"""Time and memory of a network's forward pass on this device."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.devices import data_mesh, place, replicate
from kdsearch_jax.reporting.intervals import median_interval
from kdsearch_jax.runs.evaluation import inference

TURN = 4e-3  # seconds of repeated calls per network and turn


def compile_inference(module: Any, variables: Any, batch_size: int, call: CallSpec) -> tuple[Any, tuple[Any, Any]]:
    """The network compiled for one device in inference mode and float32, and arguments to call it with."""
    mesh = data_mesh(jax.local_devices()[:1])
    inputs = place(call.random(batch_size, np.random.default_rng(0)), NamedSharding(mesh, PartitionSpec("data")))
    arguments = (replicate(jax.tree.map(np.asarray, variables), mesh), inputs)
    return inference(module, json.dumps(call.to_json())).lower(*arguments).compile(), arguments


def turn_timer(
    networks: Mapping[str, tuple[Any, Any]], batch_size: int, call: CallSpec
) -> Callable[[], dict[str, float]]:
    """A function that times every network once per call: {name: milliseconds per forward pass}.

    Networks alternate, forwards and backwards, so that other load on the machine affects all of them alike. A turn
    repeats short calls for about `TURN` seconds and takes their median. The number of repeats is derived from the
    fastest of a few calls, because that one is affected least by other load.

    Args:
      networks: {name: (module, variables)}.
      batch_size: examples per call.
    """
    compiled = {name: compile_inference(module, variables, batch_size, call) for name, (module, variables)
                in networks.items()}  # fmt: skip

    def seconds(name: str, repeats: int) -> list[float]:
        run, arguments = compiled[name]
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times.append(time.perf_counter() - start)
        return times

    for name in compiled:
        seconds(name, 1)  # warm-up
    repeats = {name: max(1, min(100, round(TURN / max(min(seconds(name, 5)), 1e-9)))) for name in compiled}
    order = itertools.cycle([list(repeats), list(reversed(repeats))])
    return lambda: {name: 1000 * statistics.median(seconds(name, repeats[name])) for name in next(order)}


def measure_latency(
    networks: Mapping[str, tuple[Any, Any]], batch_size: int, call: CallSpec, turns: int = 30
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds per example of each network (module, variables): (median over the turns, low, high)."""
    turn = turn_timer(networks, batch_size, call)
    times = [turn() for _ in range(turns)]
    return {name: median_interval([each[name] / batch_size for each in times]) for name in networks}


def measure_memory(networks: Mapping[str, tuple[Any, Any]], batch_size: int, call: CallSpec) -> dict[str, float]:
    """Bytes of device memory that a forward pass of each network (module, variables) needs, according to XLA.

    The sum of arguments (parameters, statistics, inputs), outputs and the peak of temporary arrays. Memory that kernel
    libraries allocate at run time is not included. Deterministic for a given program.

    Raises:
      ValueError: this backend does not report memory.
    """
    total = {}
    for name, (module, variables) in networks.items():
        analysis = compile_inference(module, variables, batch_size, call)[0].memory_analysis()
        if analysis is None:
            raise ValueError(f"memory: the backend {jax.default_backend()!r} does not report what a program takes")
        sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
        total[name] = float(sum(sizes) - analysis.alias_size_in_bytes)
    return total
