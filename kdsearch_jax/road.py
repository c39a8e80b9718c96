"""What a run is, and whether it can be: all that is checked before any work, and before any file is written.

A run trains on a data set, from a teacher to a student that costs so much. The teacher is trained here, or is given: a
network of another run, weights of any kind (`kdsearch_jax.weights`) for a module that the experiment names, or, from
Python, a module and its variables as they are.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax import baselines, distilling, front, measured, models, pretrained, storage, weights
from kdsearch_jax import budget as budget_lib
from kdsearch_jax import data as data_lib
from kdsearch_jax import task as task_lib
from kdsearch_jax.batches import is_image, prepared
from kdsearch_jax.budget import Limits
from kdsearch_jax.call import Call
from kdsearch_jax.checkpoint import CheckpointError, load_network
from kdsearch_jax.config import Experiment
from kdsearch_jax.examples import SPLITS, Dataset
from kdsearch_jax.files import memory, read_sealed
from kdsearch_jax.forward import apply_eval
from kdsearch_jax.front import Point
from kdsearch_jax.network import Network, library_of, trace
from kdsearch_jax.rundir import fingerprint
from kdsearch_jax.student import Architecture
from kdsearch_jax.task import Task

log = logging.getLogger(__name__)

COPIES = 4  # of the parameters while they are trained: themselves, gradients, momentum, a checkpoint's
PROOF = 16  # examples of a batch on which networks are proved equal


@dataclass(frozen=True)
class Loaded:
    """A network as its directory describes it."""

    module: Any
    variables: Any
    architecture: Architecture
    info: dict[str, Any]

    @staticmethod
    def of(directory: Path, base: Any = None, *, trust_code: bool = False) -> Loaded:
        """Reads a network directory; base: the base model, where the directory cannot name it."""
        return Loaded(*load_network(directory, base, trust_code=trust_code))

    @property
    def costs(self) -> dict[str, int]:
        """MACs of an example, parameters, bytes of all arrays."""
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(self.variables))
        return {"macs": self.info["macs"], "params": self.info["params"], "bytes": size}


@dataclass(frozen=True)
class Own:
    """What a Python program brings along: a trained network, its data, and perhaps a loss and metrics."""

    module: Any
    variables: Any
    dataset: Dataset
    loss: task_lib.Loss | None = None
    metrics: task_lib.Metrics | None = None


@dataclass(frozen=True)
class Road:
    """A run: its settings, data and directory.

    task: how networks are called and compared; given: the teacher to start from, if it is not to be trained;
    search_from: the directory of a finished search stage to start from, whose run has the teacher; base: the teacher's
    module, where files cannot name it; further: more teachers to learn from, `distill.teachers`.
    """

    experiment: Experiment
    dataset: Dataset
    directory: Path
    task: Task
    given: Loaded | None = None
    search_from: Path | None = None
    base: Any = None
    further: tuple[Loaded, ...] = ()

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

    def load(self, directory: Path) -> Loaded:
        """A network of this run. Raises CheckpointError where it is damaged."""
        try:
            return Loaded.of(directory, self.base, trust_code=True)
        except CheckpointError as error:
            raise CheckpointError(f"{error}, or remove {directory}: the command of this run makes it again") from None


def prepare(
    experiment: Experiment,
    directory: Path,
    *,
    resume: bool = False,
    search_from: Path | None = None,
    searches: bool = True,
    own: Own | None = None,
    trust_code: bool = False,
) -> Road:
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
      ValueError, OSError: where one of them cannot serve.
    """
    points = front.points(experiment)
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
        source, ours = _brought(source, "teacher_from"), False
    if source is not None and not Path(source).exists():
        raise FileNotFoundError(f"teacher_from: {source} does not exist")
    start = _network_directory(source)
    if own is None and start is None and not _is_huggingface(source):
        models.build(experiment.model.name, _arguments(experiment, 2))  # before data are read
    elif own is None and ":" in experiment.model.name:
        models.takes(experiment.model.name, "")  # imports it: whoever names a package trusts it
    dataset = data_lib.load(experiment.data, 0) if own is None else own.dataset
    given = _given(experiment, dataset, source, start, own, trust_code=trust_code or ours)
    if given is not None and experiment.data.mean is None and "mean" in given.info and dataset.mean:
        # It sees images as it was trained on them.
        dataset = dataclasses.replace(dataset, mean=tuple(given.info["mean"]), std=tuple(given.info["std"]))
    architecture = given.architecture if given else architecture_of(experiment, dataset)
    module = given.module if given else architecture.module()
    dataset, task = _task(experiment, dataset, architecture, module, given, own)
    if searches and found is None and not (resume and finished(directory / "search")):
        network = traced(experiment, architecture, module)
        random = np.random.default_rng(0).uniform(0.1, 1.0, network.topology.units)
        every = limits_of(experiment, network, points)
        front.path(experiment, every, network.topology)  # whether there are steps enough
        for limits in every:
            budget_lib.select(network.topology, limits, random)  # whether widths exist that cost so much
            if experiment.baselines:
                baselines.check(network.topology, limits)
    base = own.module if own is not None and architecture.model.startswith(models.GIVEN) else None
    further = tuple(_further(experiment, dataset, source, trust_code) for source in experiment.distill.teachers)
    return Road(experiment, dataset, directory, task, given, found, base, further)


