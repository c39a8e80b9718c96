"""What can be decided from noisy times.

Networks take turns (`evaluate.clock`), and turns go on until a 95% interval of the median lies on one side of what is
asked: order statistics, for which no distribution is assumed, but turns as independent of each other. A fraction of the
teacher's time is compared turn by turn, so that what slows a whole turn down does not count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning.budgets import BudgetError
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting.intervals import SPREAD, interval
from kdsearch_jax.runs import evaluation

UNITS = {"latency": " ms", "memory": " bytes"}
FIRST, MOST, SECONDS = 15, 960, 40.0  # turns at first and at most; seconds after which no more turns are begun

Networks = Mapping[str, tuple[Any, Any]]
Turn = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Tools:
    """How networks {name: (module, variables)} of a batch size and a call are measured.

    clock: → a function whose every call is a turn, {name: milliseconds}; memory: → {name: bytes}.
    """

    clock: Callable[[Networks, int, CallSpec], Turn] = evaluation.clock
    memory: Callable[[Networks, int, CallSpec], Mapping[str, float]] = evaluation.measure_memory


def asked(budget: BudgetConfig) -> tuple[str, ...]:
    """What of a budget must be measured."""
    return tuple(name for name in UNITS if getattr(budget, name) is not None)


def medians(turn: Turn) -> dict[str, float]:
    """{name: milliseconds} of the networks of a clock, of which one is "whole": medians of times over the whole's.

    Raises:
      BudgetError: the times scatter too much to tell networks apart.
    """
    times: list[Mapping[str, float]] = []
    begin = time.perf_counter()
    while True:
        times += [turn() for _ in range(FIRST)]
        whole = interval([t["whole"] for t in times])[0]
        shares = {name: interval([t[name] / t["whole"] for t in times]) for name in times[0]}
        name, (_, low, high) = max(shares.items(), key=lambda item: item[1][2] - item[1][1])
        late = len(times) >= MOST or time.perf_counter() - begin > SECONDS
        if late and high - low > 2 * SPREAD:
            raise BudgetError(
                f"budget.latency: timing is too noisy here: after {len(times)} turns a network ({name}) takes "
                f"{low:.2f} to {high:.2f} of the teacher's time; leave the machine to this run, or bound the MACs"
            )
        if late or high - low <= SPREAD / 2:
            return {name: share * whole for name, (share, _, _) in shares.items()}


def decide(turn: Turn, value: float, target: float = 1.0) -> dict[str, Any]:
    """Takes turns until the interval of the student's share of the budget lies on one side of `target`.

    Args:
      turn: of "teacher" and "student". value: milliseconds, or at most 1: a fraction of the teacher's.

    Returns:
      {"teacher", "student" (medians, ms), "budget" (the value), "share" (of the budget that is used, the median),
      "low", "high" (of the share), "turns", "within"}; within: None where turns came to an end undecided.
    """
    times: list[Mapping[str, float]] = []
    begin = time.perf_counter()
    while True:
        times += [turn() for _ in range(max(FIRST, len(times)))]
        shares = [t["student"] / (value * t["teacher"] if value <= 1 else value) for t in times]
        share, low, high = interval(shares)
        decided = high <= target or low > target
        if decided or 2 * len(times) > MOST or time.perf_counter() - begin > SECONDS:
            break
    told = {name: float(np.median([t[name] for t in times])) for name in ("teacher", "student")}
    verdict = {"budget": value, "share": share, "low": low, "high": high, "turns": len(times)}
    return {**told, **verdict, "within": bool(high <= target) if decided else None}


def check_noise(name: str, found: Mapping[str, Any]) -> None:
    """Raises BudgetError where an undecided interval is too wide to say anything."""
    if found["within"] is None and (found["high"] - found["low"]) > SPREAD * found["share"]:
        raise BudgetError(
            f"budget.{name}: timing is too noisy here to decide: after {found['turns']} turns the student takes "
            f"{found['low']:.2f} to {found['high']:.2f} of the budget; leave the machine to this run, or bound the MACs"
        )


def of_process_0(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gives on process 0, on every process; and its error."""
    if jax.process_count() == 1:
        return measure()
    found: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            found = {"found": measure()}
        except ValueError as error:
            found = {"error": str(error)}
    text = json.dumps(found).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    found = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
    if "error" in found:
        raise BudgetError(found["error"])
    return found["found"]
