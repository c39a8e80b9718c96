"""One training loop for the teacher, the search and the student.

A `Step` is a pure function (state, batch, key, constants) → (state, metrics): one update. `fit` owns all the rest. It
compiles `run.steps_per_dispatch` updates into one call (`lax.scan` under `jit` over a mesh of all devices of all
processes; on CPUs the loop is Python's), with the state donated. Images lie on the devices as uint8; per call only the
indices of the batches are sent, sharded over the devices; augmentation and normalisation are part of the compiled
step. BatchNorm therefore sees the whole batch, however many devices share it.

Between two calls the host looks at the losses, calls `between`, evaluates, writes metrics and checkpoints. Everything
random is folded from (seed, step), so step n does the same whether or not the run was interrupted before it, and calls
begin at multiples of `run.steps_per_dispatch` in any case: a resumed run ends bit by bit where an uninterrupted one
does, on the same machine. Why a mesh and not `pmap`: docs/training.md.

Not here: what is trained and by which loss beyond the two plain cases, data larger than a device, sharded parameters.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import unfreeze
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdsearch_jax import losses
from kdsearch_jax.checkpoint import Checkpointer, preemption
from kdsearch_jax.config import RULES, DataConfig, DistillConfig, RunConfig, StageConfig, nearest
from kdsearch_jax.data import Dataset, augment, batch_indices, normalise
from kdsearch_jax.metrics import MetricsWriter, Progress
from kdsearch_jax.student import Student

Batch = dict[str, Array]  # {"images": normalised float32 (batch, height, width, channels), "labels": int32 (batch,)}
Metrics = dict[str, Array]  # scalars; "loss" must be among them

CHOICES = {"optimizer": ("sgd", "adamw"), "schedule": ("cosine", "step", "constant"), "precision": ("fp32", "bf16")}
_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
# How modules call the switch between training and inference, and its value for training.
_MODES = {"train": True, "training": True, "is_training": True, "deterministic": False}


class TrainState(flax.struct.PyTreeNode):
    """All that training changes; what is not in here is not in a checkpoint.

    Attributes:
      step: int32 scalar, updates done.
      params: the trained parameters, float32 whatever the precision of the computation.
      model_state: the module's other collections, {"batch_stats": …}; {} where it has none.
      opt_state: the optimiser's state.
      ema: averaged {"params": …, **model_state}, or None.
      extra: whatever else a `Step` or `between` carries along: gates, importance, a controller's memory; or None.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any = None
    extra: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What to evaluate and to keep: the averaged variables where there are such, else the current ones."""
        return {"params": self.params, **self.model_state} if self.ema is None else self.ema


Step = Callable[[TrainState, Batch, Array, Any], tuple[TrainState, Metrics]]


class TrainingDiverged(FloatingPointError):
    """The loss or a parameter is no longer a finite number."""


class Preempted(RuntimeError):
    """SIGTERM came; the state is saved. A command ends with the status of a process that SIGTERM has ended."""

    exit_status = 143


def create_state(
    variables: Any, tx: optax.GradientTransformation, *, ema: float | None = None, extra: Any = None
) -> TrainState:
    """The state before the first update of a network's `variables`, {"params": …, "batch_stats": …}."""
    model_state = {name: leaves for name, leaves in unfreeze(variables).items() if name != "params" and leaves}
    params = unfreeze(variables)["params"]
    average = None if ema is None else {"params": params, **model_state}
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params), average, extra)


# --- optimiser ------------------------------------------------------------------------------------------------------


