"""Metadata that Linen keeps around arrays: boxes (`nn.Partitioned`, `nn.LogicallyPartitioned`, one's own).

A box is a node of the tree with one array in it, so that a boxed kernel lies at "params/conv/kernel/value". The package
computes with trees without boxes: `unboxed` on the way in, `boxed` on the way out; `described` and `made` are for
files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

Boxes = Mapping[str, Any]  # {path of an array, "params/conv/kernel": its box}
Described = dict[str, dict[str, Any]]  # {path: {"kind": class, "names": […], "rules": […]}}
_KINDS: dict[str, Any] = {"Partitioned": nn.Partitioned, "LogicallyPartitioned": nn.LogicallyPartitioned}


def boxes_of(tree: Any) -> dict[str, Any]:
    """The boxes of a tree; {} where it has none."""
    return {_name(path): node for path, node in _flat(tree) if _is_box(node)}


def unboxed(tree: Any) -> Any:
    """The tree with arrays (or shapes) in the place of boxes; unlike `nn.unbox`, no sharding constraint is applied."""

    def value(node: Any) -> Any:
        while _is_box(node):
            node = _content(node)
        return node

    return jax.tree.map(value, tree, is_leaf=_is_box)


def boxed(tree: Any, boxes: Boxes) -> Any:
    """The tree with its arrays in boxes like those at their paths, as far as there are such."""

    def put(box: Any, value: Any) -> Any:
        inner = _content(box)
        return box.replace_boxed(put(inner, value) if _is_box(inner) else value)

    def at(path: Any, leaf: Any) -> Any:
        box = boxes.get(_name(path))
        return leaf if box is None else put(box, leaf)

    return jax.tree_util.tree_map_with_path(at, tree) if boxes else tree


def keeping_boxes(function: Callable[[Any], Any], tree: Any) -> Any:
    """What `function` makes of the tree without boxes, in the boxes of the tree."""
    return boxed(function(unboxed(tree)), boxes_of(tree))


def described(boxes: Boxes) -> Described:
    """Boxes as plain JSON, without their meshes; of one that is not Flax's own its class alone."""
    return {path: _described(box) for path, box in boxes.items()}


def made(described: Any, own: Callable[[], Boxes]) -> dict[str, Any]:
    """The boxes that `described` wrote; those of other kinds are taken from `own()`, the boxes that a module makes.

    Raises:
      ValueError: it is not what `described` writes.
    """
    found = {}
    for path, record in described.items():
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind in _KINDS and isinstance(record.get("names"), list):
            more = {"rules": _tupled(record["rules"])} if record.get("rules") is not None else {}
            found[path] = _KINDS[kind](None, _tupled(record["names"]), **more)
        elif kind is None or kind in _KINDS:
            raise ValueError(f"boxes: {path!r:.80} is described wrongly")
    others = {path: record["kind"] for path, record in described.items() if path not in found}
    same = own() if others else {}
    return found | {path: same[path] for path, kind in others.items() if type(same.get(path)).__qualname__ == kind}


def _described(box: Any) -> dict[str, Any]:
    kind = next((name for name, kind in _KINDS.items() if type(box) is kind), None)
    if kind is not None and not _is_box(_content(box)):
        record = {"kind": kind, "names": list(box.names), "rules": getattr(box, "rules", None)}
        if all(map(_is_plain, record["names"])) and (record["rules"] is None or all(map(_is_plain, record["rules"]))):
            return record
    return {"kind": type(box).__qualname__}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _content(box: Any) -> Any:
    """What is in a box, without the constraint on its sharding that `unbox` may apply."""
    children = jax.tree.leaves(box, is_leaf=lambda node: node is not box)
    return children[0] if len(children) == 1 and children[0] is not box else box.unbox()


def _is_box(node: Any) -> bool:
    return isinstance(node, meta.AxisMetadata)


def _flat(tree: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
