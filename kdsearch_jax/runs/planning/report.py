"""Compiles the programs of a run for a target and puts what the compiler says into one record.

Times are estimates: cycles of the compiler's cost model over the chip's clock. They see padding, but not what overlaps.
Collectives are added as a ring over all links at the vendor's peak; the latency of small ones is left out. What bounds
a program is the resource that would take the longest at its own peak, or "padding" if none takes half of the estimated
time: then most cycles go into lanes without data and into small operations.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdsearch_jax.runs.planning.steps import AbstractRun, Program
from kdsearch_jax.runs.targets import Estimates, Target, TargetError, compile_for
from kdsearch_jax.runs.targets.program_text import Scope
from kdsearch_jax.tracing.messages import nearest

# What is no layer of the trained network, by the scopes of the loop; OTHER is losses and what XLA does not attribute.
TEACHER, OPTIMIZER, INPUT, OTHER = "(teacher)", "(optimizer and search)", "(input)", "(other)"
_SCOPES = {"optimizer": OPTIMIZER, "input": INPUT}


def plan(run: AbstractRun, target: Target, names: Sequence[str] = ()) -> dict[str, Any]:
    """What the compiler says about a run on a target, as plain JSON.

    Args:
      names: of the programs to compile. By default all; for a student, only its forward pass and that of its teacher.

    Raises:
      TargetError: a batch cannot be divided among the devices, or the compiler is missing.
      ValueError: a name is unknown.
    """
    if run.is_pruned and not names:
        names = ("forward", "forward unpruned")
    programs = run.programs()
    for name in names:
        if name not in programs:
            raise ValueError(f"--programs: {name!r} is not compiled; {nearest(name, programs)}")
    chosen = [_divided(program, target) for program in programs.values() if not names or program.name in names]
    layers = layer_paths(run)
    rows = {program.name: program_record(program, target, layers) for program in chosen}
    return {
        "target": target.name,
        "chips": target.chips,
        "devices": target.devices,
        "memory": target.chip.memory,
        "versions": dict(next(iter(rows.values()))["versions"]) if rows else {},
        "resident_examples": run.examples,
        "precision": run.experiment.run.precision,
        "macs": run.macs,
        "programs": rows,
        "updates": {p.name: p.stage.steps for p in chosen if p.stage is not None},
    }


def program_record(program: Program, target: Target, layers: Iterable[str]) -> dict[str, Any]:
    """One program on a target, as plain JSON; with the largest batch that fits if its own does not."""
    found = _compile(program, target, program.batch)
    record = {"batch": program.batch, **_summary(program, target, found, layers)}
    if found.fits:
        return record
    batch = program.batch
    while not found.fits and batch // 2 >= target.devices:
        batch = batch // 2 // target.devices * target.devices
        found = _compile(program, target, batch)
    record["largest_batch"] = batch if found.fits else 0
    if found.fits:
        record["at_largest_batch"] = {"batch": batch, **_summary(program, target, found, layers)}
    return record


def _compile(program: Program, target: Target, batch: int) -> Estimates:
    function, arguments = program.make(target.mesh(), batch)
    return compile_for(target, function, *arguments, name=f"{program.name}, {batch} examples,")


def _divided(program: Program, target: Target) -> Program:
    """The program, if its batch can be divided among the devices; evaluation rounds its batch up."""
    rest = program.batch % target.devices
    if rest and program.stage is not None:
        near = max(target.devices, program.batch - rest)
        raise TargetError(
            f"{program.name}.batch_size: {program.batch} is not a multiple of the {target.devices} devices of "
            f"{target.name}; give {near}, for example"
        )
    return dataclasses.replace(program, batch=-(-program.batch // target.devices) * target.devices)


def _summary(program: Program, target: Target, found: Estimates, layers: Iterable[str]) -> dict[str, Any]:
    counts, chip = found.counts, target.chip
    cycles = counts.cycles / program.updates
    conditional = counts.conditional / program.updates / program.every
    links = _ring_seconds(counts.collectives, target)
    seconds = (cycles + conditional) / chip.clock
    shares = {
        "matrix unit": (found.flops or 0.0) / chip.flops,
        "HBM": (found.bytes or 0.0) / chip.bandwidth,
        "links": links,
    }
    total = max(seconds + links, 1e-30)
    matrix = sum(n for _, n in counts.matrix.values())
    elements, padded = (sum(getattr(s, key) for s in counts.scopes.values()) for key in ("elements", "padded"))
    usable = found.fits and cycles > 0
    return {
        "per_device": -(-program.batch // target.devices),
        "fits": found.fits,
        "memory": dict(found.memory),
        "cycles": cycles if usable else None,
        "conditional_cycles": conditional if usable else None,
        "milliseconds": 1e3 * total if usable else None,
        "examples_per_second": program.batch / total if usable else None,
        "flops": found.flops,
        "bytes": found.bytes,
        "shares": {name: value / total for name, value in shares.items()} if usable else {},
        "bound": _bound(shares, total) if usable else None,
        "bf16": counts.matrix.get("bf16", [0, 0.0])[1] / matrix if matrix else None,
        "matrix_operations": {name: int(n) for name, (n, _) in counts.matrix.items()},
        "not_bf16": sorted({layer_of(scope, layers) for scope in counts.not_bf16}),
        "padding": 1 - elements / padded if padded else None,
        "collectives": counts.collectives,
        "not_estimated": counts.custom_calls,
        "loops_counted_once": counts.loops,
        "layers": _layers(counts.scopes, layers, counts.cycles) if usable else {},
        "compile_seconds": round(found.seconds, 1),
        "versions": dict(found.versions),
    }


def _bound(shares: Mapping[str, float], total: float) -> str:
    name = max(shares, key=lambda each: shares[each])
    return name if shares[name] >= 0.5 * total else "padding"


def _ring_seconds(collectives: Mapping[str, Mapping[str, int]], target: Target) -> float:
    """Seconds of all collectives at the peak of the links: an all-reduce sends its bytes twice, the others once."""
    n = target.devices
    sent = sum((2 if kind == "all-reduce" else 1) * each["bytes"] for kind, each in collectives.items())
    return (n - 1) / n * sent / target.chip.links


def _layers(scopes: Mapping[str, Scope], layers: Iterable[str], total: float) -> dict[str, dict[str, float]]:
    """{layer: {"share" of the cycles, "matrix" share, "padding"}}, the most expensive first."""
    layers = list(layers)
    sums: dict[str, list[float]] = {}
    for name, scope in scopes.items():
        row = sums.setdefault(layer_of(name, layers), [0.0, 0.0, 0.0, 0.0])
        for at, value in enumerate((scope.cycles, scope.matrix, scope.elements, scope.padded)):
            row[at] += value
    found = {}
    for name, (cycles, matrix, elements, padded) in sorted(sums.items(), key=lambda item: -item[1][0]):
        if cycles > 0:
            padding = 1 - elements / padded if padded else None
            found[name] = {"share": cycles / total, "matrix": matrix / total, "padding": padding}
    return found


def layer_paths(run: AbstractRun) -> list[str]:
    """Paths of the layers that own parameters."""
    return sorted({leaf.split("/", 1)[1].rpartition("/")[0] for leaf in run.network.topology.shapes} - {""})


def layer_of(scope: str, layers: Iterable[str]) -> str:
    """The layer that an operation's scope belongs to: the longest path in it, or a name for what is no layer."""
    plain = "/" + re.sub(r"\b(jvp|transpose|jit|vmap|remat|checkpoint)\(|\)", "", scope) + "/"
    if "/teacher/" in plain:
        return TEACHER
    if within := [path for path in layers if f"/{path}/" in plain]:
        return max(within, key=len)
    return next((name for part, name in _SCOPES.items() if f"/{part}/" in plain), OTHER)
