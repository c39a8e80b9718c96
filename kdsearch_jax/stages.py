"""The road, stage by stage: teacher → search → retrain and baselines → delivery.

Each stage reads directories and writes one of its own; a stage whose result is there is not run again, and one that was
interrupted goes on from its last checkpoint. What a stage hands on is a network directory (`checkpoint.save_network`),
so any stage can start from files that another run wrote.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kdsearch_jax import baselines, evaluate, export, gated, models, pretrained, report, surgery, train
from kdsearch_jax import budget as budget_lib
from kdsearch_jax import data as data_lib
from kdsearch_jax import gates as gates_lib
from kdsearch_jax.budget import Limits
from kdsearch_jax.checkpoint import load_network, save_network, written_whole
from kdsearch_jax.cli import write_json
from kdsearch_jax.config import Experiment, StageConfig, to_json
from kdsearch_jax.data import Dataset
from kdsearch_jax.network import Network, count, trace
from kdsearch_jax.student import Architecture

log = logging.getLogger(__name__)

STAGES = ("teacher", "search", "retrain")
PROOF = 16  # examples of a batch on which networks are proved equal


@dataclass(frozen=True)
class Loaded:
    """A network as its directory describes it."""

    module: nn.Module
    variables: Any
    architecture: Architecture
    info: dict[str, Any]

    @staticmethod
    def of(directory: Path) -> Loaded:
        """Reads a network directory."""
        return Loaded(*load_network(directory))


@dataclass(frozen=True)
class Road:
    """A run: its settings, data and directory.

    given: the teacher to start from, if it is not to be trained; search_from: the directory of a finished search stage
    to start from, whose run has the teacher.
    """

    experiment: Experiment
    dataset: Dataset
    directory: Path
    given: Loaded | None = None
    search_from: Path | None = None

    @property
    def teacher(self) -> Path:
        """The teacher's network directory."""
        return self.directory / "teacher" / "network"

    @property
    def search(self) -> Path:
        """The search stage's directory."""
        return self.directory / "search"


def prepare(
    experiment: Experiment,
    directory: Path,
    *,
    resume: bool = False,
    search_from: Path | None = None,
    searches: bool = True,
) -> Road:
    """Checks what can be checked before any work, and before any file is written.

    That is: the data, the model, the teacher or the search to start from, and that the budget can be met.

    Args:
      directory: of the run; looked at only to `resume`.
      search_from: a run with a finished search, or that stage's directory.
      searches: False where the run ends with the teacher.

    Raises:
      ValueError, OSError: where one of them cannot serve.
    """
    found = None if search_from is None else _finished_search(search_from, experiment, directory)
    source = experiment.teacher_from
    if resume and _finished(directory / "teacher"):
        source = str(directory / "teacher" / "network")
    elif found is not None:
        source = str(found.parent / "teacher" / "network")
    if source is not None and not Path(source).exists():
        raise FileNotFoundError(f"teacher_from: {source} does not exist")
    start = _network_directory(source)
    if start is None:
        models.build(experiment.model.name, {**experiment.model.arguments, "num_classes": 2})  # before data are read
    dataset = data_lib.load(experiment.data, 0)
    given = None
    if start is not None:
        given = Loaded.of(start)
        _check_teacher(start, given, dataset)
        if experiment.data.mean is None and "mean" in given.info:  # it sees images as it was trained on them
            dataset = dataclasses.replace(dataset, mean=tuple(given.info["mean"]), std=tuple(given.info["std"]))
    else:
        architecture = _architecture(experiment, dataset)
        module = architecture.module()
        if source is not None:
            variables = pretrained.load_torch(source, module, architecture.input_shape)
            given = Loaded(module, variables, architecture, {})
    if searches and found is None and not (resume and _finished(directory / "search")):
        architecture = given.architecture if given else _architecture(experiment, dataset)
        network, limits = traced(experiment, architecture)
        random = np.random.default_rng(0).uniform(0.1, 1.0, network.topology.units)
        budget_lib.select(network.topology, limits, random)  # whether widths exist that cost so much
        if experiment.baselines:
            baselines.check(network.topology, limits)
    return Road(experiment, dataset, directory, given, found)


