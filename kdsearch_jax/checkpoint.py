"""What a run leaves on disk and finds again: checkpoints of a training state, and finished networks.

Arrays are stored by Orbax under flat names ("params/stage1/conv/kernel"). Orbax gives back a flipped byte, or another
dtype, without a word, so every array carries its own SHA-256 over dtype, shape and bytes, checked whenever it is read.

    Checkpointer    DIRECTORY/STEP/{state, meta}: the newest few and the best; restoring falls back past damaged ones
    save_network    DIRECTORY/{architecture.json, network.json, variables}: one network, written whole or not at all
    preemption      SIGTERM as a flag that a training loop can ask for

A state is a pytree of arrays and plain numbers; its structure is not stored: the caller brings it along when restoring,
and with it the devices on which each array shall lie, however many there were when it was saved.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from kdsearch_jax.forward import apply_eval
from kdsearch_jax.student import Architecture

PyTree = Any
T = TypeVar("T")
FORMAT, VERSION = "kdsearch_jax network", 1
_DTYPE = re.compile("bool|bfloat16|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
_MAX_JSON = 1 << 26  # bytes of JSON read from a directory that may come from elsewhere
_asked = itertools.count(1 << 30)

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """What is stored is damaged, or is not what was asked for."""


# Names and digests of arrays


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by flat name, as `{"params/conv/kernel": leaf}`; "/" and "%" within a key are escaped."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = (str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
        name = "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)
        flat[name] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionary whose `flatten` is `flat`.

    Raises:
      ValueError: a name is both an array and a folder of arrays.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = (part.replace("%2F", "/").replace("%25", "%") for part in name.split("/"))
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r}: {folder!r} is an array and a folder at once")
        if last in node:
            raise ValueError(f"{name!r} is an array and a folder at once")
        node[last] = leaf
    return tree


def describe(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 (over both and the bytes) of an array, as JSON."""
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest.hexdigest()}


def _copied(name: str, leaf: Any) -> np.ndarray:
    """A leaf in the host's memory, safe from donation of its buffer and from changes in place."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name!r} is a typed random key; store jax.random.key_data(key), of dtype uint32")
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.array(leaf)
    if not _DTYPE.fullmatch(array.dtype.name):
        raise ValueError(
            f"{name!r} is of type {type(leaf).__name__}, dtype {array.dtype}; store arrays and numbers only"
        )
    return array


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Opens and reads array after array.

    Orbax opens and reads all at once; the first error ends that, and every other one is then a traceback on stderr.
    """

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        return [described for info in infos for described in await super(_OneByOne, self).metadata([info])]

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[np.ndarray]:
        pairs = zip(infos, args or [ocp.RestoreArgs()] * len(infos), strict=True)
        return [array for pair in pairs for array in await super(_OneByOne, self).deserialize(*([x] for x in pair))]


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax for flat dictionaries of NumPy arrays, without compression: files are as large as what they hold."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _OneByOne(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # not used here; Orbax warns of its absence
    )
    return ocp.PyTreeCheckpointHandler(
        use_compression=False, multiprocessing_options=_alone(), type_handler_registry=registry
    )


def _alone() -> ocp.options.MultiprocessingOptions:
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def _to_store(arrays: Mapping[str, np.ndarray]) -> ocp.args.PyTreeSave:
    """What goes to Orbax, which refuses arrays without elements: their description says all there is to say."""
    return ocp.args.PyTreeSave({name: array for name, array in arrays.items() if array.size})


def _to_read(leaves: Mapping[str, Mapping[str, Any]]) -> ocp.args.PyTreeRestore:
    """What Orbax shall read of the arrays described: all that have elements, as NumPy arrays of these shapes."""
    targets = {
        name: np.broadcast_to(np.zeros((), jnp.dtype(leaf["dtype"])), leaf["shape"])
        for name, leaf in leaves.items()
        if math.prod(leaf["shape"])
    }
    arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in targets}
    return ocp.args.PyTreeRestore(item=targets, restore_args=arguments)


