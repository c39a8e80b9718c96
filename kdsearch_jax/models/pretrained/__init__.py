"""Loads trained PyTorch weights into our networks: `.safetensors`, and `.pth`, `.pt`, `.th` if PyTorch is installed.

    torch_files.py      reads a file: tensors by name, without running code
    torchvision.py      torchvision's tensor names
    huggingface.py      a directory with config.json and model.safetensors in Hugging Face's format
    tensor_mapping.py   fills a network from named tensors, or lists everything that does not match

Every tensor of the file must match a leaf of the network and the reverse, with the right shape; otherwise nothing is
loaded and the error lists both sides. No code in a file is ever run: PyTorch's restricted unpickler accepts tensors
only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn

from kdsearch_jax.models.pretrained import huggingface, tensor_mapping, torchvision
from kdsearch_jax.models.pretrained.huggingface import PretrainedNetwork, from_huggingface, is_huggingface
from kdsearch_jax.models.pretrained.torch_files import read_tensors

__all__ = ["PretrainedNetwork", "from_huggingface", "is_huggingface", "load_torch", "read_tensors"]


def load_torch(path: str | Path, module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the variables of `module` with the weights in a PyTorch file.

    Args:
      path: `.safetensors` (does not need PyTorch), or `.pth`, `.pt`, `.th`: a state dict, or a checkpoint that has one
        under "state_dict" or "model"; or a directory in Hugging Face's format.
      module: one of our networks that torchvision (or github.com/akamaster/pytorch_resnet_cifar10) has too, or the
        network in the directory.
      input_shape: of one example, (height, width, channels).

    Returns:
      {"params": …, "batch_stats": …}, float32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, or contains another network than `module`.
      ImportError: PyTorch is needed but not installed.
    """
    if Path(path).is_dir():
        return huggingface.load(path, module, input_shape)
    naming = torchvision.naming(module, input_shape)
    return tensor_mapping.load_variables(path, read_tensors(path), module, input_shape, naming)