def make_schedule(stage: StageConfig) -> optax.Schedule:
    """Learning rate of update 0, 1, …: linear warm-up to `learning_rate` at update `warmup` − 1, then the schedule.

    `cosine` ends at 0 after the last update; `step` is multiplied by `decay` at each of `boundaries` (shares of all
    `steps`); `constant` stays.

    Raises:
      ValueError: a setting is out of range.
    """
    _check_stage(stage)
    rate, remaining = stage.learning_rate, stage.steps - stage.warmup
    if stage.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(remaining, 1))
    elif stage.schedule == "step":
        steps = [round(share * stage.steps) - stage.warmup for share in stage.boundaries]
        main = optax.piecewise_constant_schedule(rate, {step: stage.decay ** steps.count(step) for step in steps})
    else:
        main = optax.constant_schedule(rate)
    if not stage.warmup:
        return main
    rising = optax.linear_schedule(rate / stage.warmup, rate, max(stage.warmup - 1, 1))
    return optax.join_schedules([rising, main], [stage.warmup])


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """The optimiser of a stage: clip the global norm, add weight decay, step with the scheduled rate.

    Weight decay is on kernels only: leaves of two axes or more that are not named `bias` or `scale`. For `sgd` it is
    part of the gradient, before Nesterov's momentum; for `adamw` it is decoupled (Loshchilov and Hutter 2019).

    Raises:
      ValueError: a setting is out of range.
    """
    schedule, parts = make_schedule(stage), []
    if stage.clip is not None:
        parts.append(optax.clip_by_global_norm(stage.clip))
    if stage.optimizer == "sgd":
        parts.append(optax.add_decayed_weights(stage.weight_decay, mask=is_kernel))
        parts.append(optax.sgd(schedule, stage.momentum, nesterov=stage.momentum > 0))
    else:
        parts.append(optax.adamw(schedule, b1=stage.momentum, weight_decay=stage.weight_decay, mask=is_kernel))
    return optax.chain(*parts)


def is_kernel(params: Any) -> Any:
    """Per leaf of `params`: whether weight decay acts on it."""

    def kernel(path: Any, leaf: Array) -> bool:
        return leaf.ndim >= 2 and getattr(path[-1], "key", None) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(kernel, params)


def _check(record: StageConfig | RunConfig, prefix: str) -> None:
    """Raises ValueError for a setting out of range, by the rules of `kdsearch_jax.config`."""
    for setting, known in CHOICES.items():
        if (value := getattr(record, setting, known[0])) not in known:
            raise ValueError(f"{setting}: {value!r} is unknown; {nearest(value, known)}")
    for pattern, (holds, requirement) in RULES.items():
        setting = pattern.removeprefix(prefix)
        value = getattr(record, setting, None) if setting != pattern else None
        if value is not None and not holds(value):
            raise ValueError(f"{setting}: {value!r} is not possible; {requirement}")


def _check_stage(stage: StageConfig) -> None:
    _check(stage, "*.")
    if stage.warmup >= max(stage.steps, 1):
        raise ValueError(f"warmup: {stage.warmup} is not possible; give fewer updates than steps, {stage.steps}")


# --- one update -----------------------------------------------------------------------------------------------------


def apply_train(
    module: nn.Module, params: Any, model_state: Any, images: Array, key: Array, precision: str = "fp32"
) -> tuple[Array, Any]:
    """The module in training mode.

    With `precision="bf16"` parameters and images are cast, so that an unmodified module computes in bfloat16; the other
    collections (BatchNorm's running statistics) stay as they are, and Linen reduces its statistics in float32.

    Args:
      params, model_state: as in `TrainState`; every collection of `model_state` may change.
      images: (batch, height, width, channels), normalised.
      key: for dropout and any other random stream of the module.
      precision: "fp32" or "bf16".

    Returns:
      logits (batch, classes) in float32, and the new `model_state`, of the old structure and dtypes.
    """
    dtype = _dtype(precision)
    logits, changed = module.apply(
        {"params": _cast(params, dtype), **model_state},
        images.astype(dtype),
        **mode(module, train=True),
        rngs={"dropout": key, "params": jax.random.fold_in(key, 1)},  # Linen's streams fall back on "params"
        mutable=list(model_state),
    )
    kept = jax.tree.map(lambda old, new: new.astype(old.dtype), model_state, unfreeze(changed))
    return logits.astype(jnp.float32), kept


def apply_eval(module: nn.Module, variables: Any, images: Array, precision: str = "fp32") -> Array:
    """Logits (batch, classes) in float32 of the module in inference mode; nothing changes."""
    dtype = _dtype(precision)
    variables = {**variables, "params": _cast(variables["params"], dtype)}
    return jnp.asarray(module.apply(variables, images.astype(dtype), **mode(module, train=False)), jnp.float32)


