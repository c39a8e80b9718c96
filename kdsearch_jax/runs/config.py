"""The settings of a run, composed of the typed, frozen records of each package.

An experiment file (`configs/NAME.py`) defines `experiment(quick: bool = False) -> Experiment`. Every setting that a
command line can override is a field of `Experiment`. `check` validates values; its errors name the setting, the value
and the way out. What depends on the data (number of classes, image shape) is read from the data and is not a setting.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdsearch_jax import storage
from kdsearch_jax.data import settings as data_settings
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill import settings as distill_settings
from kdsearch_jax.distill.settings import DistillConfig, loss_weights
from kdsearch_jax.pruning import settings as pruning_settings
from kdsearch_jax.pruning.settings import BOUNDS, BudgetConfig, GatesConfig
from kdsearch_jax.storage.files import MAX_SETTINGS, read_json
from kdsearch_jax.tracing.messages import nearest, require
from kdsearch_jax.training import settings as training_settings
from kdsearch_jax.training.settings import RunConfig, StageConfig

__all__ = [
    "BudgetConfig",
    "DataConfig",
    "DistillConfig",
    "Experiment",
    "GatesConfig",
    "ModelConfig",
    "RunConfig",
    "StageConfig",
    "shorten",
]


@dataclass(frozen=True)
class ModelConfig:
    """The teacher's network.

    name: a model of `kdsearch_jax.models` (`cifar_resnet`, `vgg`, …) or `package.module:factory`.
    arguments: its keyword arguments as plain JSON; `num_classes` is added from the data if the network takes it.
    train_kwargs, eval_kwargs: keywords of the network's call in training and in inference, such as
    `deterministic=false`; `train`, `training`, `is_training` and `deterministic` are set automatically.
    """

    name: str = "cifar_resnet"
    arguments: dict[str, Any] = field(default_factory=lambda: {"depth": 20})
    train_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """All settings of a run, written to `config.json` in its directory."""

    name: str = "digits"
    """The experiment's name; its runs are in runs/NAME."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    teacher_from: str | None = None
    """The teacher's weights: a directory of this package, of Orbax or in Hugging Face's format, or a file
    `.safetensors`, `.msgpack` (Flax), `.pth` or `.th`; None trains a teacher."""
    teacher: StageConfig = StageConfig()
    search: StageConfig = StageConfig()
    gates: GatesConfig = GatesConfig()
    retrain: StageConfig = StageConfig()
    distill: DistillConfig = DistillConfig()
    budget: BudgetConfig = BudgetConfig()
    budgets: tuple[float, ...] = ()
    """Several budgets, with a student each from one search: values of budget.macs, or of the first bound that is set if
    that is None; the other bounds apply to every student."""
    baselines: tuple[Literal["uniform", "magnitude"], ...] = ("uniform",)
    """Hand-made students of equal cost, trained for as many steps as search and retraining together."""
    run: RunConfig = RunConfig()


def to_json(config: Any) -> dict[str, Any]:
    """The record as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> Experiment:
    """Inverts `to_json` and checks the result; missing settings take their defaults.

    Raises:
      ValueError: a setting does not exist (names the nearest one), has a wrong type, or is out of range.
    """
    return check(_read(values, Experiment, ""))


def check(experiment: Experiment) -> Experiment:
    """Validates an experiment and returns it. Raises ValueError that names the setting, its value and the way out."""
    _read({f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment)}, Experiment, "")
    values = {k: v for k, v in flatten(experiment).items() if not k.startswith(_OPEN)}
    for pattern, (holds, requirement) in RULES.items():
        for key, value in values.items():
            if value is not None and (key == pattern or (pattern[0] == "*" and key.endswith(pattern[1:]))):
                require(holds(value), key, value, requirement)
    _check_together(experiment)
    return experiment


def flatten(experiment: Experiment) -> dict[str, Any]:
    """{dotted key: value} of every setting; each argument of the model has its own key."""

    def walk(value: Any, key: str) -> Iterable[tuple[str, Any]]:
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if not isinstance(value, dict):
            yield key, value
            return
        for name, item in value.items():
            yield from walk(item, f"{key}.{name}" if key else name)

    return dict(walk(experiment, ""))


def shorten(experiment: Experiment, **arguments: Any) -> Experiment:
    """The quick variant of an experiment: a few updates of small batches; `arguments` replace the model's."""

    def shorten_stage(stage: StageConfig) -> StageConfig:
        return dataclasses.replace(stage, steps=8, batch_size=16, warmup=min(stage.warmup, 2))

    return dataclasses.replace(
        experiment,
        name=f"{experiment.name}-quick",
        model=dataclasses.replace(experiment.model, arguments={**experiment.model.arguments, **arguments}),
        data=dataclasses.replace(experiment.data, train_limit=256),
        teacher=shorten_stage(experiment.teacher),
        search=shorten_stage(experiment.search),
        retrain=shorten_stage(experiment.retrain),
        run=dataclasses.replace(
            experiment.run, steps_per_dispatch=2, checkpoint_every=4, evaluate_every=4, eval_batch_size=64
        ),
    )


