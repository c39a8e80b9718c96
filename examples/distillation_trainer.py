"""A distillation trainer that knows nothing of pruning, used for a search: `python examples/distillation_trainer.py`.

`Trainer` stands for anybody's: it takes a student as a function of parameters, a teacher and an optax transformation.
A search needs no change in it: its parameters are those of the search, its function folds the gates, its optimiser is
`search.optimizer(…)`, with clipping, schedule and accumulation around or inside of it as ever.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import data
import jax
import optax

import kdsearch_jax as kd
from kdsearch_jax.adapters import registry


@dataclass
class Trainer:
    """student: (params, x) → logits; teacher: x → logits."""

    student: Callable[[Any, Any], Any]
    teacher: Callable[[Any], Any]
    tx: optax.GradientTransformation

    def fit(self, params: Any, batches: Any) -> tuple[Any, Any]:
        """(params, state of the optimiser) after all batches."""
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
    model = registry.build("mlp", {"num_classes": 10, "hidden": [64, 64]})
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
    print(f"{macs:.3f} of the MACs at a KL of {kept:.5f} to the teacher")
    return student, macs


if __name__ == "__main__":
    main()
