"""One training loop for the teacher, the search and the student.

A `Step` (`kdsearch_jax.training.steps`) is one update, a pure function. `fit` owns all the rest. It compiles
`run.steps_per_dispatch` updates into one call (`lax.scan` under `jit` over a mesh of all devices of all processes; on
CPUs, and for streamed examples, the loop is Python's), with the state donated. Examples lie on the devices, images as
uint8, and per call only the indices of the batches are sent; or batches are streamed
(`kdsearch_jax.data.device_feed`). They are
sharded over the devices; augmentation and normalisation are part of the compiled step. BatchNorm therefore sees the
whole batch, however many devices share it.

Between two calls the host looks at the losses, calls `between`, evaluates, writes metrics and checkpoints. Everything
random is folded from (seed, step), so step n does the same whether or not the run was interrupted before it, and calls
begin at multiples of `run.steps_per_dispatch` in any case: a resumed run ends bit by bit where an uninterrupted one
does, on the same machine. Why a mesh and not `pmap`: docs/training.md.

Not here: what is trained and by which loss, where batches come from, sharded parameters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from kdsearch_jax.adapters.devices import data_mesh, donatable_copy, place, replicate
from kdsearch_jax.data import device_feed
from kdsearch_jax.data.batches import prepared
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.progress import Progress
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.training.checkpoints import Checkpointer
from kdsearch_jax.training.metrics import MetricsWriter
from kdsearch_jax.training.optimizer import check_record, check_stage
from kdsearch_jax.training.preemption import Preempted, preemption, terminable
from kdsearch_jax.training.rollback import KEY, Guard
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import Metrics, Step, TrainState

log = logging.getLogger(__name__)

_UNEVALUATED = "unevaluated"  # in the meta of a checkpoint: its metrics, where SIGTERM came before the evaluation


class TrainingDiverged(FloatingPointError):
    """The loss, or an array of the state, is no longer finite."""


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
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    between: Callable[[TrainState], tuple[TrainState, dict[str, float]]] | None = None,
    until: Callable[[TrainState], bool] | None = None,
    checkpoints_in: Path | None = None,
    seed: int = 0,
    resume: bool = False,
) -> TrainState:
    """Trains `state` for `stage.steps` updates, with checkpoints, metrics and progress in `directory`.

    Args:
      state: where to begin; its arrays stay usable.
      step: one update, see `Step`.
      dataset, data: whose training split is used, and how it is augmented.
      stage: number of updates and batch size, over all devices.
      run: updates a call, and how often to evaluate and to save: at the end of the call in which the number is reached,
        so that none of this changes what is computed. The end of training always evaluates and saves; other checkpoints
        are left out where they would take more than `run.checkpoint_share` of the time.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/.
      name: of the stage, for people.
      meta: JSON kept with every checkpoint; where it has "config", a resumed run must have the same.
      constants: arrays that `step` reads and does not change (a teacher's variables).
      evaluate: metrics of a state, such as {"validation_accuracy": …}, by which the best checkpoint is kept. The arrays
        of the state that it gets are gone after the next update: keep none of them.
      between: called on the host after each call; may change values of the state (not shapes or dtypes), and returns
        metrics too. Its memory belongs into `state.extra`, or a resumed run would go another way.
      until: asked on the host before the first call and after each; True ends the training there, as its last step
        would.
      checkpoints_in: where the checkpoints lie, if not in `directory`/checkpoints.
      seed: of batches, augmentation and dropout.
      resume: go on from the newest good checkpoint of `directory`, if there is one.

    Returns:
      The last state, on all devices.

    Raises:
      ValueError: settings and data do not go together; `between` changed the structure; the config differs from that of
        the checkpoint.
      FileExistsError: `directory` has checkpoints and `resume` is False.
      TrainingDiverged: a loss is NaN or infinite, or an array of the state that was finite at the beginning.
      Preempted: SIGTERM came; the state is saved.
    """
    mesh = data_mesh()
    check_stage(stage)
    check_record(run, "run.")
    _check_batch(stage, dataset, mesh)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpointer(checkpoints_in or Path(directory) / "checkpoints", run.keep))
        state = donatable_copy(state, mesh)
        watched = _watched(state)  # not of what is resumed: what is not finite there has become so
        state, stored = _begin(state, checkpoints, meta, resume, mesh)
        first, guard, noted = int(state.step), Guard(run, stored.get(KEY)), {}
        if evaluate is not None and (row := stored.get(_UNEVALUATED)) is not None:
            with _report(Path(directory), name, stage.steps, first - 1) as report:
                report(first, row | evaluate(state))
        if first >= stage.steps or (until is not None and until(state)):
            return state
        share = None if guard.active else run.checkpoint_share  # what it goes back to is not for the clock to say
        if guard.active and not checkpoints.steps():  # there must be one to go back to
            checkpoints.save(first, state, {**meta, **guard.memory}, wait=True)
        shown = stack.enter_context(ExitStack())
        report = shown.enter_context(_report(Path(directory), name, stage.steps, first))
        stop = stack.enter_context(preemption())
        feed = stack.enter_context(closing(device_feed.make(dataset, stage.batch_size, mesh, stage.steps)))
        constants, kind = replicate(constants, mesh), _kind(state)
        scanned = feed.resides and jax.default_backend() != "cpu"
        dispatch = make_dispatch(step, mesh, data, seed, scanned=scanned, watched=watched)
        compiled: set[int] = set()
        told = False  # that a jump was let pass
        while first < stage.steps:
            count = min(run.steps_per_dispatch - first % run.steps_per_dispatch, stage.steps - first)
            done, last = first + count, first + count == stage.steps
            start, waited = time.perf_counter(), feed.waited
            sent = feed.take(first, count, guard.seed(seed, first))
            state, metrics, finite = dispatch(state, sent, feed.resident, constants)
            metrics = {key: np.asarray(value) for key, value in metrics.items()}  # waits for the devices
            seconds = time.perf_counter() - start
            broken = not (np.isfinite(metrics["loss"]).all() and finite)
            jumps = guard.jumps(np.nan if broken else float(metrics["loss"].mean()))
            if jumps and not guard.spent:
                state, good, stored = _restored(state, checkpoints, meta, mesh)
                noted = guard.back(stored, good, done)
                log.warning(
                    "%s: the loss jumped to %.4g by step %d; going back to step %d, and on by other batches (%d of %d)",
                    name, metrics["loss"].mean(), done, good, noted["rollbacks"], run.rollbacks,
                )  # fmt: skip
                shown.close()
                report, first = shown.enter_context(_report(Path(directory), name, stage.steps, good)), good
                continue
            if broken:
                raise TrainingDiverged(
                    _divergence(name, first, metrics["loss"], state, watched, constants, checkpoints)
                )
            if jumps and not told:
                told = True
                log.warning(
                    "%s: the loss jumped to %.4g by step %d; all run.rollbacks (%d) are used up, so training goes on",
                    name, metrics["loss"].mean(), done, run.rollbacks,
                )  # fmt: skip
            row = {key: float(metrics[key].mean()) for key in sorted(metrics, key="loss".__ne__)} | noted  # loss first
            noted = {}
            if count in compiled:  # the first call of each length is mostly compilation
                row["images_per_second"] = count * stage.batch_size / seconds
                if not feed.resides:
                    row["data_wait"] = (feed.waited - waited) / seconds
            compiled.add(count)
            if between is not None:
                state, more = between(state)
                state, row = _settled(state, kind, mesh), row | more
            last = last or (until is not None and until(state))
            stopping = stop.requested
            left: dict[str, Any] = {}
            if evaluate is not None and (last or _passes(first, done, run.evaluate_every)):
                scores = None if stopping else _evaluated(evaluate, state)
                left = {_UNEVALUATED: row} if scores is None else {}
                row, stopping = row | (scores or {}), stop.requested or scores is None
            report(done, row)
            due = _passes(first, done, run.checkpoint_every)
            if last or stopping or (due and checkpoints.affordable(share)):
                if between is not None and not _all_finite([x for path, x in _floats(state) if path in watched]):
                    nothing = np.empty(0)
                    raise TrainingDiverged(_divergence(name, done, nothing, state, watched, constants, checkpoints))
                checkpoints.save(done, state, {**meta, **guard.memory, **left}, row, wait=last or stopping)
            if stopping:
                raise Preempted(
                    f"{name}: stopped by SIGTERM and saved at step {done} of {stage.steps}; the same command goes on"
                )
            if last:
                break
            first = done
    return state


def _evaluated(evaluate: Callable[[TrainState], dict[str, float]], state: TrainState) -> dict[str, float] | None:
    """The metrics of a state; None where SIGTERM came meanwhile. Several processes finish it together."""
    try:
        with terminable():
            return evaluate(state)
    except Preempted:
        return None


@contextmanager
def _report(directory: Path, name: str, total: int, first: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function that writes a row of metrics and moves the progress bar; only the first process has either."""
    if jax.process_index() > 0:
        yield lambda step, row: None
        return
    with MetricsWriter(directory, first) as writer, Progress(name, total, first) as progress:

        def report(step: int, row: dict[str, float]) -> None:
            writer.write(step, row)
            progress.update(step, row)

        yield report


def _check_batch(stage: StageConfig, dataset: Dataset, mesh: Mesh) -> None:
    examples, size = len(dataset.train), stage.batch_size
    if size % mesh.size:
        near = max(mesh.size, size - size % mesh.size)
        raise ValueError(f"batch_size: {size} is not a multiple of the {mesh.size} devices; give {near}, for example")
    if size > examples:
        raise ValueError(f"batch_size: {size} is more than the {examples} training examples; give {examples} or less")


def _begin(
    state: TrainState, checkpoints: Checkpointer, meta: dict[str, Any], resume: bool, mesh: Mesh
) -> tuple[TrainState, dict[str, Any]]:
    """(state to go on from, its meta): those of the newest good checkpoint, or else the state given."""
    if not resume:
        if steps := checkpoints.steps():
            raise FileExistsError(
                f"{checkpoints.directory} has checkpoints up to step {steps[-1]}; resume, or give another directory"
            )
        return state, {}
    if not checkpoints.steps():
        return state, {}
    state, _, stored = _restored(state, checkpoints, meta, mesh)
    return state, stored


def _restored(
    state: TrainState, checkpoints: Checkpointer, meta: dict[str, Any], mesh: Mesh
) -> tuple[TrainState, int, dict[str, Any]]:
    """(state, step, meta) of the newest good checkpoint."""
    found = checkpoints.restore(state, meta.get("config"))
    assert found is not None
    return donatable_copy(found[1], mesh), found[0], found[2]


def make_update(step: Step, mesh: Mesh, data: DataConfig, seed: int, *, scanned: bool) -> Any:
    """(state, batch, resident, constants) → (state, metrics), compiled; with `scanned` of several batches of indices.

    A batch is indices into what is resident, or itself. The state is donated.
    """
    whole, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def one(resident: dict[str, Any], constants: Any, state: TrainState, sent: Any) -> tuple[TrainState, Metrics]:
        augment_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        rows = sent
        if not isinstance(sent, Mapping):
            rows = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[sent], shared), resident["arrays"])
        batch = prepared(rows, resident["mean"], resident["std"], augment_key, crop=data.crop, flip=data.flip)
        return step(state, batch, step_key, constants)

    def update_once(state: TrainState, sent: Any, resident: dict[str, Any], constants: Any) -> Any:
        return one(resident, constants, state, sent)

    def update_many(state: TrainState, indices: Array, resident: dict[str, Any], constants: Any) -> Any:
        return jax.lax.scan(partial(one, resident, constants), state, indices)

    return jax.jit(update_many if scanned else update_once, donate_argnums=0, out_shardings=whole)


