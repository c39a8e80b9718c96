"""Progress of a long task: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_WINDOW = 30.0  # seconds over which the rate is measured


class Progress:
    """Shows steps done, rate, remaining time and the latest metrics; a context manager.

    On a terminal a rich progress bar; elsewhere (files, batch systems) plain lines, at most one per `interval` seconds
    and a final one. The rate is that of the last 30 seconds.

    Args:
      description: of the task, such as "search".
      total_steps, start_step: where the task ends, and where it starts after being resumed.
      unit: of a step, in the plural.
      stream: where to write; None for standard error.
      interval: seconds between plain lines.
      clock: returns seconds.
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
        """Draws the bar and returns itself."""
        if self._stream is None:
            self._stream = sys.stderr
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = self._make_bar(self._stream)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Writes the last line, or leaves the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._unshown:
            self._show()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Reports the number of steps done and the latest metrics, {name: number or None}."""
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
        """`12.3 steps/s · 0:41 left · loss 0.532`; at the end, the time it took instead."""
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
        # Not at the top: a run in a batch system never needs it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        status = TextColumn("{task.fields[status]}", markup=False)
        columns = [TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(), status]
        bar = Bar(*columns, console=Console(file=stream))
        bar.add_task(self._description, total=self._total, completed=self._begun, status="")
        return bar


def _short(value: Any) -> str:
    """A number with three or four digits."""
    if value is None:
        return "none"
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """`0:41`, `12:05`, `3:12:05`."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
