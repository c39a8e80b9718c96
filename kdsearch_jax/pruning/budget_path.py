"""A front from one search: the budgets that its path passes, and when.

The path of the search goes down to the largest budget, stays there for a while, goes on to the next, and so on; at the
end of each stay the state is kept, and a student is cut from it. With K budgets, the `ramp` share of the steps is spent
on the way down, each stretch as long as it is steep, so that the cost falls as fast as in a search for the smallest
budget alone; the rest is shared evenly among the K stays. A stay is needed: λ2 falls to 0 in it, so that the loop lands
on the budget, and importances settle, by which the landing chooses. One budget is the path of a single search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdsearch_jax.pruning.budgets import Limits


@dataclass(frozen=True)
class Leg:
    """A stretch of the path, in updates: the pressure asked for is `start` at `begin`, and 1 from `arrive` to `end`."""

    limits: Limits
    start: float
    begin: int
    arrive: int
    end: int

    def goal(self, step: int) -> float:
        """The pressure asked for at `step`: `start` up to `begin`, then linear in the step down to 1 at `arrive`."""
        share = min(max((step - self.begin) / max(self.arrive - self.begin, 1), 0.0), 1.0)
        return self.start + (1.0 - self.start) * share


def legs(
    limits: Sequence[Limits],
    falls: Sequence[float],
    pressure: float,
    steps: int,
    ramp: float,
    warmup: float,
    dispatch: int,
) -> tuple[Leg, ...]:
    """The path through the limits, the largest first.

    Args:
      falls: by what factor each budget is below the one before; the first is not looked at.
      pressure: of the whole network under the first limits; at most 1 where its bounds are to be measured yet.
      steps: of the search; ramp: share of them in which the cost falls; warmup: share of that in which nothing goes.
      dispatch: updates a call; legs end with a call.

    Raises:
      ValueError: there are too few steps to stay at each.
    """
    count, falling = len(limits), int(ramp * steps)
    waiting, stay = int(warmup * falling), (steps - falling) / len(limits)
    starts = [max(pressure, 1.0), *(1.0 / fall for fall in falls[1:])]
    shares = [1.0]
    for start in starts:
        shares.append(shares[-1] / start)
    drop = 1.0 - shares[-1]
    found: list[Leg] = []
    begin = waiting
    for k in range(count):
        way = [(1.0 - share) / drop if drop > 0 else 1.0 for share in shares[k : k + 2]]
        arrive = begin + (falling - waiting) * (way[1] - (way[0] if k else 0.0))
        left = waiting + (falling - waiting) * way[1] + stay * (k + 1)  # by the schedule, which rounding does not move
        end = steps if k == count - 1 else min(steps, dispatch * math.ceil(left / dispatch))
        found.append(Leg(limits[k], starts[k], begin, int(arrive), end))
        begin = end
    if count > 1 and any(leg.arrive >= leg.end for leg in found):
        raise ValueError(
            f"budgets: search.steps {steps}, in calls of run.steps_per_dispatch {dispatch}, are too few to stay "
            f"at {count} of them; give more steps, or fewer budgets"
        )
    return tuple(found)


def at(way: Sequence[Leg], step: int) -> Leg:
    """The leg that the update after `step` belongs to."""
    return next((leg for leg in way if step < leg.end), way[-1])
