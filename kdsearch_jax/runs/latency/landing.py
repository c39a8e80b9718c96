"""Landing and end: what is really cut is measured, since a model is no measurement.

The student that was chosen is cut and measured against the teacher; while it is beyond the budget the bound is
tightened and the choice repeated, and where it is far within, loosened; the last resort is the smallest student. Time
must stay `MARGIN` below the budget here, so that the same network, measured again at the end of the run, is not lost to
chance.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning.budgets import FLOOR, BudgetError, Limits, smallest_keep
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.selection import Selection
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs.latency.calibration import cut
from kdsearch_jax.runs.latency.timing import UNITS, Tools, asked, check_noise, decide, of_process_0
from kdsearch_jax.storage.files import write_sealed
from kdsearch_jax.tracing.messages import format_distinct

log = logging.getLogger(__name__)

MARGIN, AIM, ROOM = 0.02, 0.97, 0.93  # of a budget: free at the landing; aimed at; below which there is room for more
TRIES = 8


def compare(
    teacher: tuple[Any, Any],
    student: tuple[Any, Any],
    budget: BudgetConfig,
    call: CallSpec,
    tools: Tools | None = None,
    margin: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """A student measured against the teacher, for all that the budget asks.

    Args:
      teacher, student: (module, variables). margin: share of the budget on time that is to be left free.

    Returns:
      {"latency" or "memory": as `decide` gives it, memory in bytes}, process 0's.
    """
    tools, networks = tools or Tools(), {"teacher": teacher, "student": student}

    def measure() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in asked(budget):
            value = float(getattr(budget, name))
            if name == "latency":
                found[name] = decide(tools.clock(networks, budget.batch_size, call), value, 1.0 - margin)
                continue
            sizes = tools.memory(networks, budget.batch_size, call)
            share = sizes["student"] / (value * sizes["teacher"] if value <= 1 else value)
            verdict = {"budget": value, "share": share, "low": share, "high": share, "turns": 1}
            found[name] = {**sizes, **verdict, "within": share <= 1.0}
        return found

    return of_process_0(measure)


def land(
    choose: Callable[[Limits], Selection],
    limits: Limits,
    network: Network,
    variables: Any,
    budget: BudgetConfig,
    call: CallSpec,
    tools: Tools | None = None,
) -> tuple[Selection, dict[str, Any]]:
    """The choice that is within the budget as measured; arguments of `choose` are the limits to choose within.

    Args:
      network, variables: the teacher's.

    Returns:
      (the selection, what `compare` found of it; {} where nothing is measured).

    Raises:
      BudgetError: not even the smallest student is, with what it takes; or timing is too noisy.
    """
    if not limits.measured:
        return choose(limits), {}

    def measure(keep: Mapping[str, np.ndarray]) -> dict[str, Any]:
        flat = network.topology.flatten(keep).astype(float)
        return compare((network.module, variables), cut(network, variables, flat), budget, call, tools, MARGIN)

    scale = dict.fromkeys((estimate.name for estimate, _ in limits.measured), 1.0)
    within_at: dict[str, float] = dict(scale)
    beyond_at = dict.fromkeys(scale, np.inf)
    best: tuple[Selection, dict[str, Any]] | None = None
    for _ in range(TRIES):
        bounds = tuple((estimate, bound * scale[estimate.name]) for estimate, bound in limits.measured)
        tightened = dataclasses.replace(limits, measured=bounds)
        try:
            chosen = choose(tightened)
        except BudgetError:  # by the model nothing fits: what is measured decides
            break
        found = measure(chosen.keep)
        for name, each in found.items():
            log.info("landing: %s is %.3f of the budget, at a bound of %.3f", name, each["share"], scale[name])
        flat = network.topology.flatten(chosen.keep).astype(float)
        used = dict(zip(tightened.names, tightened.pressures(network.topology, flat), strict=True))
        over = [name for name, each in found.items() if not each["within"]]
        if over:
            for name in over:
                check_noise(name, found[name])
                beyond_at[name] = min(beyond_at[name], scale[name])
                # Pieces may be coarse: a bound that this student meets still would choose it again.
                step = scale[name] * min(0.97, AIM / found[name]["share"], used[name] * (1 - 1e-6))
                scale[name] = step if best is None else (within_at[name] + beyond_at[name]) / 2
            continue
        best, within_at = (chosen, found), dict(scale)
        more = {n: scale[n] * AIM / found[n]["share"] for n in scale if used[n] >= FLOOR and found[n]["share"] < ROOM}
        more = {n: min(s, (scale[n] + beyond_at[n]) / 2) for n, s in more.items()}
        more = {n: s for n, s in more.items() if s > 1.02 * scale[n]}
        if not more:
            break
        scale |= more
    return best or _smallest(limits, network, measure)


def _smallest(
    limits: Limits, network: Network, measure: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
) -> tuple[Selection, dict[str, Any]]:
    """The smallest student, where it is within the budget as measured and no other was found that is."""
    topology = network.topology
    flat = smallest_keep(topology, limits.round_to)
    keep = {name: units > 0 for name, units in topology.unflatten(flat).items()}
    found = measure(keep)
    shares = ", ".join(f"{name} {format_distinct(each['share'], 1.0)[0]} of the budget" for name, each in found.items())
    for name, each in found.items():
        check_noise(name, each)
    if not all(each["within"] for each in found.values()):
        raise BudgetError(f"budget: even the smallest student is not within it as measured: {shares}; give more")
    note = f"budget: no student was found that is nearer to it, as measured, than the smallest: {shares}"
    return Selection(keep, limits.pressure(topology, flat), note, exact=False), found


def confirm(
    teacher: tuple[Any, Any],
    student: tuple[Any, Any],
    budget: BudgetConfig,
    call: CallSpec,
    path: Path,
    tools: Tools | None = None,
) -> None:
    """Measures the final student against the teacher, and writes what was found to `path`, unless that is there.

    Raises:
      BudgetError: it is not within the budget, or timing is too noisy to say so. Nothing is written then.
    """
    if not asked(budget) or path.is_file():
        return
    found = compare(teacher, student, budget, call, tools)
    for name, each in found.items():
        share, low, high, _ = format_distinct(each["share"], each["low"], each["high"], 1.0)
        taken = f"{each['student']:,.4g}{UNITS[name]} a call, {share} of the budget (95% interval {low} to {high}"
        if each["within"]:
            log.info("%s: %s)", name, taken)
            continue
        check_noise(name, each)
        raise BudgetError(
            f"budget.{name}: the student takes {taken}, {each['turns']} turns); --resume measures again, a search for "
            "less leaves more room"
        )
    if jax.process_index() == 0:
        write_sealed(path, {"batch_size": budget.batch_size, **found})
