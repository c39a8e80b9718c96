"""What a student may cost, for use from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from kdsearch_jax.pruning import budget as budget_lib
from kdsearch_jax.pruning.budget import BudgetError, Estimate, Limits
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.pruning.tables import Table
from kdsearch_jax.tracing.topology import Group, Topology


@dataclass(frozen=True)
class Budget:
    """What the student may cost: up to 1 a share of the network's own cost, above 1 an absolute number.

    Attributes:
      macs: multiply-accumulates of one example; params: trainable parameters. None: no bound.
      round_to: widths are multiples of it, or untouched.
      measured: bounds on measured costs, (Table or Estimate, bound) each; see `kdsearch_jax.pruning.tables`.

    Raises:
      ValueError: nothing is bounded.
    """

    macs: float | None = None
    params: float | None = None
    round_to: int = 1
    measured: tuple[tuple[Table | Estimate, float], ...] = ()

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None and not self.measured:
            raise BudgetError("Budget: give a bound, such as Budget(macs=0.5) for half of the MACs")

    def limits(
        self,
        topology: Topology,
        round_to: Mapping[str, int] | None = None,
        least: Mapping[str, int] | None = None,
        whole: Topology | None = None,
    ) -> Limits:
        """The absolute bounds for a network.

        Args:
          round_to, least: {group: multiple} and {group: units that must stay}, of rules.
          whole: the topology before rules, whose groups tables may name.

        Raises:
          BudgetError: a bound is not below the network's cost, or below that of the smallest student.
        """
        multiples = round_to or self.round_to
        if self.macs is not None or self.params is not None:
            config = BudgetConfig(macs=self.macs, params=self.params, round_to=multiples)  # type: ignore[arg-type]
            limits = budget_lib.resolve(config, topology)
        else:
            limits = Limits(None, None, round_to=multiples)
        found = []
        for cost, value in self.measured:
            cost = cost.on(whole or topology) if isinstance(cost, Table) else cost
            bound = budget_lib.bound_of(cost.name, value, cost.whole)
            assert bound is not None
            found.append((cost, bound))
        limits = replace(limits, measured=tuple(found))
        _check_reach(topology, limits, least or {})
        return limits


def _check_reach(topology: Topology, limits: Limits, least: Mapping[str, int]) -> None:
    """Raises BudgetError where the smallest student costs more than the limits."""
    stays = {g.name: np.arange(g.size) < fewest_units(limits.round_to, least, g) for g in topology.groups}
    pressures = limits.pressures(topology, topology.flatten(stays).astype(float))
    worst = int(np.argmax(pressures))
    if pressures[worst] > 1.0:
        share = pressures[worst] / limits.pressures(topology, np.ones(topology.units))[worst]
        raise BudgetError(
            f"budget.{limits.names[worst]}: out of reach: with the fewest units that rules and round_to leave, the "
            f"student still costs {share:.3f} of the network; give more, or relax least, round_to or freeze of rules"
        )


def fewest_units(round_to: int | Mapping[str, int], least: Mapping[str, int], group: Group) -> int:
    """How many units of a group must stay: its `least` rounded up to its multiple; none of a residual branch."""
    if group.kind == "branches":
        return int(least.get(group.name, 0) > 0)
    step, asked = budget_lib.multiple(round_to, group), max(least.get(group.name, 1), 1)
    return min(-(-asked // step) * step, group.size)
