"""Objective: how networks are called, how student and teacher are compared, and what is measured.

`infer_objective` inspects a network's outputs, any pytree, and the data, and decides how to compare each output:

    class logits      the only output, (batch, classes) or (batch, …, classes), if the data have integer `labels` of the
                      same shape without the last axis: the distillation loss of `kdsearch_jax.distill.losses`, mean
                      over positions. Only these have an accuracy.
    logits            outputs named by `distill.logits`: KL over the last axis, mean over positions
    values            any other floating-point output: squared error over the variance of the teacher's output; entries
                      that teacher or student mask (-inf, -1e9 and the like, see `mask_bounds`) are left out
    left out          integers and booleans, which have no gradient

The distance is the sum over all outputs. A user's loss, `loss(student_outputs, teacher_outputs, batch)`, replaces it
and returns one number per example, (batch,), or one for the batch. A user's `metrics(outputs, batch)` returns
{name: (batch,)}. The decisions are logged and stored (`Objective.describe`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.call_spec import CallSpec, input_spec
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.data.streaming import Column
from kdsearch_jax.distill import losses
from kdsearch_jax.distill.metrics import agreement, top_k
from kdsearch_jax.distill.settings import DistillConfig, loss_weights

Loss = Callable[[Any, Any, Mapping[str, Any]], Array]
Metrics = Callable[[Any, Mapping[str, Any]], Mapping[str, Array]]
SIZES = 2, 3  # two batch sizes, to recognise the batch axis


@dataclass(frozen=True)
class Output:
    """One array of the outputs and how it is compared.

    Attributes:
      scale: of `values`, the variance of the teacher's.
      bounds: of `values`, those outside of which an entry is masked.
    """

    path: str
    kind: Literal["classes", "logits", "values", "left out"]
    scale: float = 1.0
    bounds: tuple[float, float] = (-math.inf, math.inf)


@dataclass(frozen=True, eq=False)
class Objective:
    """How a network is called and how its outputs are compared. Batches are {entry: pytree of arrays}.

    Attributes:
      loss, metrics: the user's functions, or None.
    """

    call: CallSpec
    distill: DistillConfig
    outputs: tuple[Output, ...]
    loss: Loss | None = None
    metrics: Metrics | None = None

    @property
    def classes(self) -> bool:
        """Whether the only output is class logits with known `labels`."""
        return len(self.outputs) == 1 and self.outputs[0].kind == "classes"

    def distance(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> Array:
        """The distance of student and teacher: (batch,), or () if a user's loss is one number for a batch."""
        if self.loss is not None:
            return self.loss(student, teacher, batch)
        if self.classes:
            pair = self.logits(student), self.logits(teacher)
            return _per_example(losses.distillation(*pair, batch["labels"], self.distill))
        pairs = zip(self.outputs, jax.tree.leaves(student), jax.tree.leaves(teacher), strict=True)
        return sum(self._compare(output, *pair) for output, *pair in pairs if output.kind != "left out")  # type: ignore

    def logits(self, outputs: Any) -> Array:
        """The class logits, the only array of the outputs."""
        return jax.tree.leaves(outputs)[0]

    def _compare(self, output: Output, student: Array, teacher: Array) -> Array:
        if output.kind == "values":
            return _squared_error(student, teacher, output.bounds) / output.scale
        config = self.distill
        return config.temperature**2 * _per_example(losses.kl(student, teacher, config.temperature, config.direction))

    def supervised(self, outputs: Any, batch: Mapping[str, Any]) -> Array:
        """(batch,) cross-entropy with the labels. Raises ValueError if there are none."""
        if not self.classes:
            raise ValueError("teacher: only networks of class logits with labels can be trained; give a trained one")
        return _per_example(losses.cross_entropy(self.logits(outputs), batch["labels"]))

    def accuracy(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Array]:
        """{"accuracy": (batch, …) bool}, or {} if the outputs are not class logits."""
        return {"accuracy": top_k(self.logits(outputs), batch["labels"], 1) > 0} if self.classes else {}

    def agreement(self, outputs: Any, target: Any) -> dict[str, Array]:
        """{"agreement": (batch, …) bool}: whether the top class is the teacher's; {} without classes."""
        return {"agreement": agreement(self.logits(outputs), self.logits(target)) > 0} if self.classes else {}

    def measure(self, outputs: Any, batch: Mapping[str, Any], target: Any = None) -> dict[str, Array]:
        """All metrics, (batch,) each, except for () for the distance of a loss that is one number for a batch.

        For classes "accuracy" and "loss" (cross-entropy). If `target` holds the teacher's outputs, "distance", and for
        classes "agreement" and "kl". The user's metrics.
        """
        found = {name: _per_example(value.astype(jnp.float32)) for name, value in self.accuracy(outputs, batch).items()}
        if self.classes:
            found["loss"] = self.supervised(outputs, batch)
        if target is not None:
            found["distance"] = self.distance(outputs, target, batch)
            if self.classes:
                pair = self.logits(outputs), self.logits(target)
                found["agreement"] = _per_example(agreement(*pair))
                found["kl"] = _per_example(losses.kl(*pair))
        return {**found, **self._user_metrics(outputs, batch)}

    def _user_metrics(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Array]:
        if self.metrics is None:
            return {}
        found = _call_user_function("metrics", self.metrics, outputs, batch)
        size = len(jax.tree.leaves(batch)[0])
        if not isinstance(found, Mapping) or not all(jnp.shape(value) == (size,) for value in found.values()):
            raise ValueError(
                f"metrics: {_function_name(self.metrics)} returned {_shapes(found)}; it must return one number per "
                f"example, {{name: ({size},)}}"
            )
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    def describe(self) -> str:
        """One line that says what is compared, and how."""
        if self.loss is not None:
            return f"student and teacher are compared by {_function_name(self.loss)}"
        parts = [part for part in self.distill.losses if part != "kl"] if self.classes else []
        kl = f"{' + '.join(self.distill.losses) if parts else 'KL'} at temperature {self.distill.temperature:g}"
        names = {"classes": f"class logits by {kl}", "logits": f"by {kl}", "left out": "not at all (no floating point)"}
        how = [
            f"{output.path} {names.get(output.kind, f'by squared error over its variance, {output.scale:.3g}')}"
            for output in self.outputs
        ]
        return f"student and teacher are compared in {'; '.join(how)}"