def differences(a: Experiment, b: Experiment) -> list[str]:
    """One line per setting that differs between two experiments, such as `search.steps: 100, not 200`."""
    left, right = flatten(a), flatten(b)
    keys = [*left, *(key for key in right if key not in left)]
    absent = "absent"
    return [
        f"{key}: {left.get(key, absent)!r}, not {right.get(key, absent)!r}"
        for key in keys
        if left.get(key, absent) != right.get(key, absent)
    ]


def changed(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """The experiment with some settings replaced by dotted name, such as {"search.optimizer": "adamw"}; checked.

    Raises:
      ValueError: as `from_json`.
    """
    values: dict[str, Any] = to_json(experiment)
    for key, value in settings.items():
        *records, last = key.split(".")
        node = values
        for name in records:
            node = node[name] if isinstance(node.get(name), dict) else {}
        if last not in node:
            raise ValueError(f"{key} is not a setting; {nearest(key, SETTINGS)}")
        node[last] = value
    return from_json(values)


# --- experiments by name --------------------------------------------------------------------------------------------


def config_directories() -> list[Path]:
    """The directories of named experiments by precedence: here, in this checkout, in the installed package."""
    package = Path(__file__).resolve().parents[1]
    return [path for path in (Path("configs"), package.parent / "configs", package / "_configs") if path.is_dir()]


def config_names() -> list[str]:
    """The names that `load_experiment` knows."""
    return sorted({path.stem for folder in config_directories() for path in folder.glob("[!_]*.py")})


def load_experiment(name_or_path: str, quick: bool = False) -> Experiment:
    """Loads and checks the experiment of `configs/NAME.py`, of another Python file, or of a run's `config.json`.

    Args:
      quick: load the variant with a few steps, which shows that everything works.

    Raises:
      ValueError: the name is unknown (names the nearest one), the file has no `experiment(quick)`, or `quick` is asked
        of a `config.json`.
      FileNotFoundError: the file does not exist.
    """
    path = _find(name_or_path)
    if path.suffix == ".json":
        if quick:
            raise ValueError(f"--quick is a variant of an experiment file; {path} holds one experiment: leave it out")
        values = read_json(path, MAX_SETTINGS)  # whose errors name the file
        try:
            return from_json(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    spec = importlib.util.spec_from_file_location(f"kdsearch_experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and Flax resolve annotations of its classes here
    spec.loader.exec_module(module)
    function: Callable[..., Any] | None = getattr(module, "experiment", None)
    if not callable(function):
        raise ValueError(f"{path}: defines no function experiment(quick: bool = False) -> Experiment")
    experiment = function(quick=quick)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path}: experiment() returned a {type(experiment).__name__}, not an Experiment")
    try:
        return check(experiment)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _find(name_or_path: str) -> Path:
    path = storage.local_copy(name_or_path, "--config")
    if path.suffix in (".py", ".json") or len(path.parts) > 1:
        if not path.is_file():
            raise FileNotFoundError(f"--config {name_or_path}: no such file")
        if path.suffix not in (".py", ".json"):
            raise ValueError(f"--config {name_or_path}: neither an experiment (.py) nor a run's config.json")
        return path
    for folder in config_directories():
        if (folder / f"{name_or_path}.py").is_file():
            return folder / f"{name_or_path}.py"
    raise ValueError(f"--config {name_or_path!r} is unknown; {nearest(name_or_path, config_names())}")


# --- types ----------------------------------------------------------------------------------------------------------


def _read(value: Any, hint: Any, key: str) -> Any:
    """Converts `value`, from JSON or Python, to the annotated type `hint`. Raises ValueError that names the setting."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _read_record(value, hint, key)
    if origin in (types.UnionType, typing.Union):
        first, *others = [a for a in arguments if a is not type(None)]
        words = typing.get_args(others[0]) if others else ()  # a number or one of a few words
        if words and isinstance(value, str):
            if value not in words:
                raise ValueError(f"{key}: {value!r} is neither {WORDS[first]} nor {' or '.join(words)}")
            return value
        return None if value is None and type(None) in arguments else _read(value, first, key)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key}: {value!r} is not one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: {value!r} is not a list of values")
        return tuple(_read(item, arguments[0], key) for item in value)
    if origin is dict:
        return _read_arguments(value, key)
    if hint is float and type(value) is int:
        return float(value) if abs(value) < 2**53 else value
    if type(value) is not hint:
        raise ValueError(f"{key}: {value!r:.80} is not {WORDS[hint]}")
    if hint is int and abs(value) >= 2**63:
        raise ValueError(f"{key}: {str(value)[:20]}… is out of bounds; give a number of at most 18 digits")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{key}: {value!r} is not a finite number")
    return value


def _read_record(value: Any, record: Any, key: str) -> Any:
    if isinstance(value, record):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, dict):
        raise ValueError(f"{key or 'an experiment'}: {value!r} is not a record of settings")
    hints = typing.get_type_hints(record)
    for name in value:
        if name not in hints:
            dotted = f"{key}.{name}" if key else name
            raise ValueError(f"{dotted} is not a setting; {nearest(dotted, SETTINGS)}")
    return record(**{name: _read(item, hints[name], f"{key}.{name}" if key else name) for name, item in value.items()})


def _read_arguments(value: Any, key: str) -> dict[str, Any]:
    try:
        plain = isinstance(value, dict) and json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise ValueError(f"{key}: {value!r} is not plain JSON (text, numbers, true, false, null, lists, dictionaries)")
    return value


WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_DICTIONARIES = ("model.arguments", "model.train_kwargs", "model.eval_kwargs")
_OPEN = tuple(f"{name}." for name in _DICTIONARIES)
SETTINGS = tuple(key for key in flatten(Experiment()) if not key.startswith(_OPEN)) + _DICTIONARIES


# --- ranges ---------------------------------------------------------------------------------------------------------


# {setting or *.suffix: (valid, what to give instead)}; None is always valid.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **data_settings.RULES,
    **distill_settings.RULES,
    **pruning_settings.RULES,
    **training_settings.RULES,
    "name": (
        lambda v: 0 < len(v) <= 200 and v.isprintable() and not set(v) & set("/\\") and v not in (".", ".."),
        "it names a directory",
    ),
    "model.name": (bool, "give a model's name or package.module:factory"),
    "budgets": (
        lambda v: all(b > 0 for b in v) and len(set(v)) == len(v) and len({b <= 1 for b in v}) <= 1,
        "give each once, all in (0, 1] as shares of the teacher's, or all above 1 as absolute bounds",
    ),
    "baselines": (lambda v: len(set(v)) == len(v), "name each once"),
}


def _check_together(experiment: Experiment) -> None:
    """Raises ValueError if two settings contradict each other."""
    distill = experiment.distill
    loss_weights(distill.losses)
    if distill.retrain_losses:
        loss_weights(distill.retrain_losses, "distill.retrain_losses")
    if distill.loss is not None and (distill.losses, distill.retrain_losses) != (DistillConfig.losses, ()):
        raise ValueError(
            f"distill.loss and distill.losses: {distill.loss} replaces all losses of this package; give one of them"
        )
    if not any(getattr(experiment.budget, name) is not None for name in BOUNDS):
        settings = ", ".join(f"budget.{name}" for name in BOUNDS)
        raise ValueError(f"{settings} are all None; bound at least one, as in --budget.macs 0.5")
    if experiment.budget.target is not None:
        from kdsearch_jax.runs.targets.chips import parse_target  # imports jax, which --help does not need

        parse_target(experiment.budget.target, "budget.target")
    mean, std = experiment.data.mean, experiment.data.std
    if (mean is None) != (std is None):
        raise ValueError(f"data.mean is {mean} and data.std is {std}; give both, or neither to measure them")
    if mean is not None and std is not None:
        require(len(mean) == len(std) > 0, "data.mean", mean, f"give as many values as data.std {std}, one a channel")
        require(all(s > 0 for s in std), "data.std", std, "give numbers above 0")
    for name in ("teacher", "search", "retrain"):
        stage: StageConfig = getattr(experiment, name)
        require(stage.steps == 0 or stage.warmup < stage.steps, f"{name}.warmup", stage.warmup,
                 f"give fewer updates than {name}.steps, {stage.steps}")  # fmt: skip
