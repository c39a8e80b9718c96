"""One row with one seed: the student is made, trained and measured, in DIR/seed-SEED/ROW.

`result.json` there says that it is finished, or why it cannot be made; without it, whatever the directory holds is gone
on from. A lock lets several processes share DIR: who comes second waits, and finds the work done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdsearch_jax import storage
from kdsearch_jax.data.examples import Split
from kdsearch_jax.distill import objective as task_lib
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.pruning import baselines
from kdsearch_jax.pruning.budgets import BudgetError
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.pruning.surgery import SurgeryError
from kdsearch_jax.runs import budget_points, cutting, directories, evaluation, fit_stage, stages
from kdsearch_jax.runs.comparison.rows import ROWS, Row
from kdsearch_jax.runs.locks import locked
from kdsearch_jax.runs.setup import RunSetup, is_plain, limits_of, traced
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.runs.weights import fresh
from kdsearch_jax.storage.files import read_json, read_sealed, write_json, write_sealed
from kdsearch_jax.tracing.topology import leaf_shapes
from kdsearch_jax.training.loop import TrainingDiverged

log = logging.getLogger(__name__)

STREAM = 0  # of the batches of every retraining, so that students of one seed see the same


class CannotMakeError(ValueError):
    """There is no such student."""


@dataclass(frozen=True)
class Place(RunSetup):
    """The road of one row with one seed. shared: the comparison's directory, which has the teacher."""

    shared: Path = Path()

    @property
    def teacher(self) -> Path:
        """The teacher's network directory."""
        return self.shared / "teacher" / "network"


def place_of(setup: RunSetup, name: str, seed: int, budget: BudgetConfig) -> Place:
    """Where the row is made with this seed, within this budget."""
    run = dataclasses.replace(setup.experiment.run, seed=seed)
    experiment = dataclasses.replace(setup.experiment, run=run, budget=budget)
    settings = {field.name: getattr(setup, field.name) for field in dataclasses.fields(RunSetup)}
    own = {"experiment": experiment, "directory": setup.directory / f"seed-{seed}" / name, "search_from": None}
    return Place(**{**settings, **own}, shared=setup.directory)


def matched(setup: RunSetup, match: str) -> BudgetConfig:
    """The budget of every row: as asked for, and with match="both" also what its uniform student costs otherwise.

    Raises:
      ValueError: there is no uniform student in the budget.
    """
    budget = setup.experiment.budget
    if match == "macs":
        return budget
    teacher = setup.load(setup.teacher)
    network = traced(setup.experiment, teacher.architecture, teacher.module)
    limits = limits_of(setup.experiment, network)[0]
    try:
        keep = baselines.select("uniform", teacher.variables, network.topology, limits)
    except BudgetError as error:
        raise ValueError(f"match: both needs the costs of the uniform student ({error}); give --match macs") from error
    macs, params = map(float, network.topology.cost(keep))
    return dataclasses.replace(
        budget,
        macs=macs if budget.macs is None else budget.macs,
        params=params if budget.params is None else budget.params,
    )


def make(setup: RunSetup, row: Row, seed: int, budget: BudgetConfig) -> dict[str, Any]:
    """What `result.json` of the row with this seed holds; makes, trains and measures the student if it is not there.

    Returns:
      {"accuracy", "agreement", "kl", "macs", "params", "bytes", "steps", "seconds"}, or {"why"} where it cannot be.
    """
    place = place_of(setup, row.name, seed, budget)
    path = place.directory / "result.json"
    with locked(place.directory, wait=True):
        directories.sweep_folder(place.directory)
        if path.is_file() and "why" not in (found := read_sealed(path)):
            return found
        log.info("%s, seed %d", row.label, seed)
        try:
            with _timed(place.directory):
                student = _student(place, setup, row)
                scores = scored(place, student, place.dataset.test, place.load(place.teacher))
        except (BudgetError, SurgeryError, CannotMakeError, TrainingDiverged) as error:
            log.warning("%s, seed %d: there is no such student: %s", row.label, seed, error)
            result = {"why": str(error)}
        else:
            steps = row.times * _steps(place)
            result = {**scores, **student.costs, "steps": steps, "seconds": round(_spent(place.directory), 1)}
        write_sealed(path, result)
        storage.publish()
    return result


