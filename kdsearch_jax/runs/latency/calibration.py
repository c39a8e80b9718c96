"""Calibration, before a search: a model of time and memory for any choice of units.

The network itself is measured, students that have lost half of one class of groups (those of the same kind, size and
cost share a class), and students of all widths down to the smallest that there is. A least-squares fit with prices ≥ 0
makes an `Estimate` of it, which is a bound like any other: for the penalty, the closed loop and the landing. It is
written into the search's directory once, and read whenever it is needed again.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping
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
from kdsearch_jax.runs.latency.timing import UNITS, Tools, asked, medians, of_process_0
from kdsearch_jax.storage.checkpoint_files import meet
from kdsearch_jax.storage.files import DamagedError, read_sealed, write_sealed
from kdsearch_jax.tracing.messages import round_up
from kdsearch_jax.tracing.topology import Group, Topology

log = logging.getLogger(__name__)

FILE = "measured.json"
CLASSES = 12  # of groups, at most


def prepare(
    network: Network, variables: Any, budget: BudgetConfig, call: CallSpec, directory: Path, tools: Tools | None = None
) -> None:
    """Calibrates what the budget bounds, and writes `measured.json` into the directory; once.

    Raises:
      BudgetError: timing is too noisy to tell networks apart.
    """
    path = directory / FILE
    if not asked(budget) or path.is_file():
        return
    record = of_process_0(lambda: calibrate(network, variables, budget, call, tools))
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_sealed(path, record)
    meet("measured")


def bounded(limits: Limits, budget: BudgetConfig, directory: Path) -> Limits:
    """The limits with those on what `prepare` has measured for this directory; as they are where nothing is asked.

    Raises:
      BudgetError: what was measured is not this batch size's, or a bound is out of reach.
    """
    if not asked(budget):
        return limits
    try:
        record = read_sealed(directory / FILE)
        return with_measured(limits, budget, record)
    except (OSError, KeyError, TypeError, DamagedError) as error:
        raise BudgetError(
            f"budget.{asked(budget)[0]}: {directory / FILE} does not tell what was measured ({error!r:.100}); delete "
            "the search and search anew"
        ) from error


def with_measured(limits: Limits, budget: BudgetConfig, record: Mapping[str, Any]) -> Limits:
    """The limits with those of a calibration's record."""
    if record["batch_size"] != budget.batch_size:
        raise BudgetError(
            f"budget.batch_size: {budget.batch_size} is not the {record['batch_size']} that this search has measured; "
            "give the same, or search anew"
        )
    found = []
    for name in asked(budget):
        bound = check_reach(name, getattr(budget, name), record["whole"][name], record["smallest"][name])
        found.append((Estimate(**record["estimates"][name]), bound))
    return dataclasses.replace(limits, measured=tuple(found))


def check_reach(name: str, value: float, whole: float, least: float) -> float:
    """The absolute bound that a setting means, where the network takes `whole` and the smallest student `least`.

    Raises:
      BudgetError: it is not below the one, or it is below the other.
    """
    bound = budgets.absolute_bound(name, value, whole, UNITS[name])
    if least > bound:
        raise BudgetError(
            f"budget.{name}: {value} is out of reach: the smallest student takes {least:,.4g}{UNITS[name]} here, "
            f"{round_up(least / whole)} of the teacher's {whole:,.4g}; give more, or free more gates.kinds"
        )
    return bound


