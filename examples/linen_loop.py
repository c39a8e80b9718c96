"""The search in an ordinary Linen loop with BatchNorm: `python examples/linen_loop.py` (a laptop, half a minute).

`params` are {"params": weights, "gates": …}. Statistics stay where a Linen user has them, beside the parameters, and
are handed to `search.fold` and `search.finish`.
"""

import data
import jax
import optax

import kdsearch_jax as kd
from kdsearch_jax.adapters import registry


def main(steps: int = 300):
    model = registry.build("small_cnn", {"num_classes": 10, "width": 8})
    example = next(data.batches(1, 256, seed=1))
    variables = model.init(jax.random.key(0), example["x"][:1], train=False)

    network = kd.trace(model, example["x"], train=False)
    search = kd.GatedSearch(network, kd.Budget(macs=0.5), steps=steps, rules=[kd.Rule("dense/bias", freeze=True)])
    params, stats = search.init(variables), variables["batch_stats"]
    tx = search.optimizer(optax.adamw(3e-3))
    state = tx.init(params)

    @jax.jit
    def step(params, stats, state, batch):
        def loss(params):
            folded = search.fold(params, batch_stats=stats)
            logits, new = model.apply(folded, batch["x"], train=True, mutable=["batch_stats"])
            return data.cross_entropy(logits, batch), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    for number, batch in enumerate(data.batches(steps)):
        params, stats, state = step(params, stats, state, batch)
        if number % 50 == 49:
            print(search.progress(state))

    student = search.finish(params, state, example["x"], batch_stats=stats)
    module, variables = student
    right = data.accuracy(module.apply(variables, example["x"], train=False), example)
    macs = student.macs / network.topology.total()[0]
    print(f"{macs:.3f} of the MACs, {student.params:,} parameters, accuracy {right:.3f}")
    return student, macs


if __name__ == "__main__":
    main()
