"""A search with a distillation trainer that knows nothing about pruning: `python examples/distillation_trainer.py`.

`Trainer` stands for any existing trainer: it takes a student as a function of parameters, a teacher and an optax
transformation. It needs no change for a search. Its parameters are the search's, its student function folds the
gates, and its optimiser is `search.optimizer(…)`, with clipping, schedules and accumulation around it or inside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import data
import jax
import optax

import kdsearch_jax as kd


@dataclass
class Trainer:
    """A minimal trainer; student: (params, x) → logits, teacher: x → logits."""

    student: Callable[[Any, Any], Any]
    teacher: Callable[[Any], Any]
    tx: optax.GradientTransformation

    def fit(self, params: Any, batches: Any) -> tuple[Any, Any]:
        """Returns the parameters and the optimiser state after all batches."""
        state = self.tx.init(params)

        @jax.jit
        def step(params, state, batch):
            target = self.teacher(batch["x"])
            grads = jax.grad(lambda params: data.kl(self.student(params, batch["x"]), target))(params)
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for batch in batches:
            params, state = step(params, state, batch)
        return params, state


def main(steps: int = 300):
    model = data.MLP()
    example = next(data.batches(1, 256, seed=1))
    variables = model.init(jax.random.key(0), example["x"][:1])

    network = kd.trace(model, example["x"])
    search = kd.GatedSearch(network, kd.Budget(macs=0.4), steps=steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), search.optimizer(optax.adamw(optax.cosine_decay_schedule(3e-3, steps)))
    )
    trainer = Trainer(
        student=lambda params, x: model.apply(search.fold(params), x),
        teacher=lambda x: model.apply(variables, x),
        tx=tx,
    )
    params, state = trainer.fit(search.init(variables), data.batches(steps))
    student = search.finish(params, state, example["x"])

    target = model.apply(variables, example["x"])
    kept = float(data.kl(student.module.apply(student.variables, example["x"]), target))
    macs = student.macs / network.topology.total()[0]
    print(f"{macs:.3f} of the MACs, KL to the teacher {kept:.5f}")
    return student, macs


if __name__ == "__main__":
    main()
