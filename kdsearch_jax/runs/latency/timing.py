"""Decisions from noisy times.

Networks alternate (`measurement.turn_timer`), and turns continue until a 95% interval of the median lies on one side of
the threshold. The interval consists of order statistics: it assumes no distribution, only independent turns. A fraction
of the teacher's time is compared turn by turn, so that what slows down a whole turn cancels out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning.budgets import BudgetError
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting.intervals import MAX_SPREAD, median_interval
from kdsearch_jax.runs import measurement

UNITS = {"latency": " ms", "memory": " bytes"}
FIRST, MOST, SECONDS = 15, 960, 40.0  # turns at first and at most; seconds after which no more turns are begun

Networks = Mapping[str, tuple[Any, Any]]  # {name: (module, variables)}
Turn = Callable[[], Mapping[str, float]]  # {name: milliseconds} of one turn


@dataclass(frozen=True)
class Instruments:
    """How networks are measured at a batch size and a call. See `measurement.turn_timer` and `measure_memory`."""

    timer: Callable[[Networks, int, CallSpec], Turn] = measurement.turn_timer
    memory: Callable[[Networks, int, CallSpec], Mapping[str, float]] = measurement.measure_memory


def measured_bounds(budget: BudgetConfig) -> tuple[str, ...]:
    """The bounds of a budget that must be measured: of "latency" and "memory", those that are set."""
    return tuple(name for name in UNITS if getattr(budget, name) is not None)


def medians(turn: Turn) -> dict[str, float]:
    """{name: milliseconds}: medians of each network's time relative to the network called "whole".

    Raises:
      BudgetError: the times scatter too much to tell networks apart.
    """
    times: list[Mapping[str, float]] = []
    begin = time.perf_counter()
    while True:
        times += [turn() for _ in range(FIRST)]
        whole = median_interval([t["whole"] for t in times])[0]
        shares = {name: median_interval([t[name] / t["whole"] for t in times]) for name in times[0]}
        name, (_, low, high) = max(shares.items(), key=lambda item: item[1][2] - item[1][1])
        late = len(times) >= MOST or time.perf_counter() - begin > SECONDS
        if late and high - low > 2 * MAX_SPREAD:
            raise BudgetError(
                f"budget.latency: timing is too noisy here: after {len(times)} turns a network ({name}) takes "
                f"{low:.2f} to {high:.2f} of the teacher's time; free the machine of other work, or bound the MACs"
            )
        if late or high - low <= MAX_SPREAD / 2:
            return {name: share * whole for name, (share, _, _) in shares.items()}


def decide(turn: Turn, value: float, target: float = 1.0) -> dict[str, Any]:
    """Measures until the interval of the student's share of the budget lies on one side of `target`.

    Args:
      turn: times of "teacher" and "student".
      value: the budget in milliseconds, or up to 1 as a fraction of the teacher's time.

    Returns:
      {"teacher", "student": median milliseconds; "budget": value; "share", "low", "high": the share of the budget that
      the student uses and its interval; "turns"; "within": None if still undecided after the last turn}.
    """
    times: list[Mapping[str, float]] = []
    begin = time.perf_counter()
    while True:
        times += [turn() for _ in range(max(FIRST, len(times)))]
        shares = [t["student"] / (value * t["teacher"] if value <= 1 else value) for t in times]
        share, low, high = median_interval(shares)
        decided = high <= target or low > target
        if decided or 2 * len(times) > MOST or time.perf_counter() - begin > SECONDS:
            break
    medians_ms = {name: float(np.median([t[name] for t in times])) for name in ("teacher", "student")}
    verdict = {"budget": value, "share": share, "low": low, "high": high, "turns": len(times)}
    return {**medians_ms, **verdict, "within": bool(high <= target) if decided else None}


def check_noise(name: str, verdict: Mapping[str, Any]) -> None:
    """Raises BudgetError if an undecided interval is too wide to say anything."""
    if verdict["within"] is None and (verdict["high"] - verdict["low"]) > MAX_SPREAD * verdict["share"]:
        raise BudgetError(
            f"budget.{name}: timing is too noisy here to decide: after {verdict['turns']} turns the student "
            f"takes {verdict['low']:.2f} to {verdict['high']:.2f} of the budget; free the machine, or bound the MACs"
        )
