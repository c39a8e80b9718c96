"""What a run says about itself: numbers on disk, a bar on the screen, and the quantities that are measured.

`MetricsWriter` keeps one line of JSON a row (metrics.jsonl) and the same numbers as TensorBoard events; `Progress`
tells people how far it is and how long it will take. Both live on the host, between two calls of the compiled step, and
cost microseconds there.

The functions at the end are per example and jittable; whoever calls them takes the mean, over the examples that count.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.storage.files import name_in_errors, parse_json
from kdsearch_jax.training.tensorboard import Events

_WINDOW = 30.0  # seconds over which the rate is measured


class MetricsWriter:
    """Appends rows to DIRECTORY/metrics.jsonl and DIRECTORY/tensorboard/.

    Row: {"step": int, "time": seconds since 1970, name: number or null, …}. NaN and infinity become null, which is JSON
    where they are not. A row is on disk as soon as `write` returns; TensorBoard's events follow within seconds.

    Args:
      directory: is made where it does not exist.
      start_step: the step that a resumed run goes on from. Rows of later steps, which will be written again, are
        dropped, and so is a last line that a killed process left unfinished; 0 begins anew.
    """

    def __init__(self, directory: str | Path, start_step: int = 0):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        _drop_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._events = Events(directory / "tensorboard", start_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row.

        Args:
          step: updates done.
          values: {name: number}; Python, NumPy or 0-dimensional JAX numbers (a JAX one waits for the device), or None.

        Raises:
          ValueError: a name that every row has, or a value that is no number.
        """
        row = {name: _number(name, value) for name, value in values.items()}
        if taken := row.keys() & {"step", "time"}:
            raise ValueError(f"values: {taken.pop()!r} is written with every row; give it another name")
        now = time.time()
        line = json.dumps({"step": int(step), "time": round(now, 3), **row}, allow_nan=False)
        with name_in_errors(self._path):
            self._file.write(line + "\n")
        self._events.write(int(step), {name: value for name, value in row.items() if value is not None}, now)

    def close(self) -> None:
        """Writes what is pending; may be called again."""
        try:
            with name_in_errors(self._path):  # it writes once more what did not find room
                self._file.close()
        finally:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes, whatever happened."""
        self.close()


def _number(name: str, value: Any) -> float | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"values: {name!r} is {value!r}; give one number") from error
    return number if math.isfinite(number) else None


def _drop_after(path: Path, last: int) -> None:
    """Leaves the rows up to step `last`; none for 0. A crash meanwhile leaves the old file."""
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