def classification(distill: DistillConfig, call: CallSpec | None = None) -> Objective:
    """The objective of class logits (batch, classes) with labels; call: by default, with images."""
    losses.check(distill)
    return Objective(call or CallSpec.of_image(()), distill, (Output("output", "classes"),))


def infer_objective(
    module: Any,
    variables: Any,
    call: CallSpec,
    dataset: Dataset,
    distill: DistillConfig,
    loss: Loss | None = None,
    metrics: Metrics | None = None,
) -> Objective:
    """The objective of a network on a data set.

    Args:
      variables: arrays or shapes.
      loss, metrics: the user's functions; by default those that `distill` names, as `package.module:function`.

    Raises:
      ValueError: an output has no batch axis, labels are out of range, a pattern of `distill.logits` matches no output,
        nothing can be compared, or a user's loss or metric returns the wrong shapes.
    """
    losses.check(distill)
    loss = loss or import_function("distill.loss", distill.loss)
    metrics = metrics or import_function("distill.metrics", distill.metrics)

    def run(variables: Any, *inputs: Any) -> Any:
        return apply_eval(module, variables, inputs, call_spec=call)

    small, large = (jax.eval_shape(run, variables, *call.example(n)) for n in SIZES)
    leaves = [(_path(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(small)[0]]
    for (path, leaf), other in zip(leaves, jax.tree.leaves(large), strict=True):
        batched = leaf.shape[:1] == SIZES[:1] and other.shape[:1] == SIZES[1:] and leaf.shape[1:] == other.shape[1:]
        if not batched and loss is None and jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"outputs: {path} has the shape {leaf.shape} for a batch of {SIZES[0]} and {other.shape} for one of "
                f"{SIZES[1]}; the leading axis must be the batch, or give a loss of your own"
            )
    outputs = _outputs(leaves, dataset, distill, loss)
    if loss is None and not any(output.kind != "left out" for output in outputs):
        raise ValueError(f"outputs: {_shapes(small)} has no floating-point array to compare; give a loss of your own")
    objective = Objective(call, distill, outputs, loss, metrics)
    _check_losses(objective)
    _check_user_functions(objective, small, dataset)
    return objective


def with_output_scales(objective: Objective, target: Any) -> Objective:
    """The objective with the variance and mask bounds of a teacher's outputs on a batch.

    Raises:
      ValueError: the teacher's outputs contain NaN, or are all infinite.
    """
    outputs = []
    for output, leaf in zip(objective.outputs, map(np.asarray, jax.tree.leaves(target)), strict=True):
        if leaf.dtype.kind == "f" and leaf.size and (np.isnan(leaf).any() or not np.isfinite(leaf).any()):
            raise ValueError(
                f"teacher: its output {output.path} is not finite; check that it is trained, and its preprocessing"
            )
        if output.kind == "values":
            values = leaf[np.isfinite(leaf)].astype(np.float64)
            low, high = mask_bounds(values)
            spread = float(values[(values > low) & (values < high)].var()) if values.size else 0.0
            output = dataclasses.replace(output, scale=spread if spread > 1e-12 else 1.0, bounds=(low, high))
        outputs.append(output)
    return dataclasses.replace(objective, outputs=tuple(outputs))


def mask_bounds(values: np.ndarray) -> tuple[float, float]:
    """The bounds outside of which values are masks; infinite if there are none.

    A mask is two or more values beyond 1e3 that are farther from all others than 100 times the range of these: -1e9 or
    -1e4 among logits, whether it replaced a logit or was added to one.

    Args:
      values: any shape, finite.
    """
    left, low, high = np.sort(values, axis=None), -math.inf, math.inf
    while len(left) > 2:
        gaps = np.diff(left)
        below, above = np.where(left[:-1] < -1e3, gaps, 0.0), np.where(left[1:] > 1e3, gaps, 0.0)
        below[0] = above[-1] = 0.0  # a single value is not a mask
        from_below = below.max() >= above.max()
        at = int((below if from_below else above).argmax())
        middle, rest = float(left[at] + left[at + 1]) / 2, left[at + 1 :] if from_below else left[: at + 1]
        if gaps[at] <= 100 * (rest[-1] - rest[0]) or not max(below[at], above[at]):
            break
        low, high, left = (middle, high, rest) if from_below else (low, middle, rest)
    return low, high


def check_user_loss(objective: Objective, target: Any, batch: Mapping[str, Any]) -> None:
    """Raises ValueError if a user's loss or its gradient is not finite for a student that equals its teacher."""

    def loss(outputs: Any) -> Array:
        return jnp.mean(objective.distance(outputs, target, batch))

    if objective.loss is None:
        return
    value, gradient = jax.value_and_grad(loss, allow_int=True)(target)
    if not np.isfinite(value):
        raise ValueError(
            f"loss: {_function_name(objective.loss)} is {value} where student and teacher agree; it must be finite"
        )
    broken = [leaf for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not all(np.isfinite(leaf).all() for leaf in broken):
        raise ValueError(
            f"loss: the gradient of {_function_name(objective.loss)} is not finite where student and teacher "
            "agree, like that of a square root or a norm at 0; add a small number under it"
        )


def import_function(setting: str, name: str | None) -> Any:
    """The function that `package.module:function` names; None for None. Raises ValueError if there is none."""
    if name is None:
        return None
    package, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*package.split("."), attribute]):
        raise ValueError(f"{setting}: {name!r} must read package.module:function")
    try:
        found = getattr(importlib.import_module(package), attribute, None)
    except ImportError as error:
        raise ValueError(f"{setting}: importing {package!r} failed ({error}); add its folder to PYTHONPATH") from error
    if not callable(found):
        raise ValueError(f"{setting}: {package!r} has no function {attribute!r}")
    return found


