"""Budgets of what must be measured: time and memory of a call, on the device that runs.

`calibration`, before a search, makes a model of either that is a bound like any other. `landing` cuts, measures and
chooses again until what was measured is within the budget, and measures the trained student at the end. `timing` says
what is decided from noisy times. Process 0 measures; all processes use its numbers.
"""

from kdsearch_jax.runs.latency.calibration import FILE, bounded, calibrate, check_reach, cut, prepare, with_measured
from kdsearch_jax.runs.latency.landing import compare, confirm, land
from kdsearch_jax.runs.latency.timing import Tools, asked, decide, medians

__all__ = [
    "FILE",
    "Tools",
    "asked",
    "bounded",
    "calibrate",
    "check_reach",
    "compare",
    "confirm",
    "cut",
    "decide",
    "land",
    "medians",
    "prepare",
    "with_measured",
]
