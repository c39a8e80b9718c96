"""Numbers in messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


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


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: what may have been meant, or else everything that exists."""
    known = list(known)
    # A dotted key is also compared by its last part: `--mcas` means `budget.macs`, whatever the number of letters says.
    last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [last[k] for k in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)]
    if near:
        return f"did you mean {near[0]!r}?" + (f" There are: {', '.join(known)}" if len(known) <= 12 else "")
    return f"there are: {', '.join(known)}"


def require(condition: bool, key: str, value: Any, requirement: str) -> None:
    """Raises ValueError that names a setting and its value, where the condition does not hold."""
    if not condition:
        raise ValueError(f"{key}: {value!r} is not possible; {requirement}")
