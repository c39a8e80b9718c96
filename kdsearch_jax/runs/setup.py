"""What a run is, and whether it can be: all that is checked before any work, and before any file is written.

A run trains on a data set, from a teacher to a student that costs so much. The teacher is trained here, or is given: a
network of another run, weights of any kind (`kdsearch_jax.runs.weights`) for a module that the experiment names, or,
from
Python, a module and its variables as they are.
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

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture, base_module
from kdsearch_jax.adapters.boxes import boxes_to_json
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.memoize import RecentValues, memoize
from kdsearch_jax.data import datasets as data_lib
from kdsearch_jax.data.batches import is_image, prepared
from kdsearch_jax.data.examples import SPLITS, Dataset
from kdsearch_jax.distill import distiller
from kdsearch_jax.distill import objective as task_lib
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.pruning import baselines, budgets, selection
from kdsearch_jax.pruning.budgets import BudgetWarning, Limits
from kdsearch_jax.pruning.network import Network, adapter_for, trace
from kdsearch_jax.runs import budget_points, latency
from kdsearch_jax.runs.budget_points import Point
from kdsearch_jax.runs.config import Experiment, to_json
from kdsearch_jax.runs.consensus import check_alike
from kdsearch_jax.runs.provenance import code, fingerprint, versions
from kdsearch_jax.runs.teacher_source import (
    LoadedNetwork,
    UserTeacher,
    architecture_of,
    is_huggingface,
    load_extra_teacher,
    load_teacher,
    local_teacher,
    model_arguments,
    network_directory,
)
from kdsearch_jax.storage.checkpoint_files import CheckpointError
from kdsearch_jax.storage.files import memory, read_sealed
from kdsearch_jax.storage.networks import BOXES, own_boxes, own_shapes

log = logging.getLogger(__name__)

COPIES = 4  # of the parameters while they are trained: themselves, gradients, momentum, a checkpoint's
PROOF = 16  # examples of a batch on which networks are proved equal


@dataclass(frozen=True)
class RunSetup:
    """A run: its settings, data and directory.

    task: how networks are called and compared; given: the teacher to start from, if it is not to be trained;
    search_from: the directory of a finished search stage to start from, whose run has the teacher; base: the teacher's
    module, or what that was cut from, where it was given as an object; further: more teachers to learn from,
    `distill.teachers`; boxes: what `kdsearch_jax.adapters.boxes` says of those that the teacher's variables came in;
    warned:
    what was warned of; shapes: see `base_shapes`; memory: what was read or computed already.
    """

    experiment: Experiment
    dataset: Dataset
    directory: Path
    task: Objective
    given: LoadedNetwork | None = None
    search_from: Path | None = None
    base: Any = None
    further: tuple[LoadedNetwork, ...] = ()
    boxes: Mapping[str, Any] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set, compare=False)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    memory: RecentValues = field(default_factory=RecentValues, compare=False)

    def warn(self, note: str) -> None:
        """Warns of a budget that no student meets, once; nothing to say where the note is empty."""
        if note and note not in self.warned and jax.process_index() == 0:
            warnings.warn(note, BudgetWarning, stacklevel=2)
        self.warned.add(note)

    @property
    def teacher(self) -> Path:
        """The teacher's network directory."""
        return self.directory / "teacher" / "network"

    @property
    def search(self) -> Path:
        """The search stage's directory."""
        return self.directory / "search"

    @property
    def fingerprint(self) -> str:
        """Of the data."""
        return fingerprint({split: getattr(self.dataset, split).arrays for split in SPLITS})

    def base_shapes(self, module: Any) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the arrays of what a network of this run was cut from, which is the same for all."""
        if not self.shapes:
            self.shapes.update(own_shapes(base_module(module), self.task.call))
        return self.shapes

    def load(self, directory: Path) -> LoadedNetwork:
        """A network of this run, read once. Raises CheckpointError where it is damaged."""
        record = directory / "network.json"
        try:
            if not record.is_file():
                return LoadedNetwork.of(directory, self.base, trust_code=True)
            key = ("network", directory.absolute(), record.read_bytes())  # which has the digests of all arrays
            return self.memory.get_or_make(key, lambda: LoadedNetwork.of(directory, self.base, trust_code=True))
        except CheckpointError as error:
            raise CheckpointError(f"{error}, or remove {directory}: the command of this run makes it again") from None


def prepare(
    experiment: Experiment,
    directory: Path,
    *,
    resume: bool = False,
    search_from: Path | None = None,
    searches: bool = True,
    own: UserTeacher | None = None,
    trust_code: bool = False,
) -> RunSetup:
    """Checks what can be checked before any work, and before any file is written.

    That is: the data, the model, the teacher or the search to start from, how the model is called and what its outputs
    are compared by, and that the budget can be met.

    Args:
      directory: of the run; looked at only to `resume`.
      search_from: a run with a finished search, or that stage's directory.
      searches: False where the run ends with the teacher.
      own: the teacher and its data, where they are objects.
      trust_code: networks that are given may import the packages that they name; those of this run, and of the one to
        start from, may always.

    Raises:
      ValueError, OSError: where one of them cannot serve, or another process of the run has others.
    """
    points = budget_points.points(experiment)
    if experiment.budgets and search_from is not None:
        raise ValueError(
            f"search_from: {search_from} is for one budget, not for budgets {experiment.budgets}; --from RUN --budgets "
            "adds budgets to a run"
        )
    found = None if search_from is None else _finished_search(search_from, experiment, directory)
    source, ours = experiment.teacher_from, True
    if resume and finished(directory / "teacher"):
        source = str(directory / "teacher" / "network")
    elif found is not None:
        source = str(found.parent / "teacher" / "network")
    else:
        source, ours = local_teacher(source, "teacher_from"), False
    if source is not None and not Path(source).exists():
        raise FileNotFoundError(f"teacher_from: {source} does not exist")
    start = network_directory(source)
    if own is None and start is None and not is_huggingface(source):
        registry.build(experiment.model.name, model_arguments(experiment, 2))  # before data are read
    elif own is None and ":" in experiment.model.name:
        registry.accepts(experiment.model.name, "")  # imports it: whoever names a package trusts it
    dataset = data_lib.load(experiment.data, 0) if own is None else own.dataset
    given = load_teacher(experiment, dataset, source, start, own, trust_code=trust_code or ours)
    if given is not None and experiment.data.mean is None and "mean" in given.info and dataset.mean:
        # It sees images as it was trained on them.
        dataset = dataclasses.replace(dataset, mean=tuple(given.info["mean"]), std=tuple(given.info["std"]))
    architecture = given.architecture if given else architecture_of(experiment, dataset)
    module = given.module if given else architecture.module()
    dataset, task = _task(experiment, dataset, architecture, module, given, own)
    notes: list[str] = []
    if searches and found is None and not (resume and finished(directory / "search")):
        network = traced(experiment, architecture, module)
        random = np.random.default_rng(0).uniform(0.1, 1.0, network.topology.units)
        every = limits_of(experiment, network, points)
        budget_points.path(experiment, every, network.topology)  # whether there are steps enough
        for limits, point in zip(every, points, strict=True):
            chosen = selection.choose(network.topology, limits, random)
            if chosen.exact and not latency.asked(point.budget):  # it will be the same whatever a search finds
                notes.append(chosen.note)
            if experiment.baselines:
                baselines.check(network.topology, limits)
    base = None if own is None else base_module(own.module)
    further = tuple(
        load_extra_teacher(experiment, dataset, source, base, trust_code) for source in experiment.distill.teachers
    )
    if further:
        log.info("%d teachers: the mean of their %s is learned from", 1 + len(further), experiment.distill.ensemble)
    boxes = given.info.get(BOXES, {}) if given else boxes_to_json(own_boxes(module, architecture.call_spec))
    setup = RunSetup(experiment, dataset, directory, task, given, found, base, further, boxes)
    for note in notes:
        setup.warn(note)
    check_alike(
        {
            "versions": lambda: json.dumps([versions(), code(experiment)]),
            "settings": lambda: json.dumps(to_json(experiment)),
            "data": lambda: setup.fingerprint,
            "teacher": lambda: fingerprint(given.variables if given else None),
            "distill.teachers": lambda: fingerprint([each.variables for each in further]),
        }
    )
    return setup


def traced(experiment: Experiment, architecture: Architecture, module: Any) -> Network:
    """The teacher's topology with the gates that the experiment allows."""
    config = experiment.gates
    network = _traced(module, json.dumps(architecture.call_spec.to_json()))
    return network.select(config.kinds, config.include, config.exclude)


