"""Calibration before a search: a model of latency and memory for any choice of units.

Measured are the network itself, students without half of one class of groups (groups of the same kind, size and cost
share a class), and students of all widths down to the smallest. A least-squares fit with prices ≥ 0 turns this into an
`Estimate`, which serves as a bound like any other in the penalty, the controller and the final selection. It is written
into the search's directory once and read from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning import budgets
from kdsearch_jax.pruning.budgets import BudgetError, Limits
from kdsearch_jax.pruning.costs import Estimate, groups_inside_branches
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.pruning.surgery import slice_variables
from kdsearch_jax.runs.coordination import broadcast_json
from kdsearch_jax.runs.latency.compiled import SHARES, instruments_for
from kdsearch_jax.runs.latency.timing import UNITS, Instruments, measured_bounds, medians
from kdsearch_jax.storage import sync_processes
from kdsearch_jax.storage.files import DamagedError, read_sealed, write_sealed
from kdsearch_jax.tracing.messages import round_up
from kdsearch_jax.tracing.topology import Group, Topology

log = logging.getLogger(__name__)

FILE = "measured.json"
CLASSES = 12  # at most so many classes of groups are measured


def calibrate_once(
    network: Network,
    variables: Any,
    budget: BudgetConfig,
    call: CallSpec,
    directory: Path,
    instruments: Instruments | None = None,
) -> None:
    """Calibrates the budget's measured bounds and writes `measured.json` into the directory, unless it exists.

    Raises:
      BudgetError: timing is too noisy to tell networks apart.
    """
    path = directory / FILE
    if not measured_bounds(budget) or path.is_file():
        return
    record = broadcast_json(lambda: calibrate(network, variables, budget, call, instruments))
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_sealed(path, record)
    sync_processes("measured")


def add_measured(limits: Limits, budget: BudgetConfig, directory: Path) -> Limits:
    """Adds the bounds that `calibrate_once` has measured for this directory to the limits, if the budget has any.

    Raises:
      BudgetError: the measurement is of another batch size, or a bound is out of reach.
    """
    if not measured_bounds(budget):
        return limits
    try:
        record = read_sealed(directory / FILE)
        return with_measured(limits, budget, record)
    except (OSError, KeyError, TypeError, DamagedError) as error:
        raise BudgetError(
            f"budget.{measured_bounds(budget)[0]}: {directory / FILE} lacks its measurement ({error!r:.100}); delete "
            "the search and run it again"
        ) from error


def with_measured(limits: Limits, budget: BudgetConfig, record: Mapping[str, Any]) -> Limits:
    """Adds the bounds of a calibration's record to the limits."""
    if record["batch_size"] != budget.batch_size:
        raise BudgetError(
            f"budget.batch_size: {budget.batch_size} differs from the {record['batch_size']} that this search has "
            "measured; give that, or search again"
        )
    measured = []
    for name in measured_bounds(budget):
        bound = check_reach(name, getattr(budget, name), record["whole"][name], record["smallest"][name])
        measured.append((Estimate(**record["estimates"][name]), bound))
    return dataclasses.replace(limits, measured=tuple(measured))


def check_reach(name: str, value: float, whole: float, least: float) -> float:
    """The absolute bound of a setting, given what the network (`whole`) and the smallest student (`least`) take.

    Raises:
      BudgetError: the bound is not below `whole`, or is below `least`.
    """
    bound = budgets.absolute_bound(name, value, whole, UNITS[name])
    if least > bound:
        raise BudgetError(
            f"budget.{name}: {value} is out of reach: the smallest student takes {least:,.4g}{UNITS[name]} here, "
            f"{round_up(least / whole)} of the teacher's {whole:,.4g}; give more, or allow more gates.kinds"
        )
    return bound


def calibrate(
    network: Network, variables: Any, budget: BudgetConfig, call: CallSpec, instruments: Instruments | None = None
) -> dict[str, Any]:
    """The budget's measured bounds as plain JSON: batch size, device, measured values, fitted estimates."""
    instruments, topology = instruments or instruments_for(budget), network.topology
    keeps = designs(topology, (0.5,) if budget.target is None else SHARES)
    how = "measuring" if budget.target is None else f"compiling for {budget.target}:"
    log.info("%s %s of %d networks to fit a cost model", how, " and ".join(measured_bounds(budget)), len(keeps))
    networks = {name: sliced_student(network, variables, keep) for name, keep in keeps.items()}
    values: dict[str, Mapping[str, float]] = {}
    if budget.latency is not None:
        values["latency"] = medians(instruments.timer(networks, budget.batch_size, call))
    if budget.memory is not None:
        values["memory"] = instruments.memory(networks, budget.batch_size, call)
    estimates = {name: fit_estimate(name, topology, keeps, measured) for name, measured in values.items()}
    for name, estimate in estimates.items():
        errors = [abs(estimate.total(topology, keep) / values[name][at] - 1) for at, keep in keeps.items()]
        log.info("%s: %.4g%s; the model is within %.0f%%", name, values[name]["whole"], UNITS[name], 100 * max(errors))
    return {
        "batch_size": budget.batch_size,
        "device": budget.target or jax.local_devices()[0].device_kind,
        "whole": {name: measured["whole"] for name, measured in values.items()},
        "smallest": {name: min(measured.values()) for name, measured in values.items()},
        "values": {name: dict(measured) for name, measured in values.items()},
        "estimates": {
            name: {key: getattr(each, key) for key in ("name", "whole", "macs", "params", "units", "inside")}
            for name, each in estimates.items()
        },
    }


