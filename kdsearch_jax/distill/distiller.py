"""Who teaches a student, and by which losses: what the steps of search and retraining have in common.

A `Distiller` holds pure functions for a step:

    target     what the teachers show for a batch: outputs, their mean if there are several, and features of the first
    train      what the student shows in training mode
    distance   one number an example: the task's own distance, and (1 − cross_entropy)·Σ weight·loss over the losses of
               features in `distill.losses`

`hint` and `crd` learn linear maps meanwhile. They live in the state's `extra`, with an optimiser of the stage's kind,
and never in its parameters: no student has them. `prepare` decides all that is decided once a stage: which layers are
compared, whether the teachers' outputs are cached, and how the maps begin.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from kdsearch_jax.adapters.apply import apply_eval, apply_train
from kdsearch_jax.adapters.memoize import RecentValues
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import ensemble, features, losses, teacher_cache
from kdsearch_jax.distill.ensemble import Member, Teacher
from kdsearch_jax.distill.losses import learned
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.distill.settings import DistillConfig, loss_weights
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig

__all__ = ["Distiller", "Lesson", "Shown", "Teacher", "examine", "prepare"]

log = logging.getLogger(__name__)

PREDICTIONS = ("kl", "dkd", "dist")  # the losses that need no features
EMBEDDING = 128  # size in which CRD compares, as in its authors' code
EXTRA = "learned"  # where a state's `extra` holds the maps and their optimiser


class Shown(NamedTuple):
    """What a network shows for a batch: its outputs, and {path: features} of some of its layers."""

    outputs: Any
    features: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Distiller:
    """What teaches, see above. Constants given to its functions are the teacher's variables, or a tuple for several.

    teachers: the first is the one that is searched; taps: paths of the layers compared; units: the gates of their
    channels, in the search; cached: the batch holds the teachers' outputs, and there are no constants; tx: trains maps.
    """

    task: Objective
    teachers: tuple[Member, ...]
    precision: str = "fp32"
    taps: tuple[str, ...] = ()
    units: Mapping[str, features.Units] = field(default_factory=dict)
    cached: bool = False
    tx: optax.GradientTransformation | None = None

    @staticmethod
    def of(task: Objective, module: Any, run: RunConfig) -> Distiller:
        """One teacher, compared by its outputs alone."""
        if names := _of_features(task.distill):
            raise ValueError(
                f"distill.losses: {names[0]} compares features, of which layers nothing says; use `prepare`"
            )
        return Distiller(task, (Member(module, task.call),), run.precision)

    def target(self, constants: Any, batch: Mapping[str, Any]) -> Shown:
        """What the teachers show; it gets no gradient."""
        if self.cached:
            return Shown(jax.lax.stop_gradient(teacher_cache.without(batch)[1]), {})
        with features.recorded(self.teachers[0].module) if self.taps else nullcontext({}) as seen:
            first = self.teachers[0].outputs(self._variables(constants)[0], batch, self.precision)
        shown = Shown(self._mean(first, constants, batch), features.taken(seen, self.taps))
        return jax.lax.stop_gradient(shown)

    def outputs(self, constants: Any, batch: Mapping[str, Any]) -> Any:
        """The outputs of `target`, computed."""
        first = self.teachers[0].outputs(self._variables(constants)[0], batch, self.precision)
        return self._mean(first, constants, batch)

    def _mean(self, first: Any, constants: Any, batch: Mapping[str, Any]) -> Any:
        pairs = zip(self.teachers[1:], self._variables(constants)[1:], strict=True)
        others = [teacher.outputs(variables, batch, self.precision) for teacher, variables in pairs]
        return ensemble.mean([first, *others], self.task.distill.ensemble, self.task.distill.temperature)

    def _variables(self, constants: Any) -> tuple[Any, ...]:
        return constants if len(self.teachers) > 1 else (constants,)

    def train(
        self,
        module: Any,
        params: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        key: Array,
        gates: Any = None,
        *,
        frozen: bool = False,
    ) -> tuple[Shown, Any]:
        """(what the student shows, its new `model_state`); arguments as those of `apply_train`.

        gates: those that are folded into `params`, so that features are those of the student cut there; frozen: in
        inference mode, where nothing of `model_state` changes.
        """
        call = self.task.call
        inputs, kept = call.bind(batch), model_state
        with features.recorded(module) if self.taps else nullcontext({}) as seen:
            if frozen:
                outputs = apply_eval(module, {"params": params, **model_state}, inputs, self.precision, call)
            else:
                outputs, kept = apply_train(module, params, model_state, inputs, key, self.precision, call)
        taken = features.taken(seen, self.taps)
        return Shown(outputs, taken if gates is None else features.gated(taken, self.units, gates)), kept

    def distance(self, maps: Any, student: Shown, teacher: Shown, batch: Mapping[str, Any]) -> Array:
        """What distillation makes small: (batch,), or () where a user's loss is one number for a batch.

        maps: what the losses learn (`learned`), None where they learn nothing.
        """
        batch = teacher_cache.without(batch)[0] if self.cached else batch
        total = self.task.distance(student.outputs, teacher.outputs, batch)
        config = self.task.distill
        for name, weight in loss_weights(config.losses).items():
            if name not in PREDICTIONS:
                value = _compare(name, maps, self.taps, student.features, teacher.features)
                total = total + (1 - config.cross_entropy) * weight * value
        return total

    def learned(self, extra: Any) -> Any:
        """The maps in a state's `extra`, or None."""
        return extra[EXTRA]["maps"] if self.tx is not None else None

    def advance(self, extra: Any, gradient: Any) -> dict[str, Any]:
        """What changes of `extra` after an update of the maps by their gradient."""
        if self.tx is None:
            return {}
        old = extra[EXTRA]
        updates, opt_state = self.tx.update(gradient, old["optimizer"], old["maps"])
        return {EXTRA: {"maps": optax.apply_updates(old["maps"], updates), "optimizer": opt_state}}


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a stage trains with. constants, dataset: for `train.fit`; learned: for the state's `extra`, or None."""

    distiller: Distiller
    constants: Any
    dataset: Dataset
    learned: Any = None

    @property
    def task(self) -> Objective:
        """The task with this stage's losses."""
        return self.distiller.task

    @property
    def extra(self) -> dict[str, Any] | None:
        """A state's whole `extra`, where it holds nothing else."""
        return None if self.learned is None else {EXTRA: self.learned}