@memoize(2)
def _traced(module: Any, called: str) -> Network:
    call = CallSpec.from_json(json.loads(called))
    return trace(module, *call.example(PROOF), **call.keywords(module, train=False))


def limits_of(
    experiment: Experiment, network: Network, points: Sequence[Point] | None = None, search: Path | None = None
) -> tuple[Limits, ...]:
    """The budgets of an experiment, or of some of its points, in absolute numbers.

    search: the search stage's directory, which knows what was measured; without it only what is counted is bounded.

    Raises:
      BudgetError: one of them cannot be met.
    """
    chosen = budget_points.points(experiment) if points is None else points
    found = [budgets.resolve(point.budget, network.topology) for point in chosen]
    if search is not None:
        found = [latency.bounded(each, point.budget, search) for each, point in zip(found, chosen, strict=True)]
    return tuple(found)


def proof_batch(dataset: Dataset) -> dict[str, Any]:
    """Real examples as networks see them; repeated where there are fewer than PROOF."""
    rows = jax.tree.map(lambda x: jnp.asarray(np.resize(x[:PROOF], (PROOF, *x.shape[1:]))), dataset.validation.arrays)
    return prepared(rows, np.asarray(dataset.mean), np.asarray(dataset.std))


def finished(directory: Path) -> bool:
    """Whether the stage of this directory has left its network."""
    return (directory / "network" / "network.json").is_file()


