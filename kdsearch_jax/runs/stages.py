"""The stages of a run: teacher → search → retraining and baselines → export.

Each stage reads directories and writes its own. A finished stage is not run again, and an interrupted one resumes from
its last checkpoint. Stages pass on network directories (`kdsearch_jax.storage.networks`), so a stage can start from
files that another run wrote.

With several budgets, the search keeps its state at each (RUN/search/at-0.5/kept), and each has a student: cut from that
state, retrained in RUN/at-0.5 for the steps that are left of search and retraining together, and exported to
RUN/student-0.5.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdsearch_jax import reporting
from kdsearch_jax.adapters.devices import gathered
from kdsearch_jax.distill import distiller, search_step, shrinking
from kdsearch_jax.distill.shrinking import Subnetwork
from kdsearch_jax.distill.steps import distill_step, supervised_step
from kdsearch_jax.distill.update_outputs import UpdateCache
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.search import GatedSearch
from kdsearch_jax.pruning.transform import GATES
from kdsearch_jax.runs import budget_points, cutting, latency
from kdsearch_jax.runs.budget_points import BudgetPoint
from kdsearch_jax.runs.results import export_student, write_results
from kdsearch_jax.runs.setup import RunSetup, is_finished, proof_batch, resolve_limits
from kdsearch_jax.runs.stage_training import (
    save_run_network,
    stage_seed,
    train_stage,
    write_run_arrays,
    write_run_json,
)
from kdsearch_jax.runs.teacher_source import LoadedNetwork, model_architecture
from kdsearch_jax.runs.teacher_weights import init_variables
from kdsearch_jax.storage import sync_processes
from kdsearch_jax.storage.files import atomic_directory
from kdsearch_jax.storage.safe_readers import check_directory
from kdsearch_jax.tracing.topology import Topology
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.preemption import check_preemption
from kdsearch_jax.training.settings import StageConfig
from kdsearch_jax.training.state import TrainState, create_state

log = logging.getLogger(__name__)

STAGES = ("teacher", "search", "retrain")


def run(setup: RunSetup, *, resume: bool, stop_after: str | None = None) -> dict[str, Any] | None:
    """Runs all stages; returns the table of `results.json`, or None if it stops earlier."""
    _copy_search(setup)
    check_preemption("the teacher")
    teach(setup, resume)
    if stop_after == "teacher":
        return None
    check_preemption("the search")
    search(setup, resume)
    check_preemption("what follows the search")
    if stop_after == "search":
        _report(setup)
        return None
    experiment = setup.experiment
    steps, points = experiment.search.steps + experiment.retrain.steps, budget_points.points(experiment)
    for point in points:
        begun = cutting.land(setup, point)
        left = steps - begun if point.suffix and begun is not None else experiment.retrain.steps
        stage = dataclasses.replace(experiment.retrain, steps=left)
        retrain(setup, point.name, point.cut_directory(setup.search_directory) / "network", stage, resume)
        check_preemption("the student is measured")
        _confirm(setup, point)
    for number, name in enumerate(experiment.baselines):
        for point in points:
            log.info("baseline %s%s: %d steps, as many as search and retraining", name, point.suffix, steps)
            source = cutting.by_hand(setup, name, point, setup.directory / f"{name}{point.suffix}" / "start")
            stage = dataclasses.replace(experiment.retrain, steps=steps)
            retrain(setup, f"{name}{point.suffix}", source, stage, resume, number + 1)
    if stop_after == "retrain":
        return None
    for point in points:
        check_preemption("the export")
        export_student(setup, point.name, point.student)
    check_preemption("the table")
    results = write_results(setup)
    check_preemption("the report")
    _report(setup)
    return results


# --- teacher --------------------------------------------------------------------------------------------------------


def _copy_search(setup: RunSetup) -> None:
    """Copies teacher and search of the run to start from, without checkpoints, so that this run is complete."""
    if setup.search_from is None:
        return
    for name in ("teacher", "search"):
        if is_finished(setup.directory / name):
            continue
        sync_processes(f"{name} is copied")
        if jax.process_index() == 0:
            check_directory(setup.search_from.parent / name, allow_links=False)
            with atomic_directory(setup.directory / name) as part:
                skipped = shutil.ignore_patterns("checkpoints*", "tensorboard")
                shutil.copytree(setup.search_from.parent / name, part, ignore=skipped, dirs_exist_ok=True)
        sync_processes(f"{name} was copied")


def teach(setup: RunSetup, resume: bool) -> None:
    """Trains the teacher, or copies the given one to the run's directory."""
    directory = setup.directory / "teacher"
    if is_finished(directory):
        return
    experiment, dataset = setup.experiment, setup.dataset
    if (given := setup.provided_teacher) is not None:
        save_run_network(directory / "network", setup, given.architecture, given.module, given.variables)
        return
    architecture = model_architecture(experiment, dataset)
    module = architecture.module()
    stage = experiment.teacher
    tx = make_optimizer(stage)
    state = create_state(init_variables(module, architecture.call_spec, experiment.run.seed), tx, ema=stage.ema)
    step = supervised_step(module, tx, stage, experiment.run, setup.objective)
    state = train_stage(setup, state, step, stage, directory, resume, module=module)
    save_run_network(directory / "network", setup, architecture, module, state.variables)


