"""Typed, frozen settings of every stage; an experiment is one `Experiment` record.

An experiment file (`configs/NAME.py`) holds `experiment(quick: bool = False) -> Experiment`. Whatever a command line
may override is a field here and nowhere else. Values are checked where they are given (`check`), with the argument's
name, the value and the way out. What depends on the data set (classes, image shape) is never a setting: it is read from
the data.
"""

from __future__ import annotations

import dataclasses
import difflib
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
from kdsearch_jax.files import MAX_SETTINGS, read_json


@dataclass(frozen=True)
class ModelConfig:
    """The teacher's network.

    name: a model of `kdsearch_jax.models` (`cifar_resnet`, `vgg`, …) or `package.module:factory`.
    arguments: its keyword arguments, all plain JSON; `num_classes` is added from the data where the network takes it.
    train_kwargs, eval_kwargs: keywords of the network's call in training and in inference, `deterministic=false` say;
    `train`, `training`, `is_training` and `deterministic` are set by themselves where the call has them.
    """

    name: str = "cifar_resnet"
    arguments: dict[str, Any] = field(default_factory=lambda: {"depth": 20})
    train_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Examples: images and labels, or arrays of any kind.

    inputs: where the network is not fed images alone: entries of `npz:FILE`, in the order of the call's arguments, or
    `keyword=entry`; other entries are for the loss.
    name: `digits` (bundled), `npz:FILE` (arrays `images`, `labels`, or `train_images`, …), or a TFDS name (`cifar10`).
    data_dir: where TFDS keeps its data; None is TFDS's own default.
    validation: share of the training split held out where the data set has no validation split.
    image_size: side in pixels to which images are resized; None keeps them.
    framing: how: all of an image stretched to the square, or in training a random box of it (at least the share
    `least_area`, aspect ratio 3/4 to 4/3), another one at every epoch, and in evaluation its middle.
    stream: examples are read from disk when they are needed (TFDS data sets only); None: where the training split would
    take more than 4 GiB, or is cropped. workers: processes that decode, 0 for threads of this one; prefetch: batches
    decoded ahead, by each of them.
    mean, std: per-channel normalisation of images in [0, 1]; None measures both on the training split.
    crop: random crops after zero padding by so many pixels; flip: random horizontal mirroring.
    train_limit: use only so many training images.
    """

    name: str = "digits"
    data_dir: str | None = None
    validation: float = 0.1
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: int = 0
    flip: bool = False
    train_limit: int | None = None
    inputs: tuple[str, ...] | None = None
    framing: Literal["stretch", "crop"] = "stretch"
    least_area: float = 0.08
    stream: bool | None = None
    workers: int = 0
    prefetch: int = 2


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: how long, with what optimiser.

    steps: optimiser updates; batch_size: images an update, over all devices.
    optimizer: `sgd` (momentum, Nesterov) or `adamw`; weight_decay is λ1 of the objective, on kernels only for adamw.
    schedule: `cosine` to 0, `step` (times `decay` at each of `boundaries`, shares of steps) or `constant`.
    warmup: updates of linear warm-up; clip: largest global gradient norm; ema: decay of averaged weights.
    """

    steps: int = 400
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    boundaries: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    warmup: int = 0
    clip: float | None = None
    ema: float | None = None


@dataclass(frozen=True)
class DistillConfig:
    """loss = (1 − cross_entropy)·Σ weight·loss + cross_entropy·CE, over `losses`; see `kdsearch_jax.losses`.

    losses: `name` or `name:weight` each. Of predictions, times T²: kl (in `direction`), dkd (decoupled KL, by
    `dkd_beta`), dist. Of features: at (usual weight 1000), hint (100), rkd_distance (25), rkd_angle (50), crd (0.8).
    retrain_losses: those of retraining, if others than the search's.
    features: layers whose outputs are compared, as paths or patterns (fnmatch); by default the last of each resolution.
    teachers: more teachers, each as in `teacher_from`; the mean is learned from, of softened probabilities or of
    logits (`ensemble`). cache: teachers' outputs are computed once, where data are not augmented and no features asked.

    loss: `package.module:function` of (student's outputs, teacher's outputs, batch) in its place; metrics: one of
    (outputs, batch), for the table. logits: outputs that are compared by KL, as paths or patterns (fnmatch); those of
    classes with labels are found by themselves, others are compared by squared error. See `kdsearch_jax.task`.
    """

    temperature: float = 4.0
    direction: Literal["forward", "reverse"] = "forward"
    cross_entropy: float = 0.0
    losses: tuple[str, ...] = ("kl",)
    retrain_losses: tuple[str, ...] = ()
    dkd_beta: float = 8.0
    features: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    ensemble: Literal["probabilities", "logits"] = "probabilities"
    cache: bool = True
    loss: str | None = None
    metrics: str | None = None
    logits: tuple[str, ...] = ()


