"""What `kdsearch_jax.search` does: makes an experiment of its arguments, goes the road, and gives back the student."""

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
from kdsearch_jax.adapters.devices import without_mesh
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.data import datasets as data_lib
from kdsearch_jax.data.examples import Dataset, only_input, own
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs import budget_points, delivery, directories, stages
from kdsearch_jax.runs.config import Experiment, ModelConfig, changed
from kdsearch_jax.runs.setup import is_plain, prepare
from kdsearch_jax.runs.teacher_source import LoadedNetwork, UserTeacher
from kdsearch_jax.tracing.messages import nearest
from kdsearch_jax.training.settings import RunConfig, StageConfig


@dataclass(frozen=True)
class Result:
    """A student and how it came about.

    Attributes:
      module, variables: the student, trained: a Linen module and its variables. Of an NNX teacher, an NNX module of the
        teacher's class at smaller sizes, and None.
      architecture: the student as plain JSON: sizes of layers, dropped layers, how it is called.
      results: the table teacher / student / baselines of `results.json`.
      report: the page that shows it all; directory: of the run, where everything is stored; of one in an object
        store its copy here, which goes when the process ends.
    """

    module: Any
    variables: Any
    architecture: dict[str, Any]
    results: dict[str, Any]
    report: Path
    directory: Path

    def __str__(self) -> str:
        """The table."""
        return delivery.table(self.results)


@dataclass(frozen=True)
class Front:
    """Students of several budgets, from one search.

    Attributes:
      students: the largest first; budgets: theirs. results, report, directory: of the run, as in `Result`.
    """

    students: tuple[Result, ...]
    budgets: tuple[float, ...]
    results: dict[str, Any]
    report: Path
    directory: Path

    def __len__(self) -> int:
        """How many students there are."""
        return len(self.students)

    def __getitem__(self, number: int) -> Result:
        """One of the students."""
        return self.students[number]

    def __str__(self) -> str:
        """The table."""
        return delivery.table(self.results)


@storage.named()
@without_mesh()
def run(
    module: Any,
    variables: Any,
    data: Any,
    *,
    budget: float | Sequence[float] | Mapping[str, Any],
    loss: Any,
    metrics: Any,
    inputs: Sequence[str] | Mapping[str, str] | None,
    train_kwargs: Mapping[str, Any] | None,
    eval_kwargs: Mapping[str, Any] | None,
    search_steps: int,
    retrain_steps: int,
    batch_size: int,
    learning_rate: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    baselines: Sequence[str],
    seed: int,
    workdir: str | Path | None,
    resume: bool,
    settings: Mapping[str, Any] | None,
) -> Result | Front:
    """See `kdsearch_jax.search`."""
    bounds, budgets = _bounds(budget)
    if bound := isinstance(module, nnx.Module):
        module, own_variables = FunctionalModule.split(module)
        variables = own_variables if variables is None else variables
    boxes = boxes_of(variables)
    data_config = DataConfig(
        data if isinstance(data, str) else "arrays",
        mean=None if mean is None else tuple(map(float, mean)),
        std=None if std is None else tuple(map(float, std)),
        inputs=_inputs(inputs, data, module),
    )
    # Clipped, as the scale of a stranger's loss is not known.
    stage = StageConfig(batch_size=batch_size, learning_rate=learning_rate, clip=1.0)
    experiment = Experiment(
        name=class_of(module).__name__,
        model=ModelConfig(
            registry.identify(base_module(module))[0], {}, dict(train_kwargs or {}), dict(eval_kwargs or {})
        ),
        data=data_config,
        search=dataclasses.replace(stage, steps=search_steps, schedule="constant"),
        retrain=dataclasses.replace(stage, steps=retrain_steps),
        distill=DistillConfig(loss=_told(loss), metrics=_told(metrics)),
        budget=bounds,
        budgets=budgets,
        baselines=tuple(baselines),  # type: ignore  # checked below
        run=RunConfig(seed=seed),
    )
    experiment = changed(experiment, settings or {})
    dataset = _dataset(data, experiment)
    scratch = Path(tempfile.mkdtemp(prefix="kdsearch-")) if workdir is None else None
    directory = storage.local(workdir or f"{scratch}/run", "workdir", whole=True)
    try:
        setup = prepare(
            experiment, directory, resume=resume, own=UserTeacher(module, variables, dataset, loss, metrics)
        )
    except BaseException:
        if scratch is not None:  # nobody knows of it
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    if jax.process_index() == 0 and not is_plain(setup.task, setup.dataset):
        print(setup.task.describe(), file=sys.stderr)  # where progress goes: loggers of a library say nothing
    with directories.run_directory(directory, experiment, {"command": "api"}, resume=resume, data=setup.fingerprint):
        results = stages.run(setup, resume=resume)
    assert results is not None
    report = directory / "report" / "index.html"

    def result(name: str) -> Result:
        student = LoadedNetwork.of(directory / name, setup.base)
        own = student.module.bind(student.variables) if bound else student.module
        made = (own, None if bound else boxed(student.variables, boxes))
        return Result(*made, student.architecture.to_json(), results, report, directory)

    students = [result(point.student) for point in budget_points.points(experiment)]
    return Front(tuple(students), budgets, results, report, directory) if budgets else students[0]