def calibrate(
    network: Network, variables: Any, budget: BudgetConfig, call: CallSpec, tools: Tools | None = None
) -> dict[str, Any]:
    """What the budget asks for, measured and modelled, as plain JSON: batch size, device, values, estimates."""
    tools, topology = tools or Tools(), network.topology
    keeps = designs(topology)
    log.info("measuring %s of %d networks, to know what units are worth", " and ".join(asked(budget)), len(keeps))
    networks = {name: cut(network, variables, keep) for name, keep in keeps.items()}
    values: dict[str, Mapping[str, float]] = {}
    if budget.latency is not None:
        values["latency"] = medians(tools.clock(networks, budget.batch_size, call))
    if budget.memory is not None:
        values["memory"] = tools.memory(networks, budget.batch_size, call)
    estimates = {name: fit(name, topology, keeps, found) for name, found in values.items()}
    for name, estimate in estimates.items():
        errors = [abs(estimate.total(topology, keep) / values[name][at] - 1) for at, keep in keeps.items()]
        log.info("%s: %.4g%s; modelled within %.0f%%", name, values[name]["whole"], UNITS[name], 100 * max(errors))
    return {
        "batch_size": budget.batch_size,
        "device": jax.local_devices()[0].device_kind,
        "whole": {name: found["whole"] for name, found in values.items()},
        "smallest": {name: min(found.values()) for name, found in values.items()},
        "values": {name: dict(found) for name, found in values.items()},
        "estimates": {
            name: {key: getattr(each, key) for key in ("name", "whole", "macs", "params", "units", "inside")}
            for name, each in estimates.items()
        },
    }


def cut(network: Network, variables: Any, keep: np.ndarray) -> tuple[Any, Any]:
    """(module, variables) of the student that keeps the flat `keep`."""
    if keep.all():
        return network.module, variables
    stays = {name: units > 0 for name, units in network.topology.unflatten(keep).items()}
    return network.student(stays), slice_variables(variables, network, stays)


def classes(topology: Topology) -> list[tuple[Group, ...]]:
    """Groups that share a measurement: of the same kind, size and cost; where that makes too many, of similar cost."""
    prices = _shares(topology)
    alike: dict[Any, list[Group]] = {}
    for group in topology.groups:
        alike.setdefault((group.kind, group.size, f"{prices[group.name]:.9g}"), []).append(group)
    found = sorted(alike.values(), key=lambda groups: (groups[0].kind, prices[groups[0].name] * groups[0].size))
    if len(found) > CLASSES:
        ends = np.linspace(0, len(found), CLASSES + 1).round().astype(int)
        found = [list(itertools.chain(*found[a:b])) for a, b in itertools.pairwise(ends)]
    return [tuple(groups) for groups in found]


def _shares(topology: Topology) -> dict[str, float]:
    """{group: share of the whole network's MACs, plus that of its parameters, that hangs on a unit}."""
    ones = np.ones(topology.units)
    share = sum(cost.marginal(ones) / max(cost.total(ones), 1.0) for cost in (topology.macs, topology.params))
    return {name: float(np.mean(values)) for name, values in topology.unflatten(np.asarray(share)).items()}


def designs(topology: Topology) -> dict[str, np.ndarray]:
    """{name: flat keep} of the networks to measure, the whole one first."""

    def keep(share: Callable[[Group], float]) -> np.ndarray:
        left = {
            g.name: np.arange(g.size) < max(round(g.size * share(g)), g.kind != "branches") for g in topology.groups
        }
        return topology.flatten(left).astype(float)

    found = {"whole": np.ones(topology.units)}
    for number, groups in enumerate(classes(topology)):
        # Half of each group goes, and of branches every second one, altogether.
        branches = [g.name for g in groups if g.kind == "branches"]
        left = {g.name: 0.5 for g in groups} | dict.fromkeys(branches, 1.0) | dict.fromkeys(branches[::2], 0.0)
        found[f"class{number}"] = keep(lambda g, left=left: left.get(g.name, 1.0))
    for share in (0.75, 0.5, 0.25):
        found[f"all at {share}"] = keep(lambda g, share=share: 1.0 if g.kind == "branches" else share)
    return {**found, "smallest": budgets.smallest_keep(topology)}


def fit(name: str, topology: Topology, keeps: Mapping[str, np.ndarray], values: Mapping[str, float]) -> Estimate:
    """The estimate whose savings are the nearest to the measured ones, all its prices ≥ 0 (least squares).

    Raises:
      BudgetError: nothing that may go saves any of it.
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
        raise BudgetError(f"budget.{name}: nothing that may go changes it; free more gates.kinds, or bound the MACs")
    units = {g: w * price for each, w in zip(basis[2:], weights[2:], strict=True) for g, price in each.units.items()}
    return Estimate(
        name,
        float(values["whole"]),
        float(weights[0]),
        float(weights[1]),
        {g: float(w) for g, w in units.items()},
        inside,
    )