def make_dispatch(
    step: Step, mesh: Mesh, data: DataConfig, seed: int, *, scanned: bool, watched: Collection[str] | None = None
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, Metrics, bool]]:
    """(state, batches, resident, constants) → (state, metrics (updates,), whether the state is finite).

    Batches are indices (updates, batch) into what is resident, or an iterable of batches, on the devices or not.

    watched: names of the leaves that are to be finite; None: all of floating point.

    The state is donated. With `scanned` all updates are one call of the device, else each is one, with equal results up
    to rounding. `fit` scans where examples reside, except on CPUs: XLA has no fast convolution there inside of a loop
    (a ResNet-20 takes 15 times as long), and a call costs nothing worth saving. Of streamed batches as many as a call
    has updates would have to be in memory at once.
    """
    shared, stacked = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), (None, "data")))
    compiled = make_update(step, mesh, data, seed, scanned=scanned)
    places: list[int] = []  # of what is watched, among all of floating point

    # Waits for an update: many collectives under way can starve few CPU threads, and many batches fill a memory.
    behind = 1 if jax.default_backend() == "cpu" else 2

    def dispatch(state: TrainState, sent: Any, resident: Any, constants: Any) -> Any:
        if scanned:
            state, metrics = compiled(state, place(sent, stacked), resident, constants)
        else:
            rows = []
            for each in sent:
                state, row = compiled(state, place(each, shared), resident, constants)
                rows.append(row)
                jax.block_until_ready(rows[-behind:][0])
            rows = jax.device_get(rows)
            metrics = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if not places:
            places.extend(i for i, (name, _) in enumerate(_floats(state)) if watched is None or name in watched)
        leaves = [leaf for leaf in jax.tree.leaves(_parts(state)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return state, metrics, _all_finite([leaves[i] for i in places])

    return dispatch


def _passes(first: int, done: int, every: int) -> bool:
    """Whether a multiple of `every` is in (first, done]."""
    return done // every > first // every


def _kind(state: TrainState) -> tuple[Any, list[Any]]:
    """(structure, [(shape, dtype), …] of the leaves)."""
    leaves, structure = jax.tree.flatten(state)
    arrays = (x if isinstance(x, (jax.Array, np.ndarray)) else np.asarray(x) for x in leaves)
    return structure, [(x.shape, x.dtype) for x in arrays]


def _settled(state: TrainState, kind: tuple[Any, list[Any]], mesh: Mesh) -> TrainState:
    """What `between` gave back, on the devices; another structure would be compiled again, or fail in an odd place."""
    if (found := _kind(state)) != kind:
        before, after = (_by_name(*each) for each in (kind, found))
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                what, wanted = after.get(name, "absent"), before.get(name, "absent")
                raise ValueError(f"between changed {name}: {what}, not {wanted}")
    return replicate(state, mesh)


def _by_name(structure: Any, leaves: list[Any]) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(structure, range(len(leaves))))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaves[number] for path, number in paths}


