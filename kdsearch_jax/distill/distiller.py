"""Distillation: teachers and losses, as pure functions that the steps of search and retraining share.

    target     the teachers' outputs for a batch, their mean if there are several, and the first one's features
    train      the student's outputs and features in training mode
    distance   one number per example: the objective's distance, plus (1 − cross_entropy)·Σ weight·loss over the losses
               of features in `distill.losses`

The losses `hint` and `crd` learn linear maps. Maps are kept in the state's `extra`, with an optimiser of the stage's
kind, and not among the parameters, so no student contains them. `make_distillation` chooses the layers to compare,
caches the teachers' outputs if that pays, and initialises the maps.
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
from kdsearch_jax.adapters.call_spec import input_spec
from kdsearch_jax.adapters.memoize import RecentValues
from kdsearch_jax.data.device_feed import UpdateEntries
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import ensemble, features, losses, teacher_cache, update_outputs
from kdsearch_jax.distill.ensemble import Teacher, TeacherModule
from kdsearch_jax.distill.losses import learned
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.distill.settings import DistillConfig, loss_weights
from kdsearch_jax.distill.update_outputs import UpdateCache
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.tracing.masking import masked
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig

__all__ = ["Activations", "Distillation", "Distiller", "Teacher", "check_losses", "make_distillation"]

log = logging.getLogger(__name__)

PREDICTIONS = ("kl", "dkd", "dist")  # losses that need no features
EMBEDDING = 128  # dimension in which CRD compares, as in its authors' code
EXTRA = "learned"  # key of the maps and their optimiser's state in a state's `extra`


class Activations(NamedTuple):
    """A network's outputs for a batch, and {path: features} of some of its layers."""

    outputs: Any
    features: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Distiller:
    """Teachers and losses. The `constants` of its methods are the teacher's variables, a tuple for several teachers.

    Attributes:
      teachers: the first is the one that is searched.
      feature_paths: layers whose features are compared.
      channel_units: the units of their channels, in a search; see `features.channel_units`.
      cached: the batch contains the teachers' outputs, and `constants` is not used.
      tx: trains the maps that losses learn; None if there are none.
    """

    objective: Objective
    teachers: tuple[TeacherModule, ...]
    precision: str = "fp32"
    feature_paths: tuple[str, ...] = ()
    channel_units: Mapping[str, features.Units] = field(default_factory=dict)
    cached: bool = False
    tx: optax.GradientTransformation | None = None

    @staticmethod
    def of(objective: Objective, module: Any, run: RunConfig) -> Distiller:
        """One teacher, compared by its outputs only."""
        if names := _feature_losses(objective.distill):
            raise ValueError(
                f"distill.losses: {names[0]} compares features of layers, which `make_distillation` chooses; use that"
            )
        return Distiller(objective, (TeacherModule(module, objective.call),), run.precision)

    def target(self, constants: Any, batch: Mapping[str, Any]) -> Activations:
        """The teachers' outputs and features, without gradient."""
        if self.cached:
            return Activations(jax.lax.stop_gradient(teacher_cache.split_outputs(batch)[1]), {})
        recorded = features.record_features(self.teachers[0].module) if self.feature_paths else nullcontext({})
        with jax.named_scope("teacher"):
            with recorded as seen:
                first = self.teachers[0].outputs(self._variables(constants)[0], batch, self.precision)
            shown = Activations(self._mean(first, constants, batch), features.select_features(seen, self.feature_paths))
        return jax.lax.stop_gradient(shown)

    def outputs(self, constants: Any, batch: Mapping[str, Any]) -> Any:
        """The teachers' outputs, computed even if they are cached."""
        first = self.teachers[0].outputs(self._variables(constants)[0], batch, self.precision)
        return self._mean(first, constants, batch)

    def _mean(self, first: Any, constants: Any, batch: Mapping[str, Any]) -> Any:
        pairs = zip(self.teachers[1:], self._variables(constants)[1:], strict=True)
        others = [teacher.outputs(variables, batch, self.precision) for teacher, variables in pairs]
        return ensemble.mean([first, *others], self.objective.distill.ensemble, self.objective.distill.temperature)

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
        topology: Topology | None = None,
        *,
        frozen: bool = False,
    ) -> tuple[Activations, Any]:
        """(the student's outputs and features, its new `model_state`); arguments as of `apply_train`.

        Args:
          gates: those folded into `params`; features are then those of the student cut at these gates.
          topology: of the network that the gates belong to.
          frozen: run in inference mode, which does not change `model_state`.
        """
        call = self.objective.call

        def run(variables: Any, inputs: Any, key: Array) -> tuple[Any, Any, Any]:
            params, state = variables["params"], {name: x for name, x in variables.items() if name != "params"}
            with features.record_features(module) if self.feature_paths else nullcontext({}) as seen:
                if frozen:
                    outputs = apply_eval(module, variables, inputs, self.precision, call)
                else:
                    outputs, state = apply_train(module, params, state, inputs, key, self.precision, call)
            return outputs, state, features.select_features(seen, self.feature_paths)

        if topology is not None:
            run = masked(run, topology, gates_lib.kept(gates, topology))
        outputs, state, taken = run({"params": params, **model_state}, call.bind(batch), key)
        if gates is not None:
            linear = () if topology is None else [group.name for group in topology.groups if group.masked]
            taken = features.mask_channels(taken, self.channel_units, gates, linear)
        return Activations(outputs, taken), state

    def distance(self, maps: Any, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Array:
        """The distillation loss: (batch,), or () if a user's loss is one number for a batch.

        Args:
          maps: that the losses learn (`learned`), or None.
        """
        batch = teacher_cache.split_outputs(batch)[0] if self.cached else batch
        total = self.objective.distance(student.outputs, teacher.outputs, batch)
        config = self.objective.distill
        for name, weight in loss_weights(config.losses).items():
            if name not in PREDICTIONS:
                value = _feature_loss(name, maps, self.feature_paths, student.features, teacher.features)
                total = total + (1 - config.cross_entropy) * weight * value
        return total

    def learned(self, extra: Any) -> Any:
        """The maps in a state's `extra`, or None."""
        return extra[EXTRA]["maps"] if self.tx is not None else None

    def advance(self, extra: Any, gradient: Any) -> dict[str, Any]:
        """The changed entries of `extra` after an update of the maps by their gradient."""
        if self.tx is None:
            return {}
        old = extra[EXTRA]
        updates, opt_state = self.tx.update(gradient, old["optimizer"], old["maps"])
        return {EXTRA: {"maps": optax.apply_updates(old["maps"], updates), "optimizer": opt_state}}


@dataclass(frozen=True, eq=False)
class Distillation:
    """What a stage trains with.

    Attributes:
      constants, dataset, entries: for `loop.fit`.
      learned: the maps and their optimiser's state, for the state's `extra`; None if no loss learns any.
    """

    distiller: Distiller
    constants: Any
    dataset: Dataset
    learned: Any = None
    entries: UpdateEntries | None = None

    @property
    def objective(self) -> Objective:
        """The objective, with the losses of this stage."""
        return self.distiller.objective

    @property
    def extra(self) -> dict[str, Any] | None:
        """The `extra` of a state that holds nothing else there."""
        return None if self.learned is None else {EXTRA: self.learned}


def check_losses(objective: Objective, module: Any, variables: Any) -> None:
    """Checks that this network has the features that the losses of search and retraining compare.

    Warns if retraining compares features only, since nothing then trains the classifier behind them.

    Args:
      variables: arrays or shapes; nothing is computed.

    Raises:
      ValueError: a loss has no features to compare.
    """
    config = objective.distill
    both = (*config.losses, *(loss for loss in config.retrain_losses if loss not in config.losses))
    if any(_feature_losses(dataclasses.replace(config, losses=(loss,))) for loss in both):
        found = features.find_layers(module, variables, objective.call, config.features)
        for each in (config.losses, config.retrain_losses or config.losses):
            _check_features(dataclasses.replace(config, losses=each), found, found)
        last = loss_weights(config.retrain_losses or config.losses)
        if not config.cross_entropy and not any(name in PREDICTIONS for name in last):
            log.warning(
                "distill.losses: %s: features only, so the classifier behind %s is not trained in retraining; add kl, "
                "or give --distill.retrain-losses kl",
                " + ".join(last),
                list(found)[-1],
            )


def make_distillation(
    objective: Objective,
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
    update_cache: UpdateCache | None = None,
) -> Distillation:
    """What a stage trains with.

    Args:
      teachers: the first is the one that is searched.
      student, variables: the module to train, and its variables.
      retraining: whether to use `distill.retrain_losses`.
      topology: of a search, whose gates apply to the student's features.
      memory: of the run; keeps the teachers' outputs for the next stage.
      update_cache: where the outputs for augmented batches are stored; None if no other stage sees these batches.

    Raises:
      ValueError: the layers or outputs of teachers and student cannot be compared.
    """
    if retraining and config.retrain_losses:
        objective = dataclasses.replace(
            objective, distill=dataclasses.replace(objective.distill, losses=config.retrain_losses)
        )
    # The first is called as the objective says, whatever its directory says.
    first_module = TeacherModule(teachers[0].module, objective.call)
    modules = (first_module, *(TeacherModule.of(teacher, dataset) for teacher in teachers[1:]))
    constants: Any = teachers[0].variables if len(teachers) == 1 else tuple(each.variables for each in teachers)
    distiller = Distiller(objective, modules, run.precision)
    if update_cache is not None and (data.crop or data.flip):
        found = _with_outputs_by_update(distiller, constants, dataset, config, data, run, stage, update_cache)
        if found is not None:
            return found
    if not _feature_losses(objective.distill):
        why = teacher_cache.reason_not_to_cache(config, data, stage, dataset)
        if why is None:
            found = _with_cached_outputs(distiller, teachers, constants, dataset, config, run, memory or RecentValues())
            if found is not None:
                return Distillation(dataclasses.replace(distiller, cached=True), None, found)
        return Distillation(distiller, constants, dataset)
    first = teachers[0]
    taught = features.find_layers(first.module, first.variables, objective.call, config.features)
    own, _ = features.layer_shapes(student, variables, objective.call)
    _check_features(objective.distill, taught, own)
    units = (
        {} if topology is None else features.channel_units(student, variables, objective.call, tuple(taught), topology)
    )
    maps = _initial_maps(objective.distill, {path: (own[path][-1], shape[-1]) for path, shape in taught.items()}, run)
    tx = make_optimizer(stage) if maps else None
    distiller = dataclasses.replace(distiller, feature_paths=tuple(taught), channel_units=units, tx=tx)
    return Distillation(distiller, constants, dataset, {"maps": maps, "optimizer": tx.init(maps)} if tx else None)


def _with_cached_outputs(
    distiller: Distiller,
    teachers: Sequence[Teacher],
    constants: Any,
    dataset: Dataset,
    config: DistillConfig,
    run: RunConfig,
    memory: RecentValues,
) -> Dataset | None:
    """The data set with the teachers' outputs, or None; shared by all stages that have these teachers."""
    size = run.eval_batch_size

    def compute() -> tuple[Any, Dataset | None]:
        found, line = teacher_cache.cache_outputs(distiller.outputs, constants, dataset, size)
        log.info("%s", line)
        return (teachers, dataset), found  # kept alive, so that no other objects get their ids

    numbers = tuple(id(part) for each in teachers for part in (each.module, each.variables))
    key = ("outputs", numbers, id(dataset), size, run.precision, config.ensemble)
    return memory.get_or_make(key, compute)[1]


def _with_outputs_by_update(
    distiller: Distiller,
    constants: Any,
    dataset: Dataset,
    config: DistillConfig,
    data: DataConfig,
    run: RunConfig,
    stage: StageConfig,
    cache: UpdateCache,
) -> Distillation | None:
    """A distillation from outputs that are cached for each update; None, with a line in the log, if they cannot be."""
    inputs = dict(distiller.objective.call.inputs)
    batch = jax.tree.map(lambda leaf: input_spec((stage.batch_size, *leaf.shape), leaf.dtype), inputs)
    shape = jax.eval_shape(distiller.outputs, constants, batch)
    why = update_outputs.reason_not_to_cache(config, run, stage, dataset, len(distiller.teachers), shape)
    if names := _feature_losses(distiller.objective.distill):
        why = f"{names[0]} compares features"
    if why is not None:
        log.info("the teacher's outputs are not cached: %s", why)
        return None
    entries = update_outputs.open_outputs(cache, distiller.outputs, constants, shape.shape, dataset, data, run, stage)
    return Distillation(dataclasses.replace(distiller, cached=True), None, dataset, entries=entries)


def _feature_losses(config: DistillConfig) -> list[str]:
    return [name for name in loss_weights(config.losses) if name not in PREDICTIONS]


def _feature_loss(
    name: str, maps: Any, feature_paths: Sequence[str], student: Mapping[str, Array], teacher: Mapping[str, Array]
) -> Array:
    """(batch,) a loss of features: the sum over all layers, or that of the last layer."""
    if name == "at":
        return sum(losses.attention(student[p], teacher[p]) for p in feature_paths if student[p].ndim > 2)  # type: ignore
    if name == "hint":
        return sum(losses.hint(student[p], teacher[p], maps["hint"][_key(p)]) for p in feature_paths)  # type: ignore
    pair = losses.pooled(student[feature_paths[-1]]), losses.pooled(teacher[feature_paths[-1]])
    if name == "crd":
        return losses.contrastive(*pair, maps["crd"]["student"], maps["crd"]["teacher"])
    return losses.distances(*pair) if name == "rkd_distance" else losses.angles(*pair)


def _initial_maps(config: DistillConfig, channels: Mapping[str, tuple[int, int]], run: RunConfig) -> dict[str, Any]:
    """The initial maps of losses that learn any; channels: {path: (student's, teacher's)}, the last layer last."""
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


def _check_features(
    config: DistillConfig, taught: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError if a loss cannot compare features of these shapes."""
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
