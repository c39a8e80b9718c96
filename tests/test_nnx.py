"""NNX modules are traced, pruned and proved like Linen modules; a student is a module of the user's own class."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from proof import ANY, groups, image, prove, random_gates, random_keep, reasons, traced

import kdsearch_jax
from kdsearch_jax import search
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.functional_module import FunctionalModule, Zeros
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import trace

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Mlp(nnx.Module):
    """With dropout, as in ordinary training code."""

    def __init__(self, width: int = 12, rate: float = 0.5, num_classes: int = 5, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.second = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.first(x))))


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(x + self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x))))))


class Cnn(nnx.Module):
    """Residual blocks in a list."""

    def __init__(self, width: int = 8, num_classes: int = 5, channels: int = 3, depth: int = 2, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(channels, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((1, 2))))


class Encoder(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, 24, decode=False, dropout_rate=0.1, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Vit(nnx.Module):
    def __init__(self, rngs):
        self.patch = nnx.Conv(3, 16, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (1, 4, 16)))
        self.encoder = nnx.Sequential(Encoder(16, rngs), nnx.relu)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], 4, -1) + self.position[...]
        return self.head(self.encoder(x).mean(1))


class Grouped(nnx.Module):
    """Depthwise and grouped convolutions, transposed ones, and a map of pixels as output."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 12, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(12, 12, (3, 3), feature_group_count=12, rngs=rngs)
        self.grouped = nnx.Conv(12, 16, (3, 3), feature_group_count=4, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.flipped = nnx.ConvTranspose(6, 8, (3, 3), strides=(1, 1), transpose_kernel=True, rngs=rngs)
        self.masked = nnx.Conv(11, 4, (3, 3), mask=jnp.ones((3, 3, 11, 4)), rngs=rngs)
        self.last = nnx.Conv(4, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.depthwise(nnx.relu(self.stem(x))))
        y = nnx.relu(self.flipped(nnx.relu(self.up(nnx.relu(self.grouped(y))))))
        return self.last(nnx.relu(self.masked(jnp.concatenate([x, y], -1))))


class Adapted(nnx.Module):
    """Low-rank adapters, general layers, arrays that are no Variables, and a bare parameter."""

    def __init__(self, rngs):
        self.lora = nnx.LoRALinear(6, 10, lora_rank=3, rngs=rngs)
        self.split = nnx.LinearGeneral(10, (2, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 4), 9, axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("bi,io->bo", (9, 7), (7,), rngs=rngs)
        self.scale = jnp.linspace(1.0, 2.0, 9)[None]
        self.own = nnx.Param(jax.random.normal(rngs.params(), (7, 5)))
        self.head = nnx.LoRA(5, 2, 3, base_module=nnx.Linear(5, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.join(nnx.relu(self.split(nnx.relu(self.lora(x)))))) * self.scale
        return self.head(nnx.relu(nnx.relu(self.einsum(x)) @ self.own))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.lstm = nnx.RNN(nnx.LSTMCell(6, 8, rngs=rngs))
        self.gru = nnx.RNN(nnx.GRUCell(8, 7, rngs=rngs))
        self.head = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.gru(self.lstm(x)).mean(1))


class Feedforward(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, 12, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(12, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.dropout(nnx.relu(self.up(x))))


class Stack(nnx.Module):
    """Layers that `nnx.scan` runs through, and one that is rematerialised."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Feedforward(8, rngs)))(rngs)
        self.again = Feedforward(8, rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = run(self.stack, nnx.relu(self.first(x)))
        return self.head(nnx.remat(lambda layer, x: layer(x))(self.again, x))


class Shared(nnx.Module):
    """One layer in three places, its kernel in a fourth, and a branch that is one layer twice."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.repeat = nnx.Linear(8, 8, rngs=rngs)
        self.steps = nnx.List([self.repeat, self.repeat])
        self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.tied.kernel = self.repeat.kernel
        self.branch = nnx.data([nnx.Linear(8, 8, rngs=rngs)])
        self.names = nnx.Dict(same=self.branch[0])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        for step in self.steps:
            x = nnx.relu(step(x))
        x = nnx.relu(self.tied(x))
        x = x + self.names["same"](nnx.relu(self.branch[0](x)))
        return self.head(x)


class Tokens(nnx.Module):
    """An embedding that is read both ways."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.mix = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(nnx.relu(self.mix(self.embed(x))))


NETWORKS: dict[str, tuple[Any, Any, dict[str, tuple[str, int]]]] = {
    "mlp": (Mlp, image(6), {"first": ("neurons", 12)}),
    "cnn": (
        Cnn,
        image(8, 8, 3),
        {
            "blocks/0/conv1": ("channels", 8),
            "blocks/0/conv2": ("channels", 8),
            "blocks/1/conv1": ("channels", 8),
            "blocks/0:branch": ("branches", 1),
            "blocks/1:branch": ("branches", 1),
        },
    ),
    "vit": (
        Vit,
        image(8, 8, 3),
        {
            "encoder/layers/0/attention/key": ("heads", 4),
            "encoder/layers/0/attention/key#2": ("queries", 6),
            "encoder/layers/0/attention/value": ("values", 6),
            "encoder/layers/0/attention/out": ("width", 16),
            "encoder/layers/0/up": ("neurons", 32),
            "encoder/layers/0:branch": ("branches", 1),
            "encoder/layers/0:branch#2": ("branches", 1),
        },
    ),
    "grouped": (
        Grouped,
        image(8, 8, 3),
        {"depthwise": ("groups", 4), "up": ("channels", 6), "flipped": ("channels", 8), "masked": ("channels", 4)},
    ),
    "adapted": (
        Adapted,
        image(6),
        {
            "lora": ("neurons", 10),
            "lora/lora": ("neurons", 3),
            "split": ("neurons", 2),
            "split#2": ("neurons", 4),
            "join": ("neurons", 9),
            "einsum": ("neurons", 7),
            "own": ("neurons", 5),
            "head": ("neurons", 2),
        },
    ),
    "recurrent": (Recurrent, image(4, 6), {"gru/cell/dense_h": ("neurons", 7), "lstm/cell/hf": ("neurons", 8)}),
    "stack": (
        Stack,
        image(6),
        {
            "again/down": ("neurons", 8),
            "again/up": ("neurons", 12),
            "stack/up": ("neurons", 12),
            "again:branch": ("branches", 1),
        },
    ),
    "shared": (Shared, image(6), {"branch/0": ("neurons", 8), "branch:branch": ("branches", 1)}),
    "tokens": (Tokens, np.random.default_rng(0).integers(0, 11, (3, 7)), {"mix": ("neurons", 8)}),
}


@functools.cache
def trained(make: Any, seed: int = 0) -> tuple[FunctionalModule, Any]:
    """A module as after training: no parameter is 0, and statistics differ from their initial values."""
    module, rng = FunctionalModule.make(make, {}), np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0))

    def moved(path: Any, leaf: Any) -> Any:
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = max(1, math.prod(leaf.shape[:-1]))
        return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    return module, jax.tree_util.tree_map_with_path(moved, shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_student_computes_what_the_gated_network_does(name):
    make, x, expected = NETWORKS[name]
    module, variables = trained(make)
    network = traced(module, x)
    assert groups(network) == expected
    prove(network, variables, x, hows=("half", "one") if name in ("cnn", "shared") else ("half",))


@functools.cache
def cut(name: str, how: str = "half") -> tuple[FunctionalModule, FunctionalModule, Any]:
    """(the network, a random student, its variables) of one of the networks above."""
    make, x, _ = NETWORKS[name]
    module, variables = trained(make)
    network, rng = trace(module, x), np.random.default_rng(1)
    gates, keep = random_gates(network.topology, rng), random_keep(network.topology, rng, how)
    sliced, _ = surgery.slice_network(variables, gates, keep, network, ANY)
    return module, network.student(keep), sliced


def fresh(layer: Any) -> Any:
    """A new layer of the same class with the sizes in the attributes of `layer`."""
    rngs, kind = nnx.Rngs(0), type(layer)
    if kind in (nnx.Linear, nnx.LinearGeneral, nnx.LoRALinear, nnx.Conv, nnx.ConvTranspose):
        more = {"kernel_size": layer.kernel_size} if hasattr(layer, "kernel_size") else {}
        more |= {"feature_group_count": layer.feature_group_count} if kind is nnx.Conv else {}
        more |= {"transpose_kernel": layer.transpose_kernel} if kind is nnx.ConvTranspose else {}
        more |= {"axis": layer.axis} if kind is nnx.LinearGeneral else {}
        more |= {"lora_rank": layer.lora.lora_a.shape[1]} if kind is nnx.LoRALinear else {}
        return kind(layer.in_features, layer.out_features, use_bias=layer.use_bias, rngs=rngs, **more)
    if kind is nnx.Einsum:
        return nnx.Einsum(layer.einsum_str, layer.kernel_shape, layer.bias_shape, rngs=rngs)
    if kind is nnx.LoRA:
        return nnx.LoRA(layer.in_features, layer.lora_a.shape[1], layer.out_features, rngs=rngs)
    if kind in (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm):
        return kind(layer.num_features, rngs=rngs)
    if kind in (nnx.LSTMCell, nnx.GRUCell):
        return kind(layer.in_features, layer.hidden_features, rngs=rngs)
    return nnx.Embed(layer.num_embeddings, layer.features, rngs=rngs) if kind is nnx.Embed else nnx.List()


@pytest.mark.parametrize("name", ["cnn", "grouped", "adapted", "recurrent", "tokens"])
def test_a_cut_layer_tells_its_true_sizes(name):
    """A layer created from a student's attributes has arrays of the same shapes."""
    _, student, sliced = cut(name)
    seen = 0
    for _, layer in nnx.iter_graph(student.bind(sliced)):
        if isinstance(layer, nnx.Module) and type(layer) not in (Cnn, Block, Grouped, Adapted, Recurrent, Tokens):
            own, new = (nnx.to_flat_state(nnx.state(m, (nnx.Param, nnx.BatchStat))) for m in (layer, fresh(layer)))
            own = {path: value.shape for path, value in own}
            assert {path: own[path] for path, _ in new} == {path: value.shape for path, value in new}
            seen += 1
    assert seen >= 2


def test_an_attention_layer_tells_its_true_sizes():
    _, student, sliced = cut("vit")
    module = student.bind(sliced)
    attention = module.encoder.layers[0].attention
    heads, size = attention.query.kernel.shape[1:]
    assert (attention.num_heads, attention.head_dim, attention.qkv_features) == (heads, size, heads * size)
    assert heads < 4 and attention.out.in_features == attention.out.kernel.shape[:2] != (4, 6)
    assert attention.value.out_features == attention.value.kernel.shape[1:]


def test_what_comes_back_is_a_module_of_the_users_class():
    """It computes what `apply` does, updates its statistics in training, and can be differentiated."""
    _, student, sliced = cut("cnn", "one")
    x, module = NETWORKS["cnn"][1], student.bind(sliced)
    assert type(module) is Cnn
    assert isinstance(module.blocks[0].conv1, Zeros) and not nnx.state(module.blocks[0].conv1)
    module.eval()
    np.testing.assert_allclose(module(x), student.apply(sliced, x), rtol=1e-6)
    module.train()
    _, changed = student.apply(sliced, x, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    gradient = nnx.grad(lambda module: jnp.square(module(x)).mean())(module)
    np.testing.assert_allclose(module.norm.mean[...], changed["batch_stats"]["norm"]["mean"], rtol=1e-5)
    assert {"/".join(map(str, p)) for p, _ in nnx.to_flat_state(gradient)} == {
        name.removeprefix("params/")
        for name in traverse_util.flatten_dict(sliced, sep="/")
        if name.startswith("params/")
    }


def test_sharing_survives_the_cut():
    _, student, sliced = cut("shared", "branches")
    flat = traverse_util.flatten_dict(sliced["params"], sep="/")
    assert not {"steps/0/kernel", "tied/kernel"} <= flat.keys()
    module = student.bind(sliced)
    assert module.steps[0] is module.steps[1] is module.repeat
    assert module.tied.kernel is module.repeat.kernel and module.tied.bias is not module.repeat.bias
    _, student, sliced = cut("shared", "one")
    module = student.bind(sliced)
    assert isinstance(module.branch[0], Zeros) and module.names["same"] is module.branch[0]
    assert module.tied.in_features == module.tied.out_features == 1


class LinenBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(use_running_average=True, name=name)

        y = nn.Conv(self.width, (3, 3), use_bias=False, name="conv1")(x)
        y = nn.Conv(self.width, (3, 3), use_bias=False, name="conv2")(nn.relu(norm("norm1")(y)))
        return nn.relu(x + norm("norm2")(y))


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        for i in range(2):
            x = LinenBlock(8, name=f"blocks_{i}")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_the_same_network_in_linen_has_the_same_topology():
    ours, theirs = (trace(module, image(8, 8, 3)) for module in (Cnn(rngs=nnx.Rngs(0)), LinenCnn()))
    named = {name.replace("blocks_", "blocks/"): value for name, value in groups(theirs).items()}
    assert named == groups(ours) and ours.topology.total() == theirs.topology.total()
    keeps = [random_keep(network.topology, np.random.default_rng(0)) for network in (ours, theirs)]
    assert ours.topology.cost(keeps[0]) == theirs.topology.cost(keeps[1])
    assert {f.reason.split(" in ")[0] for f in ours.topology.frozen} == {
        f.reason.split(" in ")[0] for f in theirs.topology.frozen
    }
    assert ours.topology.flops == pytest.approx(theirs.topology.flops, rel=0.01)


# --- the calling convention -----------------------------------------------------------------------------------------


def test_random_streams_follow_the_key_of_the_call():
    module, variables = trained(Mlp)
    x = image(6)

    def run(seed: int) -> np.ndarray:
        return np.asarray(module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(seed)}))

    assert (run(1) == run(1)).all() and (run(1) != run(2)).any()
    assert (np.asarray(module.apply(variables, x)) == np.asarray(module.apply(variables, x))).all()
    with pytest.raises(ValueError, match=r"rngs: .* stream 'default' in training"):
        module.apply(variables, x, train=True)


def test_fresh_variables_come_from_the_factory_and_are_cropped_for_a_student():
    module = FunctionalModule.make(Cnn, {"width": 6})
    one, same, other = (module.init(jax.random.key(seed)) for seed in (0, 0, 1))
    kernel = one["params"]["stem"]["kernel"]
    assert (kernel == same["params"]["stem"]["kernel"]).all() and (kernel != other["params"]["stem"]["kernel"]).any()
    assert (one["batch_stats"]["norm"]["var"] == 1).all()
    student = module.resized({"stem": {"kernel": (3, 3, 3, 4)}}, ())
    assert student.init(jax.random.key(0))["params"]["stem"]["kernel"].shape == (3, 3, 3, 4)
    assert hash(module) == hash(FunctionalModule.make(Cnn, {"width": 6})) and module != student


def test_a_file_is_enough_to_build_the_student_again():
    module, student, sliced = cut("cnn", "one")
    base = Architecture("test_nnx:Cnn", {"width": 8, "num_classes": 5}, input_shape=(8, 8, 3))
    record = json.dumps(Architecture(base.model, base.arguments, dict(student.layers), student.dropped).to_json())
    again = Architecture.from_json(json.loads(record)).module()
    x = NETWORKS["cnn"][1]
    np.testing.assert_array_equal(again.apply(sliced, x), student.apply(sliced, x))
    assert base.module() == module


def test_a_student_is_cut_again():
    _, student, sliced = cut("grouped")
    network = traced(student, NETWORKS["grouped"][1])
    assert network.topology.total() < trace(*cut("grouped")[:1], NETWORKS["grouped"][1]).topology.total()
    prove(network, sliced, NETWORKS["grouped"][1])


class Fixed(nnx.Module):
    """A hard-coded size."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.first = nnx.Linear(8, 6, rngs=rngs)
        self.second = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(nnx.relu(self.conv(x)).reshape(x.shape[0], 64, 8).mean(1))))


def test_a_size_written_into_the_code_is_frozen_with_its_line():
    network = traced(Fixed(nnx.Rngs(0)), image(8, 8, 3))
    assert groups(network) == {"first": ("neurons", 6)}
    assert "test_nnx.py" in reasons(network)["conv/kernel[3]"]


class AlwaysRandom(Mlp):
    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.first(x)), deterministic=False))


class Holds(nnx.Module):
    def __init__(self):
        self.pair = nnx.Param({"a": jnp.ones(2)})


def test_bad_input_says_what_to_do():
    module, variables = FunctionalModule.split(Mlp(rngs=nnx.Rngs(0)))
    x = image(6)
    with pytest.raises(ValueError, match="deterministic"):
        trace(AlwaysRandom(rngs=nnx.Rngs(0)), x)
    with pytest.raises(ValueError, match="init: .*package.module:factory"):
        module.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"variables: params/first/bias has shape None, \(12,\) is expected by Mlp"):
        module.apply({"params": {"first": {"kernel": variables["params"]["first"]["kernel"]}}}, x)
    with pytest.raises(ValueError, match="pair: a Param that holds a dict .*one array"):
        FunctionalModule.split(Holds())
    with pytest.raises(ValueError, match="no layer 'frist'; did you mean 'first'"):
        module.resized({"frist": {"kernel": (6, 3)}}, ())
    with pytest.raises(ValueError, match="'first' .*'kernle'"):
        module.resized({"first": {"kernle": (6, 3)}}, ())
    with pytest.raises(ValueError, match="no argument 'widht'.*did you mean 'width'"):
        Architecture("test_nnx:Mlp", {"widht": 3}).module()


# --- a whole run ---------------------------------------------------------------------------------------------------

SMALL = ["--config", str(Path(__file__).parent / "tiny.py"), "--model.name", "test_nnx:Cnn"]


@pytest.mark.slow
def test_a_whole_run_by_command(tmp_path, monkeypatch, python):
    from kdsearch_jax.search.__main__ import main

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    argv = [*SMALL, "--model.arguments", "width=16", "channels=1", "depth=1", "--workdir", str(run), "--baselines"]
    assert main(argv) == 0
    student, variables = kdsearch_jax.load(run / "student")
    assert type(student) is Cnn and student.stem.out_features == variables["params"]["stem"]["kernel"].shape[-1]
    code = (
        "import kdsearch_jax, numpy as np; own, _ = kdsearch_jax.load('run/student', trust_code=True); "
        "x = np.ones((2, 8, 8, 1), np.float32); own.eval(); print(type(own).__name__, own(x).shape[-1])"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.split() == ["Cnn", "10"], done.stderr


def test_a_whole_run_by_python_call(tmp_path):
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(64, 6)).astype(np.float32), "labels": rng.integers(0, 5, 64)}
    model = Mlp(50, rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = search(model, None, data, search_steps=8, retrain_steps=4, batch_size=16, workdir=tmp_path / "run")
    assert type(found.module) is Mlp and found.variables is None
    assert found.module.first.out_features == found.module.second.in_features == 25
    assert model.first.out_features == 50  # the teacher is as it was
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
