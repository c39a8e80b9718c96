"""Cuts students, from a state that a search kept or from the teacher itself, and verifies each cut.

A search keeps what it takes to cut a student at each of its budgets: SEARCH/kept (or SEARCH/at-0.5/kept) contains the
network's variables, gates not folded in, with gates and importances. A budget that is added later gets its student from
the nearest state above it, without another search.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdsearch_jax.adapters.devices import gathered
from kdsearch_jax.distill import shrinking
from kdsearch_jax.distill.shrinking import Subnetwork
from kdsearch_jax.pruning import baselines, landing, selection, surgery
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.budgets import Limits, fewest_units
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.search import search_state
from kdsearch_jax.pruning.selection import Selection
from kdsearch_jax.pruning.transform import GATES
from kdsearch_jax.runs import latency
from kdsearch_jax.runs.budget_points import BudgetPoint
from kdsearch_jax.runs.setup import RunSetup, is_finished, proof_batch, resolve_limits
from kdsearch_jax.runs.stage_training import save_run_network, write_run_arrays, write_run_json
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.storage import sync_processes
from kdsearch_jax.storage.files import DamagedError, atomic_directory, read_arrays, read_sealed
from kdsearch_jax.tracing.messages import format_distinct
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.training.state import TrainState

log = logging.getLogger(__name__)

Gates = dict[str, np.ndarray]


def rehearse(network: Network, teacher: LoadedNetwork, limits: Limits, inputs: Any) -> Limits:
    """Cuts random units and verifies the result, so that a model whose student would differ fails before the search.

    Returns:
      the limits, with the floor that students can reach.
    """
    topology, random = network.topology, np.random.default_rng(0)
    worth = random.uniform(0.1, 1.0, topology.units)
    chosen = selection.choose(topology, limits, worth, per_cost=False)
    keep = chosen.keep
    gates = {group.name: random.uniform(0.5, 1.0, group.size).astype(np.float32) for group in topology.groups}
    sliced, _ = surgery.slice_network(teacher.variables, gates, keep, network, teacher.architecture)
    surgery.verify(network, teacher.variables, gates, keep, sliced, *inputs)
    return dataclasses.replace(limits, floor=min(limits.floor, chosen.pressure))


def keep(
    setup: RunSetup, subnetwork: Subnetwork, state: TrainState, teacher: LoadedNetwork, point: BudgetPoint
) -> None:
    """Keeps the state of a search for `land`: the network, gates not folded in, with gates and importances."""
    directory = point.cut_directory(setup.search_directory) / "kept"
    state = jax.tree.map(np.asarray, gathered(state))
    variables, gates = shrinking.expanded(subnetwork, state, teacher.variables), state.params[GATES]
    importance = subnetwork.whole.topology.unflatten(np.asarray(search_state(state.opt_state).importance))
    directory.mkdir(parents=True, exist_ok=True)
    units = {f"gate/{name}": gate for name, gate in gates.items()}
    write_run_arrays(
        directory / "units.npz", units | {f"importance/{name}": value for name, value in importance.items()}
    )
    save_run_network(
        directory / "network", setup, teacher.architecture, teacher.module, variables, step=int(state.step)
    )


def check(setup: RunSetup, points: Sequence[BudgetPoint]) -> None:
    """Raises ValueError if a budget cannot be met from the states that the search kept."""
    network = setup.trace_teacher()
    for point, limits in zip(
        points, resolve_limits(setup.experiment, network, points, setup.search_directory), strict=True
    ):
        _, _, gates, importance = nearest(setup, point, network.topology, limits)
        choose(network.topology, limits, gates, importance)


def nearest(
    setup: RunSetup, point: BudgetPoint, topology: Topology, limits: Limits
) -> tuple[Path, LoadedNetwork, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The state to cut a student from: (its directory, network, gates, importances).

    That is the one kept at this budget. For a budget added later, it is the cheapest one that costs more.

    Raises:
      ValueError: there is none.
    """
    own = point.cut_directory(setup.search_directory) / "kept"
    places = (
        [own]
        if (own / _COMPLETE).is_file()
        else sorted(p.parent.parent for p in setup.search_directory.rglob(f"kept/{_COMPLETE}"))
    )
    costs = {
        place: limits.pressure(topology, (topology.flatten(_units(place, topology)[0]) > 0).astype(float))
        for place in places
    }
    above = [place for place in places if place == own or costs[place] > 1.0]
    if not above:
        largest = (
            f"the largest costs {format_distinct(max(costs.values()), 1.0)[0]} of it" if costs else "there are none"
        )
        raise ValueError(
            f"budgets: {point.suffix[1:] or 'the budget'} is above all states kept in {setup.search_directory} "
            f"({largest}); run a new search with it"
        )
    place = min(above, key=lambda place: costs[place])
    return place, setup.load(place / "network"), *_units(place, topology)