def verified(leaves: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays that `leaves` describes, each compared with its digest."""
    found = {
        name: np.asarray(arrays[name]) if name in arrays else np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
        for name, leaf in leaves.items()
    }
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for (name, leaf), actual in zip(leaves.items(), pool.map(describe, found.values()), strict=True):
            if actual != dict(leaf):
                what = (
                    "bytes"
                    if (actual["shape"], actual["dtype"]) == (leaf["shape"], leaf["dtype"])
                    else "shape or dtype"
                )
                raise CheckpointError(f"{what} of {name!r} are not those that were saved")
    return found


def _seal(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _sealed(payload: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their digest; `_unsealed` inverts it, or raises CheckpointError."""
    return {"payload": dict(payload), "sha256": _seal(payload)}


def _unsealed(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("sha256") != _seal(record.get("payload")):
        raise CheckpointError("its JSON is not what was saved")
    return record["payload"]


def _plain(value: Any, what: str) -> Any:
    """`value` as it will be read back from JSON."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be plain JSON values: {error}") from None


def _local(directory: str | Path) -> Path:
    if "://" in str(directory):
        raise ValueError(f"directory {str(directory)!r}: give a path of the file system; mount a bucket to use one")
    return Path(directory).expanduser().absolute()


def _reason(error: BaseException) -> str:
    """An exception on one line; what the operating system said, where TensorStore buries it in paths."""
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    text = text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
    return f"{text[:150]} … {text[-150:]}" if len(text) > 300 else text


def _check_room(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises OSError where the disk is too full, before Orbax has filled it and covered stderr with tracebacks."""
    needed, free = sum(array.nbytes for array in arrays.values()) + (1 << 20), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{os.strerror(errno.ENOSPC)}: {needed >> 20} MiB needed, {free >> 20} MiB free")


# Checkpoints of a training state


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
        self.directory = _local(directory)
        self._best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self._scores: dict[int, float] = {}
        self._damaged: set[int] = set()  # found so by `restore`, and older than what it gave back
        self._last: int | None = None  # step of the last save
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._manager = _manager(self.directory, _Keep(keep, self._scores))
        for step in self._manager.all_steps():
            payload, _ = _attempt(self._payload, step)
            self._score(step, payload["metrics"] if payload else {})

    def __enter__(self) -> Checkpointer:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

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
            newest = max(set(self._manager.all_steps()) - self._damaged, default=-1)
            if step <= newest:
                raise ValueError(
                    f"step {step}: {self.directory} already has a checkpoint of step {newest}; resume from it, or give "
                    "another directory"
                )
            arrays = {name: _copied(name, leaf) for name, leaf in flatten(state).items()}
            if not any(array.size for array in arrays.values()):
                raise ValueError("state has no array with elements; there is nothing to save")
            payload = {"step": step, "meta": _plain(meta, "meta"), "metrics": _plain(metrics or {}, "metrics")}
            self._score(step, payload["metrics"])
            if jax.process_index() == 0:
                self._pending = self._worker.submit(self._write, step, arrays, payload, first=self._last is None)
            self._last = step
        if wait:
            self.wait()
            _meet("checkpoint")

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
            payload, problem = _attempt(self._payload, candidate)
            if payload is not None:
                if expected_config is not None:
                    _check_config(path, payload["meta"].get("config"), expected_config)
                state, problem = _attempt(self._state, candidate, payload["leaves"], targets)
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
        _meet("checkpoint")
        if jax.process_index() > 0:
            self._manager.reload()
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best metric, None where none has it."""
        return _best(self.steps(), self._scores)

    def close(self) -> None:
        """Waits for the last save; raises OSError where it failed."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()
        _meet("checkpoint")

    def _score(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._best_metric) if self._best_metric else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            self._scores[step] = self._sign * value

    def _payload(self, step: int) -> dict[str, Any]:
        """The checked JSON of a checkpoint: step, meta, metrics, leaves."""
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        payload = _unsealed(restored["meta"])
        if payload["step"] != step:
            raise CheckpointError(f"it is the checkpoint of step {payload['step']}")
        return payload

    def _state(self, step: int, leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> list[Any]:
        """The leaves of a checkpoint, in the order and place of `targets`."""
        _check_structure(leaves, targets)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=_to_read(leaves)))
        arrays = verified(leaves, restored["state"])
        return [_placed(arrays[name], target) for name, target in targets.items()]

    def _write(self, step: int, arrays: Mapping[str, np.ndarray], payload: dict[str, Any], first: bool) -> None:
        """In the background: Orbax writes a temporary folder, renames it, then drops what need not stay."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if first:
                _sweep(self.directory)
            for damaged in self._damaged.intersection(self._manager.all_steps()):
                self._manager.delete(damaged)
            _check_room(self.directory, arrays)
            payload["leaves"] = {name: describe(array) for name, array in arrays.items()}
            items = {"state": _to_store(arrays), "meta": ocp.args.JsonSave(_sealed(payload))}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            self._scores.pop(step, None)
            self._last = None
            _sweep(self.directory)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {_reason(error)}; earlier "
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
            state=_array_handler(), meta=ocp.JsonCheckpointHandler(multiprocessing_options=_alone())
        ),
        options=ocp.CheckpointManagerOptions(
            create=False,
            save_root_metadata=False,
            lightweight_initialize=True,  # it would read the files of a damaged checkpoint, and fail
            enable_async_checkpointing=False,  # a thread of ours waits instead, so that nothing else does
            preservation_policy=policy,
            multiprocessing_options=_alone(),
        ),
    )


def _sweep(directory: Path) -> None:
    """Removes what a save that was killed, or failed, has left."""
    for leftover in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_config(path: Path, stored: Any, expected: Mapping[str, Any]) -> None:
    """Raises ValueError, listing the settings in which a checkpoint's configuration differs from the expected one."""
    old, new = _settings(stored or {}), _settings(_plain(expected, "expected_config"))
    differing = [
        f"{key}: {json.dumps(old[key]) if key in old else 'absent'} there, "
        f"{json.dumps(new[key]) if key in new else 'absent'} now"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} is of another configuration ({'; '.join(differing)}); set these back to resume, or "
            "start in another directory"
        )


