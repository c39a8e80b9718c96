"""The weights α_j of the penalty on gates: what decides which units go.

- `importance` (the default): α_j = (c_j / I_j)^s, re-estimated at every call of the compiled steps. c_j is what unit j
  adds to the cost (of several bounds so weighted that they are met together, see
  `kdsearch_jax.pruning.budget.multipliers`),
  I_j the running mean of (g_j ∂KL/∂g_j)², the Fisher information of the distillation loss at the gate: to second
  order, what the loss gains if the unit goes. So the teacher sets the weights. A penalty that is constant over the
  gates shrinks all of them for free where BatchNorm follows, and damages what should stay; this one is a re-weighted L1
  that takes the unimportant to zero within a few steps and leaves the important unshrunk. The sharpness s ≥ 1 sets how
  clearly: a unit worth k times the threshold shrinks k^s times slower than one at the threshold.
- `macs`, `params`: α_j = the marginal cost; `one`: α_j = 1. These are the plain readings of the method, for comparison.

In each group the most important unit has α_j = 0, so no layer is emptied; a residual branch goes as a whole, by its own
gate, when its own Fisher information per cost is the least. A branch so large that without it the cost would be below
the budget has α_j = 0 as well.
"""

from __future__ import annotations

import numpy as np

from kdsearch_jax.pruning import budget as budget_lib
from kdsearch_jax.pruning.budget import Limits
from kdsearch_jax.pruning.settings import GatesConfig
from kdsearch_jax.tracing.topology import Topology


def weights(
    topology: Topology,
    limits: Limits,
    config: GatesConfig,
    gates: np.ndarray,
    importance: np.ndarray,
    goal: float = 1.0,
) -> np.ndarray:
    """(units,) α_j as the module's docstring states it, up to a common factor (λ2 carries the scale).

    goal: the pressure that the gates are to be brought to next.
    """
    living = gates > 0
    alive = living.astype(float)
    if config.penalty == "one":
        alpha = np.ones(topology.units)
    elif config.penalty in ("macs", "params"):
        alpha = getattr(topology, config.penalty).marginal(alive)
        alpha = alpha / max(alpha[living].sum() / max(living.sum(), 1), 1e-30)
    else:
        # The scale is that of the living: what is dead is worth less at every step, and would carry it away.
        cost = budget_lib.cost_of(topology, limits, alive, importance, goal)
        floor = 1e-12 * max(importance[living].sum() / max(living.sum(), 1), 1e-30)
        with np.errstate(divide="ignore"):
            logs = config.sharpness * (np.log(cost) - np.log(importance + floor))
        finite = logs[living & np.isfinite(logs)]
        logs = logs - (np.median(finite) if len(finite) else 0.0)
        alpha = np.exp(np.clip(logs, -80.0, 80.0))
        alpha[cost <= 0] = 0.0
    alpha[budget_lib.protected(topology, np.where(gates > 0, importance, -1.0), limits.round_to)] = 0.0
    alpha[budget_lib.too_large(topology, limits, alive)] = 0.0
    return alpha