def _task(
    experiment: Experiment,
    dataset: Dataset,
    architecture: Architecture,
    module: Any,
    given: LoadedNetwork | None,
    own: UserTeacher | None,
) -> tuple[Dataset, Objective]:
    """What networks are compared by; and the data set, which now knows its number of classes."""
    call = architecture.call_spec
    call.check(module)
    _check_augmentation(experiment, dataset)
    variables = adapter_for(module).abstract_variables(module, call.example(2), call.keywords(module, train=False))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    if given is None and COPIES * size > memory():
        raise ValueError(
            f"model.arguments: to train this {architecture.model} takes {COPIES * size / 2**30:.1f} GiB for parameters "
            f"alone; this machine has {memory() / 2**30:.1f}"
        )
    loss, metrics = (own.loss, own.metrics) if own is not None else (None, None)
    task = task_lib.infer_objective(
        module, given.variables if given else variables, call, dataset, experiment.distill, loss, metrics
    )
    if given is None and not task.classes:
        raise ValueError(
            "teacher_from: None trains a teacher on class logits with labels, which this model's outputs are not; "
            "give a trained one"
        )
    if given is not None and not (task.classes and task.loss is None):
        batch = proof_batch(dataset)
        run = jax.jit(lambda v, *xs: apply_eval(given.module, v, xs, call_spec=call))
        target = run(given.variables, *call.bind(batch))
        task = task_lib.with_output_scales(task, target)
        task_lib.check_user_loss(task, target, batch)
    if task.classes and not dataset.num_classes:
        outputs: Any = jax.eval_shape(
            lambda v, *xs: apply_eval(module, v, xs, call_spec=call), variables, *call.example(2)
        )
        classes = task.logits(outputs).shape[-1]
        dataset = dataclasses.replace(dataset, num_classes=classes, class_names=tuple(map(str, range(classes))))
    distiller.check_losses(task, module, given.variables if given else variables)
    if not is_plain(task, dataset):
        log.info("%s", task.describe())
    return dataset, task


def is_plain(task: Objective, dataset: Dataset) -> bool:
    """Whether this is the classification of images with one label each, by the loss of this package."""
    alone = task.call.arguments == ("images",) and is_image("images", dataset.train.arrays.get("images"))
    return alone and task.classes and dataset.train.labels.ndim == 1 and task.loss is None and task.metrics is None


def _check_augmentation(experiment: Experiment, dataset: Dataset) -> None:
    """Raises ValueError where crops or mirroring would move images and leave behind what belongs to their pixels."""
    data = experiment.data
    if not (data.crop or data.flip):
        return
    images = dataset.train.arrays.get("images")
    if not is_image("images", images):
        raise ValueError("data.crop, data.flip: there are no images in uint8 to augment; give 0 and False")
    for entry, tree in dataset.train.arrays.items():
        if entry != "images" and any(leaf.ndim > 1 for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"data.crop, data.flip: they move images, but not {entry!r}, which may belong to their pixels; give 0 "
                "and False"
            )


def _finished_search(path: Path, experiment: Experiment, directory: Path) -> Path:
    """The finished search stage meant by `path`, a run's directory or the stage's own, for this experiment."""
    stage = path / "search" if (path / "search").is_dir() else path
    teacher = stage.parent / "teacher" / "network"
    for needed in (stage / "selection.json", stage / "network" / "network.json", teacher / "network.json"):
        if not needed.is_file():
            raise ValueError(f"search_from: {path} is no run with a finished search; {needed} is missing")
    try:
        budget = read_sealed(stage / "selection.json")["budget"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"search_from: {stage / 'selection.json'} is damaged ({error}); search anew") from error
    if budget != dataclasses.asdict(experiment.budget):
        raise ValueError(
            f"budget: {dataclasses.asdict(experiment.budget)} is not that of the search in {stage}, {budget}; give the "
            "same, or search anew"
        )
    own = directory / "search"
    if own.is_dir() and not finished(own):
        raise ValueError(f"search_from: {directory} has begun a search of its own; leave it out, or another --workdir")
    return stage
