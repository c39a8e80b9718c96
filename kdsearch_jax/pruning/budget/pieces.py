"""What a selection is made of: pieces of a network, each of which goes or stays as a whole.

A piece is a residual branch, or as many units of a group as its width may change by. The pieces of a group go in the
order of their importance, the least important first: they are a *chain*, and a selection says how many of each chain
are gone. More pieces never cost less.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdsearch_jax.pruning.budget.limits import Limits, multiple
from kdsearch_jax.tracing.topology import Topology


@dataclass(frozen=True)
class Pieces:
    """The pieces of a topology.

    units: (n,) unit numbers, piece by piece; starts: (pieces + 1,) where each begins in them; chain: (pieces,) which
    chain each belongs to; chains: of each chain, the numbers of its pieces in the order in which they go; worth:
    (pieces,) sums of importance.
    """

    units: np.ndarray
    starts: np.ndarray
    chain: np.ndarray
    chains: tuple[tuple[int, ...], ...]
    worth: np.ndarray

    @staticmethod
    def of(topology: Topology, limits: Limits, importance: np.ndarray) -> Pieces:
        """Those whose widths the limits allow; importance: (units,)."""
        units: list[np.ndarray] = []
        chains: list[tuple[int, ...]] = []
        start = 0
        for group in topology.groups:
            order = start + np.argsort(importance[start : start + group.size], kind="stable")
            start += group.size
            step = multiple(limits.round_to, group)
            narrower = (0,) if group.kind == "branches" else range(step * ((group.size - 1) // step), 0, -step)
            own = [order[group.size - a : group.size - b] for a, b in itertools.pairwise((group.size, *narrower))]
            if own:
                chains.append(tuple(range(len(units), len(units) + len(own))))
                units += own
        flat = np.concatenate([*units, np.zeros(0, int)])
        starts = np.cumsum([0, *map(len, units)])
        chain = np.repeat(np.arange(len(chains)), [len(each) for each in chains])
        return Pieces(flat, starts, chain, tuple(chains), _sums(importance, flat, starts))

    def __len__(self) -> int:
        return len(self.chain)

    def of_piece(self, piece: int) -> np.ndarray:
        """The unit numbers of a piece."""
        return self.units[self.starts[piece] : self.starts[piece + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(…, pieces) of values (…, units): those of each piece added up."""
        return _sums(values, self.units, self.starts)

    def without(self, keep: np.ndarray, pieces: Sequence[int] | np.ndarray) -> np.ndarray:
        """A copy of the flat `keep` in which these pieces are gone."""
        result = keep.copy()
        for piece in pieces:
            result[self.of_piece(piece)] = 0.0
        return result

    def added(self, keep: np.ndarray, piece: int) -> np.ndarray:
        """A copy of the flat `keep` in which a piece is back."""
        result = keep.copy()
        result[self.of_piece(piece)] = 1.0
        return result

    def is_gone(self, keep: np.ndarray) -> np.ndarray:
        """(pieces,) whether each is gone from the flat `keep`."""
        return keep[self.units[self.starts[:-1]]] == 0

    def ends(self, keep: np.ndarray) -> tuple[list[int], list[int]]:
        """The piece of each chain that may go next, and that which may come back next, where there are such."""
        counts = np.bincount(self.chain[self.is_gone(keep)], minlength=len(self.chains))
        pairs = list(zip(self.chains, counts.tolist(), strict=True))
        return [c[n] for c, n in pairs if n < len(c)], [c[n - 1] for c, n in pairs if n]


def _sums(values: np.ndarray, units: np.ndarray, starts: np.ndarray) -> np.ndarray:
    if len(starts) == 1:
        return np.zeros((*values.shape[:-1], 0))
    return np.add.reduceat(values[..., units], starts[:-1], axis=-1)