def mode(module: nn.Module, train: bool) -> dict[str, Any]:
    """The keyword by which `module.__call__` is told to train, `train=…` or another; {} where it has none."""
    inner = module.base if isinstance(module, Student) else module
    parameters = inspect.signature(type(inner).__call__).parameters
    return {name: value is train for name, value in _MODES.items() if name in parameters}


def _dtype(precision: str) -> Any:
    if precision not in _DTYPES:
        raise ValueError(f"precision: {precision!r} is unknown; {nearest(precision, _DTYPES)}")
    return _DTYPES[precision]


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def update(
    state: TrainState, gradient: Any, model_state: Any, tx: optax.GradientTransformation, ema: float | None
) -> TrainState:
    """The state after one update of the parameters by their `gradient`; `extra` is left alone."""
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if ema is not None:
        average = averaged(state.ema, {"params": params, **model_state}, ema, state.step)
    return state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=average)


def averaged(average: Any, variables: Any, decay: float, step: Array) -> Any:
    """a ← d·a + (1 − d)·v with d = min(decay, (1 + step)/(10 + step)), so that the first values are soon forgotten.

    Statistics are averaged as parameters are; leaves that are no floats are taken over.
    """
    count = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + count) / (10 + count))

    def mix(old: Array, new: Array) -> Array:
        return (rate * old + (1 - rate) * new).astype(old.dtype) if jnp.issubdtype(old.dtype, jnp.floating) else new

    return jax.tree.map(mix, average, variables)


def supervised_step(module: nn.Module, tx: optax.GradientTransformation, stage: StageConfig, run: RunConfig) -> Step:
    """One update on the cross-entropy with the labels; takes no constants."""

    def loss(logits: Array, batch: Batch, _: Any) -> Array:
        return losses.cross_entropy(logits, batch["labels"])

    return _gradient_step(module, tx, stage, run, loss)


def distill_step(
    module: nn.Module,
    teacher: nn.Module,
    tx: optax.GradientTransformation,
    stage: StageConfig,
    distill: DistillConfig,
    run: RunConfig,
) -> Step:
    """One update on `losses.distillation` against a fixed teacher; its variables are the constants given to `fit`."""
    losses.check(distill)

    def loss(logits: Array, batch: Batch, teacher_variables: Any) -> Array:
        target = apply_eval(teacher, teacher_variables, batch["images"], run.precision)
        return losses.distillation(logits, target, batch["labels"], distill)

    return _gradient_step(module, tx, stage, run, loss)


