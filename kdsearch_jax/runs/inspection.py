"""The prunable groups of a network, as JSON and as tables."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.registry import accepts, build
from kdsearch_jax.pruning import budgets, hardware, selection
from kdsearch_jax.pruning.network import Network, adapter_for, trace
from kdsearch_jax.pruning.settings import BOUNDS
from kdsearch_jax.runs import latency
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.runs.plain_tables import Table, common, pattern
from kdsearch_jax.runs.planning.steps import AbstractRun
from kdsearch_jax.runs.teacher_source import LoadedNetwork, network_directory
from kdsearch_jax.storage.files import one_line
from kdsearch_jax.tracing.topology import Topology

SHOWN = 4  # names of frozen parameters listed per reason


def inspect_network(
    experiment: Experiment, call: CallSpec, classes: int, measure: bool, trust_code: bool = False
) -> tuple[Network, CallSpec, dict[str, Any]]:
    """Traces the experiment's network.

    Args:
      call: how the network is called; ignored for a stored network (`teacher_from`), whose directory says so.
      classes: the number of classes, if the network takes it and the experiment does not set it.
      measure: also measure latency and memory of a call.
      trust_code: a stored network may import its package.

    Returns:
      The traced network, how it is called, and everything that is known about it as plain JSON.

    Raises:
      ValueError: the network cannot be built, called or pruned.
    """
    stored = network_directory(experiment.teacher_from)
    if stored is not None:
        loaded = LoadedNetwork.of(stored, trust_code=trust_code)
        module, call = loaded.module, loaded.architecture.call_spec
        model, arguments = loaded.architecture.model, loaded.architecture.arguments
    else:
        model, arguments = experiment.model.name, dict(experiment.model.arguments)
        if accepts(model, "num_classes"):
            arguments.setdefault("num_classes", classes)
        module = build(model, arguments)
        call.check(module)
    start = time.perf_counter()
    try:
        network = trace(module, *call.example(2), **call.keywords(module, train=False))
    except (TypeError, ValueError) as error:
        entries = ", ".join(call.to_json()["inputs"].values())
        raise ValueError(
            f"the network was called with {entries} (--input-shape, --inputs): {one_line(error)}"
        ) from error
    seconds = time.perf_counter() - start
    gates = experiment.gates
    network = network.select(gates.kinds, gates.include, gates.exclude)
    record = report(network, experiment)
    if measure:
        record = _measured(record, network, experiment, call)
    inputs = call.to_json()["inputs"]
    record |= {"model": model, "arguments": arguments, "inputs": inputs, "seconds": round(seconds, 3)}
    return network, call, record


def parse_call(inputs: Sequence[str], shape: Sequence[int], dtype: str, keywords: Any) -> CallSpec:
    """A call with these inputs, or with a single one of this shape and type.

    Raises:
      ValueError: an input does not read like `int32[128]` or `name=int32[128]`.
    """
    written = inputs or (f"{dtype}[{','.join(map(str, shape))}]",)
    entries = {}
    for number, text in enumerate(written):
        name, _, spec = text.rpartition("=")
        if not re.fullmatch(r"\w+\[[\d,]*\]", spec):
            raise ValueError(f"--inputs: {text!r} is invalid; write float32[224,224,3], or mask=bool[16]")
        entries[name or f"input{number}"] = (f"{name}={name}" if name else f"input{number}", spec)
    return CallSpec.from_json(
        {
            "arguments": [argument for argument, _ in entries.values()],
            "inputs": {name: spec for name, (_, spec) in entries.items()},
            "train": {},
            "eval": dict(keywords),
        }
    )


def abstract_run(experiment: Experiment, network: Network, call: CallSpec, examples: int | None) -> AbstractRun:
    """The experiment's run without data: a network of one image is called as by a data set of images.

    Args:
      examples: of the training split; None if they are streamed or their number is unknown.
    """
    (name, spec), *others = call.inputs.items()
    if not others and len(getattr(spec, "shape", ())) == 3 and call.arguments == (name,):
        call = CallSpec(("images",), {"images": spec}, call.train, call.eval)
    if examples is not None and experiment.data.train_limit is not None:
        examples = min(examples, experiment.data.train_limit)
    return AbstractRun(experiment, network, call, None if experiment.data.stream else examples)


def report(network: Network, experiment: Experiment) -> dict[str, Any]:
    """Groups, frozen axes, costs, the smallest student and whether the budget can be met, as plain JSON."""
    topology, config = network.topology, experiment.budget
    round_to = hardware.multiples(topology) if config.round_to == "hardware" else config.round_to
    keep = budgets.smallest_keep(topology, round_to)
    smallest = {
        name: {"count": cost, "share": cost / max(total, 1)}
        for name, cost, total in zip(("macs", "params"), topology.cost(keep), topology.total(), strict=True)
    }
    ones, platform = np.ones(topology.units), hardware.current_platform()
    padded = {"platform": platform, "share": hardware.padded_share(topology, ones, platform)}
    return {**topology.to_json(), "smallest": smallest, "padded": padded, "budget": _reach(network, experiment)}


def _reach(network: Network, experiment: Experiment) -> dict[str, Any]:
    """Whether the experiment's budget can be met (None if that must be measured), and the reason if not."""
    bounds = {name: getattr(experiment.budget, name) for name in BOUNDS}
    try:
        multiples = latency.target_multiples(experiment.budget, network.topology)
        limits = budgets.resolve(experiment.budget, network.topology, multiples)
    except budgets.BudgetError as error:
        return {**bounds, "reachable": False, "reason": str(error)}
    if measured := latency.measured_bounds(experiment.budget):
        return {**bounds, "reachable": None, "reason": f"{' and '.join(measured)} must be measured: --measure"}
    note = selection.choose(network.topology, limits, np.ones(network.topology.units)).note
    return {**bounds, "reachable": True, "reason": note or None}


