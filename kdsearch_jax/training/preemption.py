"""SIGTERM: the machine is about to be taken away, and the run must end cleanly before that.

A training loop checks `Preemption.requested` after each call, saves and leaves. Everywhere else all results are on disk
already: there, inside `raise_on_sigterm`, an exception ends the run, so that temporary files are deleted and locks
released. With several processes JAX's preemption service takes the signal and all processes must learn of it together:
in training as above, elsewhere at the boundaries between stages (`check_preemption`).
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

_sync_points = itertools.count(1 << 30)


class Preempted(BaseException):
    """SIGTERM was received. Like KeyboardInterrupt not an `Exception`, so that error handlers do not catch it.

    A command then ends with the exit status of a process that SIGTERM has ended.
    """

    exit_status = 143


class Preemption:
    """Whether the machine is about to be taken away."""

    def __init__(self) -> None:
        self._signalled = self._reported = False

    @property
    def requested(self) -> bool:
        """Whether to save and leave. Several processes must check equally often, and all get the same answer."""
        if not self._signalled and processes.is_distributed():
            from jax.experimental import multihost_utils

            self._signalled = bool(multihost_utils.reached_preemption_sync_point(next(_sync_points)))
        self._reported = self._signalled
        return self._signalled


@contextlib.contextmanager
def catch_sigterm() -> Iterator[Preemption]:
    """Inside this context the first SIGTERM only sets `.requested`; a second one ends the process.

    A signal that nobody has checked for is raised again at the end. Only the main thread can catch it; elsewhere
    `.requested` stays False. With several processes JAX's preemption service catches it, and `.requested` becomes True
    in all of them at once.
    """
    preemption = Preemption()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        preemption._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    with _sigterm_handler(handle):
        yield preemption
    if preemption._signalled and not preemption._reported:
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Inside this context the first SIGTERM raises Preempted; a second one ends the process."""
    before = sys.unraisablehook

    def handle(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = send_again
        raise Preempted("stopped by SIGTERM; the same command resumes the run")

    def send_again(unraisable: Any) -> None:
        # Python drops exceptions raised in finalisers and in callbacks of the garbage collector, of which JAX has one.
        if not isinstance(unraisable.exc_value, Preempted):
            before(unraisable)
            return
        signal.signal(signal.SIGTERM, handle)
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()

    try:
        with _sigterm_handler(handle):
            yield
    finally:
        if sys.unraisablehook is send_again:
            sys.unraisablehook = before


def check_preemption(stage: str) -> None:
    """Raises Preempted in all of several processes if one of them received SIGTERM; all must call it equally often.

    A single process gets the exception from `raise_on_sigterm`.

    Args:
      stage: what comes next, for the message.
    """
    if processes.is_distributed() and Preemption().requested:
        raise Preempted(f"stopped by SIGTERM before {stage}; the same command resumes the run")


@contextlib.contextmanager
def _sigterm_handler(handler: object) -> Iterator[None]:
    """Installs a handler, unless this is not the main thread or JAX's preemption service takes the signal."""
    if threading.current_thread() is not threading.main_thread() or processes.is_distributed():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)  # type: ignore  # a function of (number, frame)
    try:
        yield
    finally:
        # None: the previous handler was not installed from Python and cannot be restored.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
