"""The road, stage by stage: teacher → search → retrain and baselines → delivery.

Each stage reads directories and writes one of its own; a stage whose result is there is not run again, and one that was
interrupted goes on from its last checkpoint. What a stage hands on is a network directory (`checkpoint.save_network`),
so any stage can start from files that another run wrote.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kdsearch_jax import baselines, evaluate, export, gated, report, surgery, train
from kdsearch_jax import budget as budget_lib
from kdsearch_jax import gates as gates_lib
from kdsearch_jax.budget import Limits
from kdsearch_jax.checkpoint import save_network, written_whole
from kdsearch_jax.cli import write_json
from kdsearch_jax.config import StageConfig, to_json
from kdsearch_jax.library import bound
from kdsearch_jax.network import Network, count
from kdsearch_jax.optimizer import make_optimizer
from kdsearch_jax.road import Loaded, Road, architecture_of, finished, is_plain, proof_batch, traced
from kdsearch_jax.steps import Step, TrainState, create_state, distill_step, supervised_step
from kdsearch_jax.student import Architecture
from kdsearch_jax.weights import stored

log = logging.getLogger(__name__)

STAGES = ("teacher", "search", "retrain")


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
        if finished(road.directory / name):
            continue
        if jax.process_index() == 0:
            with written_whole(road.directory / name) as part:
                skipped = shutil.ignore_patterns("checkpoints", "tensorboard")
                shutil.copytree(road.search_from.parent / name, part, ignore=skipped, dirs_exist_ok=True)
        _meet(f"{name} taken over")


def teach(road: Road, resume: bool) -> None:
    """Trains the teacher, or takes the given one over into the run's directory."""
    directory = road.directory / "teacher"
    if finished(directory):
        return
    experiment, dataset = road.experiment, road.dataset
    if (given := road.given) is not None:
        _save(directory / "network", road, given.architecture, given.module, given.variables)
        return
    architecture = architecture_of(experiment, dataset)
    module = architecture.module()
    stage = experiment.teacher
    tx = make_optimizer(stage)
    call = architecture.called
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), call.example(2))
    args, keywords = bound(inputs, call.keywords(module, train=False))
    variables = jax.jit(lambda key: module.init(key, *args, **keywords))(jax.random.key(experiment.run.seed))
    state = create_state(stored(variables), tx, ema=stage.ema)
    step = supervised_step(module, tx, stage, experiment.run, road.task)
    state = _fit(road, state, step, stage, directory, resume, module=module)
    _save(directory / "network", road, architecture, module, state.variables)


# --- search ---------------------------------------------------------------------------------------------------------


def search(road: Road, resume: bool) -> None:
    """Searches, cuts and proves the cut; writes the stage's directory."""
    directory = road.search
    if finished(directory):
        return
    experiment, teacher = road.experiment, road.load(road.teacher)
    network, limits = traced(experiment, teacher.architecture, teacher.module)
    topology = network.topology
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "topology.json", topology.to_json())
    log.info("%s", topology.describe())
    inputs = road.task.call.bind(proof_batch(road.dataset))
    _rehearse(network, teacher, limits, inputs)

    stage = experiment.search
    tx = gated.make_transformation(stage, experiment.gates)
    step = gated.search_step(network, teacher.module, tx, road.task, experiment.gates, experiment.run)
    control = gated.controller(topology, limits, stage, experiment.gates, experiment.run)
    state = gated.begin(teacher.variables, topology, tx, stage)

    def variables_of(state: TrainState) -> Any:
        return gates_lib.fold({"params": state.params, **state.model_state}, state.extra["gates"], topology)

    state = _fit(
        road, state, step, stage, directory, resume,
        module=teacher.module, teacher=teacher, variables_of=variables_of, constants=teacher.variables, between=control,
    )  # fmt: skip
    state = jax.tree.map(np.asarray, state)  # off the devices of other processes
    keep = gated.landing(topology, limits, state)
    gates, variables = state.extra["gates"], {"params": state.params, **state.model_state}
    sliced, architecture = surgery.prune(variables, gates, keep, network, teacher.architecture)
    proof = surgery.verify(network, variables, gates, keep, sliced, *inputs)
    log.info("the student is the gated network: outputs agree to %.1e of their scale", proof["difference"])
    _write_npz(directory / "history.npz", gated.history(topology, state))
    _write_npz(directory / "gates.npz", gates)
    kept = {name: np.flatnonzero(mask).tolist() for name, mask in keep.items()}
    budget = dataclasses.asdict(experiment.budget)
    macs, params = topology.cost(keep)
    _write(
        directory / "selection.json", {"kept": kept, "macs": macs, "params": params, "budget": budget, "proof": proof}
    )
    _write(directory / "architecture.json", architecture.to_json())
    _save(directory / "network", road, architecture, architecture.module(road.base), sliced)


