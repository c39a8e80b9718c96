"""A teacher's weights out of what users have: the same numbers by every road, and both sides where they do not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import serialization

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.runs import teacher_weights
from kdsearch_jax.storage.arrays import flatten

CALL = CallSpec(("x",), {"x": jax.ShapeDtypeStruct((5,), jnp.float32)})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(not train, name="bn")(nn.Dense(4, name="hidden")(x))
        self.sow("intermediates", "seen", x)
        return nn.Dense(3, name="out")(x)


class Other(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.Dense(6, name="first")(x))


def variables():
    shapes = teacher_weights.without_sown(jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((2, 5))))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes)


def saved(tree, path):
    with ocp.StandardCheckpointer() as store:
        store.save(path, tree)
    return path


def write(kind, directory):
    """The file or directory that a user of `kind` has."""
    tree = variables()
    if kind == "standard":
        return saved(tree, directory / "x")
    if kind == "pytree":
        with ocp.PyTreeCheckpointer() as store:
            store.save(directory / "x", tree)
        return directory / "x"
    if kind == "train state":
        return saved(
            {"step": 3, **tree, "opt_state": [{"mu": tree["params"]}, {"nu": tree["params"]}]}, directory / "x"
        )
    if kind == "variables as params":
        return saved({"params": tree, "step": 1}, directory / "x")
    if kind == "nnx":
        values = jax.tree.map(lambda leaf: {"value": leaf}, {k: {**tree["params"][k]} for k in tree["params"]})
        values["bn"] |= jax.tree.map(lambda leaf: {"value": leaf}, tree["batch_stats"]["bn"])
        return saved({"model": values}, directory / "x")
    if kind == "manager":
        with ocp.CheckpointManager(directory / "x") as manager:
            manager.save(2, args=ocp.args.StandardSave(jax.tree.map(jnp.zeros_like, tree)))
            manager.save(11, args=ocp.args.StandardSave(tree))
        return directory / "x"
    if kind == "msgpack":
        (directory / "x.msgpack").write_bytes(serialization.to_bytes(tree))
        return directory / "x.msgpack"
    assert kind == "safetensors"
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}
    safetensors.numpy.save_file(arrays, directory / "x.safetensors")
    return directory / "x.safetensors"


KINDS = ("standard", "pytree", "train state", "variables as params", "nnx", "manager", "msgpack", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_found_wherever_they_lie(kind, tmp_path):
    found = teacher_weights.load_weights(write(kind, tmp_path), Net(), CALL)
    assert jax.tree.structure(found) == jax.tree.structure(variables())
    jax.tree.map(np.testing.assert_array_equal, found, variables())


def test_another_network_lists_both_sides(tmp_path):
    with pytest.raises(ValueError, match=r"needs params/first/bias \(6,\).*there is .*params/hidden/kernel \(5, 4\)"):
        teacher_weights.load_weights(write("standard", tmp_path), Other(), CALL)


def test_statistics_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"needs batch_stats/bn/mean \(4,\), batch_stats/bn/var \(4,\)"):
        teacher_weights.load_weights(saved(variables()["params"], tmp_path / "x"), Net(), CALL)


def test_values_that_are_not_finite_are_named():
    broken = jax.tree.map(lambda leaf: leaf, variables())
    broken["params"]["out"]["bias"] = broken["params"]["out"]["bias"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="params/out/bias "):
        teacher_weights.match_variables(broken, Net(), CALL, "here")


def test_what_is_nothing_of_the_kind_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.msgpack").write_bytes(b"\xc1\x00")
    (tmp_path / "c.safetensors").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    for name, match in {
        "a.txt": "a.txt",
        "b.msgpack": "msgpack",
        "c.safetensors": "complete",
        "empty": "empty",
    }.items():
        with pytest.raises(ValueError, match=match):
            teacher_weights.load_weights(tmp_path / name, Net(), CALL)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        teacher_weights.load_weights(tmp_path / "nowhere", Net(), CALL)
