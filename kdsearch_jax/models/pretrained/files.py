"""Reading PyTorch's weight files: float32 tensors by name, without ever running code that a file holds."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kdsearch_jax.storage.files import total_memory
from kdsearch_jax.storage.safe_readers import check_file, read_safetensors

TORCH_SUFFIXES = (".pth", ".pt", ".th")
SOUND = (2, 6)  # of PyTorch, from which on weights_only=True runs no code (CVE-2025-32434)


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
        tensors, _ = read_safetensors(path)
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


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an extra of its own
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch: pip install 'kdsearch-jax[torch]', or, wherever PyTorch is, convert the "
            "state dict once by safetensors.torch.save_file and load the .safetensors file"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < SOUND:
        raise ValueError(
            f"reading {path} with PyTorch {torch.__version__} could run code that the file holds (CVE-2025-32434); "
            f"install PyTorch {'.'.join(map(str, SOUND))} or newer"
        )
    check_file(path)
    _check_archive(path)
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
    for name, value in content.items():
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name!s:.80} is sparse, or declares more numbers than the file has")
    if sum(4 * value.numel() for value in content.values()) > total_memory():
        raise ValueError(f"{path} declares more than this machine's memory")
    # By way of float32, as NumPy lacks bfloat16; integers stay, to be refused by name.
    return {str(k): (v.float() if v.is_floating_point() else v).numpy() for k, v in content.items()}


def _check_archive(path: Path) -> None:
    """Raises ValueError where a zip file, PyTorch's format since 1.6, is compressed: PyTorch never does."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as PyTorch tensors ({error}); is it complete?") from error
    if declared > path.stat().st_size:
        raise ValueError(f"{path} is compressed, and would take {declared} bytes; save it anew by torch.save")
