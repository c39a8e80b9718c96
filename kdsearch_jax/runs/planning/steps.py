"""The programs of a run, as the loop compiles them, for abstract arguments on any mesh.

    search, retrain, teacher   `training.loop.make_update` around the step of that stage: scanned with resident examples
                               where the size of the data set is known, one streamed batch otherwise
    forward                    of the network, of a student and, for a network that is a student, of what it was cut
                               from: `evaluation.inference` in float32, in batches of run.eval_batch_size

Nothing is read and nothing is computed. The student of `retrain` keeps units of random importance within the budget,
as the search's own choice is not known yet. Not included: teachers besides the first, and the bounds of a budget on
latency and memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import base_module
from kdsearch_jax.adapters.call_spec import CallSpec, input_spec
from kdsearch_jax.adapters.devices import shardings_of
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.distill import distiller as distiller_lib
from kdsearch_jax.distill import search_step, teacher_cache
from kdsearch_jax.distill.objective import Objective, infer_objective
from kdsearch_jax.distill.shrinking import Subnetwork
from kdsearch_jax.distill.steps import distill_step, supervised_step
from kdsearch_jax.pruning import selection
from kdsearch_jax.pruning.network import Network, adapter_for, count
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.runs.evaluation import inference
from kdsearch_jax.runs.setup import resolve_limits
from kdsearch_jax.training import loop
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import StageConfig
from kdsearch_jax.training.state import Step, create_state

STREAMED = 64  # examples of a data set whose size is unknown


@dataclass(frozen=True)
class Program:
    """One compiled call.

    Attributes:
      name: such as "search".
      batch: examples of an update or a call, over all devices.
      updates: in one call. every: updates between two runs of conditional branches (the controller of the budget).
      make: (mesh, batch) → (function, arguments).
      stage: the stage's settings, for updates.
    """

    name: str
    batch: int
    make: Callable[[Mesh, int], tuple[Any, tuple[Any, ...]]]
    updates: int = 1
    every: int = 1
    stage: StageConfig | None = None


@dataclass(frozen=True)
class AbstractRun:
    """A run without data and parameters.

    Attributes:
      network: the teacher's, with the gates that the experiment allows.
      call: how it is called.
      examples: of the training split, if they reside on the devices; None if they are streamed.
    """

    experiment: Experiment
    network: Network
    call: CallSpec
    examples: int | None = None

    @cached_property
    def variables(self) -> Any:
        """The teacher's, abstract."""
        return self._shapes(self.network.module)

    @cached_property
    def student(self) -> Any:
        """The module of a student within the smallest budget, of random importance."""
        topology = self.network.topology
        limits = resolve_limits(self.experiment, self.network)[-1]
        importance = np.random.default_rng(0).uniform(0.1, 1.0, topology.units)
        return self.network.student(selection.choose(topology, limits, importance, per_cost=False).keep)

    @property
    def is_pruned(self) -> bool:
        """Whether the network is a student already."""
        return base_module(self.network.module) is not self.network.module

    @property
    def macs(self) -> dict[str, int]:
        """MACs an example of the networks that `forward` programs call."""
        keywords = {name: self.call.keywords(module, train=False) for name, module in self._forwards().items()}
        return {n: count(m, *self.call.example(2), **keywords[n]).macs for n, m in self._forwards().items()}

    def programs(self) -> dict[str, Program]:
        """{name: program} of everything that this run compiles."""
        experiment, found = self.experiment, {}
        stages = {"search": experiment.search, "retrain": experiment.retrain}
        if experiment.teacher_from is None and self._objective.classes:
            stages["teacher"] = experiment.teacher
        steps = experiment.run.steps_per_dispatch
        for name, stage in stages.items():
            if stage.steps:

                def make(mesh: Mesh, batch: int, name: str = name, stage: StageConfig = stage) -> Any:
                    return self._update(name, dataclasses.replace(stage, batch_size=batch), mesh)

                found[name] = Program(name, stage.batch_size, make, steps if self.scanned else 1, steps, stage)
        for name, module in self._forwards().items():

            def call(mesh: Mesh, batch: int, module: Any = module) -> Any:
                return self._forward(module, mesh, batch)

            found[name] = Program(name, experiment.run.eval_batch_size, call)
        return found

    @property
    def scanned(self) -> bool:
        """Whether several updates are one call."""
        return self.examples is not None

    def _forwards(self) -> dict[str, Any]:
        module = self.network.module
        before = {"forward unpruned": base_module(module)} if self.is_pruned else {}
        return {**before, "forward": module, "forward student": self.student}

    def _shapes(self, module: Any) -> Any:
        return adapter_for(module).abstract_variables(
            module, self.call.example(2), self.call.keywords(module, train=False)
        )

    @cached_property
    def _dataset(self) -> Dataset:
        """A data set of zeros with the shapes of the real one, which takes no memory."""
        size = self.examples or STREAMED

        def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return np.broadcast_to(np.zeros((), dtype), (size, *shape))

        arrays = {name: jax.tree.map(lambda leaf: zeros(leaf.shape, leaf.dtype), tree)
                  for name, tree in self.call.inputs.items()}  # fmt: skip
        mean: tuple[float, ...] = ()
        image = self.call.inputs.get("images")
        if image is not None and hasattr(image, "shape") and len(image.shape) == 3:
            arrays["images"], mean = zeros(image.shape, np.uint8), (0.5,) * image.shape[-1]
        outputs = jax.eval_shape(
            lambda v, *xs: apply_eval(self.network.module, v, xs, call_spec=self.call),
            self.variables,
            *self.call.example(2),
        )
        classes = 0
        if hasattr(outputs, "shape") and outputs.ndim >= 2 and jnp.issubdtype(outputs.dtype, jnp.floating):
            classes = outputs.shape[-1]
            arrays["labels"] = zeros(outputs.shape[1:-1], np.int32)
        split = Split(arrays)
        return Dataset("abstract", split, split, split, classes, mean, mean, ())

    @cached_property
    def _objective(self) -> Objective:
        return infer_objective(self.network.module, self.variables, self.call, self._dataset, self.experiment.distill)

    def _step(self, name: str, stage: StageConfig) -> tuple[Step, Any, Any, Any]:
        """(step, abstract state, abstract constants, the teacher's cached outputs or None) of a stage."""
        experiment, module = self.experiment, self.network.module
        tx = make_optimizer(stage)
        if name == "teacher":
            step = supervised_step(module, tx, stage, experiment.run, self._objective)
            return step, jax.eval_shape(lambda v: create_state(v, tx, ema=stage.ema), self.variables), None, None
        trained = module if name == "search" else self.student
        shapes = self.variables if name == "search" else self._shapes(trained)
        distillation = distiller_lib.make_distillation(
            self._objective,
            [distiller_lib.Teacher(module, self.variables, self.call)],
            self._dataset,
            dataclasses.replace(experiment.distill, cache=False, teachers=()),
            experiment.data,
            experiment.run,
            stage,
            trained,
            shapes,
            retraining=name == "retrain",
            topology=self.network.topology if name == "search" else None,
        )
        teaching, constants, outputs = distillation.distiller, distillation.constants, None
        if self._caches_outputs(stage) and not teaching.feature_paths:
            outputs = jax.eval_shape(teaching.outputs, constants, self._rows(self._dataset.train.arrays, 2))
            teaching, constants = dataclasses.replace(teaching, cached=True), None
        if name == "retrain":
            step = distill_step(trained, module, tx, stage, experiment.run, distillation.objective, teaching)
            state = jax.eval_shape(lambda v: create_state(v, tx, ema=stage.ema, extra=distillation.extra), shapes)
            return step, state, constants, outputs
        limits = resolve_limits(experiment, self.network)
        search = search_step.gated_search(self.network, limits, stage, experiment.gates, experiment.run)
        tx = search.optimizer(tx)
        step = search_step.search_step(
            Subnetwork.of(search), module, tx, stage, distillation.objective, experiment.gates, experiment.run, teaching
        )
        state = jax.eval_shape(lambda v: search_step.begin(search, v, tx, distillation.learned), shapes)
        return step, state, constants, outputs

    def _caches_outputs(self, stage: StageConfig) -> bool:
        experiment = self.experiment
        reason = teacher_cache.reason_not_to_cache(experiment.distill, experiment.data, stage, self._dataset)
        return self.scanned and reason is None

    @staticmethod
    def _rows(arrays: Mapping[str, Any], size: int) -> dict[str, Any]:
        """The arrays as a normalised batch of this size, abstract."""

        def row(leaf: Any) -> Any:
            return input_spec((size, *leaf.shape[1:]), np.float32 if leaf.dtype == np.uint8 else leaf.dtype)

        return jax.tree.map(row, dict(arrays))

    def _update(self, name: str, stage: StageConfig, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
        """The compiled update of a stage, and abstract arguments."""
        step, state, constants, outputs = self._step(name, stage)
        whole, by_batch = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        run, arrays = self.experiment.run, dict(self._dataset.train.arrays)
        if outputs is not None:
            size = len(self._dataset.train)
            arrays[teacher_cache.KEY] = jax.tree.map(lambda x: input_spec((size, *x.shape[1:]), x.dtype), outputs)
        resident: dict[str, Any] = {
            key: jax.ShapeDtypeStruct((len(self._dataset.mean),), jnp.float32) for key in ("mean", "std")
        }
        if self.scanned:
            resident["arrays"] = arrays
            indices = jax.ShapeDtypeStruct((run.steps_per_dispatch, stage.batch_size), jnp.int32)
            batch: Any = _abstract(indices, NamedSharding(mesh, PartitionSpec(None, "data")))
        else:
            rows = jax.tree.map(lambda x: input_spec((stage.batch_size, *x.shape[1:]), x.dtype), arrays)
            batch = _abstract(rows, by_batch)
        shardings, fixed = (shardings_of(tree, mesh, run.shard) for tree in (state, constants))
        update = loop.make_update(step, mesh, self.experiment.data, run.seed, scanned=self.scanned, shardings=shardings)
        return update, (_abstract(state, shardings), batch, _abstract(resident, whole), _abstract(constants, fixed))

    def _forward(self, module: Any, mesh: Mesh, batch: int) -> tuple[Any, tuple[Any, ...]]:
        whole, by_batch = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        function = inference(module, json.dumps(self.call.to_json()))
        return function, (_abstract(self._shapes(module), whole), _abstract(self.call.example(batch), by_batch))


def _abstract(tree: Any, sharding: Any) -> Any:
    """The shapes of a tree in one sharding, or in a tree of them."""
    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, NamedSharding) else sharding
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
