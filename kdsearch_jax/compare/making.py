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

from kdsearch_jax import baselines, cutting, evaluate, fitting, front, rundir, stages, storage
from kdsearch_jax import task as task_lib
from kdsearch_jax.budget import BudgetError
from kdsearch_jax.compare.rows import ROWS, Row
from kdsearch_jax.config import BudgetConfig, DistillConfig
from kdsearch_jax.examples import Split
from kdsearch_jax.files import read_json, read_sealed, write_json, write_sealed
from kdsearch_jax.given import Loaded
from kdsearch_jax.locks import locked
from kdsearch_jax.road import Road, is_plain, limits_of, traced
from kdsearch_jax.surgery import SurgeryError
from kdsearch_jax.tracing.topology import leaf_shapes
from kdsearch_jax.train import TrainingDiverged
from kdsearch_jax.weights import fresh

log = logging.getLogger(__name__)

STREAM = 0  # of the batches of every retraining, so that students of one seed see the same


class CannotMakeError(ValueError):
    """There is no such student."""


@dataclass(frozen=True)
class Place(Road):
    """The road of one row with one seed. shared: the comparison's directory, which has the teacher."""

    shared: Path = Path()

    @property
    def teacher(self) -> Path:
        """The teacher's network directory."""
        return self.shared / "teacher" / "network"


def place_of(road: Road, name: str, seed: int, budget: BudgetConfig) -> Place:
    """Where the row is made with this seed, within this budget."""
    run = dataclasses.replace(road.experiment.run, seed=seed)
    experiment = dataclasses.replace(road.experiment, run=run, budget=budget)
    settings = {field.name: getattr(road, field.name) for field in dataclasses.fields(Road)}
    own = {"experiment": experiment, "directory": road.directory / f"seed-{seed}" / name, "search_from": None}
    return Place(**{**settings, **own}, shared=road.directory)


def matched(road: Road, match: str) -> BudgetConfig:
    """The budget of every row: as asked for, and with match="both" also what its uniform student costs otherwise.

    Raises:
      ValueError: there is no uniform student in the budget.
    """
    budget = road.experiment.budget
    if match == "macs":
        return budget
    teacher = road.load(road.teacher)
    network = traced(road.experiment, teacher.architecture, teacher.module)
    limits = limits_of(road.experiment, network)[0]
    try:
        keep = baselines.keep("uniform", teacher.variables, network.topology, limits)
    except BudgetError as error:
        raise ValueError(f"match: both needs the costs of the uniform student ({error}); give --match macs") from error
    macs, params = map(float, network.topology.cost(keep))
    return dataclasses.replace(
        budget,
        macs=macs if budget.macs is None else budget.macs,
        params=params if budget.params is None else budget.params,
    )


def make(road: Road, row: Row, seed: int, budget: BudgetConfig) -> dict[str, Any]:
    """What `result.json` of the row with this seed holds; makes, trains and measures the student if it is not there.

    Returns:
      {"accuracy", "agreement", "kl", "macs", "params", "bytes", "steps", "seconds"}, or {"why"} where it cannot be.
    """
    place = place_of(road, row.name, seed, budget)
    path = place.directory / "result.json"
    with locked(place.directory, wait=True):
        rundir.sweep_folder(place.directory)
        if path.is_file() and "why" not in (found := read_sealed(path)):
            return found
        log.info("%s, seed %d", row.label, seed)
        try:
            with _timed(place.directory):
                student = _student(place, road, row)
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


def _student(place: Place, road: Road, row: Row) -> Loaded:
    """The trained student."""
    stage, steps = place.experiment.retrain, row.times * _steps(place)
    if row.how == "search":
        stages.search(_supervised(place) if row.supervised else place, True)
        source, steps = place.search / "network", stage.steps
    elif row.how == "cut":
        rng = np.random.default_rng(place.experiment.run.seed)
        source = cutting.by_hand(place, row.name, front.points(place.experiment)[0], place.directory / "start", rng)
    else:
        source = _fresh(place, _searched(place, road))
    stages.retrain(place, "retrain", source, dataclasses.replace(stage, steps=steps), True, STREAM)
    return place.load(place.directory / "retrain" / "network")


def _steps(place: Place) -> int:
    return place.experiment.search.steps + place.experiment.retrain.steps


def _supervised(place: Place) -> Place:
    """The place whose search looks at labels alone."""
    labels = DistillConfig(cross_entropy=1.0)
    task = task_lib.classification(labels, place.task.call)
    return dataclasses.replace(place, task=task, experiment=dataclasses.replace(place.experiment, distill=labels))


def _searched(place: Place, road: Road) -> Loaded:
    """The network that the search with the same seed cut; it is searched for now where it was not yet."""
    origin = place_of(road, "searched", place.experiment.run.seed, place.experiment.budget)
    with locked(origin.directory, wait=True), _timed(origin.directory):
        try:
            stages.search(origin, True)
        except (BudgetError, SurgeryError, TrainingDiverged) as error:
            raise CannotMakeError(f"{ROWS['searched'].label}: {error}") from error
    return origin.load(origin.search / "network")


def _fresh(place: Place, shape: Loaded) -> Path:
    """The network of this shape as it is before any training."""
    directory, architecture, module = place.directory / "start", shape.architecture, shape.module
    if (directory / "network.json").is_file():
        return directory
    try:
        variables = fresh(module, architecture.called, place.experiment.run.seed)
    except ValueError as error:  # an nnx.Module that came as an instance
        raise CannotMakeError(f"nobody knows how its parameters begin ({error})") from error
    assert leaf_shapes(variables) == leaf_shapes(shape.variables)
    fitting.save(directory, place, architecture, module, variables)
    return directory


# --- measuring ------------------------------------------------------------------------------------------------------


def scored(road: Road, network: Loaded, split: Split, teacher: Loaded | None = None) -> dict[str, float]:
    """Accuracy on a split; with a teacher also agreement with it and divergence from it, in nats."""
    dataset, size = road.dataset, road.experiment.run.eval_batch_size
    if is_plain(road.task, dataset):
        logits = [
            evaluate.predict(n.module, n.variables, split.images, dataset.mean, dataset.std, size, n.architecture.call)
            for n in (network, teacher)
            if n is not None
        ]
        scores = evaluate.score(logits[0], split.labels, *logits[1:])
    else:
        other = None if teacher is None else (teacher.module, teacher.variables)
        measure = evaluate.measurer(road.task, network.module, split, dataset, batch_size=size, teacher=other)
        scores = measure(network.variables)
    return {name: scores[name] for name in ("accuracy", "agreement", "kl") if name in scores}


def check_teacher(road: Road, teacher: Loaded) -> None:
    """Raises ValueError where the teacher is no better than who always says the most frequent class."""
    if not road.task.classes:
        raise ValueError(
            "compare: students are compared by accuracy; the data need labels and the network class logits"
        )
    labels = np.asarray(road.dataset.validation.labels)
    chance = np.unique(labels, return_counts=True)[1].max() / labels.size
    accuracy = scored(road, teacher, road.dataset.validation)["accuracy"]
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