def examine(task: Objective, module: Any, variables: Any) -> None:
    """Raises ValueError where a loss asked for, in search or retraining, has no features to compare in this network.

    Warns where retraining compares features alone, as nothing then trains the classifier behind them. Nothing is
    computed; variables: arrays or shapes.
    """
    config = task.distill
    both = (*config.losses, *(loss for loss in config.retrain_losses if loss not in config.losses))
    if any(_of_features(dataclasses.replace(config, losses=(loss,))) for loss in both):
        found = features.find(module, variables, task.call, config.features)
        for each in (config.losses, config.retrain_losses or config.losses):
            _check(dataclasses.replace(config, losses=each), found, found)
        last = loss_weights(config.retrain_losses or config.losses)
        if not config.cross_entropy and not any(name in PREDICTIONS for name in last):
            log.warning(
                "distill.losses: %s: features alone, so the classifier behind %s learns nothing in retraining; give kl "
                "beside them, or --distill.retrain-losses kl",
                " + ".join(last),
                list(found)[-1],
            )


def prepare(
    task: Objective,
    teachers: Sequence[Teacher],
    dataset: Dataset,
    config: DistillConfig,
    data: DataConfig,
    run: RunConfig,
    stage: StageConfig,
    student: Any,
    variables: Any,
    *,
    retraining: bool,
    topology: Topology | None = None,
    memory: RecentValues | None = None,
) -> Lesson:
    """What a stage trains with.

    Args:
      teachers: the first is the one that is searched.
      student, variables: the module that is trained, and its variables.
      retraining: whether `distill.retrain_losses` count.
      topology: in the search, whose gates the student's features go through.
      memory: of the run, in which the teachers' outputs are kept for its next stage.

    Raises:
      ValueError: a layer or a teacher does not fit.
    """
    if retraining and config.retrain_losses:
        task = dataclasses.replace(task, distill=dataclasses.replace(task.distill, losses=config.retrain_losses))
    members = tuple(Member.of(each, dataset) for each in teachers)
    # The task says how the first is called, whatever its directory says.
    members = (Member(teachers[0].module, task.call), *members[1:])
    constants: Any = teachers[0].variables if len(teachers) == 1 else tuple(each.variables for each in teachers)
    distiller = Distiller(task, members, run.precision)
    if not _of_features(task.distill):
        why = teacher_cache.refusal(config, data, stage, dataset)
        if why is None:
            found = _cached(distiller, teachers, constants, dataset, config, run, memory or RecentValues())
            if found is not None:
                return Lesson(dataclasses.replace(distiller, cached=True), None, found)
        return Lesson(distiller, constants, dataset)
    first = teachers[0]
    taught = features.find(first.module, first.variables, task.call, config.features)
    own, _ = features.shapes(student, variables, task.call)
    _check(task.distill, taught, own)
    seen = {} if topology is None else features.units(student, variables, task.call, tuple(taught), topology)
    maps = _begin(task.distill, {path: (own[path][-1], shape[-1]) for path, shape in taught.items()}, run)
    tx = make_optimizer(stage) if maps else None
    distiller = dataclasses.replace(distiller, taps=tuple(taught), units=seen, tx=tx)
    return Lesson(distiller, constants, dataset, {"maps": maps, "optimizer": tx.init(maps)} if tx else None)


