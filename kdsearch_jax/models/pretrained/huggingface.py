"""Teachers in Hugging Face's format: a directory with `config.json` and `model.safetensors`, possibly in shards.

    huggingface_models.py   config.json: which of our networks it describes
    huggingface_names.py    tensor names
    huggingface_images.py   preprocessor_config.json: how images are normalised
    config_reader.py        reads both files without trusting them

Supports ResNet, ViT, DeiT, ConvNeXt, Swin and MobileNetV2 with a classifier, without PyTorch or `transformers`. Only
safetensors is read, never a pickle. An unknown key in a JSON file is an error, since it may mean another network. Our
network computes the same outputs from an image as the directory's classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from kdsearch_jax.adapters import registry
from kdsearch_jax.models.pretrained import huggingface_models
from kdsearch_jax.models.pretrained import huggingface_names as names
from kdsearch_jax.models.pretrained.config_reader import read_json
from kdsearch_jax.models.pretrained.huggingface_images import read_preprocessing
from kdsearch_jax.models.pretrained.tensor_mapping import Shape, load_variables
from kdsearch_jax.models.pretrained.torch_files import read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
DEFAULT_SIZE = (224, 224)

_IRRELEVANT = {"parent", "name", "dropout", "layer_scale"}  # fields that do not affect a trained network


class PretrainedNetwork(NamedTuple):
    """A trained network.

    model, arguments: of `kdsearch_jax.adapters.registry.build`; plain JSON.
    variables: {"params": …} and, with BatchNorm, "batch_stats"; float32.
    input_shape: (height, width, channels) of the images that it was trained on.
    mean, std: per channel, normalisation of images in [0, 1]; None if the directory does not specify it.
    """

    model: str
    arguments: dict[str, Any]
    variables: dict[str, Any]
    input_shape: Shape
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def module(self) -> nn.Module:
        """Builds the network."""
        return registry.build(self.model, self.arguments)


def is_huggingface(path: str | Path) -> bool:
    """Whether `path` is a directory whose config.json has a model_type."""
    config = Path(path) / CONFIG
    return config.is_file() and "model_type" in read_json(config)


def from_huggingface(directory: str | Path) -> PretrainedNetwork:
    """Loads the network in a directory that `save_pretrained` wrote, or that was downloaded from a hub.

    Args:
      directory: contains config.json, model.safetensors (or model.safetensors.index.json and the files it lists), and
        optionally preprocessor_config.json with the normalisation of images.

    Raises:
      FileNotFoundError: the directory or a file does not exist.
      ValueError: the network or an option is not supported, or the tensors do not match; says which.
    """
    directory = Path(directory)
    family, spec, tensors = _read(directory)
    preprocessing = read_preprocessing(directory / PREPROCESSOR, spec.channels)
    shape = spec.input_shape or (*(preprocessing.size or DEFAULT_SIZE), spec.channels)
    module = registry.build(spec.model, spec.arguments)
    variables = load_variables(directory, tensors, module, shape, names.naming(family, module))
    return PretrainedNetwork(spec.model, spec.arguments, variables, shape, preprocessing.mean, preprocessing.std)


def load(directory: str | Path, module: nn.Module, input_shape: Shape) -> dict[str, Any]:
    """Loads the variables of a given network.

    Args:
      directory: as for `from_huggingface`.
      module: the network that the directory must contain.
      input_shape: of one example, (height, width, channels).

    Raises:
      FileNotFoundError, ValueError: as `from_huggingface`, or the directory contains another network than `module`.
    """
    directory = Path(directory)
    family, spec, tensors = _read(directory)
    stored = registry.build(spec.model, spec.arguments)
    if type(stored) is not type(module):
        raise ValueError(f"{directory} contains a {type(stored).__name__}, not a {type(module).__name__}")
    for field in type(stored).__dataclass_fields__:
        ours, theirs = getattr(module, field), getattr(stored, field)
        if field not in _IRRELEVANT and ours != theirs:
            raise ValueError(f"{directory} contains a {type(stored).__name__} with {field}={theirs!r}, not {ours!r}")
    return load_variables(directory, tensors, module, input_shape, names.naming(family, module))


def _read(directory: Path) -> tuple[str, huggingface_models.ModelSpec, dict[str, np.ndarray]]:
    """(model_type, our network's spec, tensors by name)."""
    for needed, kind in ((directory, "directory"), (directory / CONFIG, "file")):
        if not needed.exists():
            raise FileNotFoundError(f"no such {kind}: {needed}")
    config = read_json(directory / CONFIG)
    family = huggingface_models.family(directory / CONFIG, config)
    tensors = read_directory(directory)
    return (
        family,
        huggingface_models.model_spec(directory / CONFIG, config, *_classifier(directory, family, tensors)),
        tensors,
    )


# Tensors


def read_directory(directory: Path) -> dict[str, np.ndarray]:
    """Reads the float32 tensors of model.safetensors, or of the shards that model.safetensors.index.json lists.

    Raises:
      FileNotFoundError: neither file exists, or a shard is missing.
      ValueError: a file is damaged, or the shards do not contain the tensors that the index lists.
    """
    if (directory / WEIGHTS).is_file():
        return read_tensors(directory / WEIGHTS, names.UNUSED)
    if not (directory / INDEX).is_file():
        others = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5"))
        unsafe = f"; {', '.join(others[:3])} could run code and is not read" if others else ""
        raise FileNotFoundError(
            f"{directory} contains neither {WEIGHTS} nor {INDEX}{unsafe}; save it again with `save_pretrained(…)` of a "
            "recent `transformers`"
        )
    listed = read_json(directory / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{directory / INDEX}: 'weight_map' must map tensor names to file names")
    shards = sorted(set(listed.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{directory / INDEX}: {shard!r} must name a .safetensors file in the same directory")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        tensors |= read_tensors(directory / shard, names.UNUSED)
    expected = {name for name in listed if not name.endswith(names.UNUSED)}
    if differing := sorted(expected ^ tensors.keys()):
        raise ValueError(
            f"{directory / INDEX} and the files it lists disagree on {len(differing)} tensors: "
            f"{', '.join(differing[:5])}"
        )
    return tensors


def _classifier(directory: Path, family: str, tensors: Mapping[str, np.ndarray]) -> tuple[str, int]:
    """(name of the classifier layer, number of classes)."""
    heads = names.HEADS[family]
    for head in heads:
        weight = tensors.get(f"{head}.weight")
        if weight is not None and weight.ndim == 2:
            return head, len(weight)
    raise ValueError(
        f"{directory} has no classifier ({' or '.join(f'{head}.weight' for head in heads)}), which a teacher needs; "
        "save the ForImageClassification model"
    )