def traced(experiment: Experiment, architecture: Architecture, module: Any) -> Network:
    """The teacher's topology with the gates that the experiment allows."""
    config, call = experiment.gates, architecture.called
    network = trace(module, *call.example(PROOF), **call.keywords(module, train=False))
    return network.select(config.kinds, config.include, config.exclude)


def limits_of(
    experiment: Experiment, network: Network, points: Sequence[Point] | None = None, search: Path | None = None
) -> tuple[Limits, ...]:
    """The budgets of an experiment, or of some of its points, in absolute numbers.

    search: the search stage's directory, which knows what was measured; without it only what is counted is bounded.

    Raises:
      BudgetError: one of them cannot be met.
    """
    chosen = front.points(experiment) if points is None else points
    found = [budget_lib.resolve(point.budget, network.topology) for point in chosen]
    if search is not None:
        found = [measured.bounded(each, point.budget, search) for each, point in zip(found, chosen, strict=True)]
    return tuple(found)


def proof_batch(dataset: Dataset) -> dict[str, Any]:
    """Real examples as networks see them; repeated where there are fewer than PROOF."""
    rows = jax.tree.map(lambda x: jnp.asarray(np.resize(x[:PROOF], (PROOF, *x.shape[1:]))), dataset.validation.arrays)
    return prepared(rows, np.asarray(dataset.mean), np.asarray(dataset.std))


def finished(directory: Path) -> bool:
    """Whether the stage of this directory has left its network."""
    return (directory / "network" / "network.json").is_file()


def architecture_of(experiment: Experiment, dataset: Dataset) -> Architecture:
    """The network that the experiment names, for this data."""
    call, shape = call_of(experiment, dataset)
    return Architecture(
        experiment.model.name, _arguments(experiment, dataset.num_classes), input_shape=shape, call=call
    )


