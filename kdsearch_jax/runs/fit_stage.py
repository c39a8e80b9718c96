"""What the stages of a run share: training with the run's settings, and what they leave in its directory.

Every process of a run calls these alike; the first writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.pruning.network import count
from kdsearch_jax.runs import evaluation
from kdsearch_jax.runs.config import to_json
from kdsearch_jax.runs.setup import PROOF, RunSetup, is_plain
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.storage import checkpoint_files as checkpoint
from kdsearch_jax.storage.files import write_arrays, write_json, write_sealed
from kdsearch_jax.storage.networks import BOXES, module_info, save_network
from kdsearch_jax.tracing.topology import leaf_shapes
from kdsearch_jax.training import loop
from kdsearch_jax.training.settings import StageConfig
from kdsearch_jax.training.state import Step, TrainState


def fit(
    setup: RunSetup,
    state: TrainState,
    step: Step,
    stage: StageConfig,
    directory: Path,
    resume: bool,
    *,
    module: Any,
    teacher: LoadedNetwork | None = None,
    variables_of: Callable[[TrainState], Any] | None = None,
    constants: Any = None,
    between: Any = None,
    until: Callable[[TrainState], bool] | None = None,
    checkpoints_in: Path | None = None,
    dataset: Dataset | None = None,
    stream: int = 0,
) -> TrainState:
    """`train.fit` with the run's settings, evaluated on the validation split.

    Args:
      module, variables_of: what is evaluated of a state; dataset: to train on, if not the run's; stream: of randomness.
    """
    experiment, data = setup.experiment, setup.dataset
    size, call = experiment.run.eval_batch_size, setup.task.call
    measure = None
    if not is_plain(setup.task, data):
        other = None if teacher is None else (teacher.module, teacher.variables)
        measure = evaluation.measurer(setup.task, module, data.validation, data, batch_size=size, teacher=other)

    def assess(state: TrainState) -> dict[str, float]:
        variables = state.variables if variables_of is None else variables_of(state)
        if measure is not None:
            return {f"validation_{name}": value for name, value in measure(variables).items()}
        scores = evaluation.evaluate(
            module, variables, data.validation, data.mean, data.std, batch_size=size, call=call, largest=len(data.test)
        )
        return {f"validation_{name}": scores[name] for name in ("accuracy", "loss")}

    return loop.fit(
        state,
        step,
        dataset or data,
        experiment.data,
        stage,
        experiment.run,
        directory=directory,
        name=directory.name,
        meta={"config": to_json(experiment)},
        constants=constants,
        evaluate=assess,
        between=between,
        until=until,
        checkpoints_in=checkpoints_in,
        seed=experiment.run.seed * 1000 + stream,
        resume=resume,
    )


def save(
    directory: Path, setup: RunSetup, architecture: Architecture, module: Any, variables: Any, **more: Any
) -> None:
    """A network directory with what it takes to use the network, and `more` information."""
    call = architecture.call_spec
    cost = count(module, *call.example(PROOF), **call.keywords(module, train=False))  # as the proof counts it
    boxes = {path: setup.boxes[path] for path in leaf_shapes(variables) if path in setup.boxes}
    info = {
        "dataset": setup.dataset.name,
        "num_classes": setup.dataset.num_classes,
        "mean": list(setup.dataset.mean),
        "std": list(setup.dataset.std),
        **({"scale": setup.dataset.scale} if setup.dataset.mean else {}),
        "class_names": list(setup.dataset.class_names),
        "framing": setup.experiment.data.framing,
        "macs": cost.macs,
        "params": cost.params,
        **module_info(module, architecture, lambda: setup.base_shapes(module)),
        **({BOXES: boxes} if boxes else {}),
        **more,
    }
    save_network(directory, architecture, variables, info, overwrite=(directory / "network.json").is_file())


def meet(what: str) -> None:
    """Waits for the other processes of the run, which see then what the first has written."""
    checkpoint.meet(what)


def write(path: Path, value: Any, *, seal: bool = False) -> None:
    """JSON, the old or the new whatever happens; seal: with its digest, as what steers a run has it."""
    if jax.process_index() == 0:
        (write_sealed if seal else write_json)(path, value)


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays by name, the old or the new whatever happens."""
    if jax.process_index() == 0:
        write_arrays(path, arrays)
