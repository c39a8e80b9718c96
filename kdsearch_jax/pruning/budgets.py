"""Budgets: what a student may cost, as a user asks for it and in absolute numbers for a given network.

The *pressure* of a selection of units is its cost over the limit, the largest such ratio where several costs are
limited. The whole network has a pressure above 1. A student lands in the budget if its pressure is in [`FLOOR`, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from kdsearch_jax.pruning import hardware
from kdsearch_jax.pruning.costs import Estimate, Table
from kdsearch_jax.pruning.settings import BOUNDS, BudgetConfig
from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.messages import format_distinct, round_up
from kdsearch_jax.tracing.topology import Group, Topology

FLOOR = 0.98
COUNTED = ("macs", "params")  # costs that are counted exactly; all others are measured

RoundTo = int | Literal["hardware"]


class BudgetError(ValueError):
    """The budget cannot be met."""


class BudgetWarning(UserWarning):
    """The student costs less than FLOOR of the budget because no student is closer to it."""


@dataclass(frozen=True)
class Budget:
    """What the student may cost: a number up to 1 is a share of the network's own cost, above 1 it is absolute.

    Attributes:
      macs: multiply-accumulates of one example. None: not bounded.
      params: trainable parameters. None: not bounded.
      round_to: the width of every group is a multiple of this number, or unchanged. "hardware": multiples that the
        current device does not pad, see `kdsearch_jax.pruning.hardware`.
      measured: (cost, bound) pairs for measured costs such as latency, each a `Table` or an `Estimate`.

    Raises:
      BudgetError: nothing is bounded, or round_to is not valid.
    """

    macs: float | None = None
    params: float | None = None
    round_to: RoundTo = 1
    measured: tuple[tuple[Table | Estimate, float], ...] = ()

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None and not self.measured:
            raise BudgetError("Budget: no bound is given; Budget(macs=0.5) halves the MACs")
        _check_round_to(self.round_to)

    def limits(
        self,
        topology: Topology,
        round_to: Mapping[str, int] | None = None,
        least: Mapping[str, int] | None = None,
        whole: Topology | None = None,
    ) -> Limits:
        """The absolute limits for a network.

        Args:
          topology: the units that may be removed.
          round_to: {group: multiple}, overrides `self.round_to`.
          least: {group: number of units that must stay}.
          whole: the topology before any rules, whose groups tables may name.

        Raises:
          BudgetError: a bound is not below the cost of the network, or below the cost of the smallest student.
        """
        measured = []
        for cost, value in self.measured:
            cost = cost.on(whole or topology) if isinstance(cost, Table) else cost
            measured.append((cost, absolute_bound(cost.name, value, cost.whole)))
        limits = _counted_limits(self, topology, round_to or self.round_to)
        limits = replace(limits, measured=tuple(measured))
        asked = {"macs": self.macs, "params": self.params, **{cost.name: value for cost, value in self.measured}}
        _check_reachable(topology, limits, least or {}, asked)
        return limits


@dataclass(frozen=True)
class BoundedPolynomial:
    """A bounded cost: `offset` + Σ scale · cost ≤ `limit`, with (scale, cost) pairs in `costs`."""

    limit: float
    offset: float
    costs: tuple[tuple[float, Cost], ...]


@dataclass(frozen=True)
class Limits:
    """A budget in absolute numbers. Vectors named `keep` are flat: (units,) of 0 and 1.

    Attributes:
      macs, params: as in `Budget`, absolute. None: not bounded.
      round_to: multiple of all widths, or {group: multiple}.
      measured: (cost, absolute bound) pairs.
      floor: pressure from which a student counts as landed. Below `FLOOR` if no student is closer to 1.
    """

    macs: float | None
    params: float | None
    round_to: int | Mapping[str, int] = 1
    measured: tuple[tuple[Table | Estimate, float], ...] = ()
    floor: float = FLOOR

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bounded costs, in the order of `pressures` and `prices`."""
        return (*(name for name, _ in self._counted()), *(cost.name for cost, _ in self.measured))

    def pressures(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(bounds,) costs of `keep` over their limits."""
        counted = [round(getattr(topology, name).total(keep)) / bound for name, bound in self._counted()]
        return np.array(counted + [cost.total(topology, keep) / bound for cost, bound in self.measured])

    def pressure(self, topology: Topology, keep: np.ndarray) -> float:
        """The largest of the `pressures`; 0 if nothing is bounded."""
        return float(max(self.pressures(topology, keep), default=0.0))

    def prices(self, topology: Topology, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((bounds, units) pressure that one more unit adds, (bounds,) pressure left up to 1)."""
        slopes = [getattr(topology, name).marginal(keep) / bound for name, bound in self._counted()]
        slopes += [cost.marginal(topology, keep) / bound for cost, bound in self.measured]
        return np.stack(slopes), 1.0 - self.pressures(topology, keep) + 1e-9

    def marginal(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(units,) prices added up over the bounds that are not met yet, or over all of them."""
        unmet = self.pressures(topology, keep) > 1
        return self.prices(topology, keep)[0][unmet if unmet.any() else slice(None)].sum(0)

    @property
    def are_polynomials(self) -> bool:
        """Whether every bounded cost is a polynomial of the widths. An interpolated `Table` is not."""
        return all(isinstance(cost, Estimate) for cost, _ in self.measured)

    def polynomials(self, topology: Topology) -> list[BoundedPolynomial]:
        """The bounded costs as polynomials of the widths, in the order of `names`."""
        counted = [BoundedPolynomial(bound, 0.0, ((1.0, getattr(topology, name)),)) for name, bound in self._counted()]
        # Estimates are not integers: the margin keeps rounding from exceeding the limit.
        estimates = [(bound * (1 - 1e-12), cost) for cost, bound in self.measured if isinstance(cost, Estimate)]
        return counted + [BoundedPolynomial(bound, *cost.polynomial(topology)) for bound, cost in estimates]

    def _counted(self) -> list[tuple[str, float]]:
        return [(name, bound) for name in COUNTED if (bound := getattr(self, name))]


def resolve(config: BudgetConfig, topology: Topology, multiples: Mapping[str, int] | None = None) -> Limits:
    """The limits on MACs and parameters that settings ask for; `kdsearch_jax.runs.latency` adds the measured ones.

    Args:
      multiples: {group: multiple} for `round_to="hardware"`; by default those of this device.

    Raises:
      BudgetError: a bound is not positive, not below the cost of the network, or below that of the smallest student.
    """
    if all(getattr(config, name) is None for name in BOUNDS):
        raise BudgetError(f"budget: give budget.macs or budget.params (or budget.{' or budget.'.join(BOUNDS[2:])})")
    _check_round_to(config.round_to)
    by_target = multiples is not None and config.round_to == "hardware"
    limits = _counted_limits(config, topology, multiples if by_target and multiples else config.round_to)
    _check_reachable(topology, limits, {}, vars(config))
    return limits


def absolute_bound(name: str, value: float, whole: float, unit: str = "") -> float:
    """The absolute bound that `budget.<name> = value` means.

    Args:
      whole: the cost of the network itself.
      unit: of that cost, for the error message.

    Raises:
      BudgetError: the bound is not above 0, or not below the cost of the network.
    """
    if not isinstance(value, (int, float)) or not value > 0:
        number = "milliseconds from 1 on" if name == "latency" else "20e6 an absolute number"
        raise BudgetError(f"budget.{name}: {value!r} must be above 0; 0.5 is half of the teacher's, {number}")
    bound = value * whole if value <= 1 else float(value)
    if bound >= whole:
        cost = f"{whole:,}" if isinstance(whole, int) else format_distinct(whole, bound)[0]
        raise BudgetError(
            f"budget.{name}: {value} is not below the teacher's {cost}{unit}, so nothing would be removed"
        )
    return bound


def width_multiple(round_to: int | Mapping[str, int], group: Group) -> int:
    """The number that the width of a group is a multiple of."""
    return round_to if isinstance(round_to, int) else round_to.get(group.name, 1)


def fewest_units(round_to: int | Mapping[str, int], least: Mapping[str, int], group: Group) -> int:
    """How many units of a group must stay: `least` rounded up to its multiple; 0 for a residual branch."""
    if group.kind == "branches":
        return int(least.get(group.name, 0) > 0)
    # A LayerNorm over a single unit returns a constant.
    step, asked = width_multiple(round_to, group), max(least.get(group.name, 1), 2 if group.kind == "width" else 1)
    return min(-(-asked // step) * step, group.size)


def smallest_keep(
    topology: Topology, round_to: int | Mapping[str, int] = 1, least: Mapping[str, int] | None = None
) -> np.ndarray:
    """The flat keep of the smallest student: the fewest units in every group, and no residual branch."""
    keep = {group.name: np.arange(group.size) < fewest_units(round_to, least or {}, group) for group in topology.groups}
    return topology.flatten(keep).astype(float)


def _counted_limits(budget: Any, topology: Topology, round_to: RoundTo | Mapping[str, int]) -> Limits:
    """The limits on MACs and parameters, of a `Budget` or a `BudgetConfig`."""
    bounds = [
        None if (value := getattr(budget, name)) is None else absolute_bound(name, value, total)
        for name, total in zip(COUNTED, topology.total(), strict=True)
    ]
    return Limits(*bounds, round_to=hardware.multiples(topology) if isinstance(round_to, str) else round_to)


def _check_round_to(round_to: Any) -> None:
    if round_to != "hardware" and (not isinstance(round_to, int) or round_to < 1):
        raise BudgetError(f"budget.round_to: {round_to!r} must be at least 1, or 'hardware'")


def _check_reachable(topology: Topology, limits: Limits, least: Mapping[str, int], asked: Mapping[str, Any]) -> None:
    """Raises BudgetError if the smallest student costs more than the limits; asked: {name: bound as the user gave it}.

    It is the smallest by every cost at once, so bounds that can be met one by one can be met together.
    """
    pressures = limits.pressures(topology, smallest_keep(topology, limits.round_to, least))
    if pressures.max(initial=0.0) <= 1.0:
        return
    worst = int(np.argmax(pressures))
    share = round_up(pressures[worst] / limits.pressures(topology, np.ones(topology.units))[worst])
    name = limits.names[worst]
    raise BudgetError(
        f"budget.{name}: {asked[name]} is out of reach, the smallest student costs {share} of the network; give at "
        f"least {share}, lower round_to, or free more units (gates.kinds, least and freeze of rules)"
    )
