"""Checkpoints of a training state: DIRECTORY/STEP/{state, meta}."""

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
from kdsearch_jax.storage.arrays import alone, array_handler, copied, describe, flatten, to_read, to_store, verified
from kdsearch_jax.storage.checkpoint_files import (
    CheckpointError,
    attempt,
    check_room,
    local,
    meet,
    plain,
    reason,
    sealed,
    unsealed,
)
from kdsearch_jax.storage.matching import check_config, check_structure, placed

PyTree = Any

log = logging.getLogger(__name__)
LONGEST = 600.0  # seconds after a checkpoint when the next is worth any cost


class Checkpointer:
    """Checkpoints of one stage of a run, written in the background: the newest `keep`, and the best.

    Every process of a run makes one and calls its methods alike; the first writes, into a directory that all of them
    see. A context manager; `close` it otherwise.

    Args:
      directory: holds a folder per step; made by the first `save`.
      keep: how many of the newest checkpoints stay.
      best_metric: name of the metric by which one more stays, however old; None for none. Saves without this metric,
        or with one that is not finite, do not compete.
      best_mode: whether a higher ("max") or a lower ("min") value is better.
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
        self.directory = local(directory)
        storage.follow(self.directory)
        self._best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self._scores: dict[int, float] = {}
        self._damaged: set[int] = set()  # found so by `restore`, and older than what it gave back
        self._last: int | None = None  # step of the last save
        self._pending: Future[None] | None = None
        self._began: float | None = None  # when the last save did, by the monotonic clock
        self._cost = 0.0  # its seconds so far, in the loop and behind
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._manager = _manager(self.directory, _Keep(keep, self._scores))
        for step in self._manager.all_steps():
            payload, _ = attempt(self._payload, step)
            self._score(step, payload["metrics"] if payload else {})

    def __enter__(self) -> Checkpointer:
        """Itself."""
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Closes; after an error, which may be this process's alone, without waiting for the others."""
        self._end()
        if error is None:
            meet("checkpoint")

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves `state` as the checkpoint of `step`; returns once it is copied to the host, unless `wait`.

        The buffers of `state` may be donated or changed as soon as this returns. Saving the step that was saved last
        once more does nothing.

        Args:
          step: above all steps in the directory.
          state: pytree of arrays and numbers; random keys as their uint32 data.
          meta: plain JSON values, given back by `restore`; its "config" is what `expected_config` is compared with.
          metrics: what is known of this step.
          wait: return when the checkpoint is on disk.

        Raises:
          ValueError: the state has something else than arrays, meta is not JSON, or the directory has newer steps.
          OSError: this checkpoint, or the one before, could not be written; earlier ones are intact.
        """
        self.wait()
        if step != self._last:
            self._began = time.monotonic()
            newest = max(set(self._manager.all_steps()) - self._damaged, default=-1)
            if step <= newest:
                raise ValueError(
                    f"step {step}: {self.directory} already has a checkpoint of step {newest}; resume from it, or give "
                    "another directory"
                )
            arrays = {name: copied(name, leaf) for name, leaf in flatten(state).items()}
            if not any(array.size for array in arrays.values()):
                raise ValueError("state has no array with elements; there is nothing to save")
            payload = {"step": step, "meta": plain(meta, "meta"), "metrics": plain(metrics or {}, "metrics")}
            self._score(step, payload["metrics"])
            self._cost = time.monotonic() - self._began
            if jax.process_index() == 0:
                self._pending = self._worker.submit(self._write, step, arrays, payload, first=self._last is None)
            self._last = step
        if wait:
            self.wait()
            meet("checkpoint")

    def affordable(self, share: float | None) -> bool:
        """Whether a save now leaves saves within this share of the time; every process asks, the first says.

        A save is taken to cost as long as the last one took, by the clock: to copy the state, when the loop waits, and
        to write it in the background, when it may need the loop's processors. That is too much where the disk or the
        network was waited for, which makes saves rarer, never dearer. The first is always affordable, and so is any
        that comes `LONGEST` seconds after the one before; none is while that is still being written.

        share: in (0, 1]; None: all are.
        """
        if share is None:
            return True
        good = True
        if self._pending is not None and not self._pending.done():
            good = False
        elif self._began is not None:
            since = time.monotonic() - self._began
            good = since >= LONGEST or since * share >= self._cost
        return good if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(good)))

    def wait(self) -> None:
        """Returns when the last save is on disk; raises OSError where it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(
        self, abstract_state: PyTree, expected_config: Mapping[str, Any] | None = None, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that is whole: (step, state, meta), or None where the directory has none at all.

        A checkpoint that is damaged, or does not fit `abstract_state`, is passed over with a logged warning.

        Args:
          abstract_state: pytree of arrays, `jax.ShapeDtypeStruct` or numbers, of the state's structure. NumPy arrays
            and numbers are given back as such, others as JAX arrays on the devices of their `sharding`, if any.
          expected_config: what meta["config"] must equal.
          step: restore this one, instead of the newest.

        Raises:
          ValueError: the configuration differs (lists where), or there is no checkpoint of `step`.
          CheckpointError: there are checkpoints, and none is good.
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
            log.warning("checkpoint %s is passed over: %s", path, problems[candidate])
        if not problems:
            return None
        causes = "; ".join(f"step {bad}: {problem}" for bad, problem in problems.items())
        raise CheckpointError(f"{self.directory}: no checkpoint is usable ({causes}); move them away to start again")

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, oldest first."""
        self.wait()
        meet("checkpoint")
        if jax.process_index() > 0:
            storage.follow(self.directory)
            self._manager.reload()
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best metric, None where none has it."""
        return _best(self.steps(), self._scores)

    def close(self) -> None:
        """Waits for the last save; raises OSError where it failed."""
        self._end()
        meet("checkpoint")

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
        payload = unsealed(restored["meta"])
        if payload["step"] != step:
            raise CheckpointError(f"it is the checkpoint of step {payload['step']}")
        return payload

    def _state(self, step: int, leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> list[Any]:
        """The leaves of a checkpoint, in the order and place of `targets`."""
        check_structure(leaves, targets)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=to_read(leaves)))
        arrays = verified(leaves, restored["state"])
        return [placed(arrays[name], target) for name, target in targets.items()]

    def _write(self, step: int, arrays: Mapping[str, np.ndarray], payload: dict[str, Any], first: bool) -> None:
        """In the background: Orbax writes a temporary folder, renames it, then drops what need not stay."""
        began = time.monotonic()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if first:
                _sweep(self.directory)
            for damaged in self._damaged.intersection(self._manager.all_steps()):
                self._manager.delete(damaged)
            check_room(self.directory, arrays)
            payload["leaves"] = {name: describe(array) for name, array in arrays.items()}
            items = {"state": to_store(arrays), "meta": ocp.args.JsonSave(sealed(payload))}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            storage.publish()
            self._cost += time.monotonic() - began
        except Exception as error:
            self._scores.pop(step, None)
            self._last = None
            _sweep(self.directory)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {reason(error)}; earlier "
                "checkpoints are intact"
            ) from error


