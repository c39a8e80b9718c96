"""Run setup: validates the data, the teacher and the budget before anything is written.

A run trains on a data set, from a teacher to a student within a budget. The teacher is trained by the run itself, read
from another run or from weights of any kind (`kdsearch_jax.runs.teacher_weights`), or passed in from Python.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture, base_module
from kdsearch_jax.adapters.boxes import boxes_to_json
from kdsearch_jax.adapters.memoize import RecentValues
from kdsearch_jax.data import datasets as data_lib
from kdsearch_jax.data.batches import is_image, preprocess
from kdsearch_jax.data.examples import SPLITS, Dataset
from kdsearch_jax.distill import distiller
from kdsearch_jax.distill import objective as objective_lib
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.pruning import baselines, budgets
from kdsearch_jax.pruning.budgets import BudgetWarning, Limits
from kdsearch_jax.pruning.network import Network, adapter_for, trace
from kdsearch_jax.pruning.selection import choose
from kdsearch_jax.runs import budget_points, latency
from kdsearch_jax.runs.budget_points import BudgetPoint
from kdsearch_jax.runs.config import Experiment, to_json
from kdsearch_jax.runs.coordination import check_equal_on_all_processes
from kdsearch_jax.runs.evaluation import EvaluatedNetwork
from kdsearch_jax.runs.provenance import code, fingerprint, versions
from kdsearch_jax.runs.teacher_source import (
    LoadedNetwork,
    UserTeacher,
    check_model,
    fetch_teacher,
    load_extra_teacher,
    load_teacher,
    model_architecture,
)
from kdsearch_jax.storage.files import CheckpointError, read_sealed, total_memory
from kdsearch_jax.storage.networks import BOXES, initial_boxes, initial_shapes

log = logging.getLogger(__name__)

TRAINING_COPIES = 4  # of the parameters during training: themselves, gradients, momentum, one in a checkpoint
PROOF_EXAMPLES = 16  # batch size of the proof that two networks are equal


@dataclass(frozen=True)
class RunSetup:
    """Everything the stages of a run work with.

    Attributes:
      directory: the run's directory.
      objective: how networks are called and compared.
      architecture, module: the teacher's.
      provided_teacher: the teacher to start from; None if the run trains one.
      search_from: directory of the finished search stage to start from, beside its teacher.
      base_module: the teacher's module before any pruning, if it was passed in as an object.
      extra_teachers: those of `distill.teachers`.
      boxes: {path: description} of the boxes around the teacher's variables, see `kdsearch_jax.adapters.boxes`.
      cache: networks, traces and teachers' outputs that were already read or computed.
    """

    experiment: Experiment
    dataset: Dataset
    directory: Path
    objective: Objective
    architecture: Architecture
    module: Any
    provided_teacher: LoadedNetwork | None = None
    search_from: Path | None = None
    base_module: Any = None
    extra_teachers: tuple[LoadedNetwork, ...] = ()
    boxes: Mapping[str, Any] = field(default_factory=dict)
    cache: RecentValues = field(default_factory=RecentValues, compare=False)
    _warned: set[str] = field(default_factory=set, compare=False)

    def warn(self, message: str) -> None:
        """Issues a BudgetWarning once; does nothing if the message is empty."""
        if message and message not in self._warned and jax.process_index() == 0:
            warnings.warn(message, BudgetWarning, stacklevel=2)
        self._warned.add(message)

    @property
    def teacher_directory(self) -> Path:
        """The teacher's network directory."""
        return self.directory / "teacher" / "network"

    @property
    def search_directory(self) -> Path:
        """The search stage's directory."""
        return self.directory / "search"

    def outputs_directory(self, seed: int) -> Path | None:
        """Where teachers' outputs for the augmented batches of a seed are stored; None if no other stage sees them."""
        return None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the data."""
        return fingerprint({split: getattr(self.dataset, split).arrays for split in SPLITS})

    def base_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{path: shape} of the unpruned network's arrays."""
        return self.cache.get_or_make(
            "base shapes", lambda: initial_shapes(base_module(self.module), self.objective.call)
        )

    def trace_teacher(self) -> Network:
        """The teacher's traced network with the gates that the experiment allows; traced once per run."""
        call, gates = self.architecture.call_spec, self.experiment.gates
        keywords = call.keywords(self.module, train=False)
        network = self.cache.get_or_make("trace", lambda: trace(self.module, *call.example(PROOF_EXAMPLES), **keywords))
        return network.select(gates.kinds, gates.include, gates.exclude)

    def load(self, directory: Path) -> LoadedNetwork:
        """Reads a network of this run, or takes it from the cache. Raises CheckpointError if it is damaged."""
        record = directory / "network.json"
        try:
            # The record contains the digests of all arrays, so equal records mean equal networks.
            key = record.read_bytes() if record.is_file() else None
            return self.cache.get_or_make(
                ("network", key), lambda: LoadedNetwork.of(directory, self.base_module, trust_code=True)
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}, or remove {directory}: the run's command creates it again") from None

    def evaluated(self, module: Any, variables: Any) -> EvaluatedNetwork:
        """A network of this run in the form that `evaluation.evaluate` takes."""
        return EvaluatedNetwork(module, variables, self.objective.call, self.dataset.mean, self.dataset.std)

    @property
    def classifies_images(self) -> bool:
        """Whether this is the classification of images with one label each, by losses of this package."""
        objective, arrays = self.objective, self.dataset.train.arrays
        images = objective.call.arguments == ("images",) and is_image("images", arrays.get("images"))
        own_functions = objective.loss is not None or objective.metrics is not None
        return images and objective.classes and self.dataset.train.labels.ndim == 1 and not own_functions


