"""Pytrees as flat dictionaries of arrays: names, digests, and how Orbax saves and restores them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from kdsearch_jax.adapters.call_spec import DTYPE
from kdsearch_jax.storage.files import CheckpointError

PyTree = Any


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by name, `{"params/conv/kernel": leaf}`; "/" and "%" inside a key are escaped."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = (str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
        flat["/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionary that `flatten` turns into `flat`.

    Raises:
      ValueError: a name is both an array and a prefix of other names.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = (part.replace("%2F", "/").replace("%25", "%") for part in name.split("/"))
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r}: {folder!r} is both an array and a folder")
        if last in node:
            raise ValueError(f"{name!r} is both an array and a folder")
        node[last] = leaf
    return tree


def describe(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 (of both and of the bytes) of an array, as JSON."""
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest.hexdigest()}


def check_digests(leaves: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays that `leaves` describes (see `describe`); CheckpointError if one differs from its digest."""
    restored = {
        name: np.asarray(arrays[name]) if name in arrays else np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
        for name, leaf in leaves.items()
    }
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for (name, leaf), actual in zip(leaves.items(), pool.map(describe, restored.values()), strict=True):
            if actual != dict(leaf):
                same_kind = (actual["shape"], actual["dtype"]) == (leaf["shape"], leaf["dtype"])
                what = "bytes" if same_kind else "shape or dtype"
                raise CheckpointError(f"the {what} of {name!r} differ from what was saved")
    return restored


def to_host(name: str, leaf: Any) -> np.ndarray:
    """Copies a leaf to host memory, so that its buffer can be donated or changed afterwards.

    Raises:
      ValueError: the leaf is a typed random key, or not an array or number; names it.
    """
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name!r} is a typed random key; store jax.random.key_data(key), of dtype uint32")
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.array(leaf)
    if not DTYPE.fullmatch(array.dtype.name):
        raise ValueError(
            f"{name!r} is of type {type(leaf).__name__}, dtype {array.dtype}; only arrays and numbers can be stored"
        )
    return array


# --- Orbax ----------------------------------------------------------------------------------------------------------


class SequentialNumpyHandler(ocp.type_handlers.NumpyHandler):
    """Opens and reads one array at a time.

    Orbax opens and reads all at once: the first error ends that, and each further one becomes a traceback on stderr.
    """

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        """What is stored under each name."""
        return [described for info in infos for described in await super(SequentialNumpyHandler, self).metadata([info])]

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[np.ndarray]:
        """The arrays."""
        arrays: list[np.ndarray] = []
        for info, arg in zip(infos, args or [ocp.RestoreArgs()] * len(infos), strict=True):
            arrays += await super().deserialize([info], [arg])
        return arrays


def orbax_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for flat dictionaries of NumPy arrays; without compression, so files are as large as arrays."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, SequentialNumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused, but Orbax warns if it is missing
    )
    return ocp.PyTreeCheckpointHandler(
        use_compression=False, multiprocessing_options=single_process(), type_handler_registry=registry
    )


def single_process() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax works in this process alone, without waiting for others."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def save_args(arrays: Mapping[str, np.ndarray]) -> ocp.args.PyTreeSave:
    """Orbax's arguments to save arrays, without empty ones, which it refuses and which their description restores."""
    return ocp.args.PyTreeSave({name: array for name, array in arrays.items() if array.size})


def restore_args(leaves: Mapping[str, Mapping[str, Any]]) -> ocp.args.PyTreeRestore:
    """Orbax's arguments to restore the described arrays, except empty ones, as NumPy arrays of these shapes."""
    targets = {
        name: np.broadcast_to(np.zeros((), jnp.dtype(leaf["dtype"])), leaf["shape"])
        for name, leaf in leaves.items()
        if math.prod(leaf["shape"])
    }
    arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in targets}
    return ocp.args.PyTreeRestore(item=targets, restore_args=arguments)