def _rehearse(network: Network, teacher: Loaded, limits: Limits, inputs: Any) -> None:
    """Cuts at random and proves it, before the long work: a model whose student would differ is found now."""
    topology, random = network.topology, np.random.default_rng(0)
    keep = budget_lib.select(topology, limits, random.uniform(0.1, 1.0, topology.units), per_cost=False, rounds=1)
    gates = {group.name: random.uniform(0.5, 1.0, group.size).astype(np.float32) for group in topology.groups}
    sliced, _ = surgery.prune(teacher.variables, gates, keep, network, teacher.architecture)
    surgery.verify(network, teacher.variables, gates, keep, sliced, *inputs)


# --- retraining -----------------------------------------------------------------------------------------------------


def baseline(road: Road, name: str) -> Path:
    """Cuts a hand-made student of the same cost from the teacher's own weights; returns its network directory."""
    directory = road.directory / name / "start"
    if (directory / "network.json").is_file():
        return directory
    teacher = road.load(road.teacher)
    network, limits = traced(road.experiment, teacher.architecture, teacher.module)
    keep = baselines.keep(name, teacher.variables, network.topology, limits)
    gates = gates_lib.init(network.topology)
    sliced, architecture = surgery.prune(teacher.variables, gates, keep, network, teacher.architecture)
    inputs = road.task.call.bind(proof_batch(road.dataset))
    surgery.verify(network, teacher.variables, gates, keep, sliced, *inputs)
    _save(directory, road, architecture, architecture.module(road.base), sliced)
    return directory


def retrain(road: Road, name: str, source: Path, stage: StageConfig, resume: bool, stream: int = 0) -> None:
    """Distils the teacher into the network of `source`; writes RUN/name."""
    directory = road.directory / name
    if finished(directory):
        return
    experiment, teacher, student = road.experiment, road.load(road.teacher), road.load(source)
    tx = make_optimizer(stage)
    step = distill_step(student.module, teacher.module, tx, stage, experiment.run, road.task)
    state = create_state(student.variables, tx, ema=stage.ema)
    state = _fit(
        road, state, step, stage, directory, resume,
        module=student.module, teacher=teacher, constants=teacher.variables, stream=100 + stream,
    )  # fmt: skip
    _save(directory / "network", road, student.architecture, student.module, state.variables)


# --- delivery -------------------------------------------------------------------------------------------------------


def deliver(road: Road) -> None:
    """RUN/student: the network, `.safetensors` and StableHLO, each proved equal in a fresh process."""
    directory = road.directory / "student"
    found = road.load(road.directory / "retrain" / "network")
    if not (directory / "network.json").is_file():
        save_network(directory, found.architecture, found.variables, found.info)
    if jax.process_index() == 0:
        log.info("exporting to %s", directory)
        try:
            export.export(directory, directory, module=road.base)
        except export.CannotExportError as error:
            log.warning("%s: done so", error)
            export.export(directory, directory, ("safetensors",), module=road.base)


