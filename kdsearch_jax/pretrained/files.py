"""Reading PyTorch's weight files: float32 tensors by name, without ever running code that a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

TORCH_SUFFIXES = (".pth", ".pt", ".th")


def read_tensors(path: str | Path, unused: Sequence[str] = ("num_batches_tracked",)) -> dict[str, np.ndarray]:
    """The float32 tensors of a PyTorch file by name, without `module.` prefixes.

    Args:
      path: the file.
      unused: ends of the names of tensors that are left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, or holds anything but finite tensors.
      ImportError: PyTorch is needed and not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        tensors = _read_torch(path)
    else:
        raise ValueError(
            f"{path} is no PyTorch weights file by its name; expected one of .safetensors, {', '.join(TORCH_SUFFIXES)}"
        )
    if any(name.startswith("params/") for name in tensors):
        raise ValueError(f"{path} was exported by kdsearch_jax; load the student's directory with kdsearch_jax.load")
    if tensors and all(name.startswith("module.") for name in tensors):  # saved from DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith(tuple(unused))}
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return {name: _checked(path, name, value) for name, value in tensors.items()}


def _checked(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """The tensor as float32, which must be of floating point and finite."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{path}: {name} is of type {value.dtype}; only floating point weights can be loaded")
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: {name} holds values that are not finite; the file is damaged or training diverged")
    return value


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); is it complete?") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an extra of its own
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch: pip install torch, or, wherever PyTorch is, convert the state dict once by "
            "safetensors.torch.save_file and load the .safetensors file"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, tar and PyTorch's own errors, by what is wrong where
        # PyTorch's own message advises weights_only=False, which runs whatever code the file holds: not repeated.
        said = "" if "weights_only" in str(error) else f": {error}".split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as PyTorch tensors ({type(error).__name__}{said}); either it is damaged, or it "
            "holds more than tensors and would run code: then save its state_dict alone, where it came from"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: tensors by name, at the top or under 'state_dict' or 'model'")
    # By way of float32, as NumPy lacks bfloat16; integers stay, to be refused by name.
    return {str(k): (v.float() if v.is_floating_point() else v).numpy() for k, v in content.items()}