def _units(place: Path, topology: Topology) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(gates, importances) of a kept state."""
    stored = read_arrays(place / "units.npz")
    gates, importance = (
        {g.name: stored[f"{kind}/{g.name}"] for g in topology.groups} for kind in ("gate", "importance")
    )
    return gates, importance


_COMPLETE = "network/network.json"


def choose(topology: Topology, limits: Limits, gates: Gates, importance: Gates) -> Selection:
    """The units of a kept state to cut to; see `kdsearch_jax.pruning.landing`."""
    flat_gates, flat_importance = (topology.flatten(values).astype(float) for values in (gates, importance))
    least = np.array([fewest_units(limits.round_to, {}, group) for group in topology.groups])
    return landing.land(topology, limits, flat_gates, flat_importance, least, fill=True)


def land(setup: RunSetup, point: BudgetPoint, network: Network | None = None) -> int | None:
    """Cuts the student of a budget from a state that the search kept, and verifies it, unless this was done before.

    Returns:
      the search's steps up to that state; None for a search of a version that did not store them.
    """
    directory = point.cut_directory(setup.search_directory)
    cut = _is_cut(directory)
    sync_processes("cut looked at")  # before the first process writes files that others may still be reading
    if not cut:
        teacher = setup.load(setup.teacher_directory)
        network = network or setup.trace_teacher()
        topology, limits = (
            network.topology,
            resolve_limits(setup.experiment, network, [point], setup.search_directory)[0],
        )
        place, loaded, gates, importance = nearest(setup, point, topology, limits)
        chosen, cost = latency.land(
            lambda bounds: choose(topology, bounds, gates, importance),
            limits, network, teacher.variables, point.budget, setup.objective.call,
        )  # fmt: skip
        stay = chosen.keep
        setup.warn(chosen.note)
        sliced, architecture = surgery.slice_network(loaded.variables, gates, stay, network, teacher.architecture)
        inputs = setup.objective.call.bind(proof_batch(setup.dataset))
        proof = surgery.verify(network, loaded.variables, gates, stay, sliced, *inputs)
        log.info("the student is the gated network: outputs agree to %.1e of their own scale", proof["difference"])
        macs, params = topology.cost(stay)
        record = {
            "kept": {name: np.flatnonzero(mask).tolist() for name, mask in stay.items()},
            "macs": macs,
            "params": params,
            "budget": dataclasses.asdict(point.budget),
            "proof": proof,
            **({"measured": cost} if cost else {}),
            **({"note": chosen.note} if chosen.note else {}),
            "step": loaded.info["step"],
            "from": str(place.relative_to(setup.search_directory)),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_run_arrays(directory / "gates.npz", gates)
        write_run_json(directory / "selection.json", record, seal=True)
        write_run_json(directory / "architecture.json", architecture.to_json())
        save_run_network(directory / "network", setup, architecture, architecture.module(setup.base_module), sliced)
    return read_sealed(directory / "selection.json").get("step")


def _is_cut(directory: Path) -> bool:
    """Whether a student was cut here whose files can be read; otherwise it is cut again from the kept state."""
    if not is_finished(directory):
        return False
    try:
        read_sealed(directory / "selection.json", has={"kept": dict, "macs": int, "params": int, "budget": dict})
        read_arrays(directory / "gates.npz")
    except (DamagedError, OSError) as error:
        log.warning("%s: cut again, as %s", directory, error)
        return False
    return True


def publish(source: Path, directory: Path) -> None:
    """Copies the student of the smallest budget to where the student of a single budget is."""
    if source != directory and jax.process_index() == 0:
        for name in ("gates.npz", "selection.json", "architecture.json"):
            shutil.copy(source / name, directory / name)
        with atomic_directory(directory / "network") as part:
            shutil.copytree(source / "network", part, dirs_exist_ok=True)
    sync_processes("search published")


def by_hand(
    setup: RunSetup, rule: str, point: BudgetPoint, directory: Path, rng: np.random.Generator | None = None
) -> Path:
    """Cuts the student of a baseline from the teacher, gates all 1, and verifies it, unless this was done before.

    Returns:
      its network directory, `directory`.
    """
    if (directory / "network.json").is_file():
        return directory
    teacher = setup.load(setup.teacher_directory)
    network = setup.trace_teacher()
    limits = resolve_limits(setup.experiment, network, [point], setup.search_directory)[0]
    stay = baselines.select(rule, teacher.variables, network.topology, limits, rng)
    setup.warn(baselines.note(rule, network.topology, limits, stay))
    gates = gates_lib.init(network.topology)
    sliced, architecture = surgery.slice_network(teacher.variables, gates, stay, network, teacher.architecture)
    inputs = setup.objective.call.bind(proof_batch(setup.dataset))
    surgery.verify(network, teacher.variables, gates, stay, sliced, *inputs)
    save_run_network(directory, setup, architecture, architecture.module(setup.base_module), sliced)
    return directory
