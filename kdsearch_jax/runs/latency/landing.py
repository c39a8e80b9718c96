"""Selects the student by measurement, because a cost model is no measurement.

The selected student is cut and measured against the teacher. If it exceeds the budget the bound is tightened and the
selection repeated; if it is far below, the bound is loosened. The last resort is the smallest student. Latency must
stay `MARGIN` below the budget here, so that the same network passes when it is measured again at the end of the run.
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
from kdsearch_jax.runs.coordination import broadcast_json
from kdsearch_jax.runs.latency.calibration import sliced_student
from kdsearch_jax.runs.latency.compiled import instruments_for
from kdsearch_jax.runs.latency.timing import UNITS, Instruments, check_noise, decide, measured_bounds
from kdsearch_jax.storage.files import write_sealed
from kdsearch_jax.tracing.messages import format_distinct

log = logging.getLogger(__name__)

MARGIN, AIM, ROOM = (
    0.02,
    0.97,
    0.93,
)  # shares of a budget: left free; aimed at; below which the bound is loosened
TRIES = 8


def compare_costs(
    teacher: tuple[Any, Any],
    student: tuple[Any, Any],
    budget: BudgetConfig,
    call: CallSpec,
    instruments: Instruments | None = None,
    margin: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Measures a student against the teacher for all measured bounds of the budget.

    Args:
      teacher, student: (module, variables).
      margin: share of the latency budget to leave free.

    Returns:
      {"latency" and/or "memory": as returned by `timing.decide`, memory in bytes}, measured on the first process.
    """
    instruments, networks = instruments or instruments_for(budget), {"teacher": teacher, "student": student}

    def measure() -> dict[str, Any]:
        verdicts: dict[str, Any] = {}
        for name in measured_bounds(budget):
            value = float(getattr(budget, name))
            if name == "latency":
                verdicts[name] = decide(instruments.timer(networks, budget.batch_size, call), value, 1.0 - margin)
                continue
            sizes = instruments.memory(networks, budget.batch_size, call)
            share = sizes["student"] / (value * sizes["teacher"] if value <= 1 else value)
            verdict = {"budget": value, "share": share, "low": share, "high": share, "turns": 1}
            verdicts[name] = {**sizes, **verdict, "within": share <= 1.0}
        return verdicts

    return broadcast_json(measure)


def land(
    choose: Callable[[Limits], Selection],
    limits: Limits,
    network: Network,
    variables: Any,
    budget: BudgetConfig,
    call: CallSpec,
    instruments: Instruments | None = None,
) -> tuple[Selection, dict[str, Any]]:
    """The selection that is within the budget as measured.

    Args:
      choose: selects units within the limits it is given.
      network, variables: the teacher's.

    Returns:
      (selection, result of `compare_costs`); the result is {} if nothing is measured.

    Raises:
      BudgetError: even the smallest student exceeds the budget, or timing is too noisy.
    """
    if not limits.measured:
        return choose(limits), {}

    def measure(keep: Mapping[str, np.ndarray]) -> dict[str, Any]:
        flat = network.topology.flatten(keep).astype(float)
        return compare_costs(
            (network.module, variables), sliced_student(network, variables, flat), budget, call, instruments, MARGIN
        )

    scale = dict.fromkeys((estimate.name for estimate, _ in limits.measured), 1.0)
    within_at: dict[str, float] = dict(scale)
    beyond_at = dict.fromkeys(scale, np.inf)
    best: tuple[Selection, dict[str, Any]] | None = None
    for _ in range(TRIES):
        bounds = tuple((estimate, bound * scale[estimate.name]) for estimate, bound in limits.measured)
        tightened = dataclasses.replace(limits, measured=bounds)
        try:
            selection = choose(tightened)
        except BudgetError:  # nothing fits by the model; measure the smallest student
            break
        verdicts = measure(selection.keep)
        for name, verdict in verdicts.items():
            log.info("selection: %s is %.3f of the budget, at a bound of %.3f", name, verdict["share"], scale[name])
        flat = network.topology.flatten(selection.keep).astype(float)
        used = dict(zip(tightened.names, tightened.pressures(network.topology, flat), strict=True))
        over = [name for name, verdict in verdicts.items() if not verdict["within"]]
        if over:
            for name in over:
                check_noise(name, verdicts[name])
                beyond_at[name] = min(beyond_at[name], scale[name])
                # Units may be coarse: a bound that this student still meets would select it again.
                step = scale[name] * min(0.97, AIM / verdicts[name]["share"], used[name] * (1 - 1e-6))
                scale[name] = step if best is None else (within_at[name] + beyond_at[name]) / 2
            continue
        best, within_at = (selection, verdicts), dict(scale)
        looser = {
            n: scale[n] * AIM / verdicts[n]["share"] for n in scale if used[n] >= FLOOR and verdicts[n]["share"] < ROOM
        }
        looser = {n: min(s, (scale[n] + beyond_at[n]) / 2) for n, s in looser.items()}
        looser = {n: s for n, s in looser.items() if s > 1.02 * scale[n]}
        if not looser:
            break
        scale |= looser
    return best or _smallest(limits, network, measure)


def _smallest(
    limits: Limits, network: Network, measure: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
) -> tuple[Selection, dict[str, Any]]:
    """The smallest student, if it is within the budget as measured."""
    topology = network.topology
    flat = smallest_keep(topology, limits.round_to)
    keep = {name: units > 0 for name, units in topology.unflatten(flat).items()}
    verdicts = measure(keep)
    shares = ", ".join(
        f"{name} {format_distinct(verdict['share'], 1.0)[0]} of the budget" for name, verdict in verdicts.items()
    )
    for name, verdict in verdicts.items():
        check_noise(name, verdict)
    if not all(verdict["within"] for verdict in verdicts.values()):
        raise BudgetError(f"budget: even the smallest student exceeds it as measured: {shares}; give more")
    note = f"budget: as measured, no student is closer to it than the smallest one: {shares}"
    return Selection(keep, limits.pressure(topology, flat), note, exact=False), verdicts


def confirm(
    teacher: tuple[Any, Any],
    student: tuple[Any, Any],
    budget: BudgetConfig,
    call: CallSpec,
    path: Path,
    instruments: Instruments | None = None,
) -> None:
    """Measures the final student against the teacher and writes the result to `path`, unless that exists.

    Raises:
      BudgetError: the student exceeds the budget, or timing is too noisy to decide. Nothing is written then.
    """
    if not measured_bounds(budget) or path.is_file():
        return
    verdicts = compare_costs(teacher, student, budget, call, instruments)
    for name, verdict in verdicts.items():
        share, low, high, _ = format_distinct(verdict["share"], verdict["low"], verdict["high"], 1.0)
        taken = f"{verdict['student']:,.4g}{UNITS[name]} a call, {share} of the budget (95% interval {low} to {high}"
        if budget.target is not None:
            taken = (
                f"{verdict['student']:,.4g}{UNITS[name]} a call, {share} of the budget (estimated by the compiler for "
                f"{budget.target}"
            )
        if verdict["within"]:
            log.info("%s: %s)", name, taken)
            continue
        check_noise(name, verdict)
        raise BudgetError(
            f"budget.{name}: the student takes {taken}, {verdict['turns']} turns); --resume measures again; "
            "a search for a smaller budget leaves more room"
        )
    if jax.process_index() == 0:
        target = {} if budget.target is None else {"target": budget.target}
        write_sealed(path, {"batch_size": budget.batch_size, **target, **verdicts})
