"""Where arrays lie: one mesh over all devices of all processes, and arrays on it, whole or in parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """One axis, "data", over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh | None = None) -> Any:
    """Every leaf whole on every device of the mesh, by default of all devices of all processes."""
    return place(tree, NamedSharding(mesh or data_mesh(), PartitionSpec()))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Every leaf in this sharding, which may reach over several processes; they must all hold the same values."""

    def put(leaf: Any) -> Array:
        # Exactly this sharding, not an equivalent one: `jit` would compile anew for an equivalent one.
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding and not leaf.weak_type:
            return leaf
        host = np.asarray(leaf if isinstance(leaf, (np.ndarray, jax.Array)) else jnp.asarray(leaf))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def owned(tree: Any, mesh: Mesh) -> Any:
    """Copies in buffers of the compiler's own: donation frees them, while the caller's arrays stay alive."""
    copy = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return copy(replicate(tree, mesh))