def prepare_run(
    experiment: Experiment,
    directory: Path,
    *,
    resume: bool = False,
    search_from: Path | None = None,
    searches: bool = True,
    user_teacher: UserTeacher | None = None,
    trust_code: bool = False,
) -> RunSetup:
    """Loads data and teacher, and checks everything that can be checked before any work. Writes nothing.

    Args:
      directory: of the run; only read, and only to `resume`.
      search_from: a run with a finished search, or that stage's directory.
      searches: False if the run ends with the teacher.
      user_teacher: the teacher and its data as Python objects.
      trust_code: provided networks may import the packages that they name. Networks of this run, and of the one that
        it starts from, always may.

    Raises:
      ValueError, OSError: the data, the model, the teacher, the search or the budget cannot be used, or another process
        of the run has different ones.
    """
    points = budget_points.points(experiment)
    if experiment.budgets and search_from is not None:
        raise ValueError(
            f"search_from: {search_from} is for a single budget, not for budgets {experiment.budgets}; use --from RUN "
            "--budgets to add budgets to a run"
        )
    finished_search = None if search_from is None else _finished_search(search_from, experiment, directory)
    path, trusted = _teacher_path(experiment, directory, resume, finished_search)
    if user_teacher is None:
        check_model(experiment, path)  # before data are read
    dataset = data_lib.load(experiment.data, 0) if user_teacher is None else user_teacher.dataset
    teacher = load_teacher(experiment, dataset, path, user_teacher, trust_code=trust_code or trusted)
    if teacher is not None and experiment.data.mean is None and "mean" in teacher.info and dataset.mean:
        # The teacher sees images normalised as in its own training.
        dataset = dataclasses.replace(dataset, mean=tuple(teacher.info["mean"]), std=tuple(teacher.info["std"]))
    architecture = teacher.architecture if teacher else model_architecture(experiment, dataset)
    module = teacher.module if teacher else architecture.module()
    dataset, objective = _dataset_and_objective(experiment, dataset, architecture, module, teacher, user_teacher)
    unpruned = None if user_teacher is None else base_module(user_teacher.module)
    extra_teachers = tuple(
        load_extra_teacher(experiment, dataset, source, unpruned, trust_code) for source in experiment.distill.teachers
    )
    if extra_teachers:
        count, ensemble = 1 + len(extra_teachers), experiment.distill.ensemble
        log.info("%d teachers: students learn from the mean of their %s", count, ensemble)
    boxes = teacher.info.get(BOXES, {}) if teacher else boxes_to_json(initial_boxes(module, architecture.call_spec))
    setup = RunSetup(
        experiment, dataset, directory, objective, architecture, module, teacher, finished_search, unpruned,
        extra_teachers, boxes,
    )  # fmt: skip
    if searches and finished_search is None and not (resume and is_finished(directory / "search")):
        _check_budgets(setup, points)
    if not setup.classifies_images:
        log.info("%s", objective.describe())
    check_equal_on_all_processes(
        {
            "versions": lambda: json.dumps([versions(), code(experiment)]),
            "settings": lambda: json.dumps(to_json(experiment)),
            "data": lambda: setup.fingerprint,
            "teacher": lambda: fingerprint(teacher.variables if teacher else None),
            "distill.teachers": lambda: fingerprint([extra.variables for extra in extra_teachers]),
        }
    )
    return setup


