"""The road, stage by stage: teacher → search → retrain and baselines → delivery.

Each stage reads directories and writes one of its own; a stage whose result is there is not run again, and one that was
interrupted goes on from its last checkpoint. What a stage hands on is a network directory (`checkpoint.save_network`),
so any stage can start from files that another run wrote.

With several budgets the search keeps its state at each (RUN/search/at-0.5/kept), and there is a student for each: cut
there, retrained in RUN/at-0.5 for as long as search and retraining take in all, and delivered as RUN/student-0.5.
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

from kdsearch_jax import cutting, distilling, front, gated, measured, report, shrinking, surgery
from kdsearch_jax import gates as gates_lib
from kdsearch_jax.checkpoint import written_whole
from kdsearch_jax.config import StageConfig
from kdsearch_jax.delivery import compare, deliver
from kdsearch_jax.fitting import fit, meet, save, write, write_npz
from kdsearch_jax.foreign import check_directory
from kdsearch_jax.front import Leg, Point
from kdsearch_jax.given import Loaded, architecture_of
from kdsearch_jax.network import Network
from kdsearch_jax.optimizer import make_optimizer
from kdsearch_jax.preemption import boundary
from kdsearch_jax.road import Road, finished, limits_of, proof_batch, traced
from kdsearch_jax.shrinking import Part
from kdsearch_jax.steps import TrainState, create_state, distill_step, supervised_step
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.weights import fresh

log = logging.getLogger(__name__)

STAGES = ("teacher", "search", "retrain")


def run(road: Road, *, resume: bool, stop_after: str | None = None) -> dict[str, Any] | None:
    """The whole road; returns the table of `results.json`, or None where it stops earlier."""
    _take_over(road)
    boundary("the teacher")
    teach(road, resume)
    if stop_after == "teacher":
        return None
    boundary("the search")
    search(road, resume)
    boundary("what follows the search")
    if stop_after == "search":
        _report(road)
        return None
    experiment = road.experiment
    steps, points = experiment.search.steps + experiment.retrain.steps, front.points(experiment)
    for point in points:
        begun = cutting.land(road, point)
        left = steps - begun if point.tail and begun is not None else experiment.retrain.steps
        stage = dataclasses.replace(experiment.retrain, steps=left)
        retrain(road, point.name, point.cut(road.search) / "network", stage, resume)
        boundary("the student is measured")
        _confirm(road, point)
    for number, name in enumerate(experiment.baselines):
        for point in points:
            log.info("baseline %s%s: %d steps, as many as search and retraining", name, point.tail, steps)
            source = cutting.by_hand(road, name, point, road.directory / f"{name}{point.tail}" / "start")
            stage = dataclasses.replace(experiment.retrain, steps=steps)
            retrain(road, f"{name}{point.tail}", source, stage, resume, number + 1)
    if stop_after == "retrain":
        return None
    for point in points:
        boundary("the export")
        deliver(road, point.name, point.student)
    boundary("the table")
    results = compare(road)
    boundary("the report")
    _report(road)
    return results


# --- teacher --------------------------------------------------------------------------------------------------------


def _take_over(road: Road) -> None:
    """Copies teacher and search of the run to start from, without checkpoints: this run's directory says it all."""
    if road.search_from is None:
        return
    for name in ("teacher", "search"):
        if finished(road.directory / name):
            continue
        meet(f"{name} is taken over")
        if jax.process_index() == 0:
            check_directory(road.search_from.parent / name, links=False)
            with written_whole(road.directory / name) as part:
                skipped = shutil.ignore_patterns("checkpoints*", "tensorboard")
                shutil.copytree(road.search_from.parent / name, part, ignore=skipped, dirs_exist_ok=True)
        meet(f"{name} was taken over")


def teach(road: Road, resume: bool) -> None:
    """Trains the teacher, or takes the given one over into the run's directory."""
    directory = road.directory / "teacher"
    if finished(directory):
        return
    experiment, dataset = road.experiment, road.dataset
    if (given := road.given) is not None:
        save(directory / "network", road, given.architecture, given.module, given.variables)
        return
    architecture = architecture_of(experiment, dataset)
    module = architecture.module()
    stage = experiment.teacher
    tx = make_optimizer(stage)
    state = create_state(fresh(module, architecture.called, experiment.run.seed), tx, ema=stage.ema)
    step = supervised_step(module, tx, stage, experiment.run, road.task)
    state = fit(road, state, step, stage, directory, resume, module=module)
    save(directory / "network", road, architecture, module, state.variables)


# --- search ---------------------------------------------------------------------------------------------------------


def search(road: Road, resume: bool) -> None:
    """Searches, and cuts and proves a student for each budget; writes the stage's directory."""
    directory = road.search
    if finished(directory):
        return
    experiment, teacher, points = road.experiment, road.load(road.teacher), front.points(road.experiment)
    network = traced(experiment, teacher.architecture, teacher.module)
    directory.mkdir(parents=True, exist_ok=True)
    measured.prepare(network, teacher.variables, points[0].budget, road.task.call, directory)
    limits = limits_of(experiment, network, search=directory)
    write(directory / "topology.json", network.topology.to_json())
    log.info("%s", network.topology.describe())
    inputs = road.task.call.bind(proof_batch(road.dataset))
    limits = [cutting.rehearse(network, teacher, each, inputs) for each in limits]
    path = front.path(experiment, limits, network.topology)
    part, state = _descend(road, network, teacher, path, resume)
    cutting.keep(road, part, state, teacher, points[-1])
    write_npz(directory / "history.npz", gated.history(network.topology, state))
    for point in points:
        cutting.land(road, point, network)
    cutting.publish(points[-1].cut(directory), directory)