def call_of(experiment: Experiment, dataset: Dataset) -> tuple[Call | None, tuple[int, ...]]:
    """(how the network is called, None where it is by one image without more; the image's shape, else ()).

    Raises:
      ValueError: the data have no such entry.
    """
    model, arrays = experiment.model, dataset.train.arrays
    arguments = experiment.data.inputs or ("images",)
    entries = [argument.rpartition("=")[2] for argument in arguments]
    for entry in entries:
        if entry not in arrays:
            raise ValueError(f"data.inputs: {entry!r} is no entry of the data; there are {', '.join(arrays)}")

    def spec(leaf: Any, dtype: Any = None) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape[1:], dtype or leaf.dtype)

    inputs = {
        entry: spec(arrays[entry], jnp.float32) if is_image(entry, arrays[entry]) else jax.tree.map(spec, arrays[entry])
        for entry in entries
    }
    image = arguments == ("images",) and is_image("images", arrays["images"])
    shape = tuple(arrays["images"].shape[1:]) if image else ()
    if image and not model.train_kwargs and not model.eval_kwargs:
        return None, shape
    return Call(tuple(arguments), inputs, model.train_kwargs, model.eval_kwargs), shape


def _arguments(experiment: Experiment, classes: int) -> dict[str, Any]:
    """The model's arguments, with the number of classes where there are such and it takes them."""
    model = experiment.model
    if not classes or "num_classes" in model.arguments or not models.takes(model.name, "num_classes"):
        return dict(model.arguments)
    return {**model.arguments, "num_classes": classes}


def _brought(source: str | None, argument: str) -> str | None:
    """The path of a copy where a teacher lies in an object store: of a run, of its teacher alone."""
    if source is None or storage.address(source) is None:
        return source
    inner = storage.local(f"{source}/teacher/network", argument)
    return str(inner.parent.parent if inner.exists() else storage.local(source, argument))


def _network_directory(path: str | None) -> Path | None:
    """The network directory meant by `path` (a run's, or the network's own); None where it is of another kind."""
    if path is None or not Path(path).is_dir():
        return None
    inner = Path(path) / "teacher" / "network"
    if inner.is_dir():
        return inner
    return Path(path) if any((Path(path) / name).exists() for name in ("network.json", "architecture.json")) else None


def _is_huggingface(source: str | None) -> bool:
    return source is not None and Path(source).is_dir() and pretrained.is_huggingface(source)


def _given(
    experiment: Experiment,
    dataset: Dataset,
    source: str | None,
    start: Path | None,
    own: Own | None,
    *,
    searched: bool = True,
    trust_code: bool = False,
) -> Loaded | None:
    """The teacher that is given, in whatever way; None where it is to be trained."""
    if own is not None:
        name, arguments = models.describe(own.module)
        call, shape = call_of(experiment, dataset)
        architecture = Architecture(name, arguments, input_shape=shape, call=call)
        architecture.called.check(own.module)
        variables = weights.fit(own.variables, own.module, architecture.called, "variables")
        return Loaded(own.module, variables, architecture, {})
    if start is not None:
        given = Loaded.of(start, trust_code=trust_code)
        if searched and (given.architecture.layers or given.architecture.dropped):
            raise ValueError(f"teacher_from: {start} was cut already and cannot be searched again; give its teacher")
        _check_teacher(str(start), given, experiment, dataset)
        return given
    if source is None:
        return None
    if _is_huggingface(source):
        found = pretrained.from_huggingface(source)
        call, shape = call_of(experiment, dataset)
        architecture = Architecture(found.model, found.arguments, input_shape=shape, call=call)
        log.info("the teacher is the %s of %s", found.model, source)
        info = {"mean": list(found.mean), "std": list(found.std)} if found.mean and found.std else {}
        given = Loaded(found.module(), found.variables, architecture, info)
        _check_teacher(source, given, experiment, dataset)
        return given
    architecture = architecture_of(experiment, dataset)
    module = architecture.module()
    architecture.called.check(module)
    variables = weights.load(source, module, architecture.called, architecture.input_shape)
    return Loaded(module, variables, architecture, {})


def _further(experiment: Experiment, dataset: Dataset, source: str, trust_code: bool) -> Loaded:
    """One of `distill.teachers`; unlike the one that is searched, it may be a student itself."""
    source = _brought(source, "distill.teachers") or source
    if not Path(source).exists():
        raise FileNotFoundError(f"distill.teachers: {source} does not exist")
    try:
        start = _network_directory(source)
        found = _given(experiment, dataset, source, start, None, searched=False, trust_code=trust_code)
    except ValueError as error:
        raise ValueError(str(error).replace("teacher_from:", "distill.teachers:")) from error
    assert found is not None
    return found


