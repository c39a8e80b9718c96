"""Trained PyTorch weights in our networks: `.safetensors`, and `.pth`, `.pt`, `.th` where PyTorch is installed.

    files.py         reads a file: tensors by name, no code run
    torchvision.py   which tensor fills which leaf, where a file has torchvision's names
    huggingface.py   a directory with config.json and model.safetensors, as Hugging Face has them
    matching.py      fills a network from such a naming, or says all that does not fit

Every tensor of the file must find its place in the network and every leaf of the network its tensor, of the right
shape; otherwise nothing is loaded and the error lists both sides. No code from a file is ever run: unpickling is
PyTorch's restricted kind, which takes tensors only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn

from kdsearch_jax.models.pretrained import huggingface, matching, torchvision
from kdsearch_jax.models.pretrained.files import read_tensors
from kdsearch_jax.models.pretrained.huggingface import Teacher, from_huggingface, is_huggingface

__all__ = ["Teacher", "from_huggingface", "is_huggingface", "load_torch", "read_tensors"]


def load_torch(path: str | Path, module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """The variables of `module` with the weights in a PyTorch file.

    Args:
      path: `.safetensors` (needs no PyTorch), or `.pth`, `.pt`, `.th`: a state dict, or a checkpoint that holds one
        under "state_dict" or "model"; or a directory in Hugging Face's format.
      module: one of our networks that torchvision (or github.com/akamaster/pytorch_resnet_cifar10) has too, or that
        the directory holds.
      input_shape: of one example, (height, width, channels).

    Returns:
      {"params": …, "batch_stats": …}, float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, or that holds another network than `module`.
      ImportError: PyTorch is needed and not installed.
    """
    if Path(path).is_dir():
        return huggingface.load(path, module, input_shape)
    naming = torchvision.naming(module, input_shape)
    return matching.fill(path, read_tensors(path), module, input_shape, naming)
