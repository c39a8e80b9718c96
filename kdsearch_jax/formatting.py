"""Numbers in messages."""

from __future__ import annotations

import math


def apart(*values: float, digits: int = 3) -> tuple[str, ...]:
    """The values with as many decimals, `digits` at least, as it takes to tell those apart that differ.

    Rounding never changes the order of two numbers; with this it does not make them equal either, so that no message
    says that 0.980 lies outside of [0.980, 1].
    """
    for decimals in range(digits, 17):
        texts = tuple(f"{value:,.{decimals}f}" for value in values)
        if len(set(texts)) == len(set(values)):
            return texts
    return tuple(repr(value) for value in values)


def ceiling(value: float, digits: int = 4) -> str:
    """A number ≥ 0 rounded up to so many significant digits, and as many decimals at least."""
    decimals = max(digits, digits - 1 - math.floor(math.log10(value))) if value > 0 else digits
    rounded = math.ceil(value * 10**decimals) / 10**decimals
    return f"{rounded:.{decimals}f}"
