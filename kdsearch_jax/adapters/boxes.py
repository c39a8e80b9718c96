"""Linen's metadata boxes around arrays: `nn.Partitioned`, `nn.LogicallyPartitioned`, or a user's own class.

A box is a pytree node with one array in it, so the path of a boxed kernel is "params/conv/kernel/value". The package
computes with trees without boxes: `unboxed` removes them from what a user passes in and `boxed` puts them back.
`boxes_to_json` and `boxes_from_json` are for files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

Boxes = Mapping[str, Any]  # {path of an array, "params/conv/kernel": box}
BoxRecords = dict[str, dict[str, Any]]  # {path: {"kind": class, "names": […], "rules": […]}}
_KINDS: dict[str, Any] = {"Partitioned": nn.Partitioned, "LogicallyPartitioned": nn.LogicallyPartitioned}


def boxes_of(tree: Any) -> dict[str, Any]:
    """{path: box} of a tree."""
    return {_name(path): node for path, node in _flat(tree) if _is_box(node)}


def unboxed(tree: Any) -> Any:
    """The tree with arrays (or shapes) in place of boxes; unlike `nn.unbox`, it applies no sharding constraint."""

    def value(node: Any) -> Any:
        while _is_box(node):
            node = _content(node)
        return node

    return jax.tree.map(value, tree, is_leaf=_is_box)


def boxed(tree: Any, boxes: Boxes) -> Any:
    """The tree with the arrays at the paths of `boxes` put in boxes like those."""

    def put(box: Any, value: Any) -> Any:
        inner = _content(box)
        return box.replace_boxed(put(inner, value) if _is_box(inner) else value)

    def at(path: Any, leaf: Any) -> Any:
        box = boxes.get(_name(path))
        return leaf if box is None else put(box, leaf)

    return jax.tree_util.tree_map_with_path(at, tree) if boxes else tree


def keeping_boxes(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies `function` to the tree without boxes and puts the result in the tree's boxes."""
    return boxed(function(unboxed(tree)), boxes_of(tree))


def boxes_to_json(boxes: Boxes) -> BoxRecords:
    """Boxes as JSON values, without meshes; a box that is not Flax's own is represented by its class name only."""
    return {path: _record(box) for path, box in boxes.items()}


def boxes_from_json(records: Any, module_boxes: Callable[[], Boxes]) -> dict[str, Any]:
    """The inverse of `boxes_to_json`.

    Args:
      module_boxes: returns the boxes that the module itself creates, from which boxes of a user's own class are taken.

    Raises:
      ValueError: a record is not one that `boxes_to_json` writes.
    """
    boxes = {}
    for path, record in records.items():
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind in _KINDS and isinstance(record.get("names"), list):
            more = {"rules": _tupled(record["rules"])} if record.get("rules") is not None else {}
            boxes[path] = _KINDS[kind](None, _tupled(record["names"]), **more)
        elif kind is None or kind in _KINDS:
            raise ValueError(f"boxes: {path!r:.80} has an invalid description")
    others = {path: record["kind"] for path, record in records.items() if path not in boxes}
    created = module_boxes() if others else {}
    return boxes | {
        path: created[path] for path, kind in others.items() if type(created.get(path)).__qualname__ == kind
    }


def _record(box: Any) -> dict[str, Any]:
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
    """The content of a box, without the sharding constraint that `unbox` may apply."""
    children = jax.tree.leaves(box, is_leaf=lambda node: node is not box)
    return children[0] if len(children) == 1 and children[0] is not box else box.unbox()


def _is_box(node: Any) -> bool:
    return isinstance(node, meta.AxisMetadata)


def _flat(tree: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