def _network_directory(path: str | None) -> Path | None:
    """The network directory meant by `path` (a run's, or the network's own); None where it is a file of weights."""
    if path is None or not Path(path).is_dir():
        return None
    inner = Path(path) / "teacher" / "network"
    return inner if inner.is_dir() else Path(path)


def _architecture(experiment: Experiment, dataset: Dataset) -> Architecture:
    """The teacher that the experiment names, for this data."""
    arguments = {**experiment.model.arguments, "num_classes": dataset.num_classes}
    return Architecture(experiment.model.name, arguments, input_shape=dataset.train.images.shape[1:])


def _check_teacher(path: Path, teacher: Loaded, dataset: Dataset) -> None:
    """Raises ValueError where the network at `path` cannot be the teacher on this data."""
    architecture = teacher.architecture
    if architecture.layers or architecture.dropped:
        raise ValueError(f"teacher_from: {path} was cut already and cannot be searched again; give its teacher")
    shape = dataset.train.images.shape[1:]
    if tuple(architecture.input_shape) != shape:
        raise ValueError(
            f"teacher_from: {path} takes images {tuple(architecture.input_shape)}, those of {dataset.name} are "
            f"{shape}; give a teacher of this data, or its data by --data.name"
        )
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    forward = partial(train.apply_eval, teacher.module)
    classes = jax.eval_shape(forward, teacher.variables, images).shape[-1]
    if classes != dataset.num_classes:
        raise ValueError(
            f"teacher_from: {path} tells apart {classes} classes, but {dataset.name} has {dataset.num_classes}; give a "
            "teacher of this data, or its data by --data.name"
        )


def _finished_search(path: Path, experiment: Experiment, directory: Path) -> Path:
    """The finished search stage meant by `path`, a run's directory or the stage's own, for this experiment."""
    stage = path / "search" if (path / "search").is_dir() else path
    teacher = stage.parent / "teacher" / "network"
    for needed in (stage / "selection.json", stage / "network" / "network.json", teacher / "network.json"):
        if not needed.is_file():
            raise ValueError(f"search_from: {path} is no run with a finished search; {needed} is missing")
    try:
        budget = json.loads((stage / "selection.json").read_text())["budget"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"search_from: {stage / 'selection.json'} is damaged ({error}); search anew") from error
    if budget != dataclasses.asdict(experiment.budget):
        raise ValueError(
            f"budget: {dataclasses.asdict(experiment.budget)} is not that of the search in {stage}, {budget}; give the "
            "same, or search anew"
        )
    own = directory / "search"
    if own.is_dir() and not _finished(own):
        raise ValueError(f"search_from: {directory} has begun a search of its own; leave it out, or another --workdir")
    return stage


def run(road: Road, *, resume: bool, stop_after: str | None = None) -> dict[str, Any] | None:
    """The whole road; returns the table of `results.json`, or None where it stops earlier."""
    _take_over(road)
    teach(road, resume)
    if stop_after == "teacher":
        return None
    search(road, resume)
    if stop_after == "search":
        _report(road)
        return None
    steps = road.experiment.search.steps + road.experiment.retrain.steps
    retrain(road, "retrain", road.search / "network", road.experiment.retrain, resume)
    for number, name in enumerate(road.experiment.baselines):
        log.info("baseline %s: %d steps, as many as search and retraining", name, steps)
        source = baseline(road, name)
        retrain(road, name, source, dataclasses.replace(road.experiment.retrain, steps=steps), resume, number + 1)
    if stop_after == "retrain":
        return None
    deliver(road)
    results = compare(road)
    _report(road)
    return results


# --- teacher --------------------------------------------------------------------------------------------------------


