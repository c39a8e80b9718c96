"""Arrays as they are stored: their flat names, their digests, and what Orbax is told about them."""

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
from kdsearch_jax.storage.checkpoint_files import CheckpointError

PyTree = Any


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by flat name, as `{"params/conv/kernel": leaf}`; "/" and "%" within a key are escaped."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = (str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
        name = "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)
        flat[name] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionary whose `flatten` is `flat`.

    Raises:
      ValueError: a name is both an array and a folder of arrays.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = (part.replace("%2F", "/").replace("%25", "%") for part in name.split("/"))
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r}: {folder!r} is an array and a folder at once")
        if last in node:
            raise ValueError(f"{name!r} is an array and a folder at once")
        node[last] = leaf
    return tree


def describe(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 (over both and the bytes) of an array, as JSON."""
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest.hexdigest()}


def copied(name: str, leaf: Any) -> np.ndarray:
    """A leaf in the host's memory, safe from donation of its buffer and from changes in place."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name!r} is a typed random key; store jax.random.key_data(key), of dtype uint32")
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.array(leaf)
    if not DTYPE.fullmatch(array.dtype.name):
        raise ValueError(
            f"{name!r} is of type {type(leaf).__name__}, dtype {array.dtype}; store arrays and numbers only"
        )
    return array


class OneByOne(ocp.type_handlers.NumpyHandler):
    """Opens and reads array after array.

    Orbax opens and reads all at once; the first error ends that, and every other one is then a traceback on stderr.
    """

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        """What is stored under each name."""
        return [described for info in infos for described in await super(OneByOne, self).metadata([info])]

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[np.ndarray]:
        """The arrays."""
        pairs = zip(infos, args or [ocp.RestoreArgs()] * len(infos), strict=True)
        return [array for pair in pairs for array in await super(OneByOne, self).deserialize(*([x] for x in pair))]


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax for flat dictionaries of NumPy arrays, without compression: files are as large as what they hold."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, OneByOne(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # not used here; Orbax warns of its absence
    )
    return ocp.PyTreeCheckpointHandler(
        use_compression=False, multiprocessing_options=alone(), type_handler_registry=registry
    )


def alone() -> ocp.options.MultiprocessingOptions:
    """Orbax as one process's own: it neither waits for others nor is waited for."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def to_store(arrays: Mapping[str, np.ndarray]) -> ocp.args.PyTreeSave:
    """What goes to Orbax, which refuses arrays without elements: their description says all there is to say."""
    return ocp.args.PyTreeSave({name: array for name, array in arrays.items() if array.size})


def to_read(leaves: Mapping[str, Mapping[str, Any]]) -> ocp.args.PyTreeRestore:
    """What Orbax shall read of the arrays described: all that have elements, as NumPy arrays of these shapes."""
    targets = {
        name: np.broadcast_to(np.zeros((), jnp.dtype(leaf["dtype"])), leaf["shape"])
        for name, leaf in leaves.items()
        if math.prod(leaf["shape"])
    }
    arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in targets}
    return ocp.args.PyTreeRestore(item=targets, restore_args=arguments)


def verified(leaves: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays that `leaves` describes, each compared with its digest."""
    found = {
        name: np.asarray(arrays[name]) if name in arrays else np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
        for name, leaf in leaves.items()
    }
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for (name, leaf), actual in zip(leaves.items(), pool.map(describe, found.values()), strict=True):
            if actual != dict(leaf):
                what = (
                    "bytes"
                    if (actual["shape"], actual["dtype"]) == (leaf["shape"], leaf["dtype"])
                    else "shape or dtype"
                )
                raise CheckpointError(f"{what} of {name!r} are not those that were saved")
    return found
