"""The search in an ordinary NNX loop: `python examples/nnx_loop.py` (half a minute on a laptop).

`search.init(model)` is the model with gates, an ordinary nnx.Module: nnx.Optimizer, nnx.jit, nnx.grad and BatchNorm
work as usual. `search.finish` returns a module of the model's own class.
"""

import data
import optax
from flax import nnx

import kdsearch_jax as kd


class Net(nnx.Module):
    """A small residual network with BatchNorm."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.conv1 = nnx.Conv(width, 2 * width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2 * width, rngs=rngs)
        self.conv2 = nnx.Conv(2 * width, width, (3, 3), rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = x + self.conv2(nnx.relu(self.norm(self.conv1(x))))
        return self.head(nnx.relu(x).mean((1, 2)))


def train(model, optimizer, steps, loss_of):
    """An ordinary loop, used for the teacher and for the search."""

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(lambda model: loss_of(model(batch["x"]), batch))(model)
        optimizer.update(model, grads)

    for batch in data.batches(steps):
        step(model, optimizer, batch)


def main(steps: int = 300):
    model = Net(16, nnx.Rngs(0))
    train(model, nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param), steps, data.cross_entropy)

    x = next(data.batches(1, 256, seed=1))
    network = kd.trace(model, x["x"])
    search = kd.GatedSearch(network, kd.Budget(macs=0.5), steps=steps)
    gated = search.init(model)
    optimizer = nnx.Optimizer(gated, search.optimizer(optax.adamw(1e-3)), wrt=nnx.Param)
    train(gated, optimizer, steps, data.cross_entropy)
    student = search.finish(gated, optimizer, x["x"])

    model.eval()
    student.module.eval()
    right = data.accuracy(model(x["x"]), x), data.accuracy(student.module(x["x"]), x)
    macs = student.macs / network.topology.total()[0]
    print(f"{macs:.3f} of the MACs; accuracy: teacher {right[0]:.3f}, student {right[1]:.3f}")
    return student, macs


if __name__ == "__main__":
    main()