def _student(place: Place, setup: RunSetup, row: Row) -> LoadedNetwork:
    """The trained student."""
    stage, steps = place.experiment.retrain, row.times * _steps(place)
    if row.how == "search":
        stages.search(_supervised(place) if row.supervised else place, True)
        source, steps = place.search / "network", stage.steps
    elif row.how == "cut":
        rng = np.random.default_rng(place.experiment.run.seed)
        source = cutting.by_hand(
            place, row.name, budget_points.points(place.experiment)[0], place.directory / "start", rng
        )
    else:
        source = _fresh(place, _searched(place, setup))
    stages.retrain(place, "retrain", source, dataclasses.replace(stage, steps=steps), True, STREAM)
    return place.load(place.directory / "retrain" / "network")


def _steps(place: Place) -> int:
    return place.experiment.search.steps + place.experiment.retrain.steps


def _supervised(place: Place) -> Place:
    """The place whose search looks at labels alone."""
    labels = DistillConfig(cross_entropy=1.0)
    task = task_lib.classification(labels, place.task.call)
    return dataclasses.replace(place, task=task, experiment=dataclasses.replace(place.experiment, distill=labels))


def _searched(place: Place, setup: RunSetup) -> LoadedNetwork:
    """The network that the search with the same seed cut; it is searched for now where it was not yet."""
    origin = place_of(setup, "searched", place.experiment.run.seed, place.experiment.budget)
    with locked(origin.directory, wait=True), _timed(origin.directory):
        try:
            stages.search(origin, True)
        except (BudgetError, SurgeryError, TrainingDiverged) as error:
            raise CannotMakeError(f"{ROWS['searched'].label}: {error}") from error
    return origin.load(origin.search / "network")


def _fresh(place: Place, shape: LoadedNetwork) -> Path:
    """The network of this shape as it is before any training."""
    directory, architecture, module = place.directory / "start", shape.architecture, shape.module
    if (directory / "network.json").is_file():
        return directory
    try:
        variables = fresh(module, architecture.call_spec, place.experiment.run.seed)
    except ValueError as error:  # an nnx.Module that came as an instance
        raise CannotMakeError(f"nobody knows how its parameters begin ({error})") from error
    assert leaf_shapes(variables) == leaf_shapes(shape.variables)
    fit_stage.save(directory, place, architecture, module, variables)
    return directory


# --- measuring ------------------------------------------------------------------------------------------------------


def scored(
    setup: RunSetup, network: LoadedNetwork, split: Split, teacher: LoadedNetwork | None = None
) -> dict[str, float]:
    """Accuracy on a split; with a teacher also agreement with it and divergence from it, in nats."""
    dataset, size = setup.dataset, setup.experiment.run.eval_batch_size
    if is_plain(setup.task, dataset):
        logits = [
            evaluation.predict(
                n.module, n.variables, split.images, dataset.mean, dataset.std, size, n.architecture.custom_call
            )
            for n in (network, teacher)
            if n is not None
        ]
        scores = evaluation.score(logits[0], split.labels, *logits[1:])
    else:
        other = None if teacher is None else (teacher.module, teacher.variables)
        measure = evaluation.measurer(setup.task, network.module, split, dataset, batch_size=size, teacher=other)
        scores = measure(network.variables)
    return {name: scores[name] for name in ("accuracy", "agreement", "kl") if name in scores}


def check_teacher(setup: RunSetup, teacher: LoadedNetwork) -> None:
    """Raises ValueError where the teacher is no better than who always says the most frequent class."""
    if not setup.task.classes:
        raise ValueError(
            "compare: students are compared by accuracy; the data need labels and the network class logits"
        )
    labels = np.asarray(setup.dataset.validation.labels)
    chance = np.unique(labels, return_counts=True)[1].max() / labels.size
    accuracy = scored(setup, teacher, setup.dataset.validation)["accuracy"]
    if accuracy <= chance:
        raise ValueError(
            f"teacher: it is right on {accuracy:.1%} of the validation split, which whoever always says its most "
            f"frequent class is on {chance:.1%}; give a trained one, normalised as it was trained (--data.mean)"
        )


# --- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _timed(directory: Path) -> Iterator[None]:
    """Adds what the work takes to the seconds that the directory knows of, also when it is interrupted."""
    start = time.monotonic()
    try:
        yield
    finally:
        spent = _spent(directory) + time.monotonic() - start
        write_json(directory / "seconds.json", spent)


def _spent(directory: Path) -> float:
    path = directory / "seconds.json"
    return float(read_json(path)) if path.is_file() else 0.0


def results(directory: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """{row: {seed: its result}} of all that is there, in the order of the table."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in ROWS:
        paths = {int(p.parts[-3].removeprefix("seed-")): p for p in directory.glob(f"seed-*/{name}/result.json")}
        if paths:
            found[name] = {seed: read_sealed(paths[seed]) for seed in sorted(paths)}
    return found