def _measured(record: dict[str, Any], network: Network, experiment: Experiment, call: CallSpec) -> dict[str, Any]:
    """The record with latency and memory of a call, and whether a budget on these can be met."""
    config, random = experiment.budget, np.random.default_rng(0)
    instruments = latency.instruments_for(config)
    shapes = adapter_for(network.module).abstract_variables(network.module, network.inputs, network.kwargs)
    drawn = jax.tree.map(lambda leaf: random.uniform(0.1, 1.0, leaf.shape).astype(leaf.dtype), shapes)
    networks = {
        "whole": (network.module, drawn),
        "smallest": latency.sliced_student(network, drawn, budgets.smallest_keep(network.topology)),
    }
    costs = {
        "latency": latency.medians(instruments.timer(networks, config.batch_size, call)),
        "memory": dict(instruments.memory(networks, config.batch_size, call)),
    }
    smallest = dict(record["smallest"])
    for name, values in costs.items():
        smallest[name] = {"count": values["smallest"], "share": values["smallest"] / values["whole"]}
    whole = {name: values["whole"] for name, values in costs.items()}
    reach = dict(record["budget"])
    if reach["reachable"] is None:
        reach |= {"reachable": True, "reason": None}
        try:
            for name in latency.measured_bounds(config):
                latency.check_reach(name, getattr(config, name), costs[name]["whole"], costs[name]["smallest"])
        except budgets.BudgetError as error:
            reach |= {"reachable": False, "reason": str(error)}
    return {**record, **whole, "batch_size": config.batch_size, "smallest": smallest, "budget": reach}


