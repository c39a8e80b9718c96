"""TensorBoard's event files, by tensorboardX's records without its thread.

Its `SummaryWriter` sends every event through a pipe to a thread. Where the disk is full that thread dies with a
traceback, and the run goes on without it. Here whoever writes gets the error.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.storage.files import name_in_errors

_INTERVAL = 10.0  # seconds between what others can read


class Events:
    """Numbers for TensorBoard, in a new file of `directory`.

    start_step: the step that a resumed run goes on from; TensorBoard hides what is there of later ones. 0: begins anew.
    """

    def __init__(self, directory: Path, start_step: int = 0):
        # Not at the top: it is slow to import, and few modules write metrics.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        proto: Any = event_pb2  # protobuf makes what is in it at run time
        self._make_event = proto.Event
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with name_in_errors(self._path):
            self._records, self._flushed = RecordWriter(str(self._path)), time.monotonic()
        self._put(proto.Event(wall_time=time.time(), file_version="brain.Event:2"))
        begun = proto.SessionLog(status=proto.SessionLog.START)
        self._put(proto.Event(wall_time=time.time(), step=start_step + 1 if start_step else 0, session_log=begun))
        self._flush()

    def write(self, step: int, values: Mapping[str, float], now: float) -> None:
        """The numbers of a step, of the time `now` in seconds since 1970; OSError names the file."""
        event = self._make_event(step=step, wall_time=now)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._put(event)
        if time.monotonic() - self._flushed > _INTERVAL:
            self._flush()

    def close(self) -> None:
        """Writes what is pending; may be called again."""
        with name_in_errors(self._path):
            self._records.close()

    def _put(self, event: Any) -> None:
        with name_in_errors(self._path):
            self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        with name_in_errors(self._path):
            self._records.flush()