def _cached(
    distiller: Distiller,
    teachers: Sequence[Teacher],
    constants: Any,
    dataset: Dataset,
    config: DistillConfig,
    run: RunConfig,
    memory: RecentValues,
) -> Dataset | None:
    """The data set with the teachers' outputs, the same in every stage that has these teachers; see `cache.cached`."""
    size = run.eval_batch_size

    def compute() -> tuple[Any, Dataset | None]:
        found, line = teacher_cache.cached(distiller.outputs, constants, dataset, size)
        log.info("%s", line)
        return (teachers, dataset), found  # kept with their outputs: no others have the same numbers meanwhile

    numbers = tuple(id(part) for each in teachers for part in (each.module, each.variables))
    key = ("outputs", numbers, id(dataset), size, run.precision, config.ensemble)
    return memory.get_or_make(key, compute)[1]


def _of_features(config: DistillConfig) -> list[str]:
    return [name for name in loss_weights(config.losses) if name not in PREDICTIONS]


def _compare(
    name: str, maps: Any, taps: Sequence[str], student: Mapping[str, Array], teacher: Mapping[str, Array]
) -> Array:
    """A loss of features, (batch,): its sum over all layers, or that of the last."""
    if name == "at":
        return sum(losses.attention(student[p], teacher[p]) for p in taps if student[p].ndim > 2)  # type: ignore
    if name == "hint":
        return sum(losses.hint(student[p], teacher[p], maps["hint"][_key(p)]) for p in taps)  # type: ignore
    pair = losses.pooled(student[taps[-1]]), losses.pooled(teacher[taps[-1]])
    if name == "crd":
        return losses.contrastive(*pair, maps["crd"]["student"], maps["crd"]["teacher"])
    return losses.distances(*pair) if name == "rkd_distance" else losses.angles(*pair)


def _begin(config: DistillConfig, channels: Mapping[str, tuple[int, int]], run: RunConfig) -> dict[str, Any]:
    """The maps that the losses learn; channels: {path: (student's, teacher's)}, the last layer last."""
    names, key = loss_weights(config.losses), jax.random.fold_in(jax.random.key(run.seed), 0x1055)
    maps: dict[str, Any] = {}
    if "hint" in names:
        keys = jax.random.split(key, len(channels))
        maps["hint"] = {
            _key(path): learned.init(own, *sizes, identity=True)
            for own, (path, sizes) in zip(keys, channels.items(), strict=True)
        }
    if "crd" in names:
        sizes = list(channels.values())[-1]
        own = jax.random.split(jax.random.fold_in(key, 1))
        maps["crd"] = {who: learned.init(own[i], sizes[i], EMBEDDING) for i, who in enumerate(("student", "teacher"))}
    return maps


def _check(config: DistillConfig, taught: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where a loss cannot compare the features of these shapes."""
    for path, shape in taught.items():
        if path not in own:
            raise ValueError(f"distill.features: the student has no layer {path!r} any more; choose another")
        if own[path][:-1] != shape[:-1]:
            raise ValueError(
                f"distill.features: {path!r} is {shape[1:]} of the teacher and {own[path][1:]} of the student, which "
                "must agree but for the last axis; choose another layer"
            )
    if "at" in loss_weights(config.losses) and all(len(shape) < 3 for shape in taught.values()):
        raise ValueError(
            f"distill.losses: at compares positions, of which {', '.join(taught)} have none; take hint, rkd_distance, "
            "rkd_angle or crd, or other distill.features"
        )


def _key(path: str) -> str:
    return path.replace("/", ".")
