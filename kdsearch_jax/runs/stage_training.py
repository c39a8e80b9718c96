"""What the stages of a run share: training with the run's settings, and writing networks and files.

Every process of a run calls these functions; the first one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.devices import replicate
from kdsearch_jax.data.device_feed import UpdateEntries
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.pruning.network import count
from kdsearch_jax.runs.config import Experiment, to_json
from kdsearch_jax.runs.evaluation import evaluate
from kdsearch_jax.runs.setup import PROOF_EXAMPLES, RunSetup
from kdsearch_jax.runs.teacher_source import LoadedNetwork
from kdsearch_jax.storage.files import write_arrays, write_json, write_sealed
from kdsearch_jax.storage.networks import BOXES, module_info, save_network
from kdsearch_jax.tracing.topology import leaf_shapes
from kdsearch_jax.training import loop
from kdsearch_jax.training.settings import StageConfig
from kdsearch_jax.training.state import Step, TrainState


def train_stage(
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
    entries: UpdateEntries | None = None,
    stream: int = 0,
) -> TrainState:
    """`training.loop.fit` with the run's settings, evaluated on the validation split.

    Args:
      module, variables_of: the network to evaluate, as a function of the state.
      teacher: compared with in evaluation, unless the run classifies images, where validation accuracy suffices.
      dataset: the data to train on, if not the run's.
      entries: further entries of the batches, see `loop.fit`.
      stream: selects the random stream.
    """
    experiment = setup.experiment
    networks = {}
    if teacher is not None and not setup.classifies_images:
        networks["teacher"] = setup.evaluated(teacher.module, replicate(teacher.variables))

    def validate(state: TrainState) -> dict[str, float]:
        variables = state.variables if variables_of is None else variables_of(state)
        evaluations = evaluate(
            setup.objective, {**networks, "student": setup.evaluated(module, variables)}, setup.dataset, "validation",
            batch_size=experiment.run.eval_batch_size, teacher="teacher" if networks else None,
        )  # fmt: skip
        means = evaluations["student"].means
        return {f"validation_{name}": value for name, value in means.items() if name != "accuracy_top5"}

    return loop.fit(
        state,
        step,
        dataset or setup.dataset,
        experiment.data,
        stage,
        experiment.run,
        directory=directory,
        name=directory.name,
        meta={"config": to_json(experiment)},
        constants=constants,
        evaluate=validate,
        between=between,
        until=until,
        entries=entries,
        checkpoints_in=checkpoints_in,
        seed=stage_seed(experiment, stream),
        resume=resume,
    )


def stage_seed(experiment: Experiment, stream: int) -> int:
    """The seed of a stage's batches, augmentation and dropout, for one of the run's random streams."""
    return experiment.run.seed * 1000 + stream


def save_run_network(
    directory: Path, setup: RunSetup, architecture: Architecture, module: Any, variables: Any, **more_info: Any
) -> None:
    """Writes a network directory with all that is needed to use the network later."""
    call, dataset = architecture.call_spec, setup.dataset
    # Counted at the proof's batch size, so that its trace is reused.
    cost = count(module, *call.example(PROOF_EXAMPLES), **call.keywords(module, train=False))
    boxes = {path: setup.boxes[path] for path in leaf_shapes(variables) if path in setup.boxes}
    info = {
        "dataset": dataset.name,
        "num_classes": dataset.num_classes,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        **({"scale": dataset.scale} if dataset.mean else {}),
        "class_names": list(dataset.class_names),
        "framing": setup.experiment.data.framing,
        "macs": cost.macs,
        "params": cost.params,
        **module_info(module, architecture, setup.base_shapes),
        **({BOXES: boxes} if boxes else {}),
        **more_info,
    }
    save_network(directory, architecture, variables, info, overwrite=(directory / "network.json").is_file())


def write_run_json(path: Path, value: Any, *, seal: bool = False) -> None:
    """Writes JSON atomically on the first process; seal: with its digest, for files that later stages depend on."""
    if jax.process_index() == 0:
        (write_sealed if seal else write_json)(path, value)


def write_run_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays atomically on the first process."""
    if jax.process_index() == 0:
        write_arrays(path, arrays)