# --- search ---------------------------------------------------------------------------------------------------------


def search(setup: RunSetup, resume: bool) -> None:
    """Searches, and cuts and verifies a student for each budget; writes RUN/search."""
    directory = setup.search_directory
    if is_finished(directory):
        return
    experiment, teacher, points = (
        setup.experiment,
        setup.load(setup.teacher_directory),
        budget_points.points(setup.experiment),
    )
    network = setup.trace_teacher()
    directory.mkdir(parents=True, exist_ok=True)
    latency.calibrate_once(network, teacher.variables, points[0].budget, setup.objective.call, directory)
    limits = resolve_limits(experiment, network, search=directory)
    write_run_json(directory / "topology.json", network.topology.to_json())
    log.info("%s", network.topology.describe())
    inputs = setup.objective.call.bind(proof_batch(setup.dataset))
    limits = [cutting.rehearse(network, teacher, each, inputs) for each in limits]
    gated_search = search_step.gated_search(network, limits, experiment.search, experiment.gates, experiment.run)
    subnetwork, state = _descend(setup, gated_search, teacher, resume)
    cutting.keep(setup, subnetwork, state, teacher, points[-1])
    write_run_arrays(directory / "history.npz", gated_search.history(state.params, state.opt_state))
    for point in points:
        cutting.land(setup, point, network)
    cutting.publish(points[-1].cut_directory(directory), directory)


def _descend(
    setup: RunSetup, search: GatedSearch, teacher: LoadedNetwork, resume: bool
) -> tuple[Subnetwork, TrainState]:
    """Trains the gated network through all budgets; returns what it still computes at the end, and its state in NumPy.

    The state at each budget but the last is kept on the way.
    """
    experiment, stage = setup.experiment, setup.experiment.search
    tx = search.optimizer(make_optimizer(stage))
    subnetwork = Subnetwork.of(search)
    distillation = _distillation(setup, stage, teacher.module, teacher.variables, search.topology)
    state = search_step.begin(search, teacher.variables, tx, distillation.learned)
    checkpoints = setup.search_directory / "checkpoints"
    kept_at = dict(zip(search.ends[:-1], budget_points.points(experiment)[:-1], strict=True))
    while True:
        step = search_step.search_step(
            subnetwork,
            teacher.module,
            tx,
            stage,
            distillation.objective,
            experiment.gates,
            experiment.run,
            distillation.distiller,
        )

        def between(state: TrainState, subnetwork: Subnetwork = subnetwork) -> tuple[TrainState, dict[str, float]]:
            if point := kept_at.get(int(state.step)):
                cutting.keep(setup, subnetwork, state, teacher, point)
            return state, search_step.progress(search, state)

        def variables_of(state: TrainState, subnetwork: Subnetwork = subnetwork) -> Any:
            return subnetwork.fold(state.params, state.model_state)

        shrinks = shrinking.shrinks(subnetwork, experiment.gates.shrink)
        state = train_stage(
            setup, state, step, stage, setup.search_directory, resume,
            module=subnetwork.module, teacher=teacher, variables_of=variables_of, constants=distillation.constants,
            between=between, until=shrinks, checkpoints_in=checkpoints, dataset=distillation.dataset,
        )  # fmt: skip
        state = jax.tree.map(np.asarray, gathered(state))  # off the devices of other processes
        if not shrinks(state):
            return subnetwork, state
        subnetwork, state = _shrink(setup, subnetwork, state, teacher, tx)
        if distillation.distiller.feature_paths:  # compared layers have other channels now
            variables = {"params": state.params["params"], **state.model_state}
            distillation = _distillation(setup, stage, subnetwork.module, variables, subnetwork.network.topology)
            state = _with_maps(state, distillation)
        checkpoints = setup.search_directory / f"checkpoints-{int(state.step)}"