@dataclass(frozen=True)
class BudgetConfig:
    """What the student may cost: at most 1 is a fraction of the teacher's, above 1 an absolute number; None: no bound.

    macs: multiply-accumulates of one example; params: trainable parameters. latency: milliseconds of a call with
    `batch_size` examples; memory: bytes that such a call takes; both as measured on the device that runs, in inference
    mode and float32 (`kdsearch_jax.evaluate`). round_to: widths are multiples of it; `hardware`: of what this device
    does not pad (`kdsearch_jax.hardware`).
    """

    macs: float | None = 0.5
    params: float | None = None
    round_to: int | Literal["hardware"] = 1
    latency: float | None = None
    memory: float | None = None
    batch_size: int = 64


@dataclass(frozen=True)
class GatesConfig:
    """Which structures may go, and how the proximal search treats their gates.

    kinds: of `channels`, `neurons`, `heads`, `values`, `groups`, `branches`; include, exclude: patterns (fnmatch) of
    group names. penalty: α_j, see `kdsearch_jax.penalty`. ramp: share of the steps over which the cost falls to the
    budget; warmup: share of the ramp in which nothing goes and importance is measured. lambda2: a fixed λ2, instead of
    the closed loop that follows the budget. init: gates start at 1 (`one`), or at the norm of the kernel slices that
    they scale, 1 on average (`norm`), which are divided by it; either way the gated network starts as the teacher.
    batch_norm: in the search it normalises by the batch and learns (`train`), or by the teacher's statistics (`frozen`;
    then all of the network runs in inference mode, without dropout). shrink: whenever the living cost less than this
    share of the MACs that are computed, the search goes on without the dead (`kdsearch_jax.shrinking`); None: never.
    """

    kinds: tuple[str, ...] = ("channels", "neurons", "heads", "values", "groups", "branches")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    penalty: Literal["importance", "macs", "params", "one"] = "importance"
    learning_rate: float = 0.01
    momentum: float = 0.9
    importance_decay: float = 0.97
    sharpness: float = 8.0
    ramp: float = 0.5
    warmup: float = 0.05
    lambda2: float | None = None
    init: Literal["one", "norm"] = "one"
    batch_norm: Literal["train", "frozen"] = "train"
    shrink: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """How a run behaves, whatever it computes.

    precision: of the forward and backward pass (`fp32`, `bf16`); parameters stay fp32. steps_per_dispatch: updates
    compiled into one call. checkpoint_every, evaluate_every: in updates; keep: newest checkpoints kept beside the best.
    checkpoint_share: of the time that checkpoints may take; one that falls due so soon that they would take more is
    left out, though not beyond 10 minutes after the one before; None: none is left out, as where `spike` is given.
    spike: where the loss of a call is so many times its running median, or not finite, training goes back to the last
    checkpoint and on by other batches, at most `rollbacks` times a stage; None: never.
    """

    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    steps_per_dispatch: int = 10
    checkpoint_every: int = 200
    checkpoint_share: float | None = 0.01
    evaluate_every: int = 200
    keep: int = 2
    eval_batch_size: int = 500
    spike: float | None = None
    rollbacks: int = 3


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run; written to `config.json` of its directory."""

    name: str = "digits"
    """What the experiment is called; its runs are in runs/NAME."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    teacher_from: str | None = None
    """The teacher's weights: a directory written by this package, by Orbax or in Hugging Face's format, a file
    `.safetensors`, `.msgpack` (Flax), `.pth` or `.th`; None trains a teacher."""
    teacher: StageConfig = StageConfig()
    search: StageConfig = StageConfig()
    gates: GatesConfig = GatesConfig()
    retrain: StageConfig = StageConfig()
    distill: DistillConfig = DistillConfig()
    budget: BudgetConfig = BudgetConfig()
    budgets: tuple[float, ...] = ()
    """A student for each, from one search: values of budget.macs, or of the first bound that is given where that is
    None; other bounds hold for every student."""
    baselines: tuple[Literal["uniform", "magnitude"], ...] = ("uniform",)
    """Hand-made students of equal cost, trained for as many steps as search and retraining together."""
    run: RunConfig = RunConfig()


