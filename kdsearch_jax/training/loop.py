"""The training loop that teacher, search and student share.

A `Step` (`kdsearch_jax.training.state`) is a pure function that makes one update; `fit` does everything else. It
compiles `run.steps_per_dispatch` updates into one call (`lax.scan` under `jit` over a mesh of all devices of all
processes; on CPUs, and for streamed examples, a Python loop) and donates the state. Examples reside on the devices,
images as uint8, and each call sends only the indices of its batches; or batches are streamed
(`kdsearch_jax.data.device_feed`). Batches are sharded over the devices; augmentation and normalisation are part of the
compiled step. BatchNorm therefore computes its statistics over the whole batch, on any number of devices.

Between two calls the host checks the losses, calls `between`, evaluates, and writes metrics and checkpoints. All
randomness is folded from (seed, step), and calls begin at multiples of `run.steps_per_dispatch`, so a resumed run ends
bit for bit where an uninterrupted one does on the same machine. docs/training.md explains why a mesh and not `pmap`.

With `run.shard`, parameters, optimiser state and constants are divided among the devices; XLA gathers each where it is
used. Not in this module: what is trained and with which loss, where batches come from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from kdsearch_jax.adapters.apply import compiled_for
from kdsearch_jax.adapters.devices import data_mesh, donatable_copy, gathered, place, shardings_of
from kdsearch_jax.data.batches import preprocess
from kdsearch_jax.data.device_feed import IndexedBatches, UpdateEntries, training_feed
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.progress import Progress
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.training.checkpoints import Checkpointer
from kdsearch_jax.training.metrics import MetricsWriter
from kdsearch_jax.training.optimizer import check_settings, check_stage
from kdsearch_jax.training.preemption import Preempted, Preemption, catch_sigterm, raise_on_sigterm
from kdsearch_jax.training.rollback import META_KEY, LossSpikeGuard
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import Metrics, Step, TrainState

log = logging.getLogger(__name__)

_UNEVALUATED = "unevaluated"  # in a checkpoint's meta: its metrics, if SIGTERM came before the evaluation

Evaluate = Callable[[TrainState], dict[str, float]]
Between = Callable[[TrainState], tuple[TrainState, dict[str, float]]]


class TrainingDiverged(FloatingPointError):
    """The loss or an array of the state is no longer finite."""


def fit(
    state: TrainState,
    step: Step,
    dataset: Dataset,
    data: DataConfig,
    stage: StageConfig,
    run: RunConfig,
    *,
    directory: Path,
    name: str,
    meta: dict[str, Any],
    constants: Any = None,
    evaluate: Evaluate | None = None,
    between: Between | None = None,
    until: Callable[[TrainState], bool] | None = None,
    batches: Callable[[int], Iterator[Mapping[str, Any]]] | None = None,
    entries: UpdateEntries | None = None,
    checkpoints_in: Path | None = None,
    seed: int = 0,
    resume: bool = False,
) -> TrainState:
    """Trains `state` for `stage.steps` updates, with checkpoints, metrics and progress in `directory`.

    Args:
      state: the initial state; its arrays stay usable.
      step: makes one update, see `Step`.
      dataset: its training split is used, and its mean and std normalise uint8 images.
      data: settings of augmentation.
      stage: number of updates and global batch size.
      run: updates per call, and how often to evaluate and save: at the end of the call that reaches the number, so none
        of these settings change what is computed. The end of training always evaluates and saves; other checkpoints are
        skipped if saving would take more than `run.checkpoint_share` of the time.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/.
      name: of the stage, for messages.
      meta: JSON stored in each checkpoint; its "config", if any, must be the same when the run is resumed.
      constants: arrays that `step` reads but does not change, such as the teacher's variables.
      evaluate: returns the metrics of a state, such as {"validation_accuracy": …}, which select the best checkpoint.
        The arrays of its argument are donated to the next update, so it must not keep them.
      between: host callback after each call. It may change values of the state, but not shapes or dtypes, and returns
        further metrics. Anything it has to remember belongs in `state.extra`, or a resumed run would differ.
      until: checked on the host before the first call and after each; True ends training there.
      batches: an iterator of your own in place of the training split: `batches(n)` is called once and returns the
        batches from update n on, each {entry: array (stage.batch_size, …)}, the same in every process. After a rollback
        (`run.spike`) it simply continues. A resumed run is bit-exact only if `batches(n)` is a function of n.
      entries: further entries of the batches of resident examples, (first update, indices (updates, batch), resident) →
        {entry: array (updates, batch, …)}, as a pure function of the update.
      checkpoints_in: the directory of checkpoints, `directory`/checkpoints by default.
      seed: of batches, augmentation and dropout.
      resume: continue from the newest intact checkpoint, if there is one.

    Returns:
      The last state, on all devices; with `run.shard` in host memory.

    Raises:
      ValueError: settings and data are incompatible, `between` changed the structure of the state, `batches` ended
        early, or the config differs from the checkpoint's.
      FileExistsError: there are checkpoints and `resume` is False.
      TrainingDiverged: a loss, or an array of the state that was finite at the start, is NaN or infinite.
      Preempted: SIGTERM was received; the state is saved.
    """
    mesh = data_mesh()
    check_stage(stage)
    check_settings(run, "run.")
    _check_batch_size(stage, dataset if batches is None else None, mesh)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpointer(checkpoints_in or Path(directory) / "checkpoints", run.keep))
        shardings = shardings_of(state, mesh, run.shard)
        state = donatable_copy(state, shardings)
        watched = _finite_leaves(state)  # of the initial state: what is not finite in a resumed one has diverged
        state, stored = _resume(state, checkpoints, meta, resume, shardings)
        first, guard = int(state.step), LossSpikeGuard(run, stored.get(META_KEY))
        if evaluate is not None and (row := stored.get(_UNEVALUATED)) is not None:
            with _reporter(directory, name, stage.steps, first - 1) as report:
                report(first, row | evaluate(state))
        if first >= stage.steps or (until is not None and until(state)):
            return _result(state, run)
        if guard.active and not checkpoints.steps():  # there must be one to go back to
            checkpoints.save(first, state, {**meta, **guard.to_meta()}, wait=True)
        loop = _Loop(
            stage=stage, run=run, shardings=shardings, name=name, directory=directory, meta=meta, seed=seed,
            evaluate=evaluate, between=between, until=until, checkpoints=checkpoints, guard=guard, watched=watched,
            state=state, updates=first, constants=place(constants, shardings_of(constants, mesh, run.shard)),
        )  # fmt: skip
        stack.enter_context(loop.progress)
        loop.open_report()
        stop = stack.enter_context(catch_sigterm())
        feed = stack.enter_context(
            closing(training_feed(dataset, stage.batch_size, mesh, stage.steps, batches, entries))
        )
        scanned = feed.resides and jax.default_backend() != "cpu"
        dispatch = make_dispatch(step, mesh, data, seed, scanned=scanned, watched=watched, shardings=shardings)
        while not loop.finished:
            loop.advance(dispatch, feed, stop)
        return _result(loop.state, run)


@dataclass(kw_only=True, eq=False)
class _Loop:
    """One call of `fit` between dispatches: its arguments, and what changes from dispatch to dispatch.

    updates: number of updates done. progress: metrics files and progress bar, reopened after a rollback.
    """

    stage: StageConfig
    run: RunConfig
    shardings: Any
    name: str
    directory: Path
    meta: dict[str, Any]
    seed: int
    evaluate: Evaluate | None
    between: Between | None
    until: Callable[[TrainState], bool] | None
    checkpoints: Checkpointer
    guard: LossSpikeGuard
    watched: Collection[str]
    constants: Any
    state: TrainState
    updates: int
    finished: bool = False
    progress: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        # Which checkpoint a rollback finds must not depend on the clock.
        self._share = None if self.guard.active else self.run.checkpoint_share
        self._kind = _kind(self.state)
        self._compiled_counts: set[int] = set()
        self._rollback_metrics: dict[str, int] = {}
        self._warned = False

    def open_report(self) -> None:
        """(Re)opens metrics and progress at the current update."""
        self.progress.close()
        report = _reporter(self.directory, self.name, self.stage.steps, self.updates)
        self._report = self.progress.enter_context(report)

    def advance(self, dispatch: Any, feed: Any, stop: Preemption) -> None:
        """One call of the device and all that follows it on the host."""
        per_call, first = self.run.steps_per_dispatch, self.updates
        count = min(per_call - first % per_call, self.stage.steps - first)
        start, waited = time.perf_counter(), feed.waited
        batches = feed.take(first, count, self.guard.batch_seed(self.seed, first))
        self.state, metrics, finite = dispatch(self.state, batches, feed.resident, self.constants)
        metrics = {key: np.asarray(value) for key, value in metrics.items()}  # waits for the devices
        seconds = time.perf_counter() - start
        if self._rolled_back(metrics["loss"], finite, first + count):
            return
        row = {key: float(metrics[key].mean()) for key in sorted(metrics, key="loss".__ne__)}  # loss first
        row |= self._rollback_metrics
        self._rollback_metrics = {}
        if count in self._compiled_counts:  # the first call of each length is mostly compilation
            row["images_per_second"] = count * self.stage.batch_size / seconds
            if not feed.resides:
                row["data_wait"] = (feed.waited - waited) / seconds
        self._compiled_counts.add(count)
        self._finish_dispatch(first, first + count, row, stop)

    def _rolled_back(self, losses: np.ndarray, finite: bool, done: int) -> bool:
        """Goes back to the last checkpoint after a loss spike; TrainingDiverged if that is not allowed."""
        diverged = not (np.isfinite(losses).all() and finite)
        is_spike = self.guard.is_spike(np.nan if diverged else float(losses.mean()))
        if is_spike and not self.guard.exhausted:
            self.state, step, stored = _restore(self.state, self.checkpoints, self.meta, self.shardings)
            self._rollback_metrics = self.guard.roll_back(stored, step, done)
            log.warning(
                "%s: the loss jumped to %.4g at step %d; going back to step %d and on with other batches (%d of %d)",
                self.name, losses.mean(), done, step, self._rollback_metrics["rollbacks"], self.run.rollbacks,
            )  # fmt: skip
            self.updates = step
            self.open_report()
            return True
        if diverged:
            raise self._diverged(self.updates, losses)
        if is_spike and not self._warned:
            self._warned = True
            log.warning(
                "%s: the loss jumped to %.4g at step %d; all run.rollbacks (%d) are used up, so training continues",
                self.name, losses.mean(), done, self.run.rollbacks,
            )  # fmt: skip
        return False

    def _finish_dispatch(self, first: int, done: int, row: dict[str, float], stop: Preemption) -> None:
        """Calls `between`, evaluates, reports, saves, and ends training when it is due."""
        if self.between is not None:
            state, more = self.between(self.state)
            self.state, row = _replaced(state, self._kind, self.shardings), row | more
        last = done >= self.stage.steps or (self.until is not None and self.until(self.state))
        stopping, unevaluated = stop.requested, {}
        if self.evaluate is not None and (last or _crosses(first, done, self.run.evaluate_every)):
            scores = None if stopping else _evaluate_unless_stopped(self.evaluate, self.state)
            if scores is None:
                unevaluated, stopping = {_UNEVALUATED: row}, True
            else:
                row, stopping = row | scores, stop.requested
        self._report(done, row)
        due = _crosses(first, done, self.run.checkpoint_every)
        if last or stopping or (due and self.checkpoints.affordable(self._share)):
            if self.between is not None and not self._is_finite():
                raise self._diverged(done, np.empty(0))
            meta = {**self.meta, **self.guard.to_meta(), **unevaluated}
            self.checkpoints.save(done, self.state, meta, row, wait=last or stopping)
        if stopping:
            raise Preempted(
                f"{self.name}: stopped by SIGTERM and saved at step {done} of {self.stage.steps}; "
                "the same command resumes it"
            )
        self.updates, self.finished = done, last

    def _is_finite(self) -> bool:
        leaves = [leaf for name, leaf in _float_leaves(self.state) if name in self.watched]
        return bool(_are_finite(leaves).all())

    def _diverged(self, first: int, losses: np.ndarray) -> TrainingDiverged:
        """The error for updates after `first`: names the step, the first bad array and the last good checkpoint."""
        bad = np.flatnonzero(~np.isfinite(losses))
        what = f"loss is {losses[bad[0]]} at step {first + bad[0] + 1}" if len(bad) else f"step {first + len(losses)}"
        leaves = [(name, leaf) for name, leaf in _float_leaves(self.state) if name in self.watched]
        if name := next((name for name, leaf in leaves if not _is_finite(leaf)), None):
            what += f", {name} is not finite"
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.constants)[0]:
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not _is_finite(leaf):
                what += f", nor is the teacher's {jax.tree_util.keystr(path, simple=True, separator='/')}"
                break
        steps = self.checkpoints.steps()
        last = (
            f"the last good checkpoint is {self.checkpoints.directory / str(steps[-1])}" if steps else "no checkpoint"
        )
        return TrainingDiverged(f"{self.name}: {what}; {last}. Lower learning_rate, or set clip or a longer warmup")


def _evaluate_unless_stopped(evaluate: Evaluate, state: TrainState) -> dict[str, float] | None:
    """The metrics of a state; None if SIGTERM arrived meanwhile. Several processes always finish it together."""
    try:
        with raise_on_sigterm():
            return evaluate(state)
    except Preempted:
        return None


@contextmanager
def _reporter(directory: Path, name: str, total: int, first: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yields a function that writes a row of metrics and moves the progress bar; only process 0 has either."""
    if jax.process_index() > 0:
        yield lambda step, row: None
        return
    with MetricsWriter(Path(directory), first) as writer, Progress(name, total, first) as progress:

        def report(step: int, row: dict[str, float]) -> None:
            writer.write(step, row)
            progress.update(step, row)

        yield report


