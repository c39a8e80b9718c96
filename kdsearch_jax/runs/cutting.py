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
from kdsearch_jax.runs.budget_points import Point
from kdsearch_jax.runs.fit_stage import meet, save, write, write_npz
from kdsearch_jax.runs.setup import RunSetup, finished, limits_of, proof_batch, traced
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.storage.checkpoint_files import written_whole
from kdsearch_jax.storage.files import DamagedError, read_arrays, read_sealed
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


def keep(setup: RunSetup, subnetwork: Subnetwork, state: TrainState, teacher: LoadedNetwork, point: Point) -> None:
    """Keeps the state of a search for `land`: the network, gates not folded in, with gates and importances."""
    directory = point.cut(setup.search) / "kept"
    state = jax.tree.map(np.asarray, state)
    variables, gates = shrinking.expanded(subnetwork, state, teacher.variables), state.params[GATES]
    importance = subnetwork.whole.topology.unflatten(np.asarray(search_state(state.opt_state).importance))
    directory.mkdir(parents=True, exist_ok=True)
    units = {f"gate/{name}": gate for name, gate in gates.items()}
    write_npz(directory / "units.npz", units | {f"importance/{name}": value for name, value in importance.items()})
    save(directory / "network", setup, teacher.architecture, teacher.module, variables, step=int(state.step))


def check(setup: RunSetup, points: Sequence[Point]) -> None:
    """Raises ValueError if a budget cannot be met from the states that the search kept."""
    teacher = setup.load(setup.teacher)
    network = traced(setup.experiment, teacher.architecture, teacher.module)
    for point, limits in zip(points, limits_of(setup.experiment, network, points, setup.search), strict=True):
        _, _, gates, importance = nearest(setup, point, network.topology, limits)
        choose(network.topology, limits, gates, importance)


def nearest(
    setup: RunSetup, point: Point, topology: Topology, limits: Limits
) -> tuple[Path, LoadedNetwork, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The state to cut a student from: (its directory, network, gates, importances).

    That is the one kept at this budget. For a budget added later, it is the cheapest one that costs more.

    Raises:
      ValueError: there is none.
    """
    own = point.cut(setup.search) / "kept"
    places = (
        [own]
        if (own / _COMPLETE).is_file()
        else sorted(p.parent.parent for p in setup.search.rglob(f"kept/{_COMPLETE}"))
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
            f"budgets: {point.tail[1:] or 'the budget'} is above all states kept in {setup.search} ({largest}); run "
            "a new search with it"
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
    return landing.land(topology, limits, flat_gates, flat_importance, least)


def land(setup: RunSetup, point: Point, network: Network | None = None) -> int | None:
    """Cuts the student of a budget from a state that the search kept, and verifies it, unless this was done before.

    Returns:
      the search's steps up to that state; None for a search of a version that did not store them.
    """
    directory = point.cut(setup.search)
    cut = _is_cut(directory)
    meet("cut looked at")  # before the first process writes files that others may still be reading
    if not cut:
        teacher = setup.load(setup.teacher)
        network = network or traced(setup.experiment, teacher.architecture, teacher.module)
        topology, limits = network.topology, limits_of(setup.experiment, network, [point], setup.search)[0]
        place, loaded, gates, importance = nearest(setup, point, topology, limits)
        chosen, cost = latency.land(
            lambda bounds: choose(topology, bounds, gates, importance),
            limits, network, teacher.variables, point.budget, setup.task.call,
        )  # fmt: skip
        stay = chosen.keep
        setup.warn(chosen.note)
        sliced, architecture = surgery.slice_network(loaded.variables, gates, stay, network, teacher.architecture)
        inputs = setup.task.call.bind(proof_batch(setup.dataset))
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
            "from": str(place.relative_to(setup.search)),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_npz(directory / "gates.npz", gates)
        write(directory / "selection.json", record, seal=True)
        write(directory / "architecture.json", architecture.to_json())
        save(directory / "network", setup, architecture, architecture.module(setup.base), sliced)
    return read_sealed(directory / "selection.json").get("step")


def _is_cut(directory: Path) -> bool:
    """Whether a student was cut here whose files can be read; otherwise it is cut again from the kept state."""
    if not finished(directory):
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
        with written_whole(directory / "network") as part:
            shutil.copytree(source / "network", part, dirs_exist_ok=True)
    meet("search published")


def by_hand(setup: RunSetup, rule: str, point: Point, directory: Path, rng: np.random.Generator | None = None) -> Path:
    """Cuts the student of a baseline from the teacher, gates all 1, and verifies it, unless this was done before.

    Returns:
      its network directory, `directory`.
    """
    if (directory / "network.json").is_file():
        return directory
    teacher = setup.load(setup.teacher)
    network = traced(setup.experiment, teacher.architecture, teacher.module)
    limits = limits_of(setup.experiment, network, [point], setup.search)[0]
    stay = baselines.select(rule, teacher.variables, network.topology, limits, rng)
    setup.warn(baselines.note(rule, network.topology, limits, stay))
    gates = gates_lib.init(network.topology)
    sliced, architecture = surgery.slice_network(teacher.variables, gates, stay, network, teacher.architecture)
    inputs = setup.task.call.bind(proof_batch(setup.dataset))
    surgery.verify(network, teacher.variables, gates, stay, sliced, *inputs)
    save(directory, setup, architecture, architecture.module(setup.base), sliced)
    return directory
