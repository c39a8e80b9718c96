"""The search for NNX: the user's model with gates is a module like any other."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import kdsearch_jax as kd
from kdsearch_jax.pruning.transform import flatten

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::kdsearch_jax.pruning.budgets.BudgetWarning"),
]

X = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
STEPS = 24


class Net(nnx.Module):
    """Has BatchNorm, dropout, a list of blocks and a method besides its call."""

    def __init__(self, width, rngs):
        self.stem = nnx.Linear(5, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x):
        return self.head(self.features(x))


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.norm = nnx.BatchNorm(4 * width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.narrow(self.drop(nnx.relu(self.norm(self.wide(x)))))


def model():
    return Net(8, nnx.Rngs(0))


@cache
def search_of():
    return kd.GatedSearch(kd.trace(model(), X), kd.Budget(macs=0.5), steps=STEPS, every=3)


@nnx.jit
def step(gated, optimizer, x):
    grads = nnx.grad(lambda gated: jnp.mean(jnp.square(gated(x) - jnp.sin(x[:, :3]))))(gated)
    optimizer.update(gated, grads)


def start():
    gated = search_of().init(model())
    return gated, nnx.Optimizer(gated, search_of().optimizer(optax.adamw(3e-3)), wrt=nnx.Param)


@cache
def searched():
    gated, optimizer = start()
    for _ in range(STEPS):
        step(gated, optimizer, X)
    return gated, optimizer


def test_a_search_by_the_usual_loop_gives_back_a_module_of_its_class():
    net, search = model(), search_of()
    gated, optimizer = searched()
    student = search.finish(gated, optimizer, X)
    assert type(student.module) is Net and student.macs <= 0.5 * search.network.topology.total()[0]
    assert sum(block.wide.out_features for block in student.module.blocks) < 64
    gated.eval()
    student.module.eval()
    expected = gated(X)
    np.testing.assert_allclose(student.module(X), expected, atol=1e-5 * np.abs(expected).max())
    by_parts = gated.folded()
    np.testing.assert_allclose(by_parts.head(by_parts.features(X)), expected, rtol=1e-6)
    gated.train()
    before, after = net.blocks[0].norm.mean.get_value(), gated.model.blocks[0].norm.mean.get_value()
    assert not np.array_equal(before, after)  # statistics have moved in the gated model, and not in the user's


def test_at_first_it_is_the_model_and_leaves_that_alone():
    net = model()
    gated = search_of().init(net)
    net.eval()
    gated.eval()
    np.testing.assert_array_equal(gated(X), net(X))
    step(*start(), X)
    gated.train()
    gated(X)
    assert net.blocks[0].norm.mean.get_value().max() == 0.0


def test_the_functional_loop_is_the_same_search():
    search = search_of()
    gated, optimizer = start()
    graph, params, rest = nnx.split(search.init(model()), nnx.Param, ...)
    tx = search.optimizer(optax.adamw(3e-3))
    state = tx.init(params)

    @jax.jit
    def update(params, rest, state):
        def loss(params):
            gated = nnx.merge(graph, params, rest, copy=True)
            value = jnp.mean(jnp.square(gated(X) - jnp.sin(X[:, :3])))
            return value, nnx.state(gated, nnx.Not(nnx.Param))

        grads, rest = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state

    for _ in range(8):
        params, rest, state = update(params, rest, state)
        step(gated, optimizer, X)
    a = flatten(nnx.as_pure(params)["gates"], search.topology)
    b = flatten(nnx.as_pure(nnx.state(gated, nnx.Param))["gates"], search.topology)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_modules_and_optimizers_are_saved_as_any_other(tmp_path):
    gated, optimizer = start()
    for _ in range(5):
        step(gated, optimizer, X)
    pure = nnx.to_pure_dict(nnx.state((gated, optimizer), nnx.Not(nnx.RngState)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", pure)
    jax.tree.map(np.testing.assert_array_equal, restored, pure)


def test_what_is_pruned_at_once_and_saved_is_a_module_too(tmp_path):
    net = model()
    network = kd.trace(net, X)
    student = kd.prune(network, net, kd.magnitude(), kd.Budget(macs=0.5), X)
    assert type(student.module) is Net and student.difference <= 1e-5
    kd.save(student, tmp_path / "student")
    loaded, variables = kd.load(tmp_path / "student", module=net)
    assert type(loaded) is Net and "params" in variables
    loaded.eval()
    student.module.eval()
    np.testing.assert_array_equal(loaded(X), student.module(X))
    assert kd.verify(network, net, student, X) <= 1e-5
    assert net.blocks[0].wide.out_features == 32


def test_what_is_learned_by_a_loss_prunes_a_module():
    net = model()
    network = kd.trace(net, X)

    def loss(variables, batch):
        return jnp.mean(jnp.square(network.module.apply(variables, batch)))

    student = kd.prune(network, net, kd.fisher(loss, [X]), kd.Budget(macs=0.5), X)
    assert student.macs <= 0.5 * network.topology.total()[0]


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="traced"):
        search_of().init(Net(6, nnx.Rngs(0)))
    gated, optimizer = start()
    with pytest.raises(ValueError, match="budget after"):
        search_of().finish(gated, optimizer, X)
    with pytest.raises(ValueError, match=r"search\.init"):
        search_of().finish(model(), optimizer, X)
