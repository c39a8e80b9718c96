"""How well a time is known: an interval of the median, and whether it tells two networks apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

SPREAD = 0.25  # width of an interval, over its median, that is too wide to decide by


def interval(samples: Any) -> tuple[float, float, float]:
    """(median, low, high): a 95% interval of the median, from order statistics; all of them where they are few."""
    ordered = np.sort(np.asarray(samples, float))
    k = max(_quantile(len(ordered)), 1)
    return float(np.median(ordered)), float(ordered[k - 1]), float(ordered[-k])


@cache
def _quantile(n: int, share: Fraction = Fraction(1, 40)) -> int:
    """The smallest k with P(X ≤ k) ≥ share, X the heads of n fair coins. (To import scipy.stats takes a second.)"""
    below, k = 1, 0  # 2^n P(X ≤ k)
    while below < share * 2**n:
        k += 1
        below += math.comb(n, k)
    return k


def times(row: Mapping[str, Any]) -> tuple[float, ...]:
    """A row's milliseconds an example, or (low, high) where the interval is wider than `SPREAD` of the median."""
    middle, low, high = row["ms_per_image"], row.get("ms_low"), row.get("ms_high")
    if low is None or high is None or high - low <= SPREAD * middle:
        return (middle,)
    return low, high


def apart(row: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether a row's time can be said as a share of another's: no interval is wide, and they do not overlap.

    Rows of old runs, which have no intervals, are taken as they are.
    """
    if len(times(row)) + len(times(whole)) > 2:
        return False
    if any(each.get(end) is None for each in (row, whole) for end in ("ms_low", "ms_high")):
        return True
    return row["ms_high"] < whole["ms_low"] or whole["ms_high"] < row["ms_low"]
