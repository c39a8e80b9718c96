"""Reads PyTorch weight files: float32 tensors by name, without ever running code in a file."""

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
SAFE_VERSION = (2, 6)  # of PyTorch, since which weights_only=True runs no code (CVE-2025-32434)


def read_tensors(path: str | Path, unused: Sequence[str] = ("num_batches_tracked",)) -> dict[str, np.ndarray]:
    """Reads the float32 tensors of a PyTorch file by name, without `module.` prefixes.

    Args:
      path: the file.
      unused: suffixes of the names of tensors to ignore.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, or contains anything other than finite tensors.
      ImportError: PyTorch is needed but not installed.
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
            f"{path} has the unknown suffix {path.suffix!r}; expected .safetensors, {', '.join(TORCH_SUFFIXES)}"
        )
    if any(name.startswith("params/") for name in tensors):
        raise ValueError(f"{path} was exported by kdsearch_jax; load the student's directory with kdsearch_jax.load")
    if tensors and all(name.startswith("module.") for name in tensors):  # saved from nn.DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith(tuple(unused))}
    if not tensors:
        raise ValueError(f"{path} contains no tensors")
    return {name: _to_float32(path, name, value) for name, value in tensors.items()}


def _to_float32(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """Converts a tensor to float32; ValueError if it is not floating point, or not finite."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{path}: {name} has dtype {value.dtype}; only floating-point weights can be loaded")
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: {name} has values that are not finite; the file is damaged or training diverged")
    return value


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an optional dependency
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch: pip install 'kdsearch-jax[torch]', or convert the state dict with "
            "safetensors.torch.save_file on a machine that has PyTorch"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_VERSION:
        raise ValueError(
            f"reading {path} with PyTorch {torch.__version__} could run code in the file (CVE-2025-32434); "
            f"install PyTorch {'.'.join(map(str, SAFE_VERSION))} or newer"
        )
    check_file(path)
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip, pickle, tar or PyTorch
        # Do not repeat PyTorch's advice to set weights_only=False, which runs whatever code the file contains.
        reason = "" if "weights_only" in str(error) else f": {error}".split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as PyTorch tensors ({type(error).__name__}{reason}); either it is damaged, or it "
            "contains more than tensors and would run code: then save its state_dict alone"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(
            f"{path} contains no state dict: tensors by name, at top level or under 'state_dict' or 'model'"
        )
    for name, value in content.items():
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name!s:.80} is sparse, or declares more elements than the file has")
    if sum(4 * value.numel() for value in content.values()) > total_memory():
        raise ValueError(f"{path} declares more bytes than this machine's memory")
    # NumPy lacks bfloat16, so convert first; integers are kept, to be refused by name.
    return {str(k): (v.float() if v.is_floating_point() else v).numpy() for k, v in content.items()}


def _check_archive(path: Path) -> None:
    """Raises ValueError if a zip file, PyTorch's format since 1.6, is compressed, which PyTorch never does."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as PyTorch tensors ({error}); is it complete?") from error
    if declared > path.stat().st_size:
        raise ValueError(f"{path} is compressed and would take {declared} bytes; save it again with torch.save")