def _outputs(leaves: list[tuple[str, Any]], dataset: Dataset, distill: DistillConfig, loss: Any) -> tuple[Output, ...]:
    paths = [path for path, _ in leaves]
    for pattern in distill.logits:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(f"distill.logits: {pattern!r} matches no output; outputs are {', '.join(paths)}")
    outputs = []
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            outputs.append(Output(path, "left out"))
        elif len(leaves) == 1 and _has_class_labels(leaf, dataset, strict=loss is None):
            outputs.append(Output(path, "classes"))
        elif any(fnmatch.fnmatchcase(path, pattern) for pattern in distill.logits):
            outputs.append(Output(path, "logits"))
        else:
            outputs.append(Output(path, "values"))
    return tuple(outputs)


def _has_class_labels(leaf: Any, dataset: Dataset, strict: bool) -> bool:
    """Whether the labels are classes of this output, one per position; out of range, an error if `strict`."""
    labels = dataset.train.arrays.get("labels")
    if not isinstance(labels, (np.ndarray, Column)) or labels.dtype.kind not in "iu" or leaf.ndim < 2:
        return False
    if labels.shape[1:] != leaf.shape[1:-1]:
        return False
    if isinstance(labels, Column):  # checked when they are read
        low, high = 0, dataset.num_classes - 1
    else:
        every = [split.arrays["labels"] for split in (dataset.train, dataset.validation, dataset.test)]
        low, high = min(each.min() for each in every), max(each.max() for each in every)
    if low >= 0 and high < leaf.shape[-1]:
        return True
    if strict:
        raise ValueError(
            f"labels: from {low} to {high}, but the network has {leaf.shape[-1]} classes, 0 to {leaf.shape[-1] - 1}; "
            "renumber them, or rename the entry and give a loss of your own"
        )
    return False


