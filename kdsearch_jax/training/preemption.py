"""SIGTERM: the machine is about to be taken away, and the run shall end cleanly before it is.

A run is in a training loop, which asks `Preemption.requested` after every call, saves and leaves; or anywhere else,
where all that is worth saving is on disk already: there, within `terminable`, an exception ends it, so that temporary
files go and locks are released. With several processes JAX's own service takes the signal, and all must learn of it
together: in training as above, elsewhere at the boundaries between stages (`boundary`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from kdsearch_jax.training import processes

_asked = itertools.count(1 << 30)


class Preempted(BaseException):
    """SIGTERM came. No `Exception`, as KeyboardInterrupt is none: who handles errors shall not take it for one.

    A command ends with the status of a process that SIGTERM has ended.
    """

    exit_status = 143


class Preemption:
    """Whether the machine is about to be taken away."""

    def __init__(self) -> None:
        self._signalled = self._told = False

    @property
    def requested(self) -> bool:
        """Whether to save and leave. With several processes all must ask equally often, and all get the same answer."""
        if not self._signalled and processes.joined():
            from jax.experimental import multihost_utils

            self._signalled = bool(multihost_utils.reached_preemption_sync_point(next(_asked)))
        self._told = self._signalled
        return self._signalled


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Within this context a first SIGTERM only sets `.requested`; a second one ends the process as ever.

    A signal that came too late to be asked about is passed on at the end. Takes the signal in the main thread only;
    elsewhere `.requested` stays False. With several processes JAX's own service takes it, and `.requested` turns true
    in all of them at once.
    """
    flag = Preemption()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        flag._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    with _handled(handle):
        yield flag
    if flag._signalled and not flag._told:
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within this context a first SIGTERM raises Preempted, a second one ends the process as ever."""
    before = sys.unraisablehook

    def handle(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = lost
        raise Preempted("stopped by SIGTERM; the same command goes on")

    def lost(unraisable: Any) -> None:
        # The signal came within a callback of the garbage collector, JAX has one, or a finaliser: Python drops what is
        # raised there. It is sent once more.
        if not isinstance(unraisable.exc_value, Preempted):
            before(unraisable)
            return
        signal.signal(signal.SIGTERM, handle)
        again = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()

    try:
        with _handled(handle):
            yield
    finally:
        if sys.unraisablehook is lost:
            sys.unraisablehook = before


def boundary(name: str) -> None:
    """Raises Preempted in all of several processes where one was sent SIGTERM; all call it equally often.

    A single process is told by `terminable`, and need not ask.
    """
    if processes.joined() and Preemption().requested:
        raise Preempted(f"stopped by SIGTERM before {name}; the same command goes on")


@contextlib.contextmanager
def _handled(handle: object) -> Iterator[None]:
    """SIGTERM handled so, where it is for this thread to say, and not for JAX's service of several processes."""
    if threading.current_thread() is not threading.main_thread() or processes.joined():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handle)  # type: ignore  # a function of (number, frame)
    try:
        yield
    finally:
        # None: the handler before was not set by Python, and cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
