"""The whole search in one compiled call, inside `jax.lax.scan`: `python examples/scanned_loop.py`."""

import data
import jax
import jax.numpy as jnp
import optax

import kdsearch_jax as kd


def main(steps: int = 200):
    model = data.MLP()
    example = next(data.batches(1, 256, seed=1))
    variables = model.init(jax.random.key(0), example["x"][:1])
    search = kd.GatedSearch(kd.trace(model, example["x"]), kd.Budget(params=0.4), steps=steps)
    tx = search.optimizer(optax.adamw(3e-3))

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(
            lambda params: data.cross_entropy(model.apply(search.fold(params), batch["x"]), batch)
        )(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *data.batches(steps))
    params = search.init(variables)
    (params, state), losses = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows))(
        (params, tx.init(params)), stacked
    )
    student = search.finish(params, state, example["x"])
    right = data.accuracy(student.module.apply(student.variables, example["x"]), example)
    share = student.params / search.network.topology.total()[1]
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}, {share:.3f} of the parameters, accuracy {right:.3f}")
    return student, share


if __name__ == "__main__":
    main()