def _take_over(road: Road) -> None:
    """Copies teacher and search of the run to start from, without checkpoints: this run's directory says it all."""
    if road.search_from is None:
        return
    for name in ("teacher", "search"):
        if _finished(road.directory / name):
            continue
        if jax.process_index() == 0:
            with written_whole(road.directory / name) as part:
                skipped = shutil.ignore_patterns("checkpoints", "tensorboard")
                shutil.copytree(road.search_from.parent / name, part, ignore=skipped, dirs_exist_ok=True)
        _meet(f"{name} taken over")


def teach(road: Road, resume: bool) -> None:
    """Trains the teacher, or takes the given one over into the run's directory."""
    directory = road.directory / "teacher"
    if _finished(directory):
        return
    experiment, dataset = road.experiment, road.dataset
    if (given := road.given) is not None:
        _save(directory / "network", road, given.architecture, given.module, given.variables)
        return
    architecture = _architecture(experiment, dataset)
    module = architecture.module()
    stage = experiment.teacher
    tx = train.make_optimizer(stage)
    images = jnp.zeros((2, *architecture.input_shape))
    variables = jax.jit(module.init)(jax.random.key(experiment.run.seed), images)
    state = train.create_state(variables, tx, ema=stage.ema)
    step = train.supervised_step(module, tx, stage, experiment.run)
    state = _fit(road, state, step, stage, directory, resume, module=module)
    _save(directory / "network", road, architecture, module, state.variables)


# --- search ---------------------------------------------------------------------------------------------------------


def traced(experiment: Experiment, teacher: Architecture) -> tuple[Network, Limits]:
    """The teacher's topology with the gates that the experiment allows, and its budget in absolute numbers."""
    config, module = experiment.gates, teacher.module()
    images = jax.ShapeDtypeStruct((PROOF, *teacher.input_shape), jnp.float32)
    network = trace(module, images, **train.mode(module, train=False))
    network = network.select(config.kinds, config.include, config.exclude)
    return network, budget_lib.resolve(experiment.budget, network.topology)


def search(road: Road, resume: bool) -> None:
    """Searches, cuts and proves the cut; writes the stage's directory."""
    directory = road.search
    if _finished(directory):
        return
    experiment, teacher = road.experiment, Loaded.of(road.teacher)
    network, limits = traced(experiment, teacher.architecture)
    topology = network.topology
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "topology.json", topology.to_json())
    log.info("%s", topology.describe())
    batch = _proof_batch(road)
    _rehearse(network, teacher, limits, batch)

    stage = experiment.search
    tx = gated.make_transformation(stage, experiment.gates)
    step = gated.search_step(network, teacher.module, tx, experiment.distill, experiment.gates, experiment.run)
    control = gated.controller(topology, limits, stage, experiment.gates, experiment.run)
    state = gated.begin(teacher.variables, topology, tx, stage)

    def variables_of(state: train.TrainState) -> Any:
        return gates_lib.fold({"params": state.params, **state.model_state}, state.extra["gates"], topology)

    state = _fit(
        road, state, step, stage, directory, resume,
        module=teacher.module, variables_of=variables_of, constants=teacher.variables, between=control,
    )  # fmt: skip
    state = jax.tree.map(np.asarray, state)  # off the devices of other processes
    keep = gated.landing(topology, limits, state)
    gates, variables = state.extra["gates"], {"params": state.params, **state.model_state}
    sliced, architecture = surgery.prune(variables, gates, keep, network, teacher.architecture)
    proof = surgery.verify(network, variables, gates, keep, sliced, batch)
    log.info("the student is the gated network: logits agree to %.1e of their scale", proof["difference"])
    _write_npz(directory / "history.npz", gated.history(topology, state))
    _write_npz(directory / "gates.npz", gates)
    kept = {name: np.flatnonzero(mask).tolist() for name, mask in keep.items()}
    budget = dataclasses.asdict(experiment.budget)
    macs, params = topology.cost(keep)
    _write(
        directory / "selection.json", {"kept": kept, "macs": macs, "params": params, "budget": budget, "proof": proof}
    )
    _write(directory / "architecture.json", architecture.to_json())
    _save(directory / "network", road, architecture, architecture.module(), sliced)