def _check_batch_size(stage: StageConfig, dataset: Dataset | None, mesh: Mesh) -> None:
    size = stage.batch_size
    if size % mesh.size:
        near = max(mesh.size, size - size % mesh.size)
        raise ValueError(f"batch_size: {size} is not a multiple of the {mesh.size} devices; give {near}, for example")
    if dataset is not None and size > (examples := len(dataset.train)):
        raise ValueError(f"batch_size: {size} is more than the {examples} training examples; give {examples} or less")


def _resume(
    state: TrainState, checkpoints: Checkpointer, meta: dict[str, Any], resume: bool, shardings: Any
) -> tuple[TrainState, dict[str, Any]]:
    """(state, its meta) of the newest intact checkpoint, or the given state if there is none."""
    steps = checkpoints.steps()
    if steps and not resume:
        raise FileExistsError(
            f"{checkpoints.directory} has checkpoints up to step {steps[-1]}; resume, or give another directory"
        )
    if not steps:
        return state, {}
    state, _, stored = _restore(state, checkpoints, meta, shardings)
    return state, stored


def _restore(
    state: TrainState, checkpoints: Checkpointer, meta: dict[str, Any], shardings: Any
) -> tuple[TrainState, int, dict[str, Any]]:
    """(state, step, meta) of the newest intact checkpoint."""
    restored = checkpoints.restore(state, meta.get("config"))
    assert restored is not None
    step, state, stored = restored
    return donatable_copy(state, shardings), step, stored


