"""Metadata that Flax keeps around arrays: Linen's boxes (`nn.Partitioned`, `nn.LogicallyPartitioned`, one's own).

A box is a node of the tree with one array in it, so that a boxed kernel lies at "params/conv/kernel/value". Everything
here but this file sees trees without boxes: `unboxed` on the way in, `boxed` on the way out.
"""

from __future__ import annotations

from typing import Any

import jax
from flax.core import meta


def unboxed(tree: Any) -> Any:
    """The tree with arrays (or shapes) in the place of boxes; unlike `nn.unbox`, no sharding constraint is applied."""

    def value(node: Any) -> Any:
        while isinstance(node, meta.AxisMetadata):
            inner = jax.tree.leaves(node, is_leaf=lambda x, node=node: x is not node)
            node = inner[0] if len(inner) == 1 and inner[0] is not node else node.unbox()
        return node

    return jax.tree.map(value, tree, is_leaf=_is_box)


def _is_box(node: Any) -> bool:
    return isinstance(node, meta.AxisMetadata)
