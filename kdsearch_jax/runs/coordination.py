"""What the processes of a run must agree on. With a single process nothing here has a cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_PATIENCE = 60.0  # seconds until a shared file system shows a file that another host has written


def first_process_decides(decide: Callable[[], bool]) -> bool:
    """Runs `decide` on the first process and returns its answer on all of them.

    The others wait, because they would otherwise mistake what the first one writes for an older run.

    Raises:
      Whatever `decide` raised on the first process; ValueError on the others.
    """
    if jax.process_count() == 1:
        return decide()
    failure, answer = None, False
    if jax.process_index() == 0:
        try:
            answer = decide()
        except Exception as error:
            failure = error
    succeeded, answer = multihost_utils.broadcast_one_to_all(np.array([failure is None, answer]))
    if not succeeded:
        raise failure or ValueError("refused by process 0, see its message")
    return bool(answer)


def broadcast_json(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs `compute` on the first process and returns its JSON object on all of them. Raises its ValueError on all."""
    if jax.process_count() == 1:
        return compute()
    answer: dict[str, Any] = {}
    failure: ValueError | None = None
    if jax.process_index() == 0:
        try:
            answer = {"value": compute()}
        except ValueError as error:
            answer, failure = {"error": str(error)}, error
    text = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
    if "error" in answer:
        raise failure or ValueError(answer["error"])
    return answer["value"]


def check_equal_on_all_processes(descriptions: Mapping[str, Callable[[], str]]) -> None:
    """Raises ValueError on every process if one has other data, settings or networks than the first.

    Args:
      descriptions: {name: function that returns a text identifying it}, with the same keys on all processes.
    """
    if jax.process_count() == 1:
        return
    digests = _gathered(np.stack([_digest(describe().encode()) for describe in descriptions.values()]))
    for number, name in enumerate(descriptions):
        if different := _differing(digests[:, number]):
            raise ValueError(
                f"{name}: differs between {different} and process 0; start all of them with the same command, files "
                "and versions"
            )


def check_shared(directory: Path, name: str, patience: float = _PATIENCE) -> None:
    """Raises ValueError on every process if one does not see the file that the first one sees."""
    if jax.process_count() == 1:
        return

    def digest_of_file() -> np.ndarray:
        with contextlib.suppress(OSError):
            return _digest((directory / name).read_bytes())
        return np.zeros(32, np.uint8)

    expected, deadline = multihost_utils.broadcast_one_to_all(digest_of_file()), time.monotonic() + patience
    while not (equal := digest_of_file() == expected).all() and time.monotonic() < deadline:
        time.sleep(0.2)
    if different := _differing(_gathered(np.where(equal, expected, ~expected))):
        raise ValueError(
            f"{directory}: {name} differs between {different} and process 0; give a --workdir that all hosts share, or "
            "one in an object store (gs://…)"
        )


def _gathered(rows: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(rows))


def _digest(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


def _differing(rows: np.ndarray) -> str:
    """ "process 1" or "processes 1, 3": those that differ from the first; "" if none does."""
    others = np.flatnonzero((rows != rows[0]).any(-1)).tolist()
    return f"process{'es' if len(others) > 1 else ''} {', '.join(map(str, others))}" if others else ""
