"""Whether a checkpoint is of this run: its configuration, its structure; and how its arrays are placed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.storage.checkpoint_files import CheckpointError, plain


def check_config(path: Path, stored: Any, expected: Mapping[str, Any]) -> None:
    """Raises ValueError, listing the settings in which a checkpoint's configuration differs from the expected one."""
    old, new = _settings(stored or {}), _settings(plain(expected, "expected_config"))
    differing = [
        f"{key}: {json.dumps(old[key]) if key in old else 'absent'} there, "
        f"{json.dumps(new[key]) if key in new else 'absent'} now"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} is of another configuration ({'; '.join(differing)}); set these back to resume, or "
            "start in another directory"
        )


def _settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    return {
        name: value
        for key, child in config.items()
        for name, value in _settings(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def check_structure(leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the stored leaves are not those of the wanted structure."""
    for name in [*targets, *leaves]:
        here, there = (f"{what} {name!r}" for what in ("the state has no", "it has no"))
        if name not in leaves:
            raise CheckpointError(f"{there}, which the state has")
        if name not in targets:
            raise CheckpointError(f"{here}, which it has")
        wanted = targets[name] if hasattr(targets[name], "dtype") else np.asarray(targets[name])
        stored = (tuple(leaves[name]["shape"]), leaves[name]["dtype"])
        if stored != (tuple(wanted.shape), wanted.dtype.name):
            raise CheckpointError(
                f"{name!r} is {stored[1]} {stored[0]}, and {wanted.dtype.name} {tuple(wanted.shape)} in the state"
            )


def placed(array: np.ndarray, target: Any) -> Any:
    """The array as the leaf of the target is: NumPy, a number, or on certain devices."""
    if isinstance(target, (bool, int, float, complex)):
        return type(target)(array[()])
    if isinstance(target, (np.ndarray, np.generic)):
        return array if isinstance(target, np.ndarray) else array[()]
    # An array that nobody has placed stays free to follow the others into a computation over several devices.
    sharding = target.sharding if getattr(target, "committed", True) else None
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
