"""Budgets of latency and memory, which are measured on the device that runs, or compiled for one that is not here.

`calibration` fits a cost model before the search; its bound is used like any other. `landing` cuts a student, measures
it and adjusts the bound until the measurement is within the budget. `timing` decides from noisy times.
`compiled` has the estimates of a target's compiler in their place. The first process measures; all use its numbers.
"""

from kdsearch_jax.runs.latency.calibration import (
    FILE,
    add_measured,
    calibrate,
    calibrate_once,
    check_reach,
    sliced_student,
    with_measured,
)
from kdsearch_jax.runs.latency.compiled import check_target, instruments_for, target_multiples, width_steps
from kdsearch_jax.runs.latency.landing import compare_costs, confirm, land
from kdsearch_jax.runs.latency.timing import Instruments, decide, measured_bounds, medians

__all__ = [
    "FILE",
    "Instruments",
    "add_measured",
    "calibrate",
    "calibrate_once",
    "check_reach",
    "check_target",
    "compare_costs",
    "confirm",
    "decide",
    "instruments_for",
    "land",
    "measured_bounds",
    "medians",
    "sliced_student",
    "target_multiples",
    "width_steps",
    "with_measured",
]