def _rehearse(network: Network, teacher: Loaded, limits: Limits, batch: Any) -> None:
    """Cuts at random and proves it, before the long work: a model whose student would differ is found now."""
    topology, random = network.topology, np.random.default_rng(0)
    keep = budget_lib.select(topology, limits, random.uniform(0.1, 1.0, topology.units), per_cost=False, rounds=1)
    gates = {group.name: random.uniform(0.5, 1.0, group.size).astype(np.float32) for group in topology.groups}
    sliced, _ = surgery.prune(teacher.variables, gates, keep, network, teacher.architecture)
    surgery.verify(network, teacher.variables, gates, keep, sliced, batch)


# --- retraining -----------------------------------------------------------------------------------------------------


def baseline(road: Road, name: str) -> Path:
    """Cuts a hand-made student of the same cost from the teacher's own weights; returns its network directory."""
    directory = road.directory / name / "start"
    if (directory / "network.json").is_file():
        return directory
    teacher = Loaded.of(road.teacher)
    network, limits = traced(road.experiment, teacher.architecture)
    keep = baselines.keep(name, teacher.variables, network.topology, limits)
    gates = gates_lib.init(network.topology)
    sliced, architecture = surgery.prune(teacher.variables, gates, keep, network, teacher.architecture)
    surgery.verify(network, teacher.variables, gates, keep, sliced, _proof_batch(road))
    _save(directory, road, architecture, architecture.module(), sliced)
    return directory


def retrain(road: Road, name: str, source: Path, stage: StageConfig, resume: bool, stream: int = 0) -> None:
    """Distils the teacher into the network of `source`; writes RUN/name."""
    directory = road.directory / name
    if _finished(directory):
        return
    experiment, teacher, student = road.experiment, Loaded.of(road.teacher), Loaded.of(source)
    tx = train.make_optimizer(stage)
    step = train.distill_step(student.module, teacher.module, tx, stage, experiment.distill, experiment.run)
    state = train.create_state(student.variables, tx, ema=stage.ema)
    state = _fit(
        road, state, step, stage, directory, resume,
        module=student.module, constants=teacher.variables, stream=100 + stream,
    )  # fmt: skip
    _save(directory / "network", road, student.architecture, student.module, state.variables)


# --- delivery -------------------------------------------------------------------------------------------------------


def deliver(road: Road) -> None:
    """RUN/student: the network, `.safetensors` and StableHLO, each proved equal in a fresh process."""
    directory = road.directory / "student"
    found = Loaded.of(road.directory / "retrain" / "network")
    if not (directory / "network.json").is_file():
        save_network(directory, found.architecture, found.variables, found.info)
    if jax.process_index() == 0:
        log.info("exporting to %s", directory)
        export.export(directory, directory)


def compare(road: Road) -> dict[str, Any]:
    """The table teacher / student / baselines on the test split, each example once; writes results.json."""
    experiment, dataset = road.experiment, road.dataset
    places = {"teacher": road.teacher, "student": road.directory / "retrain" / "network"}
    places |= {name: road.directory / name / "network" for name in experiment.baselines}
    networks = {name: Loaded.of(path) for name, path in places.items()}
    logits = {
        name: evaluate.predict(
            n.module, n.variables, dataset.test.images, dataset.mean, dataset.std, experiment.run.eval_batch_size
        )
        for name, n in networks.items()
    }
    shape = dataset.test.images.shape[1:]
    batch = min(64, len(dataset.test))
    times = evaluate.measure_latency({k: (n.module, n.variables) for k, n in networks.items()}, shape, batch)
    searched = experiment.search.steps + experiment.retrain.steps
    rows = []
    for name, network in networks.items():
        scores = evaluate.score(logits[name], dataset.test.labels, None if name == "teacher" else logits["teacher"])
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(network.variables))
        cost = {"macs": network.info["macs"], "params": network.info["params"], "bytes": size}
        steps = {} if name == "teacher" else {"steps": searched}
        rows.append({"name": name, **scores, **cost, "ms_per_image": times[name], "ms_batch": batch, **steps})
    results = {
        "dataset": dataset.name,
        "split": "test",
        "examples": len(dataset.test),
        "seed": experiment.run.seed,
        "budget": dataclasses.asdict(experiment.budget),
        "rows": rows,
    }
    _write(road.directory / "results.json", results)
    return results


