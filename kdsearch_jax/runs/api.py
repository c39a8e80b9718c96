"""Runs an experiment on Python objects, for `kdsearch_jax.search`, and returns the students."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from kdsearch_jax import storage
from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.architecture import base_module
from kdsearch_jax.adapters.boxes import boxed, boxes_of
from kdsearch_jax.adapters.call_spec import class_of, signature_of
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.data import datasets as data_lib
from kdsearch_jax.data.examples import Dataset, from_arrays, sole_input
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs import budget_points, directories, stages
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.runs.results import format_table
from kdsearch_jax.runs.setup import RunSetup, prepare_run
from kdsearch_jax.runs.teacher_source import LoadedNetwork, UserTeacher
from kdsearch_jax.tracing.messages import nearest


@dataclass(frozen=True)
class Result:
    """A student and how it was made.

    Attributes:
      module, variables: the trained student: a Linen module and its variables. For an NNX teacher, an NNX module of the
        teacher's class with smaller sizes, and None.
      architecture: the student as plain JSON: sizes of layers, dropped layers, how it is called.
      results: the table of teacher, student and baselines, as in `results.json`.
      report: the HTML report.
      directory: the run's directory; for a run in an object store its local copy, which is removed when the process
        ends.
    """

    module: Any
    variables: Any
    architecture: dict[str, Any]
    results: dict[str, Any]
    report: Path
    directory: Path

    def __str__(self) -> str:
        """The table."""
        return format_table(self.results)


@dataclass(frozen=True)
class BudgetSweep:
    """Students of several budgets from one search.

    Attributes:
      students: the largest first.
      budgets: theirs, in the same order.
      results, report, directory: of the run, as in `Result`.
    """

    students: tuple[Result, ...]
    budgets: tuple[float, ...]
    results: dict[str, Any]
    report: Path
    directory: Path

    def __len__(self) -> int:
        """The number of students."""
        return len(self.students)

    def __getitem__(self, number: int) -> Result:
        """One of the students."""
        return self.students[number]

    def __str__(self) -> str:
        """The table."""
        return format_table(self.results)


@dataclass(frozen=True)
class ModuleWithVariables:
    """A module as a function of its variables; from_nnx: whether it was an NNX module."""

    module: Any
    variables: Any
    from_nnx: bool

    @staticmethod
    def of(module: Any, variables: Any) -> ModuleWithVariables:
        """variables: may be None for an NNX module."""
        if not isinstance(module, nnx.Module):
            return ModuleWithVariables(module, variables, False)
        functional, own_variables = FunctionalModule.split(module)
        return ModuleWithVariables(functional, own_variables if variables is None else variables, True)

    @property
    def class_name(self) -> str:
        """The name of the user's class."""
        return class_of(self.module).__name__

    @property
    def registered_name(self) -> str:
        """The name under which `adapters.registry` builds the unpruned module, if it can."""
        return registry.identify(base_module(self.module))[0]


def run_experiment(
    experiment: Experiment,
    teacher: ModuleWithVariables,
    data: Any,
    loss: Any = None,
    metrics: Any = None,
    *,
    workdir: str | Path | None = None,
    resume: bool = False,
) -> Result | BudgetSweep:
    """Runs every stage of an experiment. Arguments, returns and errors as in `kdsearch_jax.search`."""
    dataset = _dataset(data, experiment)
    user_teacher = UserTeacher(teacher.module, teacher.variables, dataset, loss, metrics)
    temporary = Path(tempfile.mkdtemp(prefix="kdsearch-")) if workdir is None else None
    directory = storage.local_copy(workdir or f"{temporary}/run", "workdir", entire_run=True)
    try:
        setup = prepare_run(experiment, directory, resume=resume, user_teacher=user_teacher)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if jax.process_index() == 0 and not setup.classifies_images:
        print(setup.objective.describe(), file=sys.stderr)  # with the progress, because library loggers are silent
    with directories.run_directory(directory, experiment, {"command": "api"}, resume=resume, data=setup.fingerprint):
        results = stages.run(setup, resume=resume)
    assert results is not None
    points = budget_points.points(experiment)
    students = tuple(_result(setup, teacher, directory / point.student, results) for point in points)
    if not experiment.budgets:
        return students[0]
    return BudgetSweep(students, experiment.budgets, results, students[0].report, directory)