def to_json(config: Any) -> dict[str, Any]:
    """The record as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> Experiment:
    """The `Experiment` of what `to_json` gave, checked; settings that are left out take their defaults.

    Raises ValueError for a setting that does not exist (with the nearest that does), of a wrong type, or out of range.
    """
    return check(_read(values, Experiment, ""))


def check(experiment: Experiment) -> Experiment:
    """The same record, every field of it looked at; ValueError names the setting, its value and the way out."""
    _read({f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment)}, Experiment, "")
    values = {k: v for k, v in flatten(experiment).items() if not k.startswith(_OPEN)}
    for pattern, (holds, requirement) in RULES.items():
        for key, value in values.items():
            if value is not None and (key == pattern or (pattern[0] == "*" and key.endswith(pattern[1:]))):
                _require(holds(value), key, value, requirement)
    _check_together(experiment)
    return experiment


def flatten(experiment: Experiment) -> dict[str, Any]:
    """{dotted key: value} of every setting; each of the model's arguments has a key of its own."""

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
    """The quick variant of an experiment: a few updates of small batches, and `arguments` for the model's."""

    def stage(given: StageConfig) -> StageConfig:
        return dataclasses.replace(given, steps=8, batch_size=16, warmup=min(given.warmup, 2))

    return dataclasses.replace(
        experiment,
        name=f"{experiment.name}-quick",
        model=dataclasses.replace(experiment.model, arguments={**experiment.model.arguments, **arguments}),
        data=dataclasses.replace(experiment.data, train_limit=256),
        teacher=stage(experiment.teacher),
        search=stage(experiment.search),
        retrain=stage(experiment.retrain),
        run=dataclasses.replace(
            experiment.run, steps_per_dispatch=2, checkpoint_every=4, evaluate_every=4, eval_batch_size=64
        ),
    )


def differences(a: Experiment, b: Experiment) -> list[str]:
    """One line for each setting in which two experiments differ: `search.steps: 100, not 200`; empty if they agree."""
    left, right = flatten(a), flatten(b)
    keys = [*left, *(key for key in right if key not in left)]
    absent = "absent"
    return [
        f"{key}: {left.get(key, absent)!r}, not {right.get(key, absent)!r}"
        for key in keys
        if left.get(key, absent) != right.get(key, absent)
    ]


def changed(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """The experiment with other values of some settings, by dotted name: {"search.optimizer": "adamw"}; checked.

    Raises ValueError as `from_json`.
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


LOSSES = ("kl", "dkd", "dist", "at", "hint", "rkd_distance", "rkd_angle", "crd")


def loss_weights(losses: Iterable[str], setting: str = "distill.losses") -> dict[str, float]:
    """{name: weight} of `name` and `name:weight`; a name alone has weight 1.

    Raises ValueError for none, a loss that does not exist (with the nearest that does), one given twice, or a weight
    that is no number above 0.
    """
    weights: dict[str, float] = {}
    for item in losses:
        name, colon, text = item.partition(":")
        if name not in LOSSES:
            raise ValueError(f"{setting}: {name!r} is no loss; {nearest(name, LOSSES)}")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = math.nan
        _require(0 < weight < math.inf, setting, item, f"give a weight above 0, as in {name}:0.5")
        _require(name not in weights, setting, item, f"{name} is there twice; name each loss once")
        weights[name] = weight
    _require(bool(weights), setting, tuple(losses), "name at least one loss, as in kl")
    return weights


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: what may have been meant, or else everything that exists."""
    known = list(known)
    # A dotted key is also compared by its last part: `--mcas` means `budget.macs`, whatever the number of letters says.
    last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [last[k] for k in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)]
    if near:
        return f"did you mean {near[0]!r}?" + (f" There are: {', '.join(known)}" if len(known) <= 12 else "")
    return f"there are: {', '.join(known)}"


# --- experiments by name --------------------------------------------------------------------------------------------


def config_directories() -> list[Path]:
    """Where named experiments lie, first come first: here, in this checkout, in the installed package."""
    package = Path(__file__).resolve().parent
    return [path for path in (Path("configs"), package.parent / "configs", package / "_configs") if path.is_dir()]


def config_names() -> list[str]:
    """The experiments that `load_experiment` knows by name."""
    return sorted({path.stem for folder in config_directories() for path in folder.glob("[!_]*.py")})


