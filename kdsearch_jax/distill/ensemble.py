"""Several teachers as one: the mean of their outputs.

    probabilities   softmax(z/T) = 1/n Σ softmax(z_i/T): the mean of the softened predictions, which is what the student
                    would learn from all of them in turn (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)
    logits          z = 1/n Σ z_i: their geometric mean, sharper where they agree

Either way the result is logits z, which every loss takes like those of one teacher; classes that any teacher has masked
are -inf. The first teacher is the one that is searched, and whose features are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.data.batches import is_image
from kdsearch_jax.data.examples import Dataset
from kdsearch_jax.distill import losses

Ensemble = Literal["probabilities", "logits"]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network; info: may contain `mean` and `std`, by which its images were normalised."""

    module: Any
    variables: Any
    call: CallSpec
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TeacherModule:
    """A teacher without its variables; scale, shift: from the run's normalised images to its own."""

    module: Any
    call: CallSpec
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None

    @staticmethod
    def of(teacher: Teacher, dataset: Dataset) -> TeacherModule:
        """A teacher's module on a data set."""
        mean, std = teacher.info.get("mean"), teacher.info.get("std")
        images = is_image("images", dataset.train.arrays.get("images"))
        if not mean or not std or not images or (tuple(mean), tuple(std)) == (dataset.mean, dataset.std):
            return TeacherModule(teacher.module, teacher.call)
        # (image − m)/s = ((image − mean)/std)·(std/s) + (mean − m)/s
        scale = tuple(a / b for a, b in zip(dataset.std, std, strict=True))
        shift = tuple((a - b) / s for a, b, s in zip(dataset.mean, mean, std, strict=True))
        return TeacherModule(teacher.module, teacher.call, scale, shift)

    def outputs(self, variables: Any, batch: Mapping[str, Any], precision: str) -> Any:
        """The teacher's outputs, in inference mode."""
        if self.scale is not None and self.shift is not None:
            row = (1,) * (batch["images"].ndim - 1) + (-1,)
            scale, shift = (np.array(each, np.float32).reshape(row) for each in (self.scale, self.shift))
            images = batch["images"] * scale + shift
            batch = {**batch, "images": images}
        return apply_eval(self.module, variables, self.call.bind(batch), precision, self.call)


def mean(outputs: Sequence[Any], how: Ensemble, temperature: float) -> Any:
    """The outputs of several teachers as those of one, of the structure of the first's; logits (…, classes) each.

    Raises:
      ValueError: their numbers of classes differ.
    """
    if len(outputs) == 1:
        return outputs[0]
    every = [jax.tree.leaves(each)[0] for each in outputs]
    if len({each.shape for each in every}) > 1:
        raise ValueError(
            f"distill.teachers: outputs of the shapes {', '.join(str(x.shape) for x in every)} have no mean"
        )
    structure = jax.tree.structure(outputs[0])
    return jax.tree.unflatten(structure, [_mean(jnp.stack(every), how, temperature)])


def _mean(logits: Array, how: Ensemble, temperature: float) -> Array:
    kept = losses.unmasked(*logits)
    if how == "logits":
        found = logits.mean(0)
    else:
        softened = jax.nn.log_softmax(jnp.where(kept[None], logits / temperature, -1e9))
        found = temperature * (jax.nn.logsumexp(softened, axis=0) - np.log(len(logits)))
    return jnp.where(kept, found, -jnp.inf)