def _check_teacher(path: str, teacher: Loaded, experiment: Experiment, dataset: Dataset) -> None:
    """Raises ValueError where the network at `path` cannot be a teacher on this data."""
    architecture = teacher.architecture
    call, shape = call_of(experiment, dataset)
    if architecture.input_shape and tuple(architecture.input_shape) != shape:
        raise ValueError(
            f"teacher_from: {path} takes images {tuple(architecture.input_shape)}, those of {dataset.name} are "
            f"{shape}; give a teacher of this data, or its data by --data.name"
        )
    wanted = (call or Call.of_image(shape)).inputs
    if not architecture.input_shape and architecture.called.inputs != wanted:
        raise ValueError(
            f"teacher_from: {path} takes {architecture.called.to_json()['inputs']}, and the data have "
            f"{Call(tuple(wanted), wanted).to_json()['inputs']}; give its data by --data.name and --data.inputs"
        )
    if not dataset.num_classes:
        return
    try:
        outputs = jax.eval_shape(
            lambda v, *xs: apply_eval(teacher.module, v, xs, call=architecture.call), teacher.variables,
            *architecture.called.example(1),
        )  # fmt: skip
    except Exception as error:  # whatever a model raises at a size that it was not made for
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"teacher_from: {path} does not run on images {shape} ({line[:200]})") from error
    classes = outputs.shape[-1] if hasattr(outputs, "shape") else dataset.num_classes
    if classes != dataset.num_classes:
        raise ValueError(
            f"teacher_from: {path} tells apart {classes} classes, but {dataset.name} has {dataset.num_classes}; give a "
            "teacher of this data, or its data by --data.name"
        )


def _task(
    experiment: Experiment,
    dataset: Dataset,
    architecture: Architecture,
    module: Any,
    given: Loaded | None,
    own: Own | None,
) -> tuple[Dataset, Task]:
    """What networks are compared by; and the data set, which now knows its number of classes."""
    call = architecture.called
    call.check(module)
    _check_augmentation(experiment, dataset)
    variables = library_of(module).variables(module, call.example(2), call.keywords(module, train=False))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    if given is None and COPIES * size > memory():
        raise ValueError(
            f"model.arguments: to train this {architecture.model} takes {COPIES * size / 2**30:.1f} GiB for parameters "
            f"alone; this machine has {memory() / 2**30:.1f}"
        )
    loss, metrics = (own.loss, own.metrics) if own is not None else (None, None)
    task = task_lib.examine(
        module, given.variables if given else variables, call, dataset, experiment.distill, loss, metrics
    )
    if given is None and not task.classes:
        raise ValueError(
            "teacher_from: None trains a teacher on class logits with labels, which this model's outputs are not; "
            "give a trained one"
        )
    if given is not None and not (task.classes and task.loss is None):
        batch = proof_batch(dataset)
        run = jax.jit(lambda v, *xs: apply_eval(given.module, v, xs, call=call))
        target = run(given.variables, *call.bind(batch))
        task = task_lib.measured(task, target)
        task_lib.prove(task, target, batch)
    if task.classes and not dataset.num_classes:
        outputs: Any = jax.eval_shape(lambda v, *xs: apply_eval(module, v, xs, call=call), variables, *call.example(2))
        classes = task.logits(outputs).shape[-1]
        dataset = dataclasses.replace(dataset, num_classes=classes, class_names=tuple(map(str, range(classes))))
    distilling.examine(task, module, given.variables if given else variables)
    if not is_plain(task, dataset):
        log.info("%s", task.describe())
    return dataset, task


def is_plain(task: Task, dataset: Dataset) -> bool:
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