def resolve_limits(
    experiment: Experiment, network: Network, points: Sequence[BudgetPoint] | None = None, search: Path | None = None
) -> tuple[Limits, ...]:
    """The budgets of an experiment, or of some of its points, in absolute numbers.

    Args:
      search: the search stage's directory with its measurements; without it, bounds on latency and memory are ignored.

    Raises:
      BudgetError: one of the budgets cannot be met.
    """
    points = budget_points.points(experiment) if points is None else points
    multiples = latency.target_multiples(experiment.budget, network.topology)
    limits = [budgets.resolve(point.budget, network.topology, multiples) for point in points]
    if search is not None:
        limits = [latency.add_measured(each, point.budget, search) for each, point in zip(limits, points, strict=True)]
    return tuple(limits)


def proof_batch(dataset: Dataset) -> dict[str, Any]:
    """PROOF_EXAMPLES normalised validation examples, repeated if there are fewer."""
    size = PROOF_EXAMPLES
    rows = jax.tree.map(lambda x: jnp.asarray(np.resize(x[:size], (size, *x.shape[1:]))), dataset.validation.arrays)
    return preprocess(rows, np.asarray(dataset.mean), np.asarray(dataset.std))


def is_finished(stage: Path) -> bool:
    """Whether the stage with this directory has written its network."""
    return (stage / "network" / "network.json").is_file()


def _teacher_path(
    experiment: Experiment, directory: Path, resume: bool, finished_search: Path | None
) -> tuple[str | None, bool]:
    """(Where the teacher is, None if it will be trained; whether it belongs to this run or the one it starts from)."""
    if resume and is_finished(directory / "teacher"):
        path, trusted = str(directory / "teacher" / "network"), True
    elif finished_search is not None:
        path, trusted = str(finished_search.parent / "teacher" / "network"), True
    else:
        path, trusted = fetch_teacher(experiment.teacher_from, "teacher_from"), False
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"teacher_from: {path} does not exist")
    return path, trusted


def _check_budgets(setup: RunSetup, points: Sequence[BudgetPoint]) -> None:
    """Raises ValueError if a budget cannot be met; warns if its outcome is known to be off."""
    latency.check_target(setup.experiment.budget)
    topology = setup.trace_teacher().topology
    random_importance = np.random.default_rng(0).uniform(0.1, 1.0, topology.units)
    all_limits = resolve_limits(setup.experiment, setup.trace_teacher(), points)
    budget_points.search_path(setup.experiment, all_limits, topology)  # raises if there are too few steps
    if setup.experiment.baselines:
        for limits in all_limits:
            baselines.check(topology, limits)
    for limits, point in zip(all_limits, points, strict=True):
        selection = choose(topology, limits, random_importance)
        if selection.exact and not latency.measured_bounds(point.budget):  # the same whatever the search finds
            setup.warn(selection.note)


