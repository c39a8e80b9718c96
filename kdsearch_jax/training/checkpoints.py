"""Checkpoints of a training state, written in the background: DIRECTORY/STEP/{state, meta}."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from kdsearch_jax import storage
from kdsearch_jax.storage.arrays import (
    check_digests,
    describe,
    flatten,
    orbax_handler,
    restore_args,
    save_args,
    single_process,
    to_host,
)
from kdsearch_jax.storage.files import CheckpointError, as_json, attempt, check_free_space, one_line, seal, unseal
from kdsearch_jax.training.checkpoint_matching import check_config, check_structure, place_like

PyTree = Any

log = logging.getLogger(__name__)
MAX_INTERVAL = 600.0  # seconds after a checkpoint when the next one is worth any cost


class Checkpointer:
    """Saves and restores the checkpoints of one training stage; keeps the newest `keep` and the best.

    Every process of a run creates one and calls the same methods; process 0 writes, to a directory that all of them
    see. Use it as a context manager, or `close` it.

    Args:
      directory: contains one folder per step; created by the first `save`.
      keep: number of newest checkpoints to keep, at least 1.
      best_metric: name of the metric by which one more checkpoint is kept, however old; None for none. Saves without
        this metric, or with a value that is not finite, do not compete.
      best_mode: whether a higher ("max") or lower ("min") value is better.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int = 2,
        best_metric: str | None = "validation_accuracy",
        best_mode: Literal["max", "min"] = "max",
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min', not {best_mode!r}")
        self.directory = storage.local_copy(directory, "directory").absolute()
        storage.refresh(self.directory)
        self._best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self._scores: dict[int, float] = {}
        self._damaged: set[int] = set()  # found by `restore`, newer than what it returned
        self._last: int | None = None  # step of the last save
        self._pending: Future[None] | None = None
        self._started: float | None = None  # start of the last save, by the monotonic clock
        self._cost = 0.0  # seconds that save took, in the loop and in the background
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._manager = _checkpoint_manager(self.directory, _KeepNewestAndBest(keep, self._scores))
        for step in self._manager.all_steps():
            payload, _ = attempt(self._payload, step)
            self._score(step, payload["metrics"] if payload else {})

    def __enter__(self) -> Checkpointer:
        """Returns itself."""
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Closes; after an error, which only this process may have, without waiting for the others."""
        self._end()
        if error is None:
            storage.sync_processes("checkpoint")

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves `state` as the checkpoint of `step`; returns once it is copied to the host, unless `wait`.

        The buffers of `state` may be donated or changed as soon as this returns. Saving the step of the last save again
        does nothing.

        Args:
          step: larger than all steps in the directory.
          state: pytree of arrays and numbers; random keys as their uint32 data.
          meta: plain JSON values that `restore` returns; its "config" is compared with `expected_config`.
          metrics: of this step.
          wait: return when the checkpoint is on disk.

        Raises:
          ValueError: the state contains something other than arrays, meta is not JSON, or there are newer steps.
          OSError: this checkpoint or the previous one could not be written; earlier ones are intact.
        """
        self.wait()
        if step != self._last:
            self._started = time.monotonic()
            newest = max(set(self._manager.all_steps()) - self._damaged, default=-1)
            if step <= newest:
                raise ValueError(
                    f"step {step}: {self.directory} already has a checkpoint of step {newest}; resume from it, or use "
                    "another directory"
                )
            arrays = {name: to_host(name, leaf) for name, leaf in flatten(state).items()}
            if not any(array.size for array in arrays.values()):
                raise ValueError("state contains no array with elements; there is nothing to save")
            payload = {"step": step, "meta": as_json(meta, "meta"), "metrics": as_json(metrics or {}, "metrics")}
            self._score(step, payload["metrics"])
            self._cost = time.monotonic() - self._started
            if jax.process_index() == 0:
                self._pending = self._worker.submit(self._write, step, arrays, payload, first=self._last is None)
            self._last = step
        if wait:
            self.wait()
            storage.sync_processes("checkpoint")

    def affordable(self, share: float | None) -> bool:
        """Whether a save now would keep saves within this share of the time; all processes ask, process 0 decides.

        A save is assumed to cost the wall time of the last one: copying the state, while the loop waits, and writing it
        in the background, which may compete with the loop for CPU cores. Time spent waiting for disk or network counts
        too, which makes saves rarer but never more expensive. The first save is always affordable, and so is any that
        comes MAX_INTERVAL seconds after the previous one; none is while the previous one is still being written.

        Args:
          share: in (0, 1]; None makes every save affordable.
        """
        if share is None:
            return True
        affordable = True
        if self._pending is not None and not self._pending.done():
            affordable = False
        elif self._started is not None:
            since = time.monotonic() - self._started
            affordable = since >= MAX_INTERVAL or since * share >= self._cost
        if jax.process_count() == 1:
            return affordable
        return bool(multihost_utils.broadcast_one_to_all(np.array(affordable)))

    def wait(self) -> None:
        """Returns when the last save is on disk; raises OSError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(
        self, abstract_state: PyTree, expected_config: Mapping[str, Any] | None = None, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Returns the newest intact checkpoint as (step, state, meta), or None if the directory has no checkpoints.

        A checkpoint that is damaged, or does not match `abstract_state`, is skipped with a logged warning.

        Args:
          abstract_state: pytree of arrays, `jax.ShapeDtypeStruct` or numbers with the state's structure. NumPy arrays
            and numbers are restored as such, others as JAX arrays on the devices of their `sharding`, if any.
          expected_config: meta["config"] must equal it.
          step: restore this step instead of the newest.

        Raises:
          ValueError: the configuration differs (lists the settings), or there is no checkpoint of `step`.
          CheckpointError: there are checkpoints, but all are damaged.
        """
        targets, steps = flatten(abstract_state), self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"step {step}: {self.directory} has checkpoints of the steps {steps}")
        problems: dict[int, str] = {}
        for candidate in reversed(steps) if step is None else [step]:
            path, state = self.directory / str(candidate), None
            payload, problem = attempt(self._payload, candidate)
            if payload is not None:
                if expected_config is not None:
                    check_config(path, payload["meta"].get("config"), expected_config)
                state, problem = attempt(self._state, candidate, payload["leaves"], targets)
            if _all_agree(not problem):
                assert payload is not None and state is not None
                self._damaged |= problems.keys()
                tree = jax.tree.unflatten(jax.tree.structure(abstract_state), state)
                return candidate, tree, payload["meta"]
            problems[candidate] = problem or "another process cannot read it"
            log.warning("checkpoint %s is skipped: %s", path, problems[candidate])
        if not problems:
            return None
        causes = "; ".join(f"step {bad}: {problem}" for bad, problem in problems.items())
        raise CheckpointError(
            f"{self.directory}: no checkpoint is usable ({causes}); move them elsewhere to start again"
        )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        self.wait()
        storage.sync_processes("checkpoint")
        if jax.process_index() > 0:
            storage.refresh(self.directory)
            self._manager.reload()
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best metric; None if none has that metric."""
        return _best(self.steps(), self._scores)

    def close(self) -> None:
        """Waits for the last save; raises OSError if it failed."""
        self._end()
        storage.sync_processes("checkpoint")

    def _end(self) -> None:
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def _score(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._best_metric) if self._best_metric else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            self._scores[step] = self._sign * value

    def _payload(self, step: int) -> dict[str, Any]:
        """The checked JSON of a checkpoint: step, meta, metrics, leaves."""
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        payload = unseal(restored["meta"])
        if payload["step"] != step:
            raise CheckpointError(f"it is the checkpoint of step {payload['step']}")
        return payload

    def _state(self, step: int, leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> list[Any]:
        """The leaves of a checkpoint, in the order and placement of `targets`."""
        check_structure(leaves, targets)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=restore_args(leaves)))
        arrays = check_digests(leaves, restored["state"])
        return [place_like(arrays[name], target) for name, target in targets.items()]

    def _write(self, step: int, arrays: Mapping[str, np.ndarray], payload: dict[str, Any], first: bool) -> None:
        """Background thread: Orbax writes a temporary folder, renames it, then deletes checkpoints no longer kept."""
        began = time.monotonic()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if first:
                _delete_unfinished(self.directory)
            for damaged in self._damaged.intersection(self._manager.all_steps()):
                self._manager.delete(damaged)
            check_free_space(self.directory, arrays)
            payload["leaves"] = {name: describe(array) for name, array in arrays.items()}
            items = {"state": save_args(arrays), "meta": ocp.args.JsonSave(seal(payload))}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            storage.publish()
            self._cost += time.monotonic() - began
        except Exception as error:
            self._scores.pop(step, None)
            self._last = None
            _delete_unfinished(self.directory)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {one_line(error)}; earlier "
                "checkpoints are intact"
            ) from error


class _KeepNewestAndBest:
    """Orbax preservation policy: the newest few checkpoints, and the one with the best score."""

    def __init__(self, newest: int, scores: Mapping[int, float]):
        self.newest, self.scores = newest, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in steps[-self.newest :] or step == _best(steps, self.scores) for step in steps]


def _best(steps: Iterable[int], scores: Mapping[int, float]) -> int | None:
    return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)


def _checkpoint_manager(directory: Path, policy: _KeepNewestAndBest) -> ocp.CheckpointManager:
    """Orbax's manager for this process alone: it waits for no other process, and none waits for it."""
    return ocp.CheckpointManager(
        directory,
        handler_registry=ocp.handlers.create_default_handler_registry(
            state=orbax_handler(), meta=ocp.JsonCheckpointHandler(multiprocessing_options=single_process())
        ),
        options=ocp.CheckpointManagerOptions(
            create=False,
            save_root_metadata=False,
            lightweight_initialize=True,  # else it reads the files of a damaged checkpoint and fails
            enable_async_checkpointing=False,  # our own thread waits instead
            preservation_policy=policy,
            multiprocessing_options=single_process(),
        ),
    )


def _delete_unfinished(directory: Path) -> None:
    """Deletes the leftovers of saves that were killed or failed."""
    for leftover in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _all_agree(restored: bool) -> bool:
    """Whether every process could restore a step: all must restore the same one."""
    return restored if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(restored)).all())
