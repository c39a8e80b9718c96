"""What several processes of a run must agree on: who decides, what all were given, which directory they see.

A single process agrees with itself: nothing here then costs anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_PATIENCE = 60.0  # seconds that a shared file system may take to show a file that another host has written


def first_says(decide: Callable[[], bool]) -> bool:
    """What the first process decides, in all of them; what it raises, they do as well.

    The others wait for its word, or they would take what it wrote for an old run.
    """
    if jax.process_count() == 1:
        return decide()
    failure, answer = None, False
    if jax.process_index() == 0:
        try:
            answer = decide()
        except Exception as error:
            failure = error
    good, answer = multihost_utils.broadcast_one_to_all(np.array([failure is None, answer]))
    if not good:
        raise failure or ValueError("refused by process 0, see its message")
    return bool(answer)


def check_alike(given: Mapping[str, Callable[[], str]]) -> None:
    """Raises ValueError, in all processes, where one was given something else than the first: they would train on,
    each by its own.

    Args:
      given: {what: a text that tells it from others}, of equal keys in all processes.
    """
    if jax.process_count() == 1:
        return
    everyone = _of_all(np.stack([_digest(text().encode()) for text in given.values()]))
    for number, what in enumerate(given):
        if others := _unlike(everyone[:, number]):
            raise ValueError(
                f"{what}: {others} another than process 0; start all by the same command, on the same files and "
                "versions"
            )


def check_shared(directory: Path, name: str, patience: float = _PATIENCE) -> None:
    """Raises ValueError, in all processes, where one does not see the file of this name that the first one sees."""
    if jax.process_count() == 1:
        return

    def seen() -> np.ndarray:
        with contextlib.suppress(OSError):
            return _digest((directory / name).read_bytes())
        return np.zeros(32, np.uint8)

    wanted, deadline = multihost_utils.broadcast_one_to_all(seen()), time.monotonic() + patience
    while not (found := seen() == wanted).all() and time.monotonic() < deadline:
        time.sleep(0.2)
    if others := _unlike(_of_all(np.where(found, wanted, ~wanted))):
        raise ValueError(
            f"{directory}: {others} another {name} there than process 0; give a --workdir that all hosts share, or one "
            "in an object store (gs://…)"
        )


def _of_all(rows: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(rows))


def _digest(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


def _unlike(rows: np.ndarray) -> str:
    """Which processes differ from the first, as the beginning of a sentence; "" where none does."""
    others = np.flatnonzero((rows != rows[0]).any(-1)).tolist()
    if not others:
        return ""
    return f"process{'es' if len(others) > 1 else ''} {', '.join(map(str, others))} {'have' if others[1:] else 'has'}"