def summary(record: dict[str, Any]) -> str:
    """A few lines: the network and its costs, the smallest student, whether the budget can be met."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in record["arguments"].items())
    inputs = ", ".join(str(spec) for spec in record["inputs"].values())
    least, goal, padded = record["smallest"], record["budget"], record["padded"]
    bounds = " and ".join(f"{name} {goal[name]:g}" for name in BOUNDS if goal[name] is not None)
    reached = goal["reason"] or "within reach"
    lines = [
        f"{record['model']}({arguments}) of {inputs}: {record['macs']:,} MACs an example, "
        f"{record['params']:,} parameters; traced in {record['seconds']:.2f} s",
        f"smallest student: {least['macs']['count']:,} MACs ({least['macs']['share']:.1%}), "
        f"{least['params']['count']:,} parameters ({least['params']['share']:.1%})",
    ]
    if "latency" in record:
        lines.append(
            f"a call with {record['batch_size']} examples: {record['latency']:.3g} ms, {record['memory']:,.0f} bytes; "
            f"smallest student: {least['latency']['count']:.3g} ms ({least['latency']['share']:.1%}), "
            f"{least['memory']['count']:,.0f} bytes ({least['memory']['share']:.1%})"
        )
    if padded["share"] > 1.005:
        lines.append(f"padding to the widths of this {padded['platform']}: {padded['share']:.3f} times the MACs")
    return "\n".join([*lines, f"budget of {bounds}: {reached}"])


def group_lines(network: Network) -> Table:
    """One line for groups of a kind whose names differ only in numbers: count, total units, total cost."""
    topology = network.topology
    macs, params = topology.total()
    alike: dict[tuple[str, str], list[Any]] = {}
    for group in topology.groups:
        alike.setdefault((pattern(group.name), group.kind), []).append(group)
    lines: Table = []
    for (_, kind), groups in alike.items():
        names = {group.name for group in groups}
        keep = {g.name: np.full(g.size, float(g.name not in names)) for g in topology.groups}
        less_macs, less_params = topology.cost(keep)
        shares = (f"{1 - less_macs / max(macs, 1):.1%}", f"{1 - less_params / max(params, 1):.1%}")
        units = f"{sum(g.size for g in groups):,}"
        lines.append((common([g.name for g in groups]), kind, str(len(groups)), units, *shares))
    return lines


def frozen_lines(network: Network) -> Table:
    """One line per reason, ignoring numbers in layer names: how many axes it freezes, of which parameters."""
    layers = layer_names(network.topology)
    reasons: dict[str, list[str]] = {}
    places: dict[str, dict[str, list[str]]] = {}
    for item in network.topology.frozen:
        reason = re.sub(r"^(as in [^:]*(:branch)?: )+", "", item.reason)
        key, name = alike(reason, layers), item.leaf.removeprefix("params/")
        reasons.setdefault(key, []).append(reason)
        place = f"[{item.axis}]" if item.axis >= 0 else ""
        places.setdefault(key, {}).setdefault(pattern(name) + place, []).append(name + place)
    lines: Table = []
    for key, same_reasons in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
        ranked = sorted(places[key].values(), key=lambda names: -len(names))
        shown = [f"{common(names)} ×{len(names)}" if len(names) > 1 else names[0] for names in ranked[:SHOWN]]
        more = [f"and {len(ranked) - SHOWN} more"] if len(ranked) > SHOWN else []
        lines.append((common(same_reasons), str(len(same_reasons)), ", ".join(shown + more)))
    lines += [(f"operation {name} is not supported", "", "everything it touches") for name in network.topology.unknown]
    return lines


def layer_names(topology: Topology) -> frozenset[str]:
    """Paths of layers and their parent modules, and names of groups; no bare numbers."""
    names = {group.name for group in topology.groups} | set(topology.excluded)
    for leaf in topology.shapes:
        parts = leaf.split("/")[1:]
        names |= {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return frozenset(name for name in names if not name.isdigit())


def alike(text: str, layers: frozenset[str]) -> str:
    """The text with # in place of numbers in layer names, but not in line numbers or shapes."""
    return re.sub(r"[^\s(),;'\"]+", lambda word: _alike(word[0], layers), text)


def _alike(word: str, layers: frozenset[str]) -> str:
    """`alike` for one word: a layer's path, with or without the model's class name before it, and any suffix."""
    if re.search(r"\.\w+:\d+", word):
        return word
    parts = word.split("/")
    for begin, end in itertools.product((0, 1), range(len(parts), 0, -1)):
        if "/".join(parts[begin:end]).rstrip(":") in layers:
            return "/".join(pattern(part) if begin <= i < end else part for i, part in enumerate(parts))
    return word
