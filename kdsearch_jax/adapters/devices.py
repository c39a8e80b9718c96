"""Array placement: one mesh over all devices of all processes, with replicated or sharded arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SMALLEST = 1 << 14  # elements of an array that is worth sharding

P = ParamSpec("P")
T = TypeVar("T")


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis, "data", over these devices; by default over all devices of all processes."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


@contextmanager
def without_mesh() -> Iterator[None]:
    """Disables the mesh that the caller has set with `jax.set_mesh`.

    Sharding does not change what a network computes, but modules constrain it if there is a mesh, and a student's sizes
    may not be divisible by those of the mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        yield
    else:
        with jax.set_mesh(Mesh(np.empty((), object), ())):
            yield


def off_mesh(function: Callable[P, T]) -> Callable[P, T]:
    """Calls the function `without_mesh`, and again with the mesh if the model's own code needs one."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if jax.sharding.get_abstract_mesh().empty:
            return function(*args, **kwargs)
        try:
            with without_mesh():
                return function(*args, **kwargs)
        except Exception:  # the error for missing mesh axes depends on the model
            return function(*args, **kwargs)

    return called


def gathered(tree: Any) -> Any:
    """The tree with every array that is sharded over a mesh copied to the default device."""

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
            return leaf
        if not isinstance(leaf.sharding, NamedSharding):
            return leaf
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return jnp.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return jnp.asarray(np.asarray(leaf))

    return jax.tree.map(gather, tree)


def replicate(tree: Any, mesh: Mesh | None = None) -> Any:
    """Copies every leaf to every device of the mesh, by default `data_mesh()`."""
    return place(tree, NamedSharding(mesh or data_mesh(), PartitionSpec()))


def shardings_of(tree: Any, mesh: Mesh, shard: str | None) -> Any:
    """The sharding of each leaf of a training state.

    Args:
      tree: arrays or shapes.
      shard: "fsdp" divides each leaf of `SMALLEST` elements or more among all devices, along its largest axis that
        their number divides; None replicates all.
    """

    def sharding(leaf: Any) -> NamedSharding:
        shape, axes = np.shape(leaf), PartitionSpec()
        fitting = [axis for axis, size in enumerate(shape) if size % mesh.size == 0 and size > 0]
        if shard == "fsdp" and fitting and math.prod(shape) >= SMALLEST:
            axes = PartitionSpec(*(None,) * max(fitting, key=lambda axis: shape[axis]), "data")
        return NamedSharding(mesh, axes)

    return jax.tree.map(sharding, tree)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Replicates every leaf that does not lie on the mesh already, in whatever sharding."""

    def put(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there and not leaf.weak_type else replicate(leaf, mesh)

    return jax.tree.map(put, tree)


def place(tree: Any, sharding: Any) -> Any:
    """Puts every leaf in this sharding, which may span processes; they must all hold the same values.

    Args:
      sharding: one for all leaves, or a tree of them.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Array:
        # An equivalent sharding is not enough: `jit` would recompile for it.
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding and not leaf.weak_type:
            return leaf
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        host = np.asarray(leaf if isinstance(leaf, (np.ndarray, jax.Array)) else jnp.asarray(leaf))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, sharding), tree)
    return jax.tree.map(put, tree, sharding)


def local_rows(sharding: NamedSharding, rows: int) -> tuple[int, ...]:
    """The rows that this process's devices hold of arrays with `rows` rows in this sharding, in ascending order."""
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for part in parts if part for row in range(*part[0].indices(rows))}))


def assemble(tree: Any, held: Sequence[int], sharding: NamedSharding, rows: int) -> Any:
    """Global arrays with `rows` rows, from the rows that each process holds (`held`, see `local_rows`)."""
    first = {row: at for at, row in enumerate(held)}

    def put(leaf: np.ndarray) -> Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return leaf[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def donatable_copy(tree: Any, where: Any) -> Any:
    """Copies in new buffers, so that donating them leaves the caller's arrays valid.

    Args:
      where: a tree of shardings, or a mesh to replicate to.
    """
    shardings = NamedSharding(where, PartitionSpec()) if isinstance(where, Mesh) else where
    copy = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves), out_shardings=shardings)
    return copy(place(tree, shardings))
