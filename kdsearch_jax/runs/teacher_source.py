"""Loads the networks that a run starts from: teachers of other runs, weights of any kind, or Python objects.

A network's own directory says which network it is and how it is called; otherwise the experiment and the data do.
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
from kdsearch_jax.data.examples import Dataset, sole_input
from kdsearch_jax.distill import objective as objective_lib
from kdsearch_jax.models import pretrained
from kdsearch_jax.runs import teacher_weights
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.arrays import describe, flatten
from kdsearch_jax.storage.files import json_digest, one_line, read_json_object
from kdsearch_jax.storage.networks import BOXES, initial_boxes, load_network

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedNetwork:
    """A network as its directory describes it; info: see `kdsearch_jax.storage.networks.save_network`."""

    module: Any
    variables: Any
    architecture: Architecture
    info: dict[str, Any]

    @staticmethod
    def of(directory: Path, base_module: Any = None, *, trust_code: bool = False) -> LoadedNetwork:
        """Reads a network directory; base_module: the base model, if the directory cannot name it."""
        return LoadedNetwork(*load_network(directory, base_module, trust_code=trust_code))

    @property
    def digest(self) -> str:
        """SHA-256 of the architecture and of every array."""
        arrays = {name: describe(np.asarray(leaf)) for name, leaf in flatten(self.variables).items()}
        return json_digest({"architecture": self.architecture.to_json(), "arrays": arrays})

    @property
    def costs(self) -> dict[str, int]:
        """MACs per example, parameters, and bytes of all arrays."""
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(self.variables))
        return {"macs": self.info["macs"], "params": self.info["params"], "bytes": size}


@dataclass(frozen=True)
class UserTeacher:
    """A trained network, its data, and optionally a loss and metrics, passed in from Python."""

    module: Any
    variables: Any
    dataset: Dataset
    loss: objective_lib.Loss | None = None
    metrics: objective_lib.Metrics | None = None


def check_model(experiment: Experiment, path: str | None) -> None:
    """Raises ValueError if the experiment's model cannot be built; skipped if the teacher's files name the model."""
    name = experiment.model.name
    if network_directory(path) is None and not is_huggingface(path):
        registry.build(name, model_arguments(experiment, 2))
    elif ":" in name:
        registry.accepts(name, "")  # imports the package: whoever names one trusts it


def load_teacher(
    experiment: Experiment,
    dataset: Dataset,
    path: str | None,
    user_teacher: UserTeacher | None = None,
    *,
    base_module: Any = None,
    trust_code: bool = False,
) -> LoadedNetwork | None:
    """The provided teacher, from wherever it comes; None if the run trains one.

    Args:
      path: a network directory, a run, an exported student, a Hugging Face directory or a file of weights.
      base_module: a module that no file can name, which the network may be made of.

    Raises:
      ValueError, OSError: it cannot be read, or cannot be a teacher on this data.
    """
    if user_teacher is not None:
        return _from_user(experiment, dataset, user_teacher)
    if path is None:
        return None
    if (directory := network_directory(path)) is not None:
        teacher = LoadedNetwork.of(directory, _base_if_unnamed(directory, base_module), trust_code=trust_code)
    elif export_formats.is_exported_student(Path(path)):
        teacher = LoadedNetwork(*export_formats.read_safetensors(path, trust_code=trust_code))
    elif is_huggingface(path):
        teacher = _from_huggingface(experiment, dataset, path)
    else:
        return _from_weights(experiment, dataset, path)
    check_network(path, teacher, experiment, dataset)
    return teacher


def _from_user(experiment: Experiment, dataset: Dataset, user_teacher: UserTeacher) -> LoadedNetwork:
    """The teacher that was passed in as Python objects."""
    call, image_shape = call_spec_for(experiment, dataset)
    architecture = Architecture.of(user_teacher.module, image_shape, call)
    architecture.call_spec.check(user_teacher.module)
    variables = teacher_weights.match_variables(
        user_teacher.variables, user_teacher.module, architecture.call_spec, "variables"
    )
    boxes = boxes_to_json(boxes_of(user_teacher.variables))
    return LoadedNetwork(user_teacher.module, variables, architecture, {BOXES: boxes} if boxes else {})


def _from_huggingface(experiment: Experiment, dataset: Dataset, path: str) -> LoadedNetwork:
    """The teacher of a Hugging Face directory, which also names the model."""
    source = pretrained.from_huggingface(path)
    call, image_shape = call_spec_for(experiment, dataset)
    architecture = Architecture(source.model, source.arguments, input_shape=image_shape, custom_call=call)
    log.info("the teacher is the %s of %s", source.model, path)
    info = {"mean": list(source.mean), "std": list(source.std)} if source.mean and source.std else {}
    return LoadedNetwork(source.module(), source.variables, architecture, info)


def _from_weights(experiment: Experiment, dataset: Dataset, path: str) -> LoadedNetwork:
    """The experiment's model with weights from a file or a directory of Orbax."""
    architecture = model_architecture(experiment, dataset)
    module = architecture.module()
    architecture.call_spec.check(module)
    variables = teacher_weights.load_weights(path, module, architecture.call_spec, architecture.input_shape)
    return LoadedNetwork(
        module, variables, architecture, {BOXES: boxes_to_json(initial_boxes(module, architecture.call_spec))}
    )


def _base_if_unnamed(directory: Path, base_module: Any) -> Any:
    """`base_module` if the network in `directory` is made of it and its files cannot name it; else None."""
    if base_module is None or not (directory / "architecture.json").is_file():
        return None
    name, _ = registry.identify(base_module)
    stored = read_json_object(directory / "architecture.json").get("model")
    return base_module if name.startswith(registry.OBJECT_PREFIX) and stored == name else None