def _shrink(
    setup: RunSetup, subnetwork: Subnetwork, state: TrainState, teacher: LoadedNetwork, tx: Any
) -> tuple[Subnetwork, TrainState]:
    """The subnetwork of the units that are left and its state, verified to be the gated network."""
    topology = subnetwork.whole.topology
    variables = shrinking.expanded(subnetwork, state, teacher.variables)
    smaller, state = shrinking.shrink(subnetwork, state, tx)
    folded = smaller.fold(state.params, state.model_state)
    inputs = setup.objective.call.bind(proof_batch(setup.dataset))
    surgery.verify(subnetwork.whole, variables, state.params[GATES], smaller.keep, folded, *inputs)
    costs = [topology.cost(each.keep)[0] for each in (subnetwork, smaller)]
    log.info("search: shrunk at step %d from %s to %s MACs", int(state.step), *(f"{cost:,}" for cost in costs))
    return smaller, state


# --- students -------------------------------------------------------------------------------------------------------


def retrain(setup: RunSetup, name: str, source: Path, stage: StageConfig, resume: bool, stream: int = 0) -> None:
    """Distils the teacher into the network in `source`; writes RUN/`name`."""
    directory = setup.directory / name
    if is_finished(directory):
        return
    experiment, teacher, student = setup.experiment, setup.load(setup.teacher_directory), setup.load(source)
    tx, stream = make_optimizer(stage), 100 + stream
    outputs = setup.outputs_directory(seed := stage_seed(experiment, stream))
    distillation = _distillation(
        setup, stage, student.module, student.variables,
        update_cache=outputs and UpdateCache(outputs, seed, _origin_of_outputs(setup, teacher)),
    )  # fmt: skip
    step = distill_step(
        student.module, teacher.module, tx, stage, experiment.run, distillation.objective, distillation.distiller
    )
    state = create_state(student.variables, tx, ema=stage.ema, extra=distillation.extra)
    state = train_stage(
        setup, state, step, stage, directory, resume,
        module=student.module, teacher=teacher, constants=distillation.constants, dataset=distillation.dataset,
        entries=distillation.entries, stream=stream,
    )  # fmt: skip
    save_run_network(directory / "network", setup, student.architecture, student.module, state.variables)


def _confirm(setup: RunSetup, point: BudgetPoint) -> None:
    """Measures the trained student if the budget bounds latency or memory."""
    if not latency.measured_bounds(point.budget):
        return
    directory = setup.directory / point.name
    teacher, student = setup.load(setup.teacher_directory), setup.load(directory / "network")
    networks = (teacher.module, teacher.variables), (student.module, student.variables)
    latency.confirm(*networks, point.budget, setup.objective.call, directory / "measured.json")


def _origin_of_outputs(setup: RunSetup, teacher: LoadedNetwork) -> dict[str, str]:
    """What a teacher's outputs depend on besides the settings of the stage: its digest, and that of the data."""
    return {"teacher": teacher.digest, "data": setup.fingerprint}


def _distillation(
    setup: RunSetup,
    stage: StageConfig,
    module: Any,
    variables: Any,
    topology: Topology | None = None,
    update_cache: UpdateCache | None = None,
) -> distiller.Distillation:
    """Teachers and losses of a stage that trains `module`; topology: in a search, that of its gates."""
    loaded = (setup.load(setup.teacher_directory), *setup.extra_teachers)
    teachers = [distiller.Teacher(n.module, n.variables, n.architecture.call_spec, n.info) for n in loaded]
    experiment = setup.experiment
    return distiller.make_distillation(
        setup.objective, teachers, setup.dataset, experiment.distill, experiment.data, experiment.run, stage, module,
        variables,
        retraining=topology is None, topology=topology, memory=setup.cache, update_cache=update_cache,
    )  # fmt: skip


def _with_maps(state: TrainState, distillation: distiller.Distillation) -> TrainState:
    """The state with the learned maps of a distillation, initialised again if their shapes have changed."""
    old = (state.extra or {}).get("learned")
    if distillation.learned is None or jax.tree.map(np.shape, old) == jax.tree.map(np.shape, distillation.learned):
        return state
    return state.replace(extra={**(state.extra or {}), "learned": distillation.learned})


def _report(setup: RunSetup) -> None:
    if jax.process_index() == 0:
        reporting.write_report(setup.directory)