def _check_losses(objective: Objective) -> None:
    """Raises ValueError if losses, or several teachers, need class logits with labels and there are none."""
    distill = objective.distill
    asked = {**loss_weights(distill.losses), **loss_weights(distill.retrain_losses or ("kl",))}
    others = [name for name in asked if name != "kl"]
    alone = objective.classes and objective.loss is None
    if others and not alone:
        raise ValueError(
            f"distill.losses: {others[0]} is for networks whose only output is class logits, with labels in the data; "
            "use kl, which stands for the default comparison of these outputs, or give a loss of your own"
        )
    if distill.teachers and not alone:
        raise ValueError(
            "distill.teachers: only class logits with labels can be averaged over teachers; give one teacher"
        )


def _check_user_functions(objective: Objective, outputs: Any, dataset: Dataset) -> None:
    """Raises ValueError if a user's function returns the wrong shapes; nothing is computed."""
    size = SIZES[0]
    batch = jax.tree.map(lambda leaf: input_spec((size, *leaf.shape[1:]), leaf.dtype), dataset.train.arrays)
    if "images" in batch and "images" in objective.call.inputs:
        batch["images"] = jax.ShapeDtypeStruct(batch["images"].shape, objective.call.inputs["images"].dtype)
    if (loss := objective.loss) is not None:
        found = _call_user_function(
            "loss", lambda *a: jax.eval_shape(loss, *a), outputs, outputs, batch, name=objective.loss
        )
        shape = getattr(found, "shape", None)
        if shape not in ((), (size,)) or not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(
                f"loss: {_function_name(objective.loss)} returned {_shapes(found)}; it must return one number per "
                f"example, ({size},) for a batch of {size}, or one for the batch, (), in floating point"
            )
    if objective.metrics is not None:
        jax.eval_shape(objective._user_metrics, outputs, batch)


def _call_user_function(what: str, function: Any, *args: Any, name: Any = None) -> Any:
    try:
        return function(*args)
    except ValueError:
        raise
    except Exception as error:  # of any kind: it is a user's function
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        takes = "(student_outputs, teacher_outputs, batch)" if what == "loss" else "(outputs, batch)"
        raise ValueError(
            f"{what}: {_function_name(name or function)}{takes} failed: {type(error).__name__}: {line[:200]}; "
            f"the batch has {', '.join(args[-1])}"
        ) from error


def _squared_error(student: Array, teacher: Array, bounds: tuple[float, float]) -> Array:
    """(batch,) mean squared error over the entries that neither network masks; NaN is not a mask."""
    low, high = bounds
    masked = (student <= low) | (student >= high) | (teacher <= low) | (teacher >= high)
    error = jnp.square(jnp.where(masked, 0.0, student) - jnp.where(masked, 0.0, teacher))
    axes = tuple(range(1, error.ndim))
    return error.sum(axes) / jnp.maximum((~masked).sum(axes), 1)


def _per_example(values: Array) -> Array:
    """(batch,) means of (batch, …)."""
    return values.mean(range(1, values.ndim)) if values.ndim > 1 else values


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "output"


def _function_name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _shapes(tree: Any) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    described = (
        f"{_path(path)}: {getattr(leaf, 'dtype', type(leaf).__name__)}{getattr(leaf, 'shape', '')}"
        for path, leaf in leaves
    )
    return "{" + ", ".join(described) + "}"