# --- shared ---------------------------------------------------------------------------------------------------------


def _fit(
    road: Road,
    state: train.TrainState,
    step: train.Step,
    stage: StageConfig,
    directory: Path,
    resume: bool,
    *,
    module: nn.Module,
    variables_of: Any = None,
    constants: Any = None,
    between: Any = None,
    stream: int = 0,
) -> train.TrainState:
    """`train.fit` with the run's settings, evaluated on the validation split."""
    experiment, dataset = road.experiment, road.dataset

    def assess(state: train.TrainState) -> dict[str, float]:
        variables = state.variables if variables_of is None else variables_of(state)
        size = experiment.run.eval_batch_size
        scores = evaluate.evaluate(module, variables, dataset.validation, dataset.mean, dataset.std, batch_size=size)
        return {f"validation_{name}": scores[name] for name in ("accuracy", "loss")}

    return train.fit(
        state,
        step,
        dataset,
        experiment.data,
        stage,
        experiment.run,
        directory=directory,
        name=directory.name,
        meta={"config": to_json(experiment)},
        constants=constants,
        evaluate=assess,
        between=between,
        seed=experiment.run.seed * 1000 + stream,
        resume=resume,
    )


def _finished(directory: Path) -> bool:
    return (directory / "network" / "network.json").is_file()


def _proof_batch(road: Road) -> jax.Array:
    """Real images, normalised; repeated where there are fewer than PROOF."""
    images = np.resize(road.dataset.validation.images[:PROOF], (PROOF, *road.dataset.validation.images.shape[1:]))
    return data_lib.normalise(jnp.asarray(images), np.asarray(road.dataset.mean), np.asarray(road.dataset.std))


def _save(directory: Path, road: Road, architecture: Architecture, module: nn.Module, variables: Any) -> None:
    """A network directory with what it takes to use the network on images."""
    images = jax.ShapeDtypeStruct((2, *architecture.input_shape), jnp.float32)
    cost = count(module, images, **train.mode(module, train=False))
    info = {
        "dataset": road.dataset.name,
        "num_classes": road.dataset.num_classes,
        "mean": list(road.dataset.mean),
        "std": list(road.dataset.std),
        "class_names": list(road.dataset.class_names),
        "macs": cost.macs,
        "params": cost.params,
    }
    save_network(directory, architecture, variables, info)


def _meet(what: str) -> None:
    """Waits for the other processes of the run."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _write(path: Path, value: Any) -> None:
    if jax.process_index() == 0:
        write_json(path, value)


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        part = path.with_name(f".{path.name}")
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(path)


def _report(road: Road) -> None:
    if jax.process_index() == 0:
        report.write(road.directory)


def table(results: dict[str, Any]) -> str:
    """The rows of `results.json` as plain text."""
    head = ("", "accuracy", "agreement", "MACs", "parameters", "size", "ms/image")
    lines: list[tuple[str, ...]] = [head]
    for row in results["rows"]:
        agreement = f"{row['agreement']:.2%}" if "agreement" in row else "–"
        lines.append(
            (row["name"], f"{row['accuracy']:.2%}", agreement, f"{row['macs']:,}", f"{row['params']:,}",
             f"{row['bytes'] / 1e3:,.0f} kB", f"{row['ms_per_image']:.3f}")
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
