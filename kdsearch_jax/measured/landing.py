"""Landing and end: what is really cut is measured, since a model is no measurement.

The student that was chosen is cut and measured against the teacher; while it is beyond the budget the bound is
tightened and the choice repeated, and where it is far within, loosened. Time must stay `MARGIN` below the budget here,
so that the same network, measured again at the end of the run, is not lost to chance.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdsearch_jax.budget import FLOOR, BudgetError, Limits
from kdsearch_jax.call import Call
from kdsearch_jax.config import BudgetConfig
from kdsearch_jax.files import write_sealed
from kdsearch_jax.measured.calibration import cut
from kdsearch_jax.measured.timing import UNITS, Tools, asked, check_noise, decide, of_process_0
from kdsearch_jax.network import Network

log = logging.getLogger(__name__)

MARGIN, AIM, ROOM = 0.02, 0.97, 0.93  # of a budget: free at the landing; aimed at; below which there is room for more
TRIES = 8


def compare(
    teacher: tuple[Any, Any],
    student: tuple[Any, Any],
    budget: BudgetConfig,
    call: Call,
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
    choose: Callable[[Limits], dict[str, np.ndarray]],
    limits: Limits,
    network: Network,
    variables: Any,
    budget: BudgetConfig,
    call: Call,
    tools: Tools | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The choice that is within the budget as measured; arguments of `choose` are the limits to choose within.

    Args:
      network, variables: the teacher's.

    Returns:
      ({group: (size,) bool}, what `compare` found of it; {} where nothing is measured).

    Raises:
      BudgetError: none is, with the nearest that was measured; or timing is too noisy.
    """
    if not limits.measured:
        return choose(limits), {}
    scale = dict.fromkeys((estimate.name for estimate, _ in limits.measured), 1.0)
    within_at: dict[str, float] = dict(scale)
    beyond_at = dict.fromkeys(scale, np.inf)
    best, nearest = None, ""
    for _ in range(TRIES):
        bounds = tuple((estimate, bound * scale[estimate.name]) for estimate, bound in limits.measured)
        tightened = dataclasses.replace(limits, measured=bounds)
        try:
            keep = choose(tightened)
        except BudgetError as error:
            if best is not None:
                break
            raise BudgetError(f"{error}{f' ({nearest})' if nearest else ''}") from error
        flat = network.topology.flatten(keep).astype(float)
        found = compare((network.module, variables), cut(network, variables, flat), budget, call, tools, MARGIN)
        for name, each in found.items():
            log.info("landing: %s is %.3f of the budget, at a bound of %.3f", name, each["share"], scale[name])
        over = [name for name, each in found.items() if not each["within"]]
        if over:
            for name in over:
                check_noise(name, found[name])
                beyond_at[name] = min(beyond_at[name], scale[name])
                step = scale[name] * min(0.97, AIM / found[name]["share"])
                scale[name] = step if best is None else (within_at[name] + beyond_at[name]) / 2
            nearest = "the nearest measured: " + ", ".join(f"{n} {found[n]['share']:.3f} of the budget" for n in over)
            continue
        best, within_at = (keep, found), dict(scale)
        used = dict(zip(tightened.names, tightened.pressures(network.topology, flat), strict=True))
        more = {n: scale[n] * AIM / found[n]["share"] for n in scale if used[n] >= FLOOR and found[n]["share"] < ROOM}
        more = {n: min(s, (scale[n] + beyond_at[n]) / 2) for n, s in more.items()}
        more = {n: s for n, s in more.items() if s > 1.02 * scale[n]}
        if not more:
            break
        scale |= more
    if best is None:
        raise BudgetError(f"budget: no student was found that is within it as measured; {nearest}; give more")
    return best


def confirm(
    teacher: tuple[Any, Any],
    student: tuple[Any, Any],
    budget: BudgetConfig,
    call: Call,
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
        told = f"{each['student']:,.4g}{UNITS[name]} a call, {each['share']:.3f} of the budget"
        if each["within"]:
            log.info("%s: %s (95%% interval %.3f to %.3f)", name, told, each["low"], each["high"])
            continue
        check_noise(name, each)
        raise BudgetError(
            f"budget.{name}: the student takes {told} (95% interval {each['low']:.3f} to {each['high']:.3f}, "
            f"{each['turns']} turns); --resume measures again, a search for less leaves more room"
        )
    if jax.process_index() == 0:
        write_sealed(path, {"batch_size": budget.batch_size, **found})
