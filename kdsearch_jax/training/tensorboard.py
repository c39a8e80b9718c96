"""TensorBoard event files, using tensorboardX's records but not its thread.

tensorboardX's `SummaryWriter` passes events to a background thread; if the disk is full, that thread dies with a
traceback while the run continues. Here the caller gets the error.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.storage.files import name_in_errors

_FLUSH_INTERVAL = 10.0  # seconds


class EventWriter:
    """Writes scalars for TensorBoard to a new file in `directory`.

    Args:
      directory: created if it does not exist.
      start_step: the step a resumed run continues from; TensorBoard then hides earlier events of later steps.
    """

    def __init__(self, directory: Path, start_step: int = 0):
        # Not at the top: slow to import.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        proto: Any = event_pb2  # protobuf creates its contents at run time
        self._make_event = proto.Event
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with name_in_errors(self._path):
            self._records, self._flushed = RecordWriter(str(self._path)), time.monotonic()
        self._put(proto.Event(wall_time=time.time(), file_version="brain.Event:2"))
        started = proto.SessionLog(status=proto.SessionLog.START)
        self._put(proto.Event(wall_time=time.time(), step=start_step + 1 if start_step else 0, session_log=started))
        self._flush()

    def write(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Writes the scalars of a step at time `now` (seconds since 1970); an OSError names the file."""
        event = self._make_event(step=step, wall_time=now)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._put(event)
        if time.monotonic() - self._flushed > _FLUSH_INTERVAL:
            self._flush()

    def close(self) -> None:
        """Writes what is pending; may be called repeatedly."""
        with name_in_errors(self._path):
            self._records.close()

    def _put(self, event: Any) -> None:
        with name_in_errors(self._path):
            self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        with name_in_errors(self._path):
            self._records.flush()