def _gradient_step(
    module: nn.Module,
    tx: optax.GradientTransformation,
    stage: StageConfig,
    run: RunConfig,
    example_loss: Callable[[Array, Batch, Any], Array],
) -> Step:
    schedule = make_schedule(stage)
    _dtype(run.precision)

    def step(state: TrainState, batch: Batch, key: Array, constants: Any) -> tuple[TrainState, Metrics]:
        def loss(params: Any) -> tuple[Array, tuple[Array, Any]]:
            logits, kept = apply_train(module, params, state.model_state, batch["images"], key, run.precision)
            return example_loss(logits, batch, constants).mean(), (logits, kept)

        (value, (logits, kept)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        metrics = {
            "loss": value,
            "accuracy": (logits.argmax(-1) == batch["labels"]).mean(),
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return update(state, gradient, kept, tx, stage.ema), metrics

    return step


# --- devices --------------------------------------------------------------------------------------------------------


def data_mesh() -> Mesh:
    """One axis, "data", over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh | None = None) -> Any:
    """Every leaf whole on every device of the mesh, by default of all devices of all processes."""
    return place(tree, NamedSharding(mesh or data_mesh(), PartitionSpec()))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Every leaf in this sharding, which may reach over several processes; they must all hold the same values."""

    def put(leaf: Any) -> Array:
        # Exactly this sharding, not an equivalent one: `jit` would compile anew for an equivalent one.
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding and not leaf.weak_type:
            return leaf
        host = np.asarray(leaf if isinstance(leaf, (np.ndarray, jax.Array)) else jnp.asarray(leaf))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def _owned(tree: Any, mesh: Mesh) -> Any:
    """Copies in buffers of the compiler's own: donation frees them, while the caller's arrays stay alive."""
    copy = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return copy(replicate(tree, mesh))


# --- the loop -------------------------------------------------------------------------------------------------------


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
        so that none of this changes what is computed. The end of training always evaluates and saves.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/.
      name: of the stage, for people.
      meta: JSON kept with every checkpoint; where it has "config", a resumed run must have the same.
      constants: arrays that `step` reads and does not change (a teacher's variables).
      evaluate: metrics of a state, such as {"validation_accuracy": …}, by which the best checkpoint is kept. The arrays
        of the state that it gets are gone after the next update: keep none of them.
      between: called on the host after each call; may change values of the state (not shapes or dtypes), and returns
        metrics too. Its memory belongs into `state.extra`, or a resumed run would go another way.
      seed: of batches, augmentation and dropout.
      resume: go on from the newest good checkpoint of `directory`, if there is one.

    Returns:
      The last state, on all devices.

    Raises:
      ValueError: settings and data do not go together; `between` changed the structure; the config differs from that of
        the checkpoint.
      FileExistsError: `directory` has checkpoints and `resume` is False.
      TrainingDiverged: a loss or a parameter is NaN or infinite.
      Preempted: SIGTERM came; the state is saved.
    """
    mesh = data_mesh()
    _check_stage(stage)
    _check(run, "run.")
    _check_batch(stage, dataset, mesh)
    resident = {
        "images": dataset.train.images,
        "labels": dataset.train.labels,
        "mean": np.asarray(dataset.mean, np.float32),
        "std": np.asarray(dataset.std, np.float32),
    }
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpointer(Path(directory) / "checkpoints", run.keep))
        state = _begin(_owned(state, mesh), checkpoints, meta, resume, mesh)
        first = int(state.step)
        if first >= stage.steps:
            return state
        report = stack.enter_context(_report(Path(directory), name, stage.steps, first))
        stop = stack.enter_context(preemption())
        resident, constants, kind = replicate(resident, mesh), replicate(constants, mesh), _kind(state)
        dispatch = make_dispatch(step, mesh, data, seed, scanned=jax.default_backend() != "cpu")
        compiled: set[int] = set()
        while first < stage.steps:
            count = min(run.steps_per_dispatch - first % run.steps_per_dispatch, stage.steps - first)
            done, last = first + count, first + count == stage.steps
            indices = batch_indices(seed, len(dataset.train.labels), stage.batch_size, first, count)
            start = time.perf_counter()
            state, metrics, finite = dispatch(state, indices, resident, constants)
            metrics = {key: np.asarray(value) for key, value in metrics.items()}  # waits for the devices
            seconds = time.perf_counter() - start
            if not (np.isfinite(metrics["loss"]).all() and finite):
                raise TrainingDiverged(_divergence(name, first, metrics["loss"], state, checkpoints))
            row = {key: float(metrics[key].mean()) for key in sorted(metrics, key="loss".__ne__)}  # loss first
            if count in compiled:  # the first call of each length is mostly compilation
                row["images_per_second"] = count * stage.batch_size / seconds
            compiled.add(count)
            if between is not None:
                state, more = between(state)
                state, row = _settled(state, kind, mesh), row | more
            stopping = stop.requested
            if evaluate is not None and not stopping and (last or _passes(first, done, run.evaluate_every)):
                row |= evaluate(state)
            report(done, row)
            if last or stopping or _passes(first, done, run.checkpoint_every):
                checkpoints.save(done, state, meta, row, wait=last or stopping)
            if stopping:
                raise Preempted(f"{name}: stopped by SIGTERM and saved at step {done} of {stage.steps}; resume goes on")
            first = done
    return state


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
    examples, size = len(dataset.train.labels), stage.batch_size
    if size % mesh.size:
        near = max(mesh.size, size - size % mesh.size)
        raise ValueError(f"batch_size: {size} is not a multiple of the {mesh.size} devices; give {near}, for example")
    if size > examples:
        raise ValueError(f"batch_size: {size} is more than the {examples} training images; give {examples} or less")


def _begin(state: TrainState, checkpoints: Checkpointer, meta: dict[str, Any], resume: bool, mesh: Mesh) -> TrainState:
    """The state to go on from: that of the newest good checkpoint, or else the one given."""
    if not resume:
        if steps := checkpoints.steps():
            raise FileExistsError(
                f"{checkpoints.directory} has checkpoints up to step {steps[-1]}; resume, or give another directory"
            )
        return state
    restored = checkpoints.restore(state, meta.get("config"))
    return state if restored is None else _owned(restored[1], mesh)


def make_dispatch(
    step: Step, mesh: Mesh, data: DataConfig, seed: int, *, scanned: bool
) -> Callable[[TrainState, np.ndarray, Any, Any], tuple[TrainState, Metrics, Array]]:
    """(state, indices (updates, batch), resident, constants) → (state, metrics (updates,), whether params are finite).

    The state is donated. With `scanned` all updates are one call of the device, else each is one, with equal results up
    to rounding. `fit` scans except on CPUs: XLA has no fast convolution there inside of a loop (a ResNet-20 takes 15
    times as long), and a call costs nothing worth saving.
    """
    whole, shared, stacked = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",), (None, "data")))

    def one(resident: dict[str, Array], constants: Any, state: TrainState, index: Array) -> tuple[TrainState, Metrics]:
        augment_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        images = jax.lax.with_sharding_constraint(resident["images"][index], shared)
        images = augment(augment_key, images, crop=data.crop, flip=data.flip)
        batch = {"images": normalise(images, resident["mean"], resident["std"]), "labels": resident["labels"][index]}
        return step(state, batch, step_key, constants)

    def update_once(state: TrainState, index: Array, resident: dict[str, Array], constants: Any) -> Any:
        return one(resident, constants, state, index)

    def update_many(state: TrainState, indices: Array, resident: dict[str, Array], constants: Any) -> Any:
        return jax.lax.scan(partial(one, resident, constants), state, indices)

    compiled = jax.jit(update_many if scanned else update_once, donate_argnums=0, out_shardings=whole)
    finite = jax.jit(lambda params: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all())

    def dispatch(state: TrainState, indices: np.ndarray, resident: Any, constants: Any) -> Any:
        if scanned:
            state, metrics = compiled(state, place(indices, stacked), resident, constants)
        else:
            rows = []
            for index in indices:
                state, row = compiled(state, place(index, shared), resident, constants)
                rows.append(jax.device_get(row))  # waits: many collectives under way can starve few CPU threads
            metrics = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return state, metrics, finite(state.params)

    return dispatch


def _passes(first: int, done: int, every: int) -> bool:
    """Whether a multiple of `every` is in (first, done]."""
    return done // every > first // every


def _kind(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, jnp.dtype(x.dtype)) for path, x in leaves}


def _settled(state: TrainState, kind: dict[str, Any], mesh: Mesh) -> TrainState:
    """What `between` gave back, on the devices; another structure would be compiled again, or fail in an odd place."""
    found = _kind(jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), state))
    for path in {**kind, **found}:
        if kind.get(path) != found.get(path):
            raise ValueError(f"between changed {path}: {found.get(path, 'absent')}, not {kind.get(path, 'absent')}")
    return replicate(state, mesh)


def _divergence(name: str, first: int, loss: np.ndarray, state: TrainState, checkpoints: Checkpointer) -> str:
    """What to tell a user whose training has blown up."""
    bad = np.flatnonzero(~np.isfinite(loss))
    what = f"loss is {loss[bad[0]]} at step {first + bad[0] + 1}" if len(bad) else f"step {first + len(loss)}"
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]:
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            what += f", {jax.tree_util.keystr(path, simple=True, separator='/')} is not finite"
            break
    steps = checkpoints.steps()
    good = (
        f"the last good checkpoint is {checkpoints.directory / str(steps[-1])}" if steps else "there is no checkpoint"
    )
    return f"{name}: {what}; {good}. Lower learning_rate, or give clip or a longer warmup"
