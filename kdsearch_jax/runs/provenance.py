"""Records what the results of a run depend on: data, versions, user code, devices, JAX settings, the command."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.extend
import numpy as np

from kdsearch_jax.runs.config import Experiment

_WHOLE = 1 << 26  # bytes; of larger arrays only every nth row counts in the fingerprint
# Packages that affect numbers and data. Extras may be missing, as is this one in a checkout on PYTHONPATH.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "scikit-learn", "pillow", "grain",
             "array-record", "tensorflow-datasets", "kdsearch-jax")  # fmt: skip


def fingerprint(arrays: Any) -> str:
    """A short digest of a pytree of arrays, such as {split: {entry: …}}; samples the rows of large arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        if isinstance(leaf, (np.ndarray, jax.Array)):
            rows = leaf[:: max(1, leaf.nbytes // _WHOLE)] if leaf.ndim else leaf
            digest.update(np.ascontiguousarray(rows).tobytes())
        elif isinstance(identity := getattr(leaf, "identity", None), str):  # streamed
            digest.update(identity.encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """{package: version} of Python and of the installed packages that affect numbers and data."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def made_by() -> str:
    """The versions that numbers depend on most, in one line: `jax 0.10.2, commit 1a2b3c4d5e6f`."""
    installed, revision = versions(), git_revision(Path(__file__).parents[1])
    names = [f"{name} {installed[name]}" for name in ("kdsearch-jax", "jax") if name in installed]
    return ", ".join([*names, *([f"commit {revision[:12]}{revision[40:]}"] if revision else [])])


def code(experiment: Experiment) -> dict[str, str]:
    """{module: digest of its file} of the imported user modules that the experiment names."""
    named = (experiment.model.name, experiment.distill.loss, experiment.distill.metrics)
    digests = {}
    for name in sorted({text.partition(":")[0] for text in named if text and ":" in text}):
        with contextlib.suppress(OSError):
            if file := getattr(sys.modules.get(name), "__file__", None):
                digests[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return digests


def environment() -> dict[str, Any]:
    """Versions, revision, devices, JAX settings, command and time of this start of a run."""
    names = [
        name
        for name in sorted(os.environ)
        if name == "XLA_FLAGS" or name.startswith(("JAX_", "LIBTPU_", "NVIDIA_TF32"))
    ]
    return {
        "versions": versions(),
        "git_revision": git_revision(Path(__file__).parents[1]),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "backend": jax.default_backend(),
        "runtime": jax.extend.backend.get_backend().platform_version,  # of CUDA and its driver, or of libtpu
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "variables": {name: os.environ[name] for name in names},
        "jax": {
            "default_matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore
            "enable_x64": jax.config.jax_enable_x64,  # type: ignore
            "default_prng_impl": jax.config.jax_default_prng_impl,  # type: ignore
            "threefry_partitionable": jax.config.jax_threefry_partitionable,  # type: ignore
        },
        "command": command_line(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _cpu() -> str:
    """The processor's name according to Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def command_line() -> list[str]:
    """The command that started this process, as it would be typed again."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:  # a script
        return [Path(sys.argv[0]).name, *sys.argv[1:]]
    return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def git_revision(package: Path) -> str | None:
    """The commit of the checkout that contains `package`, with `-dirty` if edited; None outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A package installed inside another repository is not part of it.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.resolve().parent:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
