"""The best selection of all, by dynamic programming over the chains of pieces.

Chains are decided one after the other. Two partial selections from which all that follows costs the same are one state,
and only the worthier is kept: a stream of blocks that are alike has few states, however many selections there are. A
state whose every completion costs too much, or too little, is dropped. Where states become too many, those of the
highest worth at every cost are gone on with, and the result is the best found, no longer the best there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdsearch_jax.pruning.budget.limits import FLOOR, Limits
from kdsearch_jax.pruning.budget.pieces import Pieces
from kdsearch_jax.pruning.budget.table import Table
from kdsearch_jax.tracing.topology import Topology

WORK = 1_000_000  # states looked at in all, about a second
SLACK = 1e-9  # of rounding, where a state is dropped for what it costs
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Outcome:
    """best: within the limits, inside of [FLOOR, 1] the worthiest, below it the costliest; above: the least costly
    selection beyond the limits, None where there is none or `best` is inside. Flat. complete: no state was left out.
    """

    best: np.ndarray
    above: np.ndarray | None
    complete: bool


def search(topology: Topology, limits: Limits, pieces: Pieces, work: int = WORK) -> Outcome | None:
    """Goes through all selections; None where none of those looked at is within the limits."""
    table = Table.of(topology, limits, pieces)
    states, steps = _States.first(table), []
    bottom, top, complete = 0.0, np.inf, True
    rows = max(work // len(pieces.chains), 1000)
    for position, chain in enumerate(table.order):
        states = states.expanded(table, pieces, chain)
        least, most = table.pressures(states.sizes, states.totals, position)
        seen = np.concatenate([least, most])
        if ((seen >= FLOOR) & (seen <= 1.0)).any():
            bottom, top = FLOOR, 1.0
        else:
            bottom = max(bottom, seen[seen <= 1.0].max(initial=0.0))
            top = min(top, seen[seen > 1.0].min(initial=np.inf))
        which = np.flatnonzero((least <= top * (1 + SLACK)) & (most >= bottom * (1 - SLACK)))
        keys = table.keys(states.sizes[which], states.totals[which], position)
        which = which[_first_of_each(keys, states.worth[which])]
        next_levels = len(pieces.chains[table.order[position + 1]]) + 1 if position + 1 < len(table.order) else 1
        if len(which) * next_levels > rows:
            which = which[_spread(least[which], states.worth[which], max(rows // next_levels, 1))]
            complete = False
        states = states.chosen(which).retired(table, position)
        steps.append((chain, states.parent, states.level))
    pressures = (states.totals / table.limits).max(1)
    found = _best(pressures, states.worth)
    if found is None:
        return None
    beyond = np.where(pressures > 1.0, pressures, np.inf)
    above = int(beyond.argmin()) if pressures[found] < FLOOR and np.isfinite(beyond).any() else None
    built = [None if at is None else _traced_back(topology, pieces, steps, at) for at in (found, above)]
    assert built[0] is not None
    return Outcome(built[0], built[1], complete)


def _first_of_each(keys: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """Numbers of the rows that are the worthiest of those with their key; keys: (rows, n) integers."""
    if not len(keys):
        return np.zeros(0, int)
    weights = np.cumprod(np.full(keys.shape[1], MIX))
    mixed = keys.view(np.uint64) * weights
    mixed = (mixed ^ (mixed >> np.uint64(29))).sum(1, dtype=np.uint64)
    order = np.lexsort((-worth, mixed))
    mixed = mixed[order]
    return np.sort(order[np.append(True, mixed[1:] != mixed[:-1])])


def _spread(cost: np.ndarray, worth: np.ndarray, count: int) -> np.ndarray:
    """Numbers of `count` rows of all costs, the worthiest of those next to each other."""
    rank = np.argsort(np.argsort(cost, kind="stable"), kind="stable")
    bucket = rank * count // len(cost)
    order = np.lexsort((-worth, bucket))
    bucket = bucket[order]
    return np.sort(order[np.append(True, bucket[1:] != bucket[:-1])])


def _best(pressures: np.ndarray, worth: np.ndarray) -> int | None:
    """The state that `Outcome.best` means."""
    if not (pressures <= 1.0).any():
        return None
    reached = np.where(pressures <= 1.0, np.minimum(pressures, FLOOR), -1.0)
    return int(np.lexsort((worth, reached))[-1])


def _traced_back(
    topology: Topology, pieces: Pieces, steps: list[tuple[int, np.ndarray, np.ndarray]], at: int
) -> np.ndarray:
    keep = np.ones(topology.units)
    for chain, parent, level in reversed(steps):
        keep = pieces.without(keep, pieces.chains[chain][: level[at]])
        at = int(parent[at])
    return keep


@dataclass(frozen=True)
class _States:
    """Partial selections. sizes: (states, sizes) with every piece to come gone; totals: (states, bounds) of the terms
    that are decided; worth: (states,) of what stays; parent, level: what each came from.
    """

    sizes: np.ndarray
    totals: np.ndarray
    worth: np.ndarray
    parent: np.ndarray
    level: np.ndarray

    @staticmethod
    def first(table: Table) -> _States:
        """Nothing is decided."""
        sizes = table.base[None]
        totals = table.offsets + table.costs(sizes, np.flatnonzero(table.first < 0))
        return _States(sizes, totals, np.zeros(1), np.zeros(1, int), np.zeros(1, int))

    def expanded(self, table: Table, pieces: Pieces, chain: int) -> _States:
        """Each with every number of pieces of a chain gone."""
        gives, worth = table.gives[chain], pieces.worth[list(pieces.chains[chain])]
        stays = np.append(np.cumsum(worth[::-1])[::-1], 0.0)  # by how many are gone
        parent = np.repeat(np.arange(len(self.worth)), len(gives))
        level = np.tile(np.arange(len(gives)), len(self.worth))
        sizes = self.sizes[parent] + gives[level]
        return _States(sizes, self.totals[parent], self.worth[parent] + stays[level], parent, level)

    def chosen(self, which: np.ndarray) -> _States:
        """Those of these numbers."""
        return _States(self.sizes[which], self.totals[which], self.worth[which], self.parent[which], self.level[which])

    def retired(self, table: Table, position: int) -> _States:
        """With the terms that end at a place of the order in the totals."""
        ended = table.costs(self.sizes, np.flatnonzero(table.last == position))
        return _States(self.sizes, self.totals + ended, self.worth, self.parent, self.level)
