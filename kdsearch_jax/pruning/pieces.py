"""Pieces: the smallest parts of a network that a selection keeps or removes as a whole.

A piece is a residual branch, or as many units of a group as its width may change by. The pieces of one group are
removed in the order of their importance, the least important first: they form a *chain*, and a selection says how many
pieces of each chain are removed. More pieces never cost less.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.pruning.budgets import width_multiple
from kdsearch_jax.tracing.topology import Topology


@dataclass(frozen=True)
class Pieces:
    """The pieces of a topology.

    Attributes:
      units: (n,) unit numbers, piece by piece.
      starts: (pieces + 1,) index in `units` at which each piece starts.
      chain: (pieces,) number of the chain that each piece belongs to.
      chains: for each chain, the numbers of its pieces in the order of removal.
      worth: (pieces,) importance of each piece, summed over its units.
    """

    units: np.ndarray
    starts: np.ndarray
    chain: np.ndarray
    chains: tuple[tuple[int, ...], ...]
    worth: np.ndarray

    @staticmethod
    def of(
        topology: Topology, importance: np.ndarray, round_to: int | Mapping[str, int], least: Sequence[int] | np.ndarray
    ) -> Pieces:
        """The pieces that may be removed.

        Args:
          importance: (units,).
          round_to: multiple of widths, or {group: multiple}.
          least: (groups,) units that must stay.
        """
        units: list[np.ndarray] = []
        chains: list[tuple[int, ...]] = []
        start = 0
        for group, fewest in zip(topology.groups, least, strict=True):
            order = start + np.argsort(importance[start : start + group.size], kind="stable")
            start += group.size
            step = 1 if group.kind == "branches" else width_multiple(round_to, group)
            widths = (group.size, *range(step * ((group.size - 1) // step), int(fewest) - 1, -step))
            removable = [order[group.size - a : group.size - b] for a, b in itertools.pairwise(widths)]
            if removable:
                chains.append(tuple(range(len(units), len(units) + len(removable))))
                units += removable
        flat = np.concatenate([*units, np.zeros(0, int)])
        starts = np.cumsum([0, *map(len, units)])
        chain = np.repeat(np.arange(len(chains)), [len(pieces) for pieces in chains])
        return Pieces(flat, starts, chain, tuple(chains), _sums(importance, flat, starts))

    def __len__(self) -> int:
        return len(self.chain)

    def of_piece(self, piece: int) -> np.ndarray:
        """The unit numbers of a piece."""
        return self.units[self.starts[piece] : self.starts[piece + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(…, pieces): `values`, (…, units), summed over the units of each piece."""
        return _sums(values, self.units, self.starts)

    def without(self, keep: np.ndarray, pieces: Sequence[int] | np.ndarray) -> np.ndarray:
        """A copy of the flat `keep` without these pieces."""
        result = keep.copy()
        for piece in pieces:
            result[self.of_piece(piece)] = 0.0
        return result

    def with_piece(self, keep: np.ndarray, piece: int) -> np.ndarray:
        """A copy of the flat `keep` with a piece restored."""
        result = keep.copy()
        result[self.of_piece(piece)] = 1.0
        return result

    def is_removed(self, keep: np.ndarray) -> np.ndarray:
        """(pieces,) bool: whether each piece is missing from the flat `keep`."""
        return keep[self.units[self.starts[:-1]]] == 0

    def ends(self, keep: np.ndarray) -> tuple[list[int], list[int]]:
        """(the next piece to remove, the next piece to restore) of all chains that have one."""
        counts = np.bincount(self.chain[self.is_removed(keep)], minlength=len(self.chains))
        pairs = list(zip(self.chains, counts.tolist(), strict=True))
        return [c[n] for c, n in pairs if n < len(c)], [c[n - 1] for c, n in pairs if n]


def _sums(values: np.ndarray, units: np.ndarray, starts: np.ndarray) -> np.ndarray:
    if len(starts) == 1:
        return np.zeros((*values.shape[:-1], 0))
    return np.add.reduceat(values[..., units], starts[:-1], axis=-1)
