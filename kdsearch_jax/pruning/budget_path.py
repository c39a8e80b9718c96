"""The schedule of a search's cost: from the whole network down to its budget, or through several budgets in turn.

The cost falls to the largest budget, stays there for a while, falls to the next, and so on; a student is cut at the end
of each stay. With K budgets, the cost falls during the `ramp` share of the steps, each fall as long as it is steep, so
it is as fast as in a search for the smallest budget alone. The K stays share the remaining steps evenly. During a stay
λ2 drops to 0 and importances settle, which the selection of units needs. One budget is the schedule with K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class BudgetPath(NamedTuple):
    """The target pressure as a function of the update, with one entry for each budget, the largest budget first.

    Toward budget k it is `start[k]` up to update `begin[k]`, falls in a straight line to 1 at `arrive[k]`, and stays
    there up to `end[k]`. Pressure is the largest cost over its limit (`kdsearch_jax.pruning.budgets`).
    """

    start: tuple[float, ...]
    begin: tuple[int, ...]
    arrive: tuple[int, ...]
    end: tuple[int, ...]

    def leg(self, step: Array) -> Array:
        """() int32: the index of the budget that the update after `step` approaches."""
        return (step >= np.array(self.end[:-1], np.int32)).sum().astype(jnp.int32)

    def goal(self, step: Array, leg: Array) -> Array:
        """() float32: the target pressure at a step on the way to budget number `leg`."""
        start = jnp.asarray(self.start, jnp.float32)[leg]
        begin, arrive = (jnp.asarray(updates, jnp.int32)[leg] for updates in (self.begin, self.arrive))
        share = (step - begin).astype(jnp.float32) / jnp.maximum(arrive - begin, 1).astype(jnp.float32)
        return start + (1.0 - start) * jnp.clip(share, 0.0, 1.0)


def budget_path(
    falls: Sequence[float], pressure: float, steps: int, ramp: float, warmup: float, every: int
) -> BudgetPath:
    """The schedule through several budgets, the largest first.

    Args:
      falls: each budget divided by the one before it; the first entry is not used.
      pressure: of the whole network under the first budget; at most 1 while its bounds are still to be measured.
      steps: of the search. ramp: share of them in which the cost falls. warmup: share of the ramp in which no unit is
        removed.
      every: updates between two decisions of the controller; each stay but the last ends at a multiple.

    Raises:
      ValueError: there are too few steps to stay at each budget.
    """
    count, falling = len(falls), int(ramp * steps)
    waiting, stay = int(warmup * falling), (steps - falling) / len(falls)
    starts = [max(pressure, 1.0), *(1.0 / fall for fall in falls[1:])]
    shares = [1.0]
    for start in starts:
        shares.append(shares[-1] / start)
    drop = 1.0 - shares[-1]
    begins, arrives, ends = [], [], []
    begin = waiting
    for k in range(count):
        way = [(1.0 - share) / drop if drop > 0 else 1.0 for share in shares[k : k + 2]]
        begins.append(begin)
        arrives.append(int(begin + (falling - waiting) * (way[1] - (way[0] if k else 0.0))))
        left = waiting + (falling - waiting) * way[1] + stay * (k + 1)  # not from `begin`: rounding must not add up
        begin = steps if k == count - 1 else min(steps, every * math.ceil(left / every))
        ends.append(begin)
    if count > 1 and any(arrive >= end for arrive, end in zip(arrives, ends, strict=True)):
        raise ValueError(
            f"budgets: search.steps {steps}, in calls of run.steps_per_dispatch {every}, are too few to stay "
            f"at {count} of them; give more steps, or fewer budgets"
        )
    return BudgetPath(tuple(starts), tuple(begins), tuple(arrives), tuple(ends))
