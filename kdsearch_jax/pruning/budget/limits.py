"""What the student may cost, in absolute numbers.

*Pressure* is the cost over its limit, the largest one where several are limited: the network starts above 1, and the
student lands in [`FLOOR`, 1], or as near below as there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from kdsearch_jax.pruning import hardware
from kdsearch_jax.pruning.budget.estimate import Estimate
from kdsearch_jax.pruning.settings import BOUNDS, BudgetConfig
from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.messages import format_distinct, round_up
from kdsearch_jax.tracing.topology import Group, Topology

FLOOR = 0.98


class BudgetError(ValueError):
    """The budget cannot be met."""


class BudgetWarning(UserWarning):
    """A student costs less than the budget asks for, since none is nearer."""


@dataclass(frozen=True)
class Polynomial:
    """A bounded cost: `offset` + Σ scale · cost, and its `limit`; costs: (scale, cost)."""

    limit: float
    offset: float
    costs: tuple[tuple[float, Cost], ...]


@dataclass(frozen=True)
class Limits:
    """Absolute bounds; None: unbounded.

    round_to: widths are multiples of it (or of the group's own: {group: multiple}), or untouched. measured: what is
    known by measurement only, with its bound. floor: the pressure from which on a student counts as landed; below
    `FLOOR` where no student is nearer to 1.
    """

    macs: float | None
    params: float | None
    round_to: int | Mapping[str, int] = 1
    measured: tuple[tuple[Estimate, float], ...] = ()
    floor: float = FLOOR

    @property
    def names(self) -> tuple[str, ...]:
        """What is bounded, in the order of `pressures` and `prices`."""
        counted = tuple(name for name in ("macs", "params") if getattr(self, name))
        return (*counted, *(estimate.name for estimate, _ in self.measured))

    def pressures(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(bounds,) costs of the flat `keep` over their limits."""
        shares = [round(getattr(topology, name).total(keep)) / bound for name, bound in self._counted()]
        return np.array(shares + [estimate.total(topology, keep) / bound for estimate, bound in self.measured])

    def pressure(self, topology: Topology, keep: np.ndarray) -> float:
        """The largest of the `pressures`, 0 without a bound; at most 1 is within the budget."""
        return float(max(self.pressures(topology, keep), default=0.0))

    def prices(self, topology: Topology, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((bounds, units) what one more unit costs of each bound, (bounds,) what of each bound is left)."""
        slopes = [getattr(topology, name).marginal(keep) / bound for name, bound in self._counted()]
        slopes += [estimate.marginal(topology, keep) / bound for estimate, bound in self.measured]
        return np.stack(slopes), 1.0 - self.pressures(topology, keep) + 1e-9

    @property
    def are_polynomials(self) -> bool:
        """Whether all that is bounded is a polynomial of the widths; a table that is interpolated is not."""
        return all(hasattr(estimate, "polynomial") for estimate, _ in self.measured)

    def polynomials(self, topology: Topology) -> list[Polynomial]:
        """What is bounded as polynomials of the widths, in the order of `names`."""
        counted = [Polynomial(bound, 0.0, ((1.0, getattr(topology, name)),)) for name, bound in self._counted()]
        # What is modelled is no whole number: within the limit whichever way it is summed up.
        modelled = [(bound * (1 - 1e-12), estimate.polynomial(topology)) for estimate, bound in self.measured]
        return counted + [Polynomial(bound, *polynomial) for bound, polynomial in modelled]

    def times(self, factors: np.ndarray) -> Limits:
        """The same with every bound times its factor, in the order of `names`."""
        scaled = dict(zip(self.names, (float(factor) for factor in factors), strict=True))
        counted = {name: bound * scaled[name] for name, bound in self._counted()}
        measured = tuple((estimate, bound * scaled[estimate.name]) for estimate, bound in self.measured)
        return replace(self, **counted, measured=measured)

    def marginal(self, topology: Topology, keep: np.ndarray) -> np.ndarray:
        """(units,) what one more unit adds to the pressure, summed over the bounds not met yet, or over all."""
        unmet = self.pressures(topology, keep) > 1
        return self.prices(topology, keep)[0][unmet if unmet.any() else slice(None)].sum(0)

    def _counted(self) -> list[tuple[str, float]]:
        return [(name, bound) for name in ("macs", "params") if (bound := getattr(self, name))]


def multiple(round_to: int | Mapping[str, int], group: Group) -> int:
    """What the width of a group is a multiple of."""
    return round_to if isinstance(round_to, int) else round_to.get(group.name, 1)


def smallest(topology: Topology, round_to: int | Mapping[str, int] = 1) -> np.ndarray:
    """The flat keep of the smallest student: one multiple of units in each group, and no branch."""
    keep = {g.name: np.arange(g.size) < (0 if g.kind == "branches" else multiple(round_to, g)) for g in topology.groups}
    return topology.flatten(keep).astype(float)


def resolve(config: BudgetConfig, topology: Topology) -> Limits:
    """The absolute limits of a budget for this network; those on what is measured are `kdsearch_jax.runs.latency`'s
    to add.

    Raises:
      BudgetError: a bound that is not positive, not below the network's own cost, or below what the smallest student
        costs (one unit, or one multiple of units, in each layer, and every removable branch gone). The smallest is so
        by every count at once: bounds that can be met one by one can be met together.
    """
    round_to = hardware.multiples(topology) if config.round_to == "hardware" else config.round_to
    if isinstance(round_to, int) and round_to < 1:
        raise BudgetError(f"budget.round_to: {round_to} must be at least 1")
    total: dict[str, int] = dict(zip(("macs", "params"), topology.total(), strict=True))
    if all(getattr(config, name) is None for name in BOUNDS):
        raise BudgetError(f"budget: give budget.macs or budget.params (or budget.{' or budget.'.join(BOUNDS[2:])})")
    limits = Limits(
        *(bound_of(name, getattr(config, name), total[name]) for name in ("macs", "params")), round_to=round_to
    )
    least = topology.cost(smallest(topology, round_to))
    for name, cost in zip(("macs", "params"), least, strict=True):
        if (bound := getattr(limits, name)) and cost > bound:
            raise BudgetError(
                f"budget.{name}: {getattr(config, name)} is out of reach: with {_width(round_to)} a layer the student "
                f"still costs {cost:,} of the teacher's {total[name]:,}; give at least {round_up(cost / total[name])}, "
                "or free more gates.kinds"
            )
    return limits


def bound_of(name: str, value: float | None, whole: float, unit: str = "") -> float | None:
    """The absolute bound that a setting of the budget means; None for none.

    Args:
      whole: what the network itself costs; unit: of it, for the error.

    Raises:
      BudgetError: it is not above 0, or the network itself is within it.
    """
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not value > 0:
        number = "milliseconds from 1 on" if name == "latency" else "20e6 an absolute number"
        raise BudgetError(f"budget.{name}: {value!r} must be above 0; 0.5 is half of the teacher's, {number}")
    bound = value * whole if value <= 1 else float(value)
    if bound >= whole:
        own = f"{whole:,}" if isinstance(whole, int) else format_distinct(whole, bound)[0]
        raise BudgetError(f"budget.{name}: {value} is not below the teacher's {own}{unit}; nothing is to be removed")
    return bound


def _width(round_to: int | Mapping[str, int]) -> str:
    if isinstance(round_to, int):
        return f"{round_to} unit{'s' * (round_to > 1)}"
    return "as few units as the hardware's multiples allow"
