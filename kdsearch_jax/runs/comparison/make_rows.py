"""Makes, trains and measures the student of one row and seed, in DIR/seed-SEED/ROW.

`result.json` there marks it as finished, or says why it cannot be made; without it the work in the directory is
resumed. A lock lets several processes share DIR: the second one waits and finds the work done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdsearch_jax import storage
from kdsearch_jax.distill import objective as objective_lib
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.pruning import baselines
from kdsearch_jax.pruning.budgets import BudgetError
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.pruning.surgery import SurgeryError
from kdsearch_jax.runs import budget_points, cutting, directories, stages
from kdsearch_jax.runs.comparison import external
from kdsearch_jax.runs.comparison.external import ExternalStudent
from kdsearch_jax.runs.comparison.rows import ROWS, Row
from kdsearch_jax.runs.evaluation import evaluate
from kdsearch_jax.runs.locks import locked
from kdsearch_jax.runs.provenance import made_by
from kdsearch_jax.runs.setup import RunSetup, resolve_limits
from kdsearch_jax.runs.stage_training import save_run_network
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.runs.teacher_weights import init_variables
from kdsearch_jax.storage.files import read_json, read_sealed, write_json, write_sealed
from kdsearch_jax.tracing.topology import leaf_shapes
from kdsearch_jax.training.loop import TrainingDiverged

log = logging.getLogger(__name__)

STREAM = 0  # the random stream of every retraining, so that all students of a seed see the same batches


class CannotMakeError(ValueError):
    """The student of a row cannot be made."""


@dataclass(frozen=True)
class RowSetup(RunSetup):
    """The setup of one row and seed; comparison_directory: holds the teacher that all rows share."""

    comparison_directory: Path = Path()

    @property
    def teacher_directory(self) -> Path:
        """The teacher's network directory."""
        return self.comparison_directory / "teacher" / "network"

    def outputs_directory(self, seed: int) -> Path | None:
        """Shared by all rows; its name begins with a dot because what can be computed again is not published."""
        return self.comparison_directory / ".teacher-outputs" / f"stream-{seed}"


def row_setup(setup: RunSetup, name: str, seed: int, budget: BudgetConfig) -> RowSetup:
    """The setup in which the row is made with this seed and budget."""
    run = dataclasses.replace(setup.experiment.run, seed=seed)
    experiment = dataclasses.replace(setup.experiment, run=run, budget=budget)
    settings = {field.name: getattr(setup, field.name) for field in dataclasses.fields(RunSetup)}
    changes = {"experiment": experiment, "directory": setup.directory / f"seed-{seed}" / name, "search_from": None}
    return RowSetup(**{**settings, **changes}, comparison_directory=setup.directory)


def matched_budget(setup: RunSetup, match: str) -> BudgetConfig:
    """The budget of every row: the experiment's, and with match="both" also the costs of its uniform student.

    Raises:
      ValueError: no uniform student meets the budget.
    """
    budget = setup.experiment.budget
    if match == "macs":
        return budget
    teacher, network = setup.provided_teacher or setup.load(setup.teacher_directory), setup.trace_teacher()
    limits = resolve_limits(setup.experiment, network)[0]
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


def make_row(
    setup: RunSetup, row: Row, seed: int, budget: BudgetConfig, student: ExternalStudent | None = None
) -> dict[str, Any]:
    """Makes, trains and measures the student of a row and seed, unless that is done; returns its `result.json`.

    Args:
      student: of an external row.

    Returns:
      {"accuracy", "agreement", "kl", "macs", "params", "bytes", "steps", "seconds", "made_by"}, or {"why"} if it cannot
      be made; of an external student also its {"label", "external"}.

    Raises:
      ValueError: the row was made from another external student.
    """
    place = row_setup(setup, row.name, seed, budget)
    path = place.directory / "result.json"
    with locked(place.directory, wait=True):
        directories.remove_leftovers_below(place.directory)
        about: dict[str, Any] = {}
        if student is not None:
            external.check_same(place.directory, student)
            about = {"label": student.label, external.KEY: student.record}
        if path.is_file() and "why" not in (result := read_sealed(path)):
            return result
        log.info("%s, seed %d", row.label, seed)
        try:
            with _timed(place.directory):
                trained = _student(place, setup, row, student)
                scores = comparison_scores(place, trained, teacher=place.load(place.teacher_directory))
        except (BudgetError, SurgeryError, CannotMakeError, TrainingDiverged) as error:
            log.warning("%s, seed %d: cannot be made: %s", row.label, seed, error)
            result = {"why": str(error), **about}
        else:
            steps = row.times * _steps(place)
            result = {
                **scores,
                **trained.costs,
                "made_by": made_by(),
                "steps": steps,
                "seconds": round(_spent(place.directory), 1),
                **about,
            }
        write_sealed(path, result)
        storage.publish()
    return result


