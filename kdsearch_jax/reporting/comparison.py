"""A comparison as one record: the students of every method over the seeds, and the searched one minus each of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdsearch_jax.reporting import files
from kdsearch_jax.reporting.record import Group, natural, read_groups

FILE = "comparison.json"
OURS = "searched"
LISTS = ("accuracy", "agreement", "kl", "macs", "params", "bytes", "ms_per_image", "seconds")


@dataclass(frozen=True)
class Row:
    """One method. values: {measure: one number a seed, None where not measured}, of `LISTS`."""

    name: str
    label: str
    seeds: tuple[Any, ...]
    values: dict[str, list[float | None]]
    steps: int | None = None
    note: str = ""

    def mean(self, key: str) -> float | None:
        """Over the seeds that were measured, or None."""
        known = [value for value in self.values.get(key, ()) if value is not None]
        return statistics.fmean(known) if known else None

    def std(self, key: str) -> float | None:
        """The sample standard deviation, None of fewer than two."""
        known = [value for value in self.values.get(key, ()) if value is not None]
        return statistics.stdev(known) if len(known) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Searched minus another row, paired by seed; std, low and high are None with one seed."""

    each: tuple[float, ...]
    mean: float
    std: float | None
    low: float | None
    high: float | None
    level: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison's directory says.

    Args:
      record: `comparison.json` as it is.
      rows: those with an accuracy, the best first.
      missing: (label, why) of those that cannot be made.
      differences: {name of a row: of its accuracy}.
      groups: {seed: the groups of its searched student}, where its search is there.
    """

    directory: Path
    record: dict[str, Any]
    teacher: dict[str, Any]
    rows: tuple[Row, ...]
    missing: tuple[tuple[str, str], ...]
    differences: dict[str, Difference]
    groups: dict[str, tuple[Group, ...]]
    config: dict[str, Any] | None
    environment: dict[str, Any] | None

    @property
    def ours(self) -> Row | None:
        """The searched row."""
        return next((row for row in self.rows if row.name == OURS), None)

    @property
    def others(self) -> tuple[Row, ...]:
        """All rows but that."""
        return tuple(row for row in self.rows if row.name != OURS)


def read(directory: Path) -> Comparison:
    """The record of the comparison in `directory`. Raises ValueError, in one line, where a file is damaged."""
    path = directory / FILE
    record = files.with_rows(path, "rows")
    if record is None:
        raise ValueError(f"{directory} is not a comparison: it has no {FILE}")
    try:
        found = [_row(row) for row in record["rows"] if not row.get("why")]
        differences = {
            str(entry["name"]): _difference(entry)
            for entry in record.get("differences") or []
            if entry.get("metric", "accuracy") == "accuracy"
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
    rows = [row for row in found if row.mean("accuracy") is not None]
    searches = sorted(directory.glob(f"seed-*/{OURS}/search/selection.json"), key=lambda p: natural(p.parts[-4]))
    teacher = record.get("teacher")
    return Comparison(
        directory=directory,
        record=record,
        teacher=teacher if isinstance(teacher, dict) else {},
        rows=tuple(sorted(rows, key=lambda row: -(row.mean("accuracy") or 0.0))),
        missing=tuple(
            (str(row.get("label", row.get("name"))), str(row["why"])) for row in record["rows"] if row.get("why")
        ),
        differences=differences,
        groups={p.parts[-4].removeprefix("seed-"): read_groups(p.parent) for p in searches},
        config=files.json_object(directory / "config.json"),
        environment=files.json_object(directory / "environment.json"),
    )


def _row(row: dict[str, Any]) -> Row:
    values = {key: [_number(row["name"], key, v) for v in row[key]] for key in LISTS if row.get(key) is not None}
    count = len(values.get("accuracy", ()))
    if any(len(each) != count for each in values.values()):
        raise ValueError(
            f"row {row['name']!r} has { ({k: len(v) for k, v in values.items()}) } numbers; one a seed each"
        )
    seeds = tuple(row.get("seeds") or range(count))
    return Row(
        str(row["name"]), str(row.get("label", row["name"])), seeds, values, row.get("steps"), row.get("note") or ""
    )


def _number(name: str, key: str, value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise ValueError(f"{key} of row {name!r} has {value!r}; a number or null is expected")


def _difference(entry: dict[str, Any]) -> Difference:
    return Difference(
        tuple(float(value) for value in entry["each"]), float(entry["mean"]),
        *(None if entry.get(key) is None else float(entry[key]) for key in ("std", "low", "high")),
        level=float(entry.get("level", 0.95)),
    )  # fmt: skip