def _descend(
    road: Road, network: Network, teacher: Loaded, path: Sequence[Leg], resume: bool
) -> tuple[Part, TrainState]:
    """The search's training, through all budgets, with what is alive of the network; the state at its end, in NumPy."""
    experiment, points, stage = road.experiment, front.points(road.experiment), road.experiment.search
    tx = gated.make_transformation(stage, experiment.gates)
    part = Part.of(network)
    lesson = _lesson(road, stage, teacher.module, teacher.variables, network.topology)
    state = gated.begin(teacher.variables, network.topology, tx, stage, experiment.gates.init, lesson.learned)
    checkpoints = road.search / "checkpoints"
    while True:
        module, topology = part.network.module, part.network.topology
        step = gated.search_step(
            part.network, teacher.module, tx, lesson.task, experiment.gates, experiment.run, lesson.distiller
        )
        control = gated.controller(part, path, stage, experiment.gates, experiment.run)
        ends = {leg.end: point for leg, point in zip(path[:-1], points[:-1], strict=True)}

        def between(state: TrainState, part: Part = part, control: Any = control, ends: Any = ends) -> Any:
            if point := ends.get(int(state.step)):
                cutting.keep(road, part, state, teacher, point)
            return control(state)

        def variables_of(state: TrainState, topology: Any = topology) -> Any:
            return gates_lib.fold({"params": state.params, **state.model_state}, state.extra["gates"], topology)

        dead = shrinking.until(part, path, experiment.gates.shrink, stage.steps)
        state = fit(
            road, state, step, stage, road.search, resume,
            module=module, teacher=teacher, variables_of=variables_of, constants=lesson.constants, between=between,
            until=dead, checkpoints_in=checkpoints, dataset=lesson.dataset,
        )  # fmt: skip
        state = jax.tree.map(np.asarray, state)  # off the devices of other processes
        if not dead(state):
            return part, state
        part, state = _shrink(road, part, state, teacher, tx)
        if lesson.distiller.taps:  # the layers compared have other channels now
            variables = {"params": state.params, **state.model_state}
            lesson = _lesson(road, stage, part.network.module, variables, part.network.topology)
            state = _relearning(state, lesson)
        checkpoints = road.search / f"checkpoints-{int(state.step)}"


def _shrink(road: Road, part: Part, state: TrainState, teacher: Loaded, tx: Any) -> tuple[Part, TrainState]:
    """The living part and its state, proved to be the gated network."""
    topology = part.whole.topology
    variables, gates, _ = shrinking.expanded(part, state, teacher.variables)
    smaller, state = shrinking.shrink(part, state, tx)
    folded = gates_lib.fold(
        {"params": state.params, **state.model_state}, state.extra["gates"], smaller.network.topology
    )
    inputs = road.task.call.bind(proof_batch(road.dataset))
    surgery.verify(part.whole, variables, gates, smaller.keep, folded, *inputs)
    costs = [topology.cost(each.keep)[0] for each in (part, smaller)]
    log.info("search: shrunk at step %d from %s to %s MACs", int(state.step), *(f"{cost:,}" for cost in costs))
    return smaller, state


# --- students -------------------------------------------------------------------------------------------------------


def retrain(road: Road, name: str, source: Path, stage: StageConfig, resume: bool, stream: int = 0) -> None:
    """Distils the teacher into the network of `source`; writes RUN/name."""
    directory = road.directory / name
    if finished(directory):
        return
    experiment, teacher, student = road.experiment, road.load(road.teacher), road.load(source)
    tx = make_optimizer(stage)
    lesson = _lesson(road, stage, student.module, student.variables)
    step = distill_step(student.module, teacher.module, tx, stage, experiment.run, lesson.task, lesson.distiller)
    state = create_state(student.variables, tx, ema=stage.ema, extra=lesson.extra)
    state = fit(
        road, state, step, stage, directory, resume,
        module=student.module, teacher=teacher, constants=lesson.constants, dataset=lesson.dataset, stream=100 + stream,
    )  # fmt: skip
    save(directory / "network", road, student.architecture, student.module, state.variables)


def _confirm(road: Road, point: Point) -> None:
    """Measures the trained student, where the budget is of what can only be measured."""
    directory = road.directory / point.name
    teacher, student = road.load(road.teacher), road.load(directory / "network")
    networks = (teacher.module, teacher.variables), (student.module, student.variables)
    measured.confirm(*networks, point.budget, road.task.call, directory / "measured.json")


def _lesson(
    road: Road, stage: StageConfig, module: Any, variables: Any, topology: Topology | None = None
) -> distilling.Lesson:
    """By whom and by what a student is taught in a stage; topology: in the search, that of its gates."""
    loaded = (road.load(road.teacher), *road.further)
    teachers = [distilling.Teacher(n.module, n.variables, n.architecture.called, n.info) for n in loaded]
    return distilling.prepare(
        road.task, teachers, road.dataset, road.experiment, stage, module, variables,
        retraining=topology is None, topology=topology,
    )  # fmt: skip


def _relearning(state: TrainState, lesson: distilling.Lesson) -> TrainState:
    """The state with what the losses learn begun anew, where its shapes are others now."""
    old = (state.extra or {}).get("learned")
    if lesson.learned is None or jax.tree.map(np.shape, old) == jax.tree.map(np.shape, lesson.learned):
        return state
    return state.replace(extra={**(state.extra or {}), "learned": lesson.learned})


def _report(road: Road) -> None:
    if jax.process_index() == 0:
        report.write(road.directory)
