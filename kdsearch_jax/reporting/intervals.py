"""Confidence intervals of measured times, and whether they tell two networks apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

MAX_SPREAD = 0.25  # width of an interval, relative to its median, above which a time is too noisy to compare


def median_interval(samples: Any) -> tuple[float, float, float]:
    """(median, low, high) with a 95% confidence interval from order statistics; with few samples, their full range."""
    ordered = np.sort(np.asarray(samples, float))
    rank = max(_binomial_quantile(len(ordered)), 1)
    return float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank])


@cache
def _binomial_quantile(n: int, share: Fraction = Fraction(1, 40)) -> int:
    """The smallest k with P(X ≤ k) ≥ share for X ~ Binomial(n, 1/2). (Importing scipy.stats takes a second.)"""
    cumulative, k = 1, 0  # 2^n P(X ≤ k)
    while cumulative < share * 2**n:
        k += 1
        cumulative += math.comb(n, k)
    return k


def time_range(row: Mapping[str, Any]) -> tuple[float, ...]:
    """A row's milliseconds per example, or (low, high) if the interval is wider than `MAX_SPREAD` of the median."""
    median, low, high = row["ms_per_image"], row.get("ms_low"), row.get("ms_high")
    if low is None or high is None or high - low <= MAX_SPREAD * median:
        return (median,)
    return low, high


def times_differ(row: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """Whether two rows' times can be compared: neither interval is too wide, and they do not overlap.

    Rows written before intervals were recorded always count as different.
    """
    if len(time_range(row)) + len(time_range(reference)) > 2:
        return False
    if any(each.get(end) is None for each in (row, reference) for end in ("ms_low", "ms_high")):
        return True
    return row["ms_high"] < reference["ms_low"] or reference["ms_high"] < row["ms_low"]
