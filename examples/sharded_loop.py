"""The search on several devices: `JAX_NUM_CPU_DEVICES=8 python examples/sharded_loop.py`.

The same search twice: with `jax.jit` over a mesh, where the compiler partitions the work, and with `jax.shard_map`,
where the loop does. Gates and the search's state are small and replicated; weights may be sharded as usual. Inside
`shard_map`, average the gradients over the devices before the update, as for any optimiser.
"""

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kdsearch_jax as kd


def main(steps: int = 60):
    model = data.MLP()
    example = next(data.batches(1, 64, seed=1))
    variables = model.init(jax.random.key(0), example["x"][:1])
    search = kd.GatedSearch(kd.trace(model, example["x"]), kd.Budget(macs=0.5), steps=steps, every=5)
    tx = search.optimizer(optax.sgd(0.05, momentum=0.9))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def step(params, state, batch, average=lambda value: value):
        def loss(params):
            # Inside shard_map the loss is averaged here, so that its gradient is that of the mean.
            return average(data.cross_entropy(model.apply(search.fold(params), batch["x"]), batch))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def by_hand(params, state, batch):
        return step(params, state, batch, lambda value: jax.lax.pmean(value, "data"))

    replicated, rows = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        by_hand, mesh=mesh, in_specs=(replicated, replicated, rows), out_specs=(replicated, replicated)
    )
    ways = {
        "jit": jax.jit(step, in_shardings=(whole, whole, shared), out_shardings=whole, donate_argnums=(0, 1)),
        "shard_map": jax.jit(mapped, donate_argnums=(0, 1)),
        "one device": jax.jit(step),
    }
    found = {}
    for name, update in ways.items():
        params = search.init(variables)
        state = tx.init(params)
        if name != "one device":
            params, state = jax.device_put((params, state), whole)
        for batch in data.batches(steps):
            params, state = update(params, state, batch)
        student = search.finish(params, state, example["x"])
        found[name] = np.asarray(jnp.concatenate(list(params["gates"].values()))), student
        print(f"{name}: {search.progress(state)}, {student.macs:,} MACs")
    return found


if __name__ == "__main__":
    main()