def _result(state: TrainState, run: RunConfig) -> TrainState:
    """What `fit` returns."""
    return state if run.shard is None else jax.tree.map(np.asarray, gathered(state))


def make_inputs(mesh: Mesh, data: DataConfig, seed: int) -> Callable[[Any, Any, Array], tuple[dict[str, Any], Array]]:
    """(resident, batch, update's number) → (the update's batch as networks receive it, its random key); jittable.

    A batch is an array of indices into the resident examples, `IndexedBatches`, or a dictionary of arrays.
    """
    by_batch = NamedSharding(mesh, PartitionSpec("data"))

    def inputs(resident: dict[str, Any], batch: Any, number: Array) -> tuple[dict[str, Any], Array]:
        augment_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        rows = batch
        if not isinstance(batch, Mapping):
            indices, entries = (batch.indices, batch.entries) if isinstance(batch, IndexedBatches) else (batch, {})
            rows = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[indices], by_batch), resident["arrays"])
            rows = {**rows, **entries}
        mean, std = resident["mean"], resident["std"]
        with jax.named_scope("input"):
            return preprocess(rows, mean, std, augment_key, crop=data.crop, flip=data.flip), step_key

    return inputs


def make_update(step: Step, mesh: Mesh, data: DataConfig, seed: int, *, scanned: bool, shardings: Any = None) -> Any:
    """Compiles a step: (state, batch, resident, constants) → (state, metrics). The state is donated.

    Batches are as in `make_inputs`. With `scanned`, the function takes several, stacked, and returns stacked metrics.

    Args:
      shardings: of the state; None: replicated.
    """
    replicated, make = NamedSharding(mesh, PartitionSpec()), make_inputs(mesh, data, seed)

    def update(resident: dict[str, Any], constants: Any, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        inputs, key = make(resident, batch, state.step)
        with compiled_for(mesh):
            return step(state, inputs, key, constants)

    def update_once(state: TrainState, batch: Any, resident: dict[str, Any], constants: Any) -> Any:
        return update(resident, constants, state, batch)

    def update_many(state: TrainState, indices: Array, resident: dict[str, Any], constants: Any) -> Any:
        return jax.lax.scan(partial(update, resident, constants), state, indices)

    out = (replicated if shardings is None else shardings, replicated)
    return jax.jit(update_many if scanned else update_once, donate_argnums=0, out_shardings=out)


def make_dispatch(
    step: Step,
    mesh: Mesh,
    data: DataConfig,
    seed: int,
    *,
    scanned: bool,
    watched: Collection[str] | None = None,
    shardings: Any = None,
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, Metrics, bool]]:
    """Returns (state, batches, resident, constants) → (state, metrics (updates,), whether the state is finite).

    The state is donated. `fit` scans if examples reside on the devices, except on CPUs: XLA has no fast convolution
    inside a loop there (a ResNet-20 takes 15 times as long), and a call costs little. Streamed batches are not scanned,
    since all batches of a call would have to be in memory at once.

    Args:
      scanned: run all updates in one call of the device; otherwise each is one call, with results equal up to rounding.
        Batches are indices (updates, batch) or `IndexedBatches` then, and otherwise an iterable of batches, each as in
        `make_inputs`, on devices or not.
      watched: names of the leaves that must stay finite; None for all floating-point leaves.
      shardings: of the state; None: replicated.
    """
    by_batch, stacked = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), (None, "data")))
    compiled = make_update(step, mesh, data, seed, scanned=scanned, shardings=shardings)
    positions: list[int] = []  # of the watched leaves among all floating-point leaves

    # Bounds the updates in flight: many collectives can starve a few CPU threads, and many batches fill the memory.
    in_flight = 1 if jax.default_backend() == "cpu" else 2

    def dispatch(state: TrainState, batches: Any, resident: Any, constants: Any) -> Any:
        if scanned:
            state, metrics = compiled(state, place(batches, stacked), resident, constants)
        else:
            rows = []
            for batch in batches:
                state, row = compiled(state, place(batch, by_batch), resident, constants)
                rows.append(row)
                jax.block_until_ready(rows[-in_flight:][0])
            rows = jax.device_get(rows)
            metrics = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if not positions:
            names = [name for name, _ in _float_leaves(state)]
            positions.extend(i for i, name in enumerate(names) if watched is None or name in watched)
        leaves = [leaf for leaf in jax.tree.leaves(_parts(state)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return state, metrics, bool(_are_finite([leaves[i] for i in positions]).all())

    return dispatch


def _crosses(first: int, done: int, every: int) -> bool:
    """Whether there is a multiple of `every` in (first, done]."""
    return done // every > first // every


def _kind(state: TrainState) -> tuple[Any, list[Any]]:
    """(structure, [(shape, dtype) of each leaf])."""
    leaves, structure = jax.tree.flatten(state)
    arrays = (x if isinstance(x, (jax.Array, np.ndarray)) else np.asarray(x) for x in leaves)
    return structure, [(x.shape, x.dtype) for x in arrays]


def _replaced(state: TrainState, kind: tuple[Any, list[Any]], shardings: Any) -> TrainState:
    """The state that `between` returned, on the devices; ValueError if its structure, a shape or a dtype changed."""
    if (actual := _kind(state)) != kind:
        before, after = (_by_name(*each) for each in (kind, actual))
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                now, expected = after.get(name, "absent"), before.get(name, "absent")
                raise ValueError(f"between changed {name}: {now}, not {expected}")
    return place(state, shardings)


def _by_name(structure: Any, leaves: list[Any]) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(structure, range(len(leaves))))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaves[number] for path, number in paths}