def _floats(state: TrainState) -> list[tuple[str, Any]]:
    """(name, leaf) of all that is of floating point, in the order of `_parts`."""
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(_parts(state))[0]
    ]
    # Parameters go by their own names, as everywhere.
    names = ("", "model_state/", "extra/", "opt_state/", "ema/")
    return [
        (names[int(number)] + path, leaf)
        for (number, _, path), leaf in ((name.partition("/"), leaf) for name, leaf in named)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def _parts(state: TrainState) -> tuple[Any, ...]:
    """What explains most, if it is not finite, comes first."""
    return state.params, state.model_state, state.extra, state.opt_state, state.ema


def _all_finite(leaves: Sequence[Any]) -> bool:
    return bool(_finite(leaves).all())


def _finite(leaves: Sequence[Any]) -> NDArray[np.bool_]:
    """(leaves,) whether each is finite. On a CPU nothing is compiled for it: arrays are looked at where they are."""
    if jax.default_backend() == "cpu":
        return np.array([_is_finite(leaf) for leaf in leaves], bool)
    return np.asarray(_finite_on_device(leaves))


@jax.jit
def _finite_on_device(leaves: Sequence[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def _is_finite(leaf: Any) -> bool:
    return bool(np.isfinite(np.asarray(leaf)).all())


def _watched(state: TrainState) -> frozenset[str]:
    """Leaves that are finite at the beginning, and so shall stay; a history of what is still to come is not."""
    names, leaves = zip(*_floats(state), strict=True)
    return frozenset(name for name, good in zip(names, _finite(leaves), strict=True) if good)


def _divergence(
    name: str,
    first: int,
    loss: np.ndarray,
    state: TrainState,
    watched: Collection[str],
    constants: Any,
    checkpoints: Checkpointer,
) -> str:
    """What to tell a user whose training has blown up."""
    bad = np.flatnonzero(~np.isfinite(loss))
    what = f"loss is {loss[bad[0]]} at step {first + bad[0] + 1}" if len(bad) else f"step {first + len(loss)}"
    if bad_leaf := next((path for path, leaf in _floats(state) if path in watched and not _is_finite(leaf)), None):
        what += f", {bad_leaf} is not finite"
    for path, leaf in jax.tree_util.tree_flatten_with_path(constants)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _is_finite(leaf):
            what += f", nor is the teacher's {jax.tree_util.keystr(path, simple=True, separator='/')}"
            break
    steps = checkpoints.steps()
    good = (
        f"the last good checkpoint is {checkpoints.directory / str(steps[-1])}" if steps else "there is no checkpoint"
    )
    return f"{name}: {what}; {good}. Lower learning_rate, or give clip or a longer warmup"
