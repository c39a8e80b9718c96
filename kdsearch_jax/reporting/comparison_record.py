"""A comparison of methods, read from its directory: every method's students, and the searched ones' paired leads."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdsearch_jax.reporting.run_record import read_optional_json, read_rows, read_search_groups
from kdsearch_jax.reporting.unit_groups import UnitGroup, natural_key

FILE = "comparison.json"
SEARCHED = "searched"
_MEASURES = ("accuracy", "agreement", "kl", "macs", "params", "bytes", "ms_per_image", "seconds")


@dataclass(frozen=True)
class MethodResults:
    """The students of one method; values: {measure: one number per seed, None where not measured}."""

    name: str
    label: str
    seeds: tuple[Any, ...]
    values: dict[str, list[float | None]]
    steps: int | None = None
    note: str = ""

    def _known(self, measure: str) -> list[float]:
        return [value for value in self.values.get(measure, ()) if value is not None]

    def mean(self, measure: str) -> float | None:
        """Over the seeds that were measured, None if there are none."""
        known = self._known(measure)
        return statistics.fmean(known) if known else None

    def std(self, measure: str) -> float | None:
        """The sample standard deviation, None for fewer than two seeds."""
        known = self._known(measure)
        return statistics.stdev(known) if len(known) > 1 else None

    @property
    def accuracy(self) -> float:
        """Mean accuracy; 0 if there is none."""
        return self.mean("accuracy") or 0.0


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the searched student minus another method's, paired by seed.

    Args:
      per_seed: the differences.
      mean: of the differences.
      interval: (low, high), Student's t interval of the mean, None for one seed.
      level: of the interval: 0.95.
    """

    per_seed: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None
    level: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class ComparisonRecord:
    """A comparison.

    Args:
      summary: the object in `comparison.json`.
      methods: those with an accuracy, the best first.
      failed: (label, reason) of methods that cannot make a student.
      differences: {method: searched minus it}.
      groups: {seed: unit groups of its searched student}, where that search is in the directory.
    """

    directory: Path
    summary: dict[str, Any]
    teacher: dict[str, Any]
    methods: tuple[MethodResults, ...]
    failed: tuple[tuple[str, str], ...]
    differences: dict[str, PairedDifference]
    groups: dict[str, tuple[UnitGroup, ...]]
    config: dict[str, Any] | None
    environment: dict[str, Any] | None

    @property
    def searched(self) -> MethodResults | None:
        """The results of the search."""
        return next((method for method in self.methods if method.name == SEARCHED), None)

    @property
    def others(self) -> tuple[MethodResults, ...]:
        """All methods except the search."""
        return tuple(method for method in self.methods if method.name != SEARCHED)


def read_comparison(directory: Path) -> ComparisonRecord:
    """Reads the comparison in `directory`. Raises ValueError, in one line, if a file is damaged."""
    path = directory / FILE
    summary = read_rows(path, "rows")
    if summary is None:
        raise ValueError(f"{directory} is not a comparison: it has no {FILE}")
    try:
        methods = [_method(row) for row in summary["rows"] if not row.get("why")]
        differences = {
            str(entry["name"]): _difference(entry)
            for entry in summary.get("differences") or []
            if entry.get("metric", "accuracy") == "accuracy"
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
    failed = [(str(row.get("label", row.get("name"))), str(row["why"])) for row in summary["rows"] if row.get("why")]
    searches = sorted(
        directory.glob(f"seed-*/{SEARCHED}/search/selection.json"), key=lambda p: natural_key(p.parts[-4])
    )
    teacher = summary.get("teacher")
    return ComparisonRecord(
        directory=directory,
        summary=summary,
        teacher=teacher if isinstance(teacher, dict) else {},
        methods=tuple(sorted((m for m in methods if m.mean("accuracy") is not None), key=lambda m: -m.accuracy)),
        failed=tuple(failed),
        differences=differences,
        groups={p.parts[-4].removeprefix("seed-"): read_search_groups(p.parent) for p in searches},
        config=read_optional_json(directory / "config.json"),
        environment=read_optional_json(directory / "environment.json"),
    )


def _method(row: dict[str, Any]) -> MethodResults:
    values = {key: [_number(row["name"], key, v) for v in row[key]] for key in _MEASURES if row.get(key) is not None}
    lengths = {key: len(per_seed) for key, per_seed in values.items()}
    if len(set(lengths.values())) > 1 or "accuracy" not in lengths:
        raise ValueError(f"row {row['name']!r} has {lengths} numbers; one per seed is expected")
    seeds = tuple(row.get("seeds") or range(lengths["accuracy"]))
    label = str(row.get("label", row["name"]))
    return MethodResults(str(row["name"]), label, seeds, values, row.get("steps"), row.get("note") or "")


def _number(name: str, key: str, value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise ValueError(f"{key} of row {name!r} has {value!r}; a number or null is expected")


def _difference(entry: dict[str, Any]) -> PairedDifference:
    interval = None if entry.get("low") is None else (float(entry["low"]), float(entry["high"]))
    per_seed = tuple(float(value) for value in entry["each"])
    return PairedDifference(per_seed, float(entry["mean"]), interval, float(entry.get("level", 0.95)))
