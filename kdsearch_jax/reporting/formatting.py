"""Numbers and names as a report shows them. The templates use these functions as filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdsearch_jax.reporting.intervals import time_range

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_NETWORKS = {"teacher": "Teacher", "student": "Student", "uniform": "Uniform", "magnitude": "Magnitude"}


def percent(share: float) -> str:
    """At least two digits: 52%, 5.2%, 0.52%."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def accuracy(share: float) -> str:
    """Two decimals: 91.20%."""
    return f"{100 * share:.2f}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.2f}".replace("-", "−")


def amount(value: float) -> str:
    """A count with three digits and a prefix: 40813184 is "40.8 M"."""
    value = float(f"{value:.3g}")  # first, so that 999,999 is "1 M" rather than "1000 k"
    for scale, prefix in _PREFIXES:
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.0f}"


def file_size(value: float) -> str:
    """Bytes with their unit."""
    text = amount(value)
    return f"{text}B" if text[-1:].isalpha() else f"{text} B"


def milliseconds(value: float) -> str:
    """A time in ms, or in µs below 0.1 ms."""
    return f"{value:.3g} ms" if value >= 0.1 else f"{1000 * value:.3g} µs"


def time_per_example(row: Mapping[str, Any]) -> str:
    """A network's time per example; a range if it is noisy."""
    return " to ".join(milliseconds(value) for value in time_range(row))


def thousands(value: float) -> str:
    """An integer with separators: 10,000."""
    return f"{value:,}"


def significant(value: Any) -> str:
    """A number with four significant digits; anything else as text."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def network_label(name: str) -> str:
    """A network's name for readers: "at-0.5" is the student at budget 0.5, "uniform-0.5" a baseline at that budget."""
    method, dash, budget = name.partition("-")
    if name in _NETWORKS or not dash:
        return _NETWORKS.get(name, name)
    return f"{'Student' if method == 'at' else _NETWORKS.get(method, method)} at {budget}"


def budget_label(budget: Any) -> str | None:
    """A budget in words, "50% of MACs"; None if there is none."""
    if not isinstance(budget, Mapping):
        return None
    nouns = {"macs": "MACs", "params": "parameters", "latency": "time", "memory": "memory"}
    parts = [
        f"{100 * budget[key]:.3g}% of {noun}" if budget[key] <= 1 else f"{budget[key]:,g} {noun}"
        for key, noun in nouns.items()
        if isinstance(budget.get(key), int | float)
    ]
    return ", ".join(parts) or None


def number_ranges(numbers: list[int]) -> str:
    """Sorted integers with runs abbreviated: "1, 4–7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    separators = {1: "", 2: ", "}
    return ", ".join(
        f"{run[0]}" if len(run) == 1 else f"{run[0]}{separators.get(len(run), '–')}{run[-1]}" for run in runs
    )