def _bounds(budget: Any) -> tuple[BudgetConfig, tuple[float, ...]]:
    """(budget, budgets) of an experiment, of what a user gave for both."""
    if isinstance(budget, Mapping):
        known = [field.name for field in dataclasses.fields(BudgetConfig)]
        for name in budget:
            if name not in known:
                raise ValueError(f"budget: {name!r} is no bound; {nearest(str(name), known)}")
        several = {name: value for name, value in budget.items() if isinstance(value, (list, tuple))}
        if not several:
            return BudgetConfig(**budget), ()
        if len(several) > 1:
            raise ValueError(
                f"budget: {', '.join(several)} have several values each; one bound may, others hold for all"
            )
        (name, values), rest = *several.items(), {k: v for k, v in budget.items() if k not in several}
        budgets = _falling(values)
        config = BudgetConfig(**{"macs": None, **rest, name: budgets[0]})
        if budget_points.driver(config) != name:
            raise ValueError(f"budget: several values of {name} need {budget_points.driver(config)} left out")
        return config, budgets
    if isinstance(budget, Sequence):
        budgets = _falling(budget)
        return BudgetConfig(macs=budgets[0]), budgets
    return BudgetConfig(macs=float(budget)), ()


def _falling(budgets: Any) -> tuple[float, ...]:
    if not len(budgets):
        raise ValueError("budget: none is given; give one, or several as in [0.7, 0.5, 0.3]")
    return tuple(sorted(map(float, budgets), reverse=True))


def _told(function: Any) -> str | None:
    """What `config.json` says of a function that was given as an object."""
    if function is None:
        return None
    return (
        f"{registry.OBJECT_PREFIX}{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    )


def _dataset(data: Any, experiment: Experiment) -> Dataset:
    config = experiment.data
    if isinstance(data, str):
        return data_lib.load(config, 0)
    return own(
        data, "arrays", validation=config.validation, mean=config.mean, std=config.std, train_limit=config.train_limit
    )


def _inputs(inputs: Sequence[str] | Mapping[str, str] | None, data: Any, module: Any) -> tuple[str, ...] | None:
    """`data.inputs` of what a user said, or of the entries' names."""
    if isinstance(inputs, Mapping):
        return tuple(f"{argument}={entry}" for argument, entry in inputs.items())
    if isinstance(inputs, str):
        return (inputs,)
    if inputs is not None:
        return tuple(inputs)
    if not isinstance(data, Mapping):
        return None
    entries = data["train"] if isinstance(data.get("train"), Mapping) else data
    if "images" in entries:
        return None
    if (only := only_input(map(str, entries))) is not None:
        return (only,)
    signature = signature_of(module)
    parameters = {} if signature is None else signature.parameters
    named = [name for name, p in parameters.items() if name in entries]
    needed = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty and p.kind <= 1]
    if named and all(name in entries for name in needed if name not in ("train", "training", "deterministic")):
        return tuple(f"{name}={name}" if name not in needed else name for name in named)
    raise ValueError(
        f"inputs: which of {', '.join(map(str, entries))} feed the network is not clear; name them, as in "
        f"inputs=({others[0]!r},)"
        if (others := [str(entry) for entry in entries if entry != "labels"])
        else "inputs: the data have labels only; add what the network is fed"
    )