class _Keep:
    """Orbax's preservation policy: the newest few, and the best by a score."""

    def __init__(self, newest: int, scores: Mapping[int, float]):
        self.newest, self.scores = newest, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in steps[-self.newest :] or step == _best(steps, self.scores) for step in steps]


def _best(steps: Iterable[int], scores: Mapping[int, float]) -> int | None:
    return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)


def _manager(directory: Path, policy: _Keep) -> ocp.CheckpointManager:
    """Orbax's manager as one process's own: others neither wait for it nor are waited for."""
    return ocp.CheckpointManager(
        directory,
        handler_registry=ocp.handlers.create_default_handler_registry(
            state=array_handler(), meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone())
        ),
        options=ocp.CheckpointManagerOptions(
            create=False,
            save_root_metadata=False,
            lightweight_initialize=True,  # it would read the files of a damaged checkpoint, and fail
            enable_async_checkpointing=False,  # a thread of ours waits instead, so that nothing else does
            preservation_policy=policy,
            multiprocessing_options=alone(),
        ),
    )


def _sweep(directory: Path) -> None:
    """Removes what a save that was killed, or failed, has left."""
    for leftover in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _all_agree(good: bool) -> bool:
    """Whether every process found it good: all must restore the same step."""
    return good if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(good)).all())