def compare(road: Road) -> dict[str, Any]:
    """The table teacher / student / baselines on the test split, each example once; writes results.json."""
    experiment, dataset = road.experiment, road.dataset
    places = {"teacher": road.teacher, "student": road.directory / "retrain" / "network"}
    places |= {name: road.directory / name / "network" for name in experiment.baselines}
    networks = {name: road.load(path) for name, path in places.items()}
    scores = _scores(road, networks)
    batch = min(64, len(dataset.test))
    times = evaluate.measure_latency(
        {k: (n.module, n.variables) for k, n in networks.items()}, (), batch, call=road.task.call
    )
    searched = experiment.search.steps + experiment.retrain.steps
    rows = []
    for name, network in networks.items():
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(network.variables))
        cost = {"macs": network.info["macs"], "params": network.info["params"], "bytes": size}
        steps = {} if name == "teacher" else {"steps": searched}
        rows.append({"name": name, **scores[name], **cost, "ms_per_image": times[name], "ms_batch": batch, **steps})
    results = {
        "dataset": dataset.name,
        "split": "test",
        "examples": len(dataset.test),
        "seed": experiment.run.seed,
        "budget": dataclasses.asdict(experiment.budget),
        **({} if is_plain(road.task, dataset) else {"compared": road.task.describe()}),
        "rows": rows,
    }
    _write(road.directory / "results.json", results)
    return results


def _scores(road: Road, networks: Mapping[str, Loaded]) -> dict[str, dict[str, float]]:
    """What each network does on the test split, compared with the teacher."""
    dataset, size, teacher = road.dataset, road.experiment.run.eval_batch_size, networks["teacher"]
    if not is_plain(road.task, dataset):
        found = {}
        for name, n in networks.items():
            other = None if name == "teacher" else (teacher.module, teacher.variables)
            measure = evaluate.measurer(road.task, n.module, dataset.test, dataset, batch_size=size, teacher=other)
            found[name] = measure(n.variables)
        return found
    logits = {
        name: evaluate.predict(
            n.module, n.variables, dataset.test.images, dataset.mean, dataset.std, size, n.architecture.call
        )
        for name, n in networks.items()
    }
    return {
        name: evaluate.score(values, dataset.test.labels, None if name == "teacher" else logits["teacher"])
        for name, values in logits.items()
    }


# --- shared ---------------------------------------------------------------------------------------------------------


def _fit(
    road: Road,
    state: TrainState,
    step: Step,
    stage: StageConfig,
    directory: Path,
    resume: bool,
    *,
    module: Any,
    teacher: Loaded | None = None,
    variables_of: Any = None,
    constants: Any = None,
    between: Any = None,
    stream: int = 0,
) -> TrainState:
    """`train.fit` with the run's settings, evaluated on the validation split."""
    experiment, dataset = road.experiment, road.dataset

    size, call = experiment.run.eval_batch_size, road.task.call
    measure = None
    if not is_plain(road.task, dataset):
        other = None if teacher is None else (teacher.module, teacher.variables)
        measure = evaluate.measurer(road.task, module, dataset.validation, dataset, batch_size=size, teacher=other)

    def assess(state: TrainState) -> dict[str, float]:
        variables = state.variables if variables_of is None else variables_of(state)
        if measure is not None:
            return {f"validation_{name}": value for name, value in measure(variables).items()}
        scores = evaluate.evaluate(
            module, variables, dataset.validation, dataset.mean, dataset.std, batch_size=size, call=call
        )
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


def _save(directory: Path, road: Road, architecture: Architecture, module: Any, variables: Any) -> None:
    """A network directory with what it takes to use the network."""
    call = architecture.called
    cost = count(module, *call.example(2), **call.keywords(module, train=False))
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
    """The rows of `results.json` as plain text: what was measured, then what it costs."""
    rows = results["rows"]
    known = {"loss", "accuracy", "accuracy_top5", "kl", *_COSTS}
    own = [name for name in dict.fromkeys(k for row in rows for k in row) if name not in {*known, *_SHARES, "distance"}]
    shown = [name for name in (*_SHARES, "distance", *own) if any(name in row for row in rows)]
    lines = [("", *(_SHARES.get(name, name) for name in shown), "MACs", "parameters", "size", "ms/example")]
    for row in rows:
        cells = [
            "–" if name not in row else f"{row[name]:.2%}" if name in _SHARES else f"{row[name]:.4g}" for name in shown
        ]
        lines.append(
            (row["name"], *cells, f"{row['macs']:,}", f"{row['params']:,}", f"{row['bytes'] / 1e3:,.0f} kB",
             f"{row['ms_per_image']:.3f}")
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


_SHARES = {"accuracy": "accuracy", "agreement": "agreement"}
_COSTS = ("name", "macs", "params", "bytes", "ms_per_image", "ms_batch", "steps")