def load_extra_teacher(
    experiment: Experiment, dataset: Dataset, source: str, base_module: Any, trust_code: bool
) -> LoadedNetwork:
    """One of `distill.teachers`. Raises as `load_teacher`."""
    path = fetch_teacher(source, "distill.teachers") or source
    if not Path(path).exists():
        raise FileNotFoundError(f"distill.teachers: {path} does not exist")
    try:
        teacher = load_teacher(experiment, dataset, path, base_module=base_module, trust_code=trust_code)
    except ValueError as error:
        raise ValueError(str(error).replace("teacher_from:", "distill.teachers:")) from error
    assert teacher is not None
    return teacher


def check_network(
    path: str | Path, network: LoadedNetwork, experiment: Experiment, dataset: Dataset, setting: str = "teacher_from"
) -> Any:
    """Checks that the network at `path` can be trained or distilled on this data.

    Returns:
      Its abstract outputs for one example; None if the data have no classes.

    Raises:
      ValueError: it cannot; `setting` is what named it.
    """
    architecture = network.architecture
    call, image_shape = call_spec_for(experiment, dataset)
    if architecture.input_shape and tuple(architecture.input_shape) != image_shape:
        raise ValueError(
            f"{setting}: {path} takes images {tuple(architecture.input_shape)}, those of {dataset.name} are "
            f"{image_shape}; give a network for this data, or its data by --data.name"
        )
    inputs = (call or CallSpec.of_image(image_shape)).inputs
    if not architecture.input_shape and architecture.call_spec.inputs != inputs:
        raise ValueError(
            f"{setting}: {path} takes {architecture.call_spec.to_json()['inputs']}, the data have "
            f"{CallSpec(tuple(inputs), inputs).to_json()['inputs']}; give its data by --data.name and --data.inputs"
        )
    if not dataset.num_classes:
        return None
    try:
        outputs = jax.eval_shape(
            lambda v, *xs: apply_eval(network.module, v, xs, call_spec=architecture.custom_call), network.variables,
            *architecture.call_spec.example(1),
        )  # fmt: skip
    except Exception as error:  # a model may raise anything at a size that it was not made for
        raise ValueError(f"{setting}: {path} does not run on images {image_shape} ({one_line(error)})") from error
    classes = outputs.shape[-1] if hasattr(outputs, "shape") else dataset.num_classes
    if classes != dataset.num_classes:
        raise ValueError(
            f"{setting}: {path} has {classes} classes, but {dataset.name} has {dataset.num_classes}; give a network "
            "for this data, or its data by --data.name"
        )
    return outputs


def model_architecture(experiment: Experiment, dataset: Dataset) -> Architecture:
    """The architecture that the experiment names, for this data."""
    call, image_shape = call_spec_for(experiment, dataset)
    arguments = model_arguments(experiment, dataset.num_classes)
    return Architecture(experiment.model.name, arguments, input_shape=image_shape, custom_call=call)


def call_spec_for(experiment: Experiment, dataset: Dataset) -> tuple[CallSpec | None, tuple[int, ...]]:
    """How the network is called on this data, and the shape of one image.

    Returns:
      (call, shape): call is None if the only input is an image and no keywords are set; shape is () without images.

    Raises:
      ValueError: `data.inputs` names an entry that the data do not have.
    """
    model, arrays = experiment.model, dataset.train.arrays
    arguments = experiment.data.inputs or (sole_input(arrays) or "images",)
    entries = [argument.rpartition("=")[2] for argument in arguments]
    for entry in entries:
        if entry not in arrays:
            raise ValueError(f"data.inputs: the data have no entry {entry!r}; they have {', '.join(arrays)}")

    def spec(leaf: Any, dtype: Any = None) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape[1:], dtype or leaf.dtype)

    inputs = {
        entry: spec(arrays[entry], jnp.float32) if is_image(entry, arrays[entry]) else jax.tree.map(spec, arrays[entry])
        for entry in entries
    }
    takes_image = arguments == ("images",) and is_image("images", arrays["images"])
    shape = tuple(arrays["images"].shape[1:]) if takes_image else ()
    if takes_image and not model.train_kwargs and not model.eval_kwargs:
        return None, shape
    return CallSpec(tuple(arguments), inputs, model.train_kwargs, model.eval_kwargs), shape


def model_arguments(experiment: Experiment, classes: int) -> dict[str, Any]:
    """The model's arguments, with the number of classes if there are classes and the model takes it."""
    model = experiment.model
    if not classes or "num_classes" in model.arguments or not registry.accepts(model.name, "num_classes"):
        return dict(model.arguments)
    return {**model.arguments, "num_classes": classes}


def fetch_teacher(source: str | None, argument: str) -> str | None:
    """The local path of a teacher; copies it first if it is in an object store, and of a run only its teacher."""
    if source is None or storage.remote_address(source) is None:
        return source
    network = storage.local_copy(f"{source}/teacher/network", argument)
    return str(network.parent.parent if network.exists() else storage.local_copy(source, argument))


def network_directory(path: str | None) -> Path | None:
    """The network directory at `path`, a run's or the network's own; None if it is of another kind."""
    if path is None or not Path(path).is_dir():
        return None
    of_run = Path(path) / "teacher" / "network"
    if of_run.is_dir():
        return of_run
    return Path(path) if any((Path(path) / name).exists() for name in ("network.json", "architecture.json")) else None


def is_huggingface(path: str | None) -> bool:
    """Whether it is a directory in Hugging Face's format."""
    return path is not None and Path(path).is_dir() and pretrained.is_huggingface(path)
