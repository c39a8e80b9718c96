"""One trial: trace a network, cut it twice at random, and compare each student with the network that it was cut from.

A pass says something only if the student still answers to its input, and if what was removed had mattered: both are
asked for. Values are random normal numbers for every parameter, which is harder than an initialisation with zeros.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import jax
import numpy as np

from benchmarks.coverage.variant import CallSpec, Record, Variant
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.pruning import budgets, equality, gates, surgery
from kdsearch_jax.pruning.network import Network, adapter_for, trace

MATTERS = 1e-3  # of an output's own scale: the least change that counts as one


def trial(package: str, variant: Variant, seed: int = 0) -> Record:
    """Everything about one network; whatever it raises becomes a record."""
    record = Record(package, variant.name, "broken")
    start = time.perf_counter()
    try:
        call = variant.make()
        record.library = "NNX" if "nnx" in adapter_for(call.module).__name__ else "Linen"
        spec = _specs(call)
        adapter_for(call.module).jaxpr(call.module, spec, call.inputs, call.kwargs)
    except BaseException as error:  # the network's own code: sys.exit in an import has been seen
        record.reason = first_line(error)
        return _timed(record, start)
    record.params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec.get("params", {})))
    try:
        _traced_and_proved(record, call, variant, seed)
    except Exception as error:
        nothing = isinstance(error, ValueError) and str(error).startswith("nothing in this network can be pruned")
        record.status, record.reason = ("nothing" if nothing else "failed"), first_line(error)
    return _timed(record, start)


def _traced_and_proved(record: Record, call: CallSpec, variant: Variant, seed: int) -> None:
    start = time.process_time()  # of this process, however busy the machine is
    network = trace(call.module, *call.inputs, **call.kwargs)
    record.trace_seconds = round(time.process_time() - start, 2)
    topology = network.topology
    record.macs, record.params = topology.total()
    record.share = round(1 - topology.cost(budgets.smallest_keep(topology))[0] / max(record.macs, 1), 4)
    record.kinds = dict(Counter(group.kind for group in topology.groups))
    record.frozen = len({(item.leaf, item.axis) for item in topology.frozen})
    if variant.full:
        record.status = "traced"
        return
    variables, rng = random_variables(call, seed), np.random.default_rng(seed)
    if any(group.kind != "branches" for group in topology.groups):
        record.half, record.effect = _difference(network, variables, call.inputs, half(network, rng), rng)
    if "branches" in record.kinds:
        less = without_branches(network, rng)
        record.branches, effect = _difference(network, variables, call.inputs, less, rng, record.effect is not None)
        record.effect = record.effect or effect
    record.status = "passed"


def _difference(
    network: Network, variables: Any, inputs: Any, keep: Any, rng: np.random.Generator, sound: bool = False
) -> tuple[float, float]:
    """(difference, effect) of removing what is not in `keep`; raises where the student is wrong, or the proof empty.

    sound: it is known already that the network answers to its input and that what is removed matters.
    """
    scales = {group.name: rng.uniform(0.5, 1.5, group.size).astype(np.float32) for group in network.topology.groups}
    sliced, _ = surgery.slice_network(variables, scales, keep, network, Architecture("none", {}, input_shape=(1,)))
    worst = surgery.verify(network, variables, scales, keep, sliced, *inputs)["difference"]
    if sound:
        return worst, 0.0
    whole = surgery.gated(variables, scales, gates.keep_all(network.topology), network)
    before = surgery.function_of(network.module, network.kwargs, network.topology)
    after = surgery.function_of(network.student(keep), network.kwargs)
    with jax.default_matmul_precision("highest"):  # as `surgery.verify` does, so that it is compiled once for both
        effect = equality.difference(equality.reference_outputs(before, whole, inputs), after(sliced, *inputs))
        if not effect > MATTERS:
            raise ValueError(f"what was removed changed the output by {effect:.1e} only: equality shows nothing")
        answer = equality.difference(
            equality.reference_outputs(after, sliced, inputs), after(sliced, *other(inputs, rng))
        )
        if not answer > MATTERS:
            raise ValueError(f"another input changed the student's output by {answer:.1e} only: equality shows nothing")
    return worst, effect


def half(network: Network, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random half of the units of each group, and all branches."""
    return {g.name: np.ones(1, bool) if g.kind == "branches" else _some(g.size, rng) for g in network.topology.groups}


def without_branches(network: Network, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All units, and a random half of the branches."""
    names = [group.name for group in network.topology.groups if group.kind == "branches"]
    stays = dict(zip(names, rng.permutation(len(names)) < len(names) // 2, strict=True))
    return {g.name: np.full(g.size, stays.get(g.name, True)) for g in network.topology.groups}


def _some(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(size) < max(1, size // 2)


def other(inputs: Any, rng: np.random.Generator) -> Any:
    """Another batch: other numbers, and other tokens."""

    def another(x: Any) -> np.ndarray:
        x = np.asarray(x)
        if x.dtype.kind == "f":
            return x + rng.normal(size=x.shape).astype(x.dtype)
        return np.roll(np.flip(x), 1, axis=-1) if x.dtype.kind in "iu" else x

    return jax.tree.map(another, inputs)


def random_variables(call: CallSpec, seed: int) -> Any:
    """Random parameters and statistics at sizes that keep activations near 1; what is not a float is initialised."""
    rng, spec = np.random.default_rng(seed), _specs(call)
    if any(not jax.numpy.issubdtype(leaf.dtype, np.floating) for leaf in jax.tree.leaves(spec)):
        keys = {name: jax.random.key(0) for name in ("params", "dropout")}
        spec = call.module.init(keys, *call.inputs, **call.kwargs)

    def value(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if any(part in name for part in ("scale", "var", "gamma")):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        if not jax.numpy.issubdtype(leaf.dtype, np.floating):
            return leaf
        # Kernels keep the signal's size through a relu; biases and means are small enough to leave it visible.
        size = (2 / max(1, math.prod(leaf.shape[:-1]))) ** 0.5 if len(leaf.shape) > 1 else 0.1
        return (size * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, spec)


def _specs(call: CallSpec) -> Any:
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call.inputs)
    return adapter_for(call.module).abstract_variables(call.module, inputs, call.kwargs)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[0].split()) if lines else ""
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")


def _timed(record: Record, start: float) -> Record:
    record.seconds = round(time.perf_counter() - start, 1)
    return record