def _parts(state: TrainState) -> tuple[Any, ...]:
    """The parts of a state, those first that explain most if they are not finite."""
    return state.params, state.model_state, state.extra, state.opt_state, state.ema


def _float_leaves(state: TrainState) -> list[tuple[str, Any]]:
    """(name, leaf) of all floating-point leaves, in the order of `_parts`; parameters have no prefix."""
    prefixes = ("", "model_state/", "extra/", "opt_state/", "ema/")
    return [
        (prefix + jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for prefix, part in zip(prefixes, _parts(state), strict=True)
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def _finite_leaves(state: TrainState) -> frozenset[str]:
    """Names of the leaves that are finite and must stay so; a history that is still to be filled is not."""
    names, leaves = zip(*_float_leaves(state), strict=True)
    return frozenset(name for name, finite in zip(names, _are_finite(leaves), strict=True) if finite)


def _are_finite(leaves: Sequence[Any]) -> NDArray[np.bool_]:
    """(leaves,) whether each is finite. On CPUs nothing is compiled: NumPy reads the arrays in place."""
    here = all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves if isinstance(leaf, Array))
    if jax.default_backend() == "cpu" and here:
        return np.array([_is_finite(leaf) for leaf in leaves], bool)
    return np.asarray(_are_finite_on_device(leaves))


@jax.jit
def _are_finite_on_device(leaves: Sequence[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def _is_finite(leaf: Any) -> bool:
    return bool(np.isfinite(np.asarray(leaf)).all())
