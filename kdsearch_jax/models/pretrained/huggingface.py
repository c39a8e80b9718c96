"""Teachers in Hugging Face's format: a directory with `config.json` and `model.safetensors`, whole or in shards.

    huggingface_config.py    config.json: which of our networks it is
    huggingface_names.py     which tensor fills which leaf
    huggingface_images.py    preprocessor_config.json: how images are prepared
    huggingface_options.py   reads both, and takes nothing on trust

ResNet, ViT, DeiT, ConvNeXt, Swin and MobileNetV2 with a classifier are understood; neither PyTorch nor `transformers`
is needed. Only safetensors is read, never a pickle, and of the JSON files only keys that are known: one that is not is
an error, since it may stand for another network. What the directory's classifier computes from an image, ours computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from kdsearch_jax.adapters import registry
from kdsearch_jax.models.pretrained import huggingface_config as configs
from kdsearch_jax.models.pretrained import huggingface_names as names
from kdsearch_jax.models.pretrained.files import read_tensors
from kdsearch_jax.models.pretrained.huggingface_images import preparation
from kdsearch_jax.models.pretrained.huggingface_options import read_json
from kdsearch_jax.models.pretrained.matching import Shape, fill

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
USUAL_SIDES = (224, 224)

_NO_MATTER = {"parent", "name", "dropout", "layer_scale"}  # fields that change nothing in a trained network


class Teacher(NamedTuple):
    """A trained network.

    model, arguments: what `kdsearch_jax.adapters.registry.build` takes; plain JSON.
    variables: {"params": …} and, with BatchNorm, "batch_stats"; float32.
    input_shape: (height, width, channels) of the images that it was made for.
    mean, std: for each channel, of images in [0, 1], what normalises them; None where the directory does not tell.
    """

    model: str
    arguments: dict[str, Any]
    variables: dict[str, Any]
    input_shape: Shape
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def module(self) -> nn.Module:
        """The network itself."""
        return registry.build(self.model, self.arguments)


def is_huggingface(path: str | Path) -> bool:
    """Whether `path` is a directory with a config.json that names a model_type."""
    config = Path(path) / CONFIG
    return config.is_file() and "model_type" in read_json(config)


def from_huggingface(directory: str | Path) -> Teacher:
    """The network in a directory that `save_pretrained` wrote, or that was downloaded from a hub.

    Args:
      directory: holds config.json and model.safetensors (or model.safetensors.index.json and what it lists), and
        preprocessor_config.json, if anything is to be known of how images are normalised.

    Raises:
      FileNotFoundError: no such directory or file.
      ValueError: another kind of network, an option that is not supported, or tensors that do not fit: says which.
    """
    directory = Path(directory)
    family, described, tensors = _read(directory)
    prepared = preparation(directory / PREPROCESSOR, described.channels)
    shape = described.input_shape or (*(prepared.sides or USUAL_SIDES), described.channels)
    module = registry.build(described.model, described.arguments)
    variables = fill(directory, tensors, module, shape, names.naming(family, module))
    return Teacher(described.model, described.arguments, variables, shape, prepared.mean, prepared.std)


def load(directory: str | Path, module: nn.Module, input_shape: Shape) -> dict[str, Any]:
    """The variables of a network that is known already.

    Args:
      directory: as for `from_huggingface`.
      module: what the directory must hold.
      input_shape: of one example, (height, width, channels).

    Raises:
      FileNotFoundError, ValueError: as `from_huggingface`; or the directory holds another network than `module`.
    """
    directory = Path(directory)
    family, described, tensors = _read(directory)
    held = registry.build(described.model, described.arguments)
    if type(held) is not type(module):
        raise ValueError(f"{directory} holds a {type(held).__name__}, not a {type(module).__name__}")
    for field in type(held).__dataclass_fields__:
        ours, theirs = getattr(module, field), getattr(held, field)
        if field not in _NO_MATTER and ours != theirs:
            raise ValueError(f"{directory} holds a {type(held).__name__} with {field}={theirs!r}, not {ours!r}")
    return fill(directory, tensors, module, input_shape, names.naming(family, module))


def _read(directory: Path) -> tuple[str, configs.Described, dict[str, np.ndarray]]:
    """(model_type, our network, tensors by name)."""
    for needed, kind in ((directory, "directory"), (directory / CONFIG, "file")):
        if not needed.exists():
            raise FileNotFoundError(f"no such {kind}: {needed}")
    config = read_json(directory / CONFIG)
    family = configs.family(directory / CONFIG, config)
    tensors = read_directory(directory)
    return family, configs.describe(directory / CONFIG, config, *_head(directory, family, tensors)), tensors


# Tensors


def read_directory(directory: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of model.safetensors, or of the shards that model.safetensors.index.json lists.

    Raises:
      FileNotFoundError: neither is there, or a shard is missing.
      ValueError: a damaged file, or shards that hold other tensors than the index says.
    """
    if (directory / WEIGHTS).is_file():
        return read_tensors(directory / WEIGHTS, names.UNUSED)
    if not (directory / INDEX).is_file():
        others = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5"))
        found = f"; {', '.join(others[:3])} is not read, as it may run code" if others else ""
        raise FileNotFoundError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}{found}; save it anew by `save_pretrained(…)` of a recent "
            "`transformers`"
        )
    listed = read_json(directory / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{directory / INDEX}: 'weight_map' must map names of tensors to names of files")
    shards = sorted(set(listed.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{directory / INDEX}: {shard!r} must be the name of a .safetensors file beside it")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        tensors |= read_tensors(directory / shard, names.UNUSED)
    expected = {name for name in listed if not name.endswith(names.UNUSED)}
    if differing := sorted(expected ^ tensors.keys()):
        raise ValueError(
            f"{directory / INDEX} and the files that it lists disagree on {len(differing)} tensors: "
            f"{', '.join(differing[:5])}"
        )
    return tensors


def _head(directory: Path, family: str, tensors: Mapping[str, np.ndarray]) -> tuple[str, int]:
    """(name of the classifier, number of classes)."""
    heads = names.HEADS[family]
    for head in heads:
        weight = tensors.get(f"{head}.weight")
        if weight is not None and weight.ndim == 2:
            return head, len(weight)
    raise ValueError(
        f"{directory} holds no classifier ({' or '.join(f'{head}.weight' for head in heads)}), only the network before "
        "it; a teacher needs one: save the ForImageClassification model"
    )