def load_experiment(name_or_path: str, quick: bool = False) -> Experiment:
    """The checked experiment of `configs/NAME.py`, of any such Python file, or of the `config.json` of a run.

    quick: the variant of a few steps, to see that everything works. Raises ValueError for a name that does not exist
    (with the nearest that does), a file without `experiment(quick)`, and `quick` asked of a `config.json`;
    FileNotFoundError for a missing file.
    """
    path = _find(name_or_path)
    if path.suffix == ".json":
        if quick:
            raise ValueError(f"--quick is a variant of an experiment file; {path} holds one experiment: leave it out")
        try:
            return from_json(read_json(path, MAX_SETTINGS))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    spec = importlib.util.spec_from_file_location(f"kdsearch_experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and Flax look up the annotations of classes that it defines
    spec.loader.exec_module(module)
    function: Callable[..., Any] | None = getattr(module, "experiment", None)
    if not callable(function):
        raise ValueError(f"{path}: no function experiment(quick: bool = False) -> Experiment in it")
    made = function(quick=quick)
    if not isinstance(made, Experiment):
        raise ValueError(f"{path}: experiment() gave a {type(made).__name__}, not an Experiment")
    try:
        return check(made)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _find(name_or_path: str) -> Path:
    path = storage.local(name_or_path, "--config")
    if path.suffix in (".py", ".json") or len(path.parts) > 1:
        if not path.is_file():
            raise FileNotFoundError(f"--config {name_or_path}: no such file")
        if path.suffix not in (".py", ".json"):
            raise ValueError(f"--config {name_or_path}: neither an experiment (.py) nor a run's config.json")
        return path
    for folder in config_directories():
        if (folder / f"{name_or_path}.py").is_file():
            return folder / f"{name_or_path}.py"
    raise ValueError(f"--config {name_or_path!r} is not known; {nearest(name_or_path, config_names())}")


# --- types ----------------------------------------------------------------------------------------------------------


def _read(value: Any, hint: Any, key: str) -> Any:
    """`value`, from JSON or Python, as what the annotation `hint` says; ValueError names the setting."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _read_record(value, hint, key)
    if origin in (types.UnionType, typing.Union):
        first, *others = [a for a in arguments if a is not type(None)]
        words = typing.get_args(others[0]) if others else ()  # a number, or one of some words
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


def _require(condition: bool, key: str, value: Any, requirement: str) -> None:
    if not condition:
        raise ValueError(f"{key}: {value!r} is not possible; {requirement}")


def _amount(value: float) -> bool:
    return 0 < value <= 1 or (value > 1 and float(value).is_integer())


_AMOUNT = "give a fraction of the teacher's in (0, 1], or a whole number above 1 for an absolute bound"
_KINDS = GatesConfig().kinds
BOUNDS = ("macs", "params", "latency", "memory")

# {setting or *.ending: (what holds, what to give instead)}; None is left alone.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (
        lambda v: 0 < len(v) <= 200 and v.isprintable() and not set(v) & set("/\\") and v not in (".", ".."),
        "it names a directory",
    ),
    "model.name": (bool, "give a model's name or package.module:factory"),
    "data.name": (bool, "give digits, npz:FILE or the name of a TFDS data set"),
    "data.validation": (lambda v: 0 < v < 1, "give a share of the training split between 0 and 1"),
    "data.image_size": (lambda v: v >= 1, "give at least 1 pixel"),
    "data.crop": (lambda v: v >= 0, "give 0 or more pixels"),
    "data.least_area": (lambda v: 0 < v <= 1, "give a share of the image above 0, up to 1"),
    "data.workers": (lambda v: v >= 0, "give 0 or more processes"),
    "data.prefetch": (lambda v: v >= 1, "give at least 1 batch"),
    "data.inputs": (bool, "name at least one entry, or None for images"),
    "data.train_limit": (lambda v: v >= 1, "give at least 1 image, or None for all"),
    "gates.warmup": (lambda v: 0 <= v < 1, "give a share of the ramp from 0 to below 1"),
    "*.steps": (lambda v: v >= 0, "give 0 or more updates"),
    "*.batch_size": (lambda v: v >= 1, "give at least 1 image"),
    "*.eval_batch_size": (lambda v: v >= 1, "give at least 1 image"),
    "*.learning_rate": (lambda v: v > 0, "give a number above 0"),
    "*.momentum": (lambda v: 0 <= v < 1, "give a number from 0 to below 1"),
    "*.weight_decay": (lambda v: v >= 0, "give a number from 0"),
    "*.boundaries": (
        lambda v: all(0 < b < 1 for b in v) and list(v) == sorted(set(v)),
        "give rising shares of the steps, between 0 and 1",
    ),
    "*.decay": (lambda v: 0 < v <= 1, "give a factor above 0, up to 1"),
    "*.warmup": (lambda v: v >= 0, "give 0 or more updates"),
    "*.clip": (lambda v: v > 0, "give a norm above 0, or None for no clipping"),
    "*.ema": (lambda v: 0 < v < 1, "give a decay between 0 and 1, or None for no average"),
    "gates.kinds": (
        lambda v: bool(v) and set(v) <= set(_KINDS) and len(set(v)) == len(v),
        f"give some of {', '.join(_KINDS)}, each once",
    ),
    "gates.include": (bool, "give at least one pattern; '*' is every group"),
    "gates.importance_decay": (lambda v: 0 <= v < 1, "give a number from 0 to below 1"),
    "gates.sharpness": (lambda v: v > 0, "give a number above 0"),
    "gates.ramp": (lambda v: 0 < v <= 1, "give a share of the steps above 0, up to 1"),
    "gates.lambda2": (lambda v: v >= 0, "give a number from 0, or None for the closed loop"),
    "gates.shrink": (lambda v: 0 <= v < 1, "give a share of the MACs from 0 to below 1, or None"),
    "distill.temperature": (lambda v: v > 0, "give a number above 0"),
    "distill.cross_entropy": (lambda v: 0 <= v <= 1, "give a share of the loss from 0 to 1"),
    "distill.dkd_beta": (lambda v: v >= 0, "give a number from 0"),
    "budget.macs": (_amount, _AMOUNT),
    "budget.params": (_amount, _AMOUNT),
    "budget.latency": (lambda v: v > 0, "give a fraction of the teacher's in (0, 1], or milliseconds above 1"),
    "budget.memory": (_amount, "give a fraction of the teacher's in (0, 1], or a whole number of bytes above 1"),
    "budget.round_to": (lambda v: v == "hardware" or v >= 1, "give at least 1, or hardware"),
    "budgets": (
        lambda v: all(b > 0 for b in v) and len(set(v)) == len(v) and len({b <= 1 for b in v}) <= 1,
        "give each once, all in (0, 1] as shares of the teacher's, or all above 1 as absolute bounds",
    ),
    "baselines": (lambda v: len(set(v)) == len(v), "name each once"),
    "run.seed": (lambda v: 0 <= v < 2**32, "give a whole number from 0 to 4294967295"),
    "run.steps_per_dispatch": (lambda v: v >= 1, "give at least 1 update"),
    "run.checkpoint_every": (lambda v: v >= 1, "give at least 1 update"),
    "run.checkpoint_share": (lambda v: 0 < v <= 1, "give a share in (0, 1], or None to leave no checkpoint out"),
    "run.evaluate_every": (lambda v: v >= 1, "give at least 1 update"),
    "run.keep": (lambda v: v >= 1, "give at least 1 checkpoint"),
    "run.spike": (lambda v: v > 1, "give a factor above 1, or None for no going back"),
    "run.rollbacks": (lambda v: v >= 1, "give at least 1"),
}


def _check_together(experiment: Experiment) -> None:
    """What two settings must not say of each other."""
    distill = experiment.distill
    loss_weights(distill.losses)
    if distill.retrain_losses:
        loss_weights(distill.retrain_losses, "distill.retrain_losses")
    if distill.loss is not None and (distill.losses, distill.retrain_losses) != (DistillConfig.losses, ()):
        raise ValueError(
            f"distill.loss and distill.losses: {distill.loss} takes the place of all losses of this package; give one"
        )
    if not any(getattr(experiment.budget, name) is not None for name in BOUNDS):
        settings = ", ".join(f"budget.{name}" for name in BOUNDS)
        raise ValueError(f"{settings} are all None; bound at least one, as in --budget.macs 0.5")
    mean, std = experiment.data.mean, experiment.data.std
    if (mean is None) != (std is None):
        raise ValueError(f"data.mean is {mean} and data.std is {std}; give both, or neither to measure them")
    if mean is not None and std is not None:
        _require(len(mean) == len(std) > 0, "data.mean", mean, f"give as many values as data.std {std}, one a channel")
        _require(all(s > 0 for s in std), "data.std", std, "give numbers above 0")
    for name in ("teacher", "search", "retrain"):
        stage: StageConfig = getattr(experiment, name)
        _require(stage.steps == 0 or stage.warmup < stage.steps, f"{name}.warmup", stage.warmup,
                 f"give fewer updates than {name}.steps, {stage.steps}")  # fmt: skip
