"""Going back when the loss jumps: to the last checkpoint, and past the batches that did it by another shuffle.

A loss that is not finite, or more than `run.spike` times its running median, takes training back to its last good
checkpoint. The updates between are done once more with batches drawn in another order, at most `run.rollbacks` times.
All that decides is in the checkpoints (the losses remembered, the detours taken), so a run that is interrupted anywhere
goes the same way when it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdsearch_jax.training.settings import RunConfig

KEY = "rollback"  # in the meta of a checkpoint
_WINDOW = 32  # calls whose mean losses are remembered
_LEAST = 4  # before so many there is no median to speak of
_APART = 40  # bits between the seed of a stage and those of its detours


class Guard:
    """Losses seen and detours taken.

    Args:
      run: `spike` and `rollbacks`; without the first, nothing is ever a spike.
      memory: what `memory` gave.
    """

    def __init__(self, run: RunConfig, memory: Mapping[str, Any] | None = None):
        self.active = run.spike is not None
        self._factor, self._most = run.spike or np.inf, run.rollbacks
        self._losses: list[float] = list((memory or {}).get("losses", ()))
        self._detours: list[list[int]] = [list(each) for each in (memory or {}).get("detours", ())]

    @property
    def memory(self) -> dict[str, Any]:
        """As JSON, for the meta of a checkpoint."""
        return {KEY: {"losses": self._losses, "detours": self._detours}} if self.active else {}

    @property
    def spent(self) -> bool:
        """Whether there is no going back any more."""
        return not self.active or len(self._detours) >= self._most

    def jumps(self, loss: float) -> bool:
        """Whether the mean loss of a call is out of proportion; else it is remembered."""
        if not self.active:
            return False
        usual = float(np.median(self._losses)) if len(self._losses) >= _LEAST else np.inf
        if not np.isfinite(loss) or loss > usual + (self._factor - 1) * abs(usual):  # a loss may be below 0
            return True
        self._losses = [*self._losses, loss][-_WINDOW:]
        return False

    def back(self, stored: Mapping[str, Any], first: int, last: int) -> dict[str, int]:
        """Takes the updates `first`, …, `last` − 1 by another way, from what a checkpoint of `first` remembers.

        Returns:
          what to note with the next metrics.
        """
        self._losses = list(stored.get(KEY, {}).get("losses", ()))
        self._detours = [*self._detours, [first, last]]
        return {"rollbacks": len(self._detours), "rollback_from": last}

    def seed(self, seed: int, step: int) -> int:
        """Of the batches of a call that begins with update `step`."""
        taken = [number for number, (first, last) in enumerate(self._detours, 1) if first <= step < last]
        return seed + (taken[-1] << _APART) if taken else seed
