"""Whether a checkpoint belongs to this run: same configuration, same structure; and where its arrays are placed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.storage.files import CheckpointError, as_json


def check_config(path: Path, stored: Any, expected: Mapping[str, Any]) -> None:
    """Raises ValueError, listing the settings that differ between a checkpoint's and the expected configuration.

    A setting that the checkpoint's version did not have counts as equal if it is None, which turns it off.
    """
    old, new = _by_dotted_name(stored or {}), _by_dotted_name(as_json(expected, "expected_config"))
    differing = [
        f"{key}: {json.dumps(old[key]) if key in old else 'absent'} in the checkpoint, "
        f"{json.dumps(new[key]) if key in new else 'absent'} now"
        for key in sorted(old.keys() | new.keys())
        if (key not in old and new[key] is not None) or key not in new or (key in old and old[key] != new[key])
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} has another configuration ({'; '.join(differing)}); restore these settings to resume, "
            "or start in another directory"
        )


def _by_dotted_name(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    return {
        name: value
        for key, child in config.items()
        for name, value in _by_dotted_name(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def check_structure(leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the stored leaves differ from the target's in name, shape or dtype."""
    for name in [*targets, *leaves]:
        if name not in leaves:
            raise CheckpointError(f"it lacks {name!r}, which the state has")
        if name not in targets:
            raise CheckpointError(f"it has {name!r}, which the state lacks")
        target = targets[name] if hasattr(targets[name], "dtype") else np.asarray(targets[name])
        stored = (tuple(leaves[name]["shape"]), leaves[name]["dtype"])
        if stored != (tuple(target.shape), target.dtype.name):
            raise CheckpointError(
                f"{name!r} is {stored[1]} {stored[0]}, but {target.dtype.name} {tuple(target.shape)} in the state"
            )


def place_like(array: np.ndarray, target: Any) -> Any:
    """Converts an array to the type of the target leaf: a number, a NumPy array, or a JAX array with its sharding."""
    if isinstance(target, (bool, int, float, complex)):
        return type(target)(array[()])
    if isinstance(target, (np.ndarray, np.generic)):
        return array if isinstance(target, np.ndarray) else array[()]
    # An uncommitted array stays free to follow the others into a computation over several devices.
    sharding = target.sharding if getattr(target, "committed", True) else None
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