def _student(place: RowSetup, setup: RunSetup, row: Row, student: ExternalStudent | None) -> LoadedNetwork:
    """Makes and trains the student."""
    stage, steps = place.experiment.retrain, row.times * _steps(place)
    if row.how == "search":
        stages.search(_supervised(place) if row.supervised else place, True)
        source, steps = place.search_directory / "network", stage.steps
    elif row.how == "cut":
        rng = np.random.default_rng(place.experiment.run.seed)
        source = cutting.by_hand(
            place, row.name, budget_points.points(place.experiment)[0], place.directory / "start", rng
        )
    elif student is not None:
        source = external.copy(place.directory / "start", student)
    else:
        source = _initialised(place, _searched(place, setup))
    stages.retrain(place, "retrain", source, dataclasses.replace(stage, steps=steps), True, STREAM)
    return place.load(place.directory / "retrain" / "network")


def _steps(place: RowSetup) -> int:
    return place.experiment.search.steps + place.experiment.retrain.steps


def _supervised(place: RowSetup) -> RowSetup:
    """The setup with a search by the labels alone."""
    labels = DistillConfig(cross_entropy=1.0)
    objective = objective_lib.classification(labels, place.objective.call)
    return dataclasses.replace(
        place, objective=objective, experiment=dataclasses.replace(place.experiment, distill=labels)
    )


def _searched(place: RowSetup, setup: RunSetup) -> LoadedNetwork:
    """The network cut by the search with the same seed, which is run if necessary."""
    origin = row_setup(setup, "searched", place.experiment.run.seed, place.experiment.budget)
    with locked(origin.directory, wait=True), _timed(origin.directory):
        try:
            stages.search(origin, True)
        except (BudgetError, SurgeryError, TrainingDiverged) as error:
            raise CannotMakeError(f"{ROWS['searched'].label}: {error}") from error
    return origin.load(origin.search_directory / "network")


def _initialised(place: RowSetup, network: LoadedNetwork) -> Path:
    """The directory of a network of the same shape with new initial values."""
    directory, architecture, module = place.directory / "start", network.architecture, network.module
    if (directory / "network.json").is_file():
        return directory
    try:
        variables = init_variables(module, architecture.call_spec, place.experiment.run.seed)
    except ValueError as error:  # an nnx.Module passed in as an instance
        raise CannotMakeError(f"its initialisation is unknown ({error})") from error
    assert leaf_shapes(variables) == leaf_shapes(network.variables)
    save_run_network(directory, place, architecture, module, variables)
    return directory


# --- measuring ------------------------------------------------------------------------------------------------------


def comparison_scores(
    setup: RunSetup,
    network: LoadedNetwork,
    split: Literal["validation", "test"] = "test",
    teacher: LoadedNetwork | None = None,
) -> dict[str, float]:
    """The accuracy on a split; with a teacher also the agreement with it and the KL divergence from it, in nats."""
    networks = {"student": network, **({"teacher": teacher} if teacher else {})}
    evaluations = evaluate(
        setup.objective, {name: setup.evaluated(n.module, n.variables) for name, n in networks.items()}, setup.dataset,
        split, batch_size=setup.experiment.run.eval_batch_size, teacher="teacher" if teacher else None,
    )  # fmt: skip
    means = evaluations["student"].means
    return {name: means[name] for name in ("accuracy", "agreement", "kl") if name in means}


def check_teacher(setup: RunSetup, teacher: LoadedNetwork) -> None:
    """Raises ValueError if the teacher is no better than always predicting the most frequent class."""
    if not setup.objective.classes:
        raise ValueError("compare: students are compared by accuracy, which needs labels and class logits")
    labels = np.asarray(setup.dataset.validation.labels)
    chance = np.unique(labels, return_counts=True)[1].max() / labels.size
    accuracy = comparison_scores(setup, teacher, "validation")["accuracy"]
    if accuracy <= chance:
        raise ValueError(
            f"teacher: its accuracy on the validation split is {accuracy:.1%}, the most frequent class alone reaches "
            f"{chance:.1%}; give a trained one, normalised as in its training (--data.mean)"
        )


# --- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _timed(directory: Path) -> Iterator[None]:
    """Adds the duration of the work to the directory's seconds.json, even if it is interrupted."""
    start = time.monotonic()
    try:
        yield
    finally:
        spent = _spent(directory) + time.monotonic() - start
        write_json(directory / "seconds.json", spent)


def _spent(directory: Path) -> float:
    path = directory / "seconds.json"
    return float(read_json(path)) if path.is_file() else 0.0


def read_results(directory: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """{row: {seed: result}} of all finished rows, in the order of the table, external ones last."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    others = sorted({path.parent.name for path in directory.glob("seed-*/external-*/result.json")})
    for name in (*ROWS, *others):
        paths = {int(p.parts[-3].removeprefix("seed-")): p for p in directory.glob(f"seed-*/{name}/result.json")}
        if paths:
            results[name] = {seed: read_sealed(paths[seed]) for seed in sorted(paths)}
    return results
