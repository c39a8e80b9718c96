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
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax.numpy as jnp
from jax import Array

from kdsearch_jax import losses
from kdsearch_jax.events import Events
from kdsearch_jax.files import naming, parse_json

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
        with naming(self._path):
            self._file.write(line + "\n")
        self._events.write(int(step), {name: value for name, value in row.items() if value is not None}, now)

    def close(self) -> None:
        """Writes what is pending; may be called again."""
        try:
            with naming(self._path):  # it writes once more what did not find room
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
    with naming(path):
        temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class Progress:
    """How far, how fast, how long still, and the latest metrics; a context manager.

    On a terminal a bar that redraws itself; elsewhere (a file, a batch system) plain lines, at most one in `interval`
    seconds, and a last one.

    Args:
      description: what goes on, such as "search".
      total_steps, start_step: where it ends, and where it begins when resumed.
      unit: what a step is, in the plural.
      stream: where to write; None is standard error.
      interval: seconds between plain lines.
      clock: seconds from anywhere.
    """

    def __init__(
        self,
        description: str,
        total_steps: int,
        start_step: int = 0,
        *,
        unit: str = "steps",
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._description, self._total, self._unit = description, total_steps, unit
        self._stream, self._interval, self._clock = stream, interval, clock
        self._begun, self._begun_at = start_step, clock()
        self._points: deque[tuple[float, int]] = deque([(self._begun_at, start_step)])
        self._shown_at, self._unshown = self._begun_at, False
        self._values: Mapping[str, Any] = {}
        self._bar: Any = None

    def __enter__(self) -> Progress:
        """Itself, with the bar drawn."""
        if self._stream is None:
            self._stream = sys.stderr
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = self._make_bar(self._stream)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The last line; the bar stays as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._unshown:
            self._show()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """`step` steps are done in all, the latest metrics are `values`: {name: number or None}."""
        now = self._clock()
        self._values, self._unshown = values, True
        self._points.append((now, step))
        while len(self._points) > 2 and self._points[1][0] < now - _WINDOW:
            self._points.popleft()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=self._status())
        elif now - self._shown_at >= self._interval:
            self._show()

    def _show(self) -> None:
        step = self._points[-1][1]
        line = f"{self._description} {step}/{self._total} {self._status()}"
        print(line.rstrip(), file=self._stream, flush=True)
        self._shown_at, self._unshown = self._points[-1][0], False

    def _status(self) -> str:
        """`12.3 steps/s · 0:41 left · loss 0.532`; when done, the time that it took instead."""
        (start, first), (end, step) = self._points[0], self._points[-1]
        parts = []
        if step >= self._total:
            start, first = self._begun_at, self._begun
        if end > start and step > first:
            rate = (step - first) / (end - start)
            left = f"{_duration((self._total - step) / rate)} left" if step < self._total else _duration(end - start)
            parts = [f"{_short(rate)} {self._unit}/s", left]
        return " · ".join([*parts, *(f"{name} {_short(value)}" for name, value in self._values.items())])

    def _make_bar(self, stream: TextIO) -> Any:
        # Imported here, for a run in a batch system never needs it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        status = TextColumn("{task.fields[status]}", markup=False)
        columns = [TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(), status]
        bar = Bar(*columns, console=Console(file=stream))
        bar.add_task(self._description, total=self._total, completed=self._begun, status="")
        return bar


def _short(value: Any) -> str:
    """Three or four digits of a number."""
    if value is None:
        return "none"
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """`0:41`, `12:05`, `3:12:05`."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --- per example ----------------------------------------------------------------------------------------------------


def top_k(logits: Array, labels: Array, k: int) -> Array:
    """1 where the label is among the k largest logits, else 0.

    Of equal logits the earlier class counts as the larger, as in `argmax`. A prediction with NaN in it is wrong, and so
    is one for a class that does not exist or that the model has masked. With k classes or fewer everything else is
    right.

    Args:
      logits: (…, classes), any floating dtype.
      labels: (…), integer, 0 … classes − 1.
      k: 1 or more.

    Returns:
      (…) float32.

    Raises:
      ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k: {k} is not possible; give at least 1")
    labels = labels[..., None]
    own = jnp.take_along_axis(logits, labels, axis=-1)
    earlier = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) < labels
    ahead = ((logits > own) | ((logits == own) & earlier)).sum(-1)
    broken = jnp.isnan(logits).any(-1) | jnp.isnan(own[..., 0])
    masked = ~jnp.take_along_axis(losses.unmasked(logits), labels, axis=-1)[..., 0]
    return ((ahead < k) & ~broken & ~masked).astype(jnp.float32)


def agreement(student_logits: Array, teacher_logits: Array) -> Array:
    """1 where the most likely class that neither model has masked is the same, else 0.

    Args:
      student_logits, teacher_logits: (…, classes).

    Returns:
      (…) float32.
    """
    kept = losses.unmasked(student_logits, teacher_logits)
    student, teacher = (jnp.where(kept, logits, -jnp.inf).argmax(-1) for logits in (student_logits, teacher_logits))
    return (student == teacher).astype(jnp.float32)


def kl_to_teacher(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(teacher ‖ student) of the predictions as they are, temperature 1, over unmasked classes; in nats.

    Args:
      student_logits, teacher_logits: (…, classes).

    Returns:
      (…) float32.

    Raises:
      ValueError: the shapes differ.
    """
    return losses.kl(student_logits, teacher_logits)
