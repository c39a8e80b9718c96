"""Several rounds of pruning and fine-tuning: `python examples/rounds.py`.

Each round traces the previous student like any other model, prunes it in one shot by the Fisher information of the
loss, and fine-tunes the result.
"""

import data
import jax
import optax

import kdsearch_jax as kd


def main(rounds: int = 3, steps: int = 100):
    module = data.MLP()
    example = next(data.batches(1, 256, seed=1))
    variables = module.init(jax.random.key(0), example["x"][:1])
    variables = train(module, variables, steps)
    costs = [kd.trace(module, example["x"]).topology.total()[0]]
    for number in range(rounds):

        def loss(variables, batch, module=module):
            return data.cross_entropy(module.apply(variables, batch["x"]), batch)

        network = kd.trace(module, example["x"])
        criterion = kd.fisher(loss, data.batches(4, seed=number))
        module, variables = student = kd.prune(network, variables, criterion, kd.Budget(macs=0.7), example["x"])
        variables = train(module, variables, steps)
        right = data.accuracy(module.apply(variables, example["x"]), example)
        print(f"round {number + 1}: {student.macs:,} MACs, accuracy {right:.3f}")
        costs.append(student.macs)
    return costs


def train(module, variables, steps):
    """Trains a module's parameters."""
    tx = optax.adamw(3e-3)

    @jax.jit
    def step(variables, state, batch):
        grads = jax.grad(lambda v: data.cross_entropy(module.apply(v, batch["x"]), batch))(variables)
        updates, state = tx.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for batch in data.batches(steps):
        variables, state = step(variables, state, batch)
    return variables


if __name__ == "__main__":
    main()