def _settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    return {
        name: value
        for key, child in config.items()
        for name, value in _settings(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _check_structure(leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the stored leaves are not those of the wanted structure."""
    for name in [*targets, *leaves]:
        here, there = (f"{what} {name!r}" for what in ("the state has no", "it has no"))
        if name not in leaves:
            raise CheckpointError(f"{there}, which the state has")
        if name not in targets:
            raise CheckpointError(f"{here}, which it has")
        wanted = targets[name] if hasattr(targets[name], "dtype") else np.asarray(targets[name])
        stored = (tuple(leaves[name]["shape"]), leaves[name]["dtype"])
        if stored != (tuple(wanted.shape), wanted.dtype.name):
            raise CheckpointError(
                f"{name!r} is {stored[1]} {stored[0]}, and {wanted.dtype.name} {tuple(wanted.shape)} in the state"
            )


def _placed(array: np.ndarray, target: Any) -> Any:
    """The array as the leaf of the target is: NumPy, a number, or on certain devices."""
    if isinstance(target, (bool, int, float, complex)):
        return type(target)(array[()])
    if isinstance(target, (np.ndarray, np.generic)):
        return array if isinstance(target, np.ndarray) else array[()]
    # An array that nobody has placed stays free to follow the others into a computation over several devices.
    sharding = target.sharding if getattr(target, "committed", True) else None
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _attempt(read: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """(What `read` returns, "") or (None, why not), as Orbax and TensorStore have dozens of ways to say "damaged"."""
    try:
        return read(*args), ""
    except Exception as error:
        return None, _reason(error)


def _all_agree(good: bool) -> bool:
    """Whether every process found it good: all must restore the same step."""
    return good if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(good)).all())


def _meet(name: str) -> None:
    """Waits for all processes of the run."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# Preemption


class Preemption:
    """Whether the machine is about to be taken away."""

    def __init__(self) -> None:
        self._signalled = False

    @property
    def requested(self) -> bool:
        """Whether to save and leave. With several processes all must ask equally often, and all get the same answer."""
        if not self._signalled and jax.process_count() > 1:
            self._signalled = bool(multihost_utils.reached_preemption_sync_point(next(_asked)))
        return self._signalled


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Within this context a first SIGTERM only sets `.requested`; a second one ends the process as ever.

    Takes the signal in the main thread only; elsewhere `.requested` stays False. With several processes JAX's own
    service takes the signal, and `.requested` turns true in all of them at once.
    """
    flag = Preemption()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield flag
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        flag._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield flag
    finally:
        # None: the handler before was not set by Python, and cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


# Finished networks


def save_network(
    directory: str | Path,
    architecture: Architecture,
    variables: Mapping[str, Any],
    info: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a network: architecture.json, network.json (info, digests) and variables/, all or nothing.

    Every process of a run calls it; the first writes.

    Args:
      directory: does not exist, or is empty, unless `overwrite`.
      architecture: what `architecture.module()` makes the network of.
      variables: the network's, nested by module; empty collections are not kept.
      info: plain JSON values: data set, normalisation, accuracy, …
      overwrite: replace the network that the directory holds, and all else in it.

    Raises:
      ValueError: info is not JSON, a leaf is not an array, or what shall be overwritten is not a network.
      OSError: the directory is not empty, or cannot be written; what was there before is intact.
    """
    target = _local(directory)
    arrays = {name: _copied(name, leaf) for name, leaf in flatten(variables).items()}
    if not any(array.size for array in arrays.values()):
        raise ValueError("variables have no array with elements; there is nothing to save")
    described = architecture.to_json()
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": _seal(_plain(described, "architecture")),
        "info": _plain(info, "info"),
        "leaves": {name: describe(array) for name, array in arrays.items()},
    }
    if jax.process_index() == 0:
        occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
        if occupied and not overwrite:
            raise FileExistsError(f"{target} exists already; give another directory, or overwrite=True to replace it")
        if occupied and not (target / "network.json").is_file():
            raise ValueError(
                f"{target} is not the directory of a network, so it is not overwritten; remove it yourself"
            )
        with written_whole(target) as temporary:
            _check_room(temporary, arrays)
            with _array_store() as store:
                store.save(temporary / "variables", args=_to_store(arrays))
            (temporary / "architecture.json").write_text(json.dumps(described, indent=1) + "\n")
            (temporary / "network.json").write_text(json.dumps(_sealed(payload), indent=1) + "\n")
    _meet("network")


def load_network(directory: str | Path, module: Any = None) -> tuple[Any, dict[str, Any], Architecture, dict[str, Any]]:
    """What `save_network` wrote: (module, variables, architecture, info), every array compared with its digest.

    module: the base model, for a network of a module object that could not be named in a file.

    A network of `package.module:factory` imports that package, that is, runs its code: look into architecture.json
    before loading what a stranger sent.

    Raises:
      FileNotFoundError: there is no such directory, or it lacks a part of a network (named).
      CheckpointError: damaged (names the array), of another version, or the arrays are not the architecture's.
      ValueError: architecture.json describes no network.
    """
    source = _local(directory)
    if not source.is_dir():
        old = next(source.parent.glob(f".{source.name}.*.old"), None)  # killed while it replaced one by another
        hint = f"rename {old}, which was there before" if old else "give one that save_network wrote"
        raise FileNotFoundError(f"{source} is not a directory; {hint}")
    missing = [name for name in ("network.json", "architecture.json", "variables") if not (source / name).exists()]
    if missing:
        raise FileNotFoundError(f"{source} is not the directory of a network: it has no {', '.join(missing)}")
    payload = _network_payload(source / "network.json")
    described = _json(source / "architecture.json")
    architecture = Architecture.from_json(described)
    if _attempt(_seal, described)[0] != payload["architecture"]:
        raise CheckpointError(f"{source / 'architecture.json'} is not the one that was saved with this network")
    arrays, problem = _attempt(_network_arrays, source / "variables", payload["leaves"])
    if arrays is None:
        raise CheckpointError(f"{source} is damaged: {problem}; take another copy")
    variables = unflatten({name: jnp.asarray(array) for name, array in arrays.items()})
    return fitting_module(architecture, variables, source, module), variables, architecture, payload["info"]


def fitting_module(architecture: Architecture, variables: Mapping[str, Any], source: Path, base: Any = None) -> Any:
    """The architecture's module; raises ValueError, naming `source`, where it cannot be made or run with these.

    base: the base model, where the architecture cannot name it.
    """
    module, problem = _attempt(architecture.module, base)
    if module is None:
        raise ValueError(f"{source}: the architecture's module cannot be made: {problem}")
    _, problem = _attempt(
        jax.eval_shape, lambda v, *xs: apply_eval(module, v, xs, call=architecture.call), variables,
        *architecture.called.example(1),
    )  # fmt: skip
    if problem:
        raise ValueError(f"{source}: the arrays are not those of the architecture: {problem}")
    return module


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` at the end, in place of what was there; an error changes nothing.

    Raises:
      OSError: it cannot be written.
    """
    temporary, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{end}") for end in ("tmp", "old"))
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        flush(target.parent)
    except Exception as error:
        raise OSError(f"{target} could not be written: {_reason(error)}; what was there before is intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Has the file system put a file or a directory on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _array_store() -> ocp.Checkpointer:
    return ocp.Checkpointer(_array_handler(), multiprocessing_options=_alone())


def _network_payload(path: Path) -> dict[str, Any]:
    """network.json, checked."""
    record = _json(path)
    payload = record.get("payload") if isinstance(record, dict) else None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of a network written by this package")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {payload.get('version')!r:.20} is not known here; {VERSION} is")
    payload, problem = _attempt(_unsealed, record)
    leaves = payload.get("leaves") if payload else None
    if payload is None or not isinstance(payload.get("info"), dict) or not isinstance(leaves, dict):
        raise CheckpointError(f"{path} is damaged: {problem or 'it lacks info or leaves'}; take another copy")
    for name, leaf in leaves.items():
        shape = leaf.get("shape") if isinstance(leaf, dict) else None
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or set(leaf) != {"shape", "dtype", "sha256"} or not _DTYPE.fullmatch(str(leaf["dtype"])):
            raise CheckpointError(f"{path}: {name!r:.80} is described wrongly")
    return payload


def _network_arrays(folder: Path, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The verified arrays of a network; reads nothing where the files are too small for what they should hold."""
    declared = sum(math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in leaves.values())
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if declared > present:
        raise CheckpointError(f"its arrays have {declared} bytes, the files {present}")
    with _array_store() as store:
        metadata = store.metadata(folder).item_metadata
        if metadata is None:
            raise CheckpointError("Orbax finds no arrays in it")
        for name, stored in metadata.items():
            chunk = stored.storage.chunk_shape if stored.storage else None
            if list(stored.shape) != leaves[name]["shape"] or math.prod(chunk or ()) > math.prod(stored.shape):
                raise CheckpointError(f"{name!r} is stored as {stored.shape} in pieces of {chunk}")
        restored = store.restore(folder, args=_to_read(leaves))
    return verified(leaves, restored)


def _json(path: Path) -> Any:
    """The JSON value in a file of modest size; raises CheckpointError."""
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path} is larger than any that this package writes")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_reason(error)}") from None
