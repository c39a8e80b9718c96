"""Deep networks in few rows: the groups of a stage or a block as one, where there are more than a page can take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdsearch_jax.reporting.record import Group

ROWS = 40  # that a figure takes before groups are merged
PANELS = 60  # of gates; more groups than this share one heat-map


def merged(groups: tuple[Group, ...], most: int = ROWS) -> tuple[Group, ...]:
    """At most `most` groups: those that share the beginning of their names as one, the deepest that is short enough.

    Units are kept one after another. Groups whose names share nothing are merged with their neighbours. Shares of the
    MACs are those of no single group and are left at 0, as the MACs between two groups belong to both.
    """
    if len(groups) <= most:
        return groups
    parts = [group.name.split("/") for group in groups]
    for depth in range(max(map(len, parts)) - 1, 0, -1):
        keys = ["/".join(part[:depth]) for part in parts]
        if 2 <= len(set(keys)) <= most:
            return _merge(groups, keys)
    size = -(-len(groups) // most)
    return _merge(groups, [_span(groups[i - i % size : i - i % size + size]) for i in range(len(groups))])


def _span(groups: Sequence[Group]) -> str:
    return groups[0].name if len(groups) == 1 else f"{groups[0].name} … {groups[-1].name}"


def _merge(groups: tuple[Group, ...], keys: list[str]) -> tuple[Group, ...]:
    lots: dict[str, list[Group]] = {}
    for key, group in zip(keys, groups, strict=True):
        lots.setdefault(key, []).append(group)
    return tuple(_one(key, lot) for key, lot in lots.items())


def _one(name: str, lot: list[Group]) -> Group:
    kept = [group.kept for group in lot if group.kept is not None]
    paths = [group.path for group in lot if group.path is not None]
    return Group(
        name=name,
        kind=lot[0].kind if len({group.kind for group in lot}) == 1 else "units",
        size=sum(group.size for group in lot),
        layers=tuple(dict.fromkeys(layer for group in lot for layer in group.layers)),
        macs_share=0.0,
        kept=np.concatenate(kept) if len(kept) == len(lot) else None,
        path=np.concatenate(paths, axis=1) if len(paths) == len(lot) else None,
    )
