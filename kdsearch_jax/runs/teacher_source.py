"""The networks that a run is given: teachers of another run, weights of any kind, or a module and its variables.

Which network it is and how it is called is said by its own directory, or else by the experiment and the data.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax import storage
from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.boxes import boxes_of, boxes_to_json
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.data.batches import is_image
from kdsearch_jax.data.examples import Dataset, only_input
from kdsearch_jax.distill import objective as task_lib
from kdsearch_jax.models import pretrained
from kdsearch_jax.runs import weights
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.files import read_object
from kdsearch_jax.storage.networks import BOXES, load_network, own_boxes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedNetwork:
    """A network as its directory describes it."""

    module: Any
    variables: Any
    architecture: Architecture
    info: dict[str, Any]

    @staticmethod
    def of(directory: Path, base: Any = None, *, trust_code: bool = False) -> LoadedNetwork:
        """Reads a network directory; base: the base model, where the directory cannot name it."""
        return LoadedNetwork(*load_network(directory, base, trust_code=trust_code))

    @property
    def costs(self) -> dict[str, int]:
        """MACs of an example, parameters, bytes of all arrays."""
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(self.variables))
        return {"macs": self.info["macs"], "params": self.info["params"], "bytes": size}


@dataclass(frozen=True)
class UserTeacher:
    """What a Python program brings along: a trained network, its data, and perhaps a loss and metrics."""

    module: Any
    variables: Any
    dataset: Dataset
    loss: task_lib.Loss | None = None
    metrics: task_lib.Metrics | None = None


def load_teacher(
    experiment: Experiment,
    dataset: Dataset,
    source: str | None,
    start: Path | None,
    own: UserTeacher | None,
    *,
    base: Any = None,
    trust_code: bool = False,
) -> LoadedNetwork | None:
    """The teacher that is given, in whatever way; None where it is to be trained.

    Args:
      source, start: where it lies, and the network directory there if it is one, which may be a student's; own: or the
        teacher itself.
      base: a module that no file can name, of which the network may be.

    Raises:
      ValueError, OSError: it cannot be read, or be a teacher on this data.
    """
    if own is not None:
        call, shape = call_of(experiment, dataset)
        architecture = Architecture.of(own.module, shape, call)
        architecture.call_spec.check(own.module)
        variables = weights.fit(own.variables, own.module, architecture.call_spec, "variables")
        boxes = boxes_to_json(boxes_of(own.variables))
        return LoadedNetwork(own.module, variables, architecture, {BOXES: boxes} if boxes else {})
    if start is not None:
        given = LoadedNetwork.of(start, _unnamed(start, base), trust_code=trust_code)
        _check_teacher(str(start), given, experiment, dataset)
        return given
    if source is None:
        return None
    if export_formats.holds_student(Path(source)):
        given = LoadedNetwork(*export_formats.read_safetensors(source, trust_code=trust_code))
        _check_teacher(source, given, experiment, dataset)
        return given
    if is_huggingface(source):
        found = pretrained.from_huggingface(source)
        call, shape = call_of(experiment, dataset)
        architecture = Architecture(found.model, found.arguments, input_shape=shape, custom_call=call)
        log.info("the teacher is the %s of %s", found.model, source)
        info = {"mean": list(found.mean), "std": list(found.std)} if found.mean and found.std else {}
        given = LoadedNetwork(found.module(), found.variables, architecture, info)
        _check_teacher(source, given, experiment, dataset)
        return given
    architecture = architecture_of(experiment, dataset)
    module = architecture.module()
    architecture.call_spec.check(module)
    variables = weights.load(source, module, architecture.call_spec, architecture.input_shape)
    return LoadedNetwork(
        module, variables, architecture, {BOXES: boxes_to_json(own_boxes(module, architecture.call_spec))}
    )


def _unnamed(directory: Path, base: Any) -> Any:
    """`base`, where the network in `directory` is of that module, which its files cannot name; else None."""
    if base is None or not (directory / "architecture.json").is_file():
        return None
    name, _ = registry.identify(base)
    described = read_object(directory / "architecture.json")
    return base if name.startswith(registry.OBJECT_PREFIX) and described.get("model") == name else None


def load_extra_teacher(
    experiment: Experiment, dataset: Dataset, source: str, base: Any, trust_code: bool
) -> LoadedNetwork:
    """One of `distill.teachers`. Raises as above."""
    source = local_teacher(source, "distill.teachers") or source
    if not Path(source).exists():
        raise FileNotFoundError(f"distill.teachers: {source} does not exist")
    try:
        start = network_directory(source)
        found = load_teacher(experiment, dataset, source, start, None, base=base, trust_code=trust_code)
    except ValueError as error:
        raise ValueError(str(error).replace("teacher_from:", "distill.teachers:")) from error
    assert found is not None
    return found


def _check_teacher(path: str, teacher: LoadedNetwork, experiment: Experiment, dataset: Dataset) -> None:
    """Raises ValueError where the network at `path` cannot be a teacher on this data."""
    architecture = teacher.architecture
    call, shape = call_of(experiment, dataset)
    if architecture.input_shape and tuple(architecture.input_shape) != shape:
        raise ValueError(
            f"teacher_from: {path} takes images {tuple(architecture.input_shape)}, those of {dataset.name} are "
            f"{shape}; give a teacher of this data, or its data by --data.name"
        )
    wanted = (call or CallSpec.of_image(shape)).inputs
    if not architecture.input_shape and architecture.call_spec.inputs != wanted:
        raise ValueError(
            f"teacher_from: {path} takes {architecture.call_spec.to_json()['inputs']}, and the data have "
            f"{CallSpec(tuple(wanted), wanted).to_json()['inputs']}; give its data by --data.name and --data.inputs"
        )
    if not dataset.num_classes:
        return
    try:
        outputs = jax.eval_shape(
            lambda v, *xs: apply_eval(teacher.module, v, xs, call_spec=architecture.custom_call), teacher.variables,
            *architecture.call_spec.example(1),
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


def architecture_of(experiment: Experiment, dataset: Dataset) -> Architecture:
    """The network that the experiment names, for this data."""
    call, shape = call_of(experiment, dataset)
    return Architecture(
        experiment.model.name, model_arguments(experiment, dataset.num_classes), input_shape=shape, custom_call=call
    )


def call_of(experiment: Experiment, dataset: Dataset) -> tuple[CallSpec | None, tuple[int, ...]]:
    """(how the network is called, None where it is by one image without more; the image's shape, else ()).

    Raises:
      ValueError: the data have no such entry.
    """
    model, arrays = experiment.model, dataset.train.arrays
    arguments = experiment.data.inputs or (only_input(arrays) or "images",)
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
    return CallSpec(tuple(arguments), inputs, model.train_kwargs, model.eval_kwargs), shape


def model_arguments(experiment: Experiment, classes: int) -> dict[str, Any]:
    """The model's arguments, with the number of classes where there are such and it takes them."""
    model = experiment.model
    if not classes or "num_classes" in model.arguments or not registry.accepts(model.name, "num_classes"):
        return dict(model.arguments)
    return {**model.arguments, "num_classes": classes}


def local_teacher(source: str | None, argument: str) -> str | None:
    """The path of a copy where a teacher lies in an object store: of a run, of its teacher alone."""
    if source is None or storage.address(source) is None:
        return source
    inner = storage.local(f"{source}/teacher/network", argument)
    return str(inner.parent.parent if inner.exists() else storage.local(source, argument))


def network_directory(path: str | None) -> Path | None:
    """The network directory meant by `path` (a run's, or the network's own); None where it is of another kind."""
    if path is None or not Path(path).is_dir():
        return None
    inner = Path(path) / "teacher" / "network"
    if inner.is_dir():
        return inner
    return Path(path) if any((Path(path) / name).exists() for name in ("network.json", "architecture.json")) else None


def is_huggingface(source: str | None) -> bool:
    """Whether it is a directory in Hugging Face's format."""
    return source is not None and Path(source).is_dir() and pretrained.is_huggingface(source)
