"""Metrics on disk: one line of JSON per row (metrics.jsonl), and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.storage.files import name_in_errors, parse_json
from kdsearch_jax.training.tensorboard import EventWriter


class MetricsWriter:
    """Appends rows to DIRECTORY/metrics.jsonl and DIRECTORY/tensorboard/.

    A row is {"step": int, "time": seconds since 1970, name: number or null, …}. NaN and infinity, which JSON lacks,
    become null. A row is on disk when `write` returns; TensorBoard events follow within seconds.

    Args:
      directory: created if it does not exist.
      start_step: the step a resumed run continues from. Rows of later steps, which will be written again, are deleted,
        and so is an incomplete last line of a killed process; 0 deletes all rows.
    """

    def __init__(self, directory: str | Path, start_step: int = 0):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        _drop_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._events = EventWriter(directory / "tensorboard", start_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row.

        Args:
          step: number of updates done.
          values: {name: number or None}, of Python, NumPy or scalar JAX numbers (which wait for the device).

        Raises:
          ValueError: a name is "step" or "time", or a value is not a number.
        """
        row = {name: _number(name, value) for name, value in values.items()}
        if taken := row.keys() & {"step", "time"}:
            raise ValueError(f"values: {taken.pop()!r} is reserved; use another name")
        now = time.time()
        line = json.dumps({"step": int(step), "time": round(now, 3), **row}, allow_nan=False)
        with name_in_errors(self._path):
            self._file.write(line + "\n")
        self._events.write(int(step), {name: value for name, value in row.items() if value is not None}, now)

    def close(self) -> None:
        """Writes what is pending; may be called repeatedly."""
        try:
            with name_in_errors(self._path):  # retries a write that the disk had no room for
                self._file.close()
        finally:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()


def _number(name: str, value: Any) -> float | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"values: {name!r} is {value!r}; give a number") from error
    return number if math.isfinite(number) else None


def _drop_after(path: Path, last: int) -> None:
    """Keeps the rows up to step `last` (none for 0), atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if last else ():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if line.endswith("\n") and isinstance(step, int | float) and step <= last:
            kept.append(line)
    temporary = path.with_name(f"{path.name}.new")
    with name_in_errors(path):
        temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
