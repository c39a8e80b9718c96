"""Rolling back when the loss jumps: to the last checkpoint, and past the offending batches in another order.

If a loss is not finite, or more than `run.spike` times its running median, training returns to the last intact
checkpoint. The updates since then are repeated with batches in another order, at most `run.rollbacks` times. Everything
this depends on is in the checkpoints (recent losses, earlier rollbacks), so an interrupted run takes the same path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdsearch_jax.training.settings import RunConfig

META_KEY = "rollback"  # in a checkpoint's meta
_WINDOW = 32  # calls whose mean losses are kept
_MIN_LOSSES = 4  # needed for a median
_SEED_SHIFT = 40  # bits between the seed of a stage and those of its rollbacks


class LossSpikeGuard:
    """Detects loss spikes and counts rollbacks.

    Args:
      run: its `spike` and `rollbacks`; without `spike` nothing is ever a spike.
      stored: what `to_meta` stored under META_KEY.
    """

    def __init__(self, run: RunConfig, stored: Mapping[str, Any] | None = None):
        self.active = run.spike is not None
        self._factor, self._max_rollbacks = run.spike or np.inf, run.rollbacks
        self._losses: list[float] = list((stored or {}).get("losses", ()))
        self._rollbacks: list[list[int]] = [list(updates) for updates in (stored or {}).get("detours", ())]

    def to_meta(self) -> dict[str, Any]:
        """The entry of a checkpoint's meta."""
        return {META_KEY: {"losses": self._losses, "detours": self._rollbacks}} if self.active else {}

    @property
    def exhausted(self) -> bool:
        """Whether no further rollback is allowed."""
        return not self.active or len(self._rollbacks) >= self._max_rollbacks

    def is_spike(self, loss: float) -> bool:
        """Whether the mean loss of a call is a spike; otherwise it enters the running median."""
        if not self.active:
            return False
        median = float(np.median(self._losses)) if len(self._losses) >= _MIN_LOSSES else np.inf
        if not np.isfinite(loss) or loss > median + (self._factor - 1) * abs(median):  # a loss may be negative
            return True
        self._losses = [*self._losses, loss][-_WINDOW:]
        return False

    def roll_back(self, stored: Mapping[str, Any], first: int, last: int) -> dict[str, int]:
        """Records that the updates `first`, …, `last` − 1 are repeated from a checkpoint with this meta.

        Returns:
          Metrics to write with the next row.
        """
        self._losses = list(stored.get(META_KEY, {}).get("losses", ()))
        self._rollbacks = [*self._rollbacks, [first, last]]
        return {"rollbacks": len(self._rollbacks), "rollback_from": last}

    def batch_seed(self, seed: int, step: int) -> int:
        """The seed of the batches of a call that begins at update `step`."""
        number = max((n for n, (first, last) in enumerate(self._rollbacks, 1) if first <= step < last), default=0)
        return seed + (number << _SEED_SHIFT)
