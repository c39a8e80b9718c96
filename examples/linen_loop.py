"""The search in an ordinary Linen loop with BatchNorm: `python examples/linen_loop.py` (half a minute on a laptop).

`params` is {"params": weights, "gates": …}. Batch statistics stay a separate collection, as in any Linen loop, and
are passed to `search.fold` and `search.finish`.
"""

import data
import flax.linen as nn
import jax
import optax

import kdsearch_jax as kd


class CNN(nn.Module):
    """Two convolutions and a residual block, with BatchNorm."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = self.unit(x, 8, "conv1", train)
        x = self.unit(x, 16, "conv2", train)
        x = nn.relu(x + nn.Conv(16, (3, 3), name="conv4")(self.unit(x, 16, "conv3", train)))
        return nn.Dense(10, name="dense")(x.mean((1, 2)))

    def unit(self, x, features, name, train):
        """Convolution, BatchNorm, relu."""
        x = nn.Conv(features, (3, 3), use_bias=False, name=name)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, name=f"{name}_norm")(x))


def main(steps: int = 300):
    model = CNN()
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