def _result(setup: RunSetup, teacher: ModuleWithVariables, path: Path, results: dict[str, Any]) -> Result:
    """The exported student in the teacher's form: bound to its variables for NNX, in the teacher's boxes for Linen."""
    student = LoadedNetwork.of(path, setup.base_module)
    if teacher.from_nnx:
        module, variables = student.module.bind(student.variables), None
    else:
        module, variables = student.module, boxed(student.variables, boxes_of(teacher.variables))
    report = setup.directory / "report" / "index.html"
    return Result(module, variables, student.architecture.to_json(), results, report, setup.directory)


def parse_budget(budget: Any) -> tuple[BudgetConfig, tuple[float, ...]]:
    """(budget, budgets) of an experiment from the argument `budget` of `kdsearch_jax.search`. Raises ValueError."""
    if not isinstance(budget, Mapping):
        if not isinstance(budget, Sequence):
            return BudgetConfig(macs=float(budget)), ()
        budget = {"macs": budget}
    known = [field.name for field in dataclasses.fields(BudgetConfig)]
    for name in budget:
        if name not in known:
            raise ValueError(f"budget: there is no bound {name!r}; {nearest(str(name), known)}")
    several = [name for name, value in budget.items() if isinstance(value, (list, tuple))]
    if not several:
        return BudgetConfig(**budget), ()
    if len(several) > 1:
        raise ValueError(f"budget: {', '.join(several)} have several values each; give several for one bound only")
    name = several[0]
    if not budget[name]:
        raise ValueError("budget: the list is empty; give one, or several as in [0.7, 0.5, 0.3]")
    budgets = tuple(sorted(map(float, budget[name]), reverse=True))
    config = BudgetConfig(**{"macs": None, **budget, name: budgets[0]})
    if (first := budget_points.varied_bound(config)) != name:
        raise ValueError(f"budget: several values of {name} need {first} left out")
    return config, budgets


def describe_callable(function: Any) -> str | None:
    """How `config.json` names a function that was passed in as an object."""
    if function is None:
        return None
    return (
        f"{registry.OBJECT_PREFIX}{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    )


def parse_inputs(inputs: Sequence[str] | Mapping[str, str] | None, data: Any, module: Any) -> tuple[str, ...] | None:
    """The setting `data.inputs` from the argument `inputs` of `kdsearch_jax.search`, or from the names of the entries.

    Raises:
      ValueError: it is not clear which entries feed the network.
    """
    if isinstance(inputs, Mapping):
        return tuple(f"{argument}={entry}" for argument, entry in inputs.items())
    if inputs is not None:
        return (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if not isinstance(data, Mapping):
        return None
    entries = data["train"] if isinstance(data.get("train"), Mapping) else data
    if "images" in entries:
        return None
    if (only := sole_input(map(str, entries))) is not None:
        return (only,)
    signature = signature_of(module)
    parameters = {} if signature is None else signature.parameters
    named = [name for name, p in parameters.items() if name in entries]
    needed = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty and p.kind <= 1]
    if named and all(name in entries for name in needed if name not in ("train", "training", "deterministic")):
        return tuple(f"{name}={name}" if name not in needed else name for name in named)
    others = [str(entry) for entry in entries if entry != "labels"]
    if not others:
        raise ValueError("inputs: the data have labels only; add what the network takes")
    raise ValueError(
        f"inputs: it is not clear which of {', '.join(map(str, entries))} feed the network; name them, as in "
        f"inputs=({others[0]!r},)"
    )


def _dataset(data: Any, experiment: Experiment) -> Dataset:
    """The data set of the argument `data` of `kdsearch_jax.search`."""
    config = experiment.data
    if isinstance(data, str):
        return data_lib.load(config, 0)
    return from_arrays(
        data, "arrays", validation=config.validation, mean=config.mean, std=config.std, train_limit=config.train_limit
    )
