"""Numbers and suggestions in error messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


def format_distinct(*values: float, digits: int = 3) -> tuple[str, ...]:
    """Formats values with at least `digits` decimals, and more if different values would look equal.

    So no message says that 0.980 is outside of [0.980, 1].
    """
    for decimals in range(digits, 17):
        texts = tuple(f"{value:,.{decimals}f}" for value in values)
        if len(set(texts)) == len(set(values)):
            return texts
    return tuple(repr(value) for value in values)


def round_up(value: float, digits: int = 4) -> str:
    """Formats a number ≥ 0, rounded up to `digits` significant digits and at least as many decimals."""
    decimals = max(digits, digits - 1 - math.floor(math.log10(value))) if value > 0 else digits
    rounded = math.ceil(value * 10**decimals) / 10**decimals
    return f"{rounded:.{decimals}f}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error about an unknown name: the most similar known name, or all of them."""
    known = list(known)
    # A dotted key is also compared by its last part, so that `--mcas` suggests `budget.macs`.
    last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [last[k] for k in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)]
    if near:
        return f"did you mean {near[0]!r}?" + (f" There are: {', '.join(known)}" if len(known) <= 12 else "")
    return f"there are: {', '.join(known)}"


def require(condition: bool, key: str, value: Any, requirement: str) -> None:
    """Raises a ValueError that names a setting and its value unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}: {value!r} is not possible; {requirement}")