def _dataset_and_objective(
    experiment: Experiment,
    dataset: Dataset,
    architecture: Architecture,
    module: Any,
    teacher: LoadedNetwork | None,
    user_teacher: UserTeacher | None,
) -> tuple[Dataset, Objective]:
    """The objective of the run, and the data set with its number of classes."""
    call = architecture.call_spec
    call.check(module)
    _check_augmentation(experiment, dataset)
    shapes = adapter_for(module).abstract_variables(module, call.example(2), call.keywords(module, train=False))
    variables = teacher.variables if teacher else shapes
    if teacher is None:
        _check_memory(architecture, shapes)
    loss, metrics = (user_teacher.loss, user_teacher.metrics) if user_teacher else (None, None)
    objective = objective_lib.infer_objective(module, variables, call, dataset, experiment.distill, loss, metrics)
    if teacher is None and not objective.classes:
        raise ValueError(
            "teacher_from: None trains a teacher on class logits with labels, which this model's outputs are not; "
            "give a trained one"
        )
    if teacher is not None and not (objective.classes and objective.loss is None):
        batch = proof_batch(dataset)
        forward = jax.jit(lambda v, *inputs: apply_eval(module, v, inputs, call_spec=call))
        outputs = forward(variables, *call.bind(batch))
        objective = objective_lib.with_output_scales(objective, outputs)
        objective_lib.check_user_loss(objective, outputs, batch)
    if objective.classes and not dataset.num_classes:
        outputs: Any = jax.eval_shape(lambda v, *inputs: apply_eval(module, v, inputs, call_spec=call), shapes,
                                      *call.example(2))  # fmt: skip
        classes = objective.logits(outputs).shape[-1]
        dataset = dataclasses.replace(dataset, num_classes=classes, class_names=tuple(map(str, range(classes))))
    distiller.check_losses(objective, module, variables)
    return dataset, objective


def _check_memory(architecture: Architecture, shapes: Any) -> None:
    """Raises ValueError if this machine cannot hold the parameters during training."""
    needed = TRAINING_COPIES * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    if needed > total_memory():
        raise ValueError(
            f"model.arguments: training this {architecture.model} takes {needed / 2**30:.1f} GiB for the parameters "
            f"alone; this machine has {total_memory() / 2**30:.1f}"
        )


def _check_augmentation(experiment: Experiment, dataset: Dataset) -> None:
    """Raises ValueError if crops or flips would move images but not the entries that belong to their pixels."""
    if not (experiment.data.crop or experiment.data.flip):
        return
    if not is_image("images", dataset.train.arrays.get("images")):
        raise ValueError("data.crop, data.flip: there are no uint8 images to augment; give 0 and False")
    for entry, tree in dataset.train.arrays.items():
        if entry != "images" and any(leaf.ndim > 1 for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"data.crop, data.flip: they move images but not {entry!r}, which may belong to their pixels; give 0 "
                "and False"
            )


def _finished_search(path: Path, experiment: Experiment, directory: Path) -> Path:
    """The finished search stage at `path`, a run's directory or the stage's own, checked against the experiment."""
    stage = path / "search" if (path / "search").is_dir() else path
    teacher = stage.parent / "teacher" / "network"
    for needed in (stage / "selection.json", stage / "network" / "network.json", teacher / "network.json"):
        if not needed.is_file():
            raise ValueError(f"search_from: {path} is not a run with a finished search; {needed} is missing")
    try:
        budget = read_sealed(stage / "selection.json")["budget"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"search_from: {stage / 'selection.json'} is damaged ({error}); search again") from error
    if {"target": None, **budget} != dataclasses.asdict(experiment.budget):
        raise ValueError(
            f"budget: {dataclasses.asdict(experiment.budget)} is not the budget of the search in {stage}, {budget}; "
            "give that one, or search again"
        )
    own_search = directory / "search"
    if own_search.is_dir() and not is_finished(own_search):
        raise ValueError(f"search_from: {directory} has begun its own search; leave it out, or give another --workdir")
    return stage