def sliced_student(network: Network, variables: Any, keep: np.ndarray) -> tuple[Any, Any]:
    """(module, variables) of the student with the units of the flat mask `keep`."""
    if keep.all():
        return network.module, variables
    stays = {name: units > 0 for name, units in network.topology.unflatten(keep).items()}
    return network.student(stays), slice_variables(variables, network, stays)


def classes(topology: Topology) -> list[tuple[Group, ...]]:
    """Groups that share a measurement: of the same kind, size and cost, or of similar cost if that gives too many."""
    prices = _shares(topology)
    alike: dict[Any, list[Group]] = {}
    for group in topology.groups:
        alike.setdefault((group.kind, group.size, f"{prices[group.name]:.9g}"), []).append(group)
    groups_by_cost = sorted(
        alike.values(), key=lambda groups: (groups[0].kind, prices[groups[0].name] * groups[0].size)
    )
    if len(groups_by_cost) > CLASSES:
        ends = np.linspace(0, len(groups_by_cost), CLASSES + 1).round().astype(int)
        groups_by_cost = [list(itertools.chain(*groups_by_cost[a:b])) for a, b in itertools.pairwise(ends)]
    return [tuple(groups) for groups in groups_by_cost]


def _shares(topology: Topology) -> dict[str, float]:
    """{group: share of the network's MACs plus share of its parameters that one unit accounts for}."""
    ones = np.ones(topology.units)
    share = sum(cost.marginal(ones) / max(cost.total(ones), 1.0) for cost in (topology.macs, topology.params))
    return {name: float(np.mean(values)) for name, values in topology.unflatten(np.asarray(share)).items()}


def designs(topology: Topology, shares: Sequence[float] = (0.5,)) -> dict[str, np.ndarray]:
    """{name: flat mask of kept units} of the networks to measure, the whole one first.

    Args:
      shares: of its units that a class of groups keeps, one network for each.
    """

    def keep(share: Callable[[Group], float]) -> np.ndarray:
        left = {
            g.name: np.arange(g.size) < max(round(g.size * share(g)), g.kind != "branches") for g in topology.groups
        }
        return topology.flatten(left).astype(float)

    masks = {"whole": np.ones(topology.units)}
    for number, groups in enumerate(classes(topology)):
        # Every second branch is removed as a whole.
        branches = [g.name for g in groups if g.kind == "branches"]
        for share in shares if len(branches) < len(groups) else shares[:1]:
            left = {g.name: share for g in groups} | dict.fromkeys(branches, 1.0) | dict.fromkeys(branches[::2], 0.0)
            masks[f"class{number} at {share}"] = keep(lambda g, left=left: left.get(g.name, 1.0))
    for share in (0.75, 0.5, 0.25):
        masks[f"all at {share}"] = keep(lambda g, share=share: 1.0 if g.kind == "branches" else share)
    return {**masks, "smallest": budgets.smallest_keep(topology)}


def fit_estimate(
    name: str, topology: Topology, keeps: Mapping[str, np.ndarray], values: Mapping[str, float]
) -> Estimate:
    """The estimate whose savings fit the measured ones best, with all prices ≥ 0 (least squares).

    Raises:
      BudgetError: removing units saves nothing.
    """
    from scipy.optimize import nnls

    inside, prices = groups_inside_branches(topology), _shares(topology)
    basis = [Estimate(name, 0.0, macs=1.0), Estimate(name, 0.0, params=1.0)]
    basis += [
        Estimate(name, 0.0, units={g.name: max(prices[g.name], 1e-12) for g in groups}, inside=inside)
        for groups in classes(topology)
    ]
    saved = np.array([values["whole"] - values[at] for at in keeps])
    columns = np.array([[-each.total(topology, keep) for each in basis] for keep in keeps.values()])
    scale = np.maximum(columns.max(0), 1e-30)
    weights = nnls(columns / scale, saved)[0] / scale
    if not (weights > 0).any():
        raise BudgetError(
            f"budget.{name}: removing units does not change it; allow more gates.kinds, or bound the MACs"
        )
    units = {g: w * price for each, w in zip(basis[2:], weights[2:], strict=True) for g, price in each.units.items()}
    return Estimate(
        name,
        float(values["whole"]),
        float(weights[0]),
        float(weights[1]),
        {g: float(w) for g, w in units.items()},
        inside,
    )
