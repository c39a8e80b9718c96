"""Students of Linen modules behave like any module; their JSON record is validated."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization, traverse_util
from proof import ANY, image, random_gates, random_keep, traced, variables_of
from test_models import small

from kdsearch_jax import models
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture, StudentModule
from kdsearch_jax.adapters.registry import build
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import adapter_for, trace
from kdsearch_jax.tracing.program import flatten_jaxpr

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Cut:
    """A network and a student of it."""

    def __init__(self, case, how="half", seed=0):
        self.module, shape = small(case)
        self.images = image(*shape)
        self.network = traced(self.module, self.images)
        self.variables = variables_of(self.module, self.images)
        rng = np.random.default_rng(seed)
        gates, self.keep = random_gates(self.network.topology, rng), random_keep(self.network.topology, rng, how)
        self.sliced, self.architecture = surgery.slice_network(self.variables, gates, self.keep, self.network, ANY)
        self.student = StudentModule.of(self.module, self.architecture.layers, self.architecture.dropped)


@pytest.fixture(scope="module", params=["cifar_resnet B", "vgg flattened", "vit"])
def cut(request):
    return Cut(request.param, "one" if request.param == "cifar_resnet B" else "half")


def paths(tree):
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def test_variables_lie_where_the_base_models_do(cut):
    """Same paths, no nesting; leaves of dropped layers absent; `init` returns the shapes that surgery does."""
    inits = jax.eval_shape(cut.student.init, jax.random.key(0), cut.images)
    assert paths(inits) == paths(cut.sliced)
    base = paths(cut.variables)
    gone = {path for path in base if path not in paths(cut.sliced)}
    assert {path.split("/", 1)[1].rsplit("/", 1)[0] for path in gone} == set(cut.architecture.dropped)


def test_training_mode(cut):
    """Statistics are updated, dropout is random, gradients reach every parameter that affects the logits."""

    @jax.jit
    def train(variables, key):
        def loss(params):
            logits, changed = cut.student.apply(
                {**variables, "params": params}, cut.images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return (logits**2).sum(), (logits, changed)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    (_, (logits, changed)), gradients = train(cut.sliced, jax.random.key(0))
    assert logits.shape == (3, 5) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert jax.tree.structure(changed.get("batch_stats")) == jax.tree.structure(cut.sliced.get("batch_stats"))
    for before, after in zip(
        *(jax.tree.leaves(tree.get("batch_stats")) for tree in (cut.sliced, changed)), strict=True
    ):
        assert not np.array_equal(before, after)
    assert np.any(jax.tree.leaves(gradients["dense"])[0])
    other = train(cut.sliced, jax.random.key(1))[0][1][0]
    assert np.array_equal(logits, other) == (getattr(cut.module, "dropout", 0.0) == 0.0)


def test_it_is_a_module_like_any_other(cut):
    """Compiled or not, hashed, cloned, bound, tabulated, under `vmap` and inside another module: the same logits."""
    expected = jax.jit(cut.student.apply)(cut.sliced, cut.images)
    np.testing.assert_allclose(cut.student.apply(cut.sliced, cut.images), expected, rtol=1e-4, atol=1e-5)
    assert hash(cut.student) == hash(cut.student.clone()) and cut.student == cut.student.clone()
    assert cut.student != cut.student.clone(dropped=("nothing",))
    one = jax.jit(jax.vmap(lambda x: cut.student.apply(cut.sliced, x[None])[0]))(cut.images)
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x)

    nested = {collection: {"inner": tree} for collection, tree in cut.sliced.items()}
    np.testing.assert_allclose(jax.jit(Outer(cut.student).apply)(nested, cut.images), expected, rtol=1e-5, atol=1e-5)


def test_tabulate_shows_the_students_sizes():
    cut = Cut("mlp")
    table = cut.student.tabulate(jax.random.key(0), cut.images)
    assert f"[64,{int(cut.keep['dense1'].sum())}]" in table


def test_the_base_model_is_not_changed():
    """Sizes are restored after a call, also if it fails."""
    cut = Cut("mlp")
    broken = StudentModule.of(cut.module, {"dense1": {"features": 3}, "dense2": {"fetures": 3}}, ())
    with pytest.raises(ValueError, match="layer 'dense2' is a Dense, which has no size 'fetures'"):
        jax.eval_shape(broken.init, jax.random.key(0), cut.images)
    logits = jax.jit(cut.module.apply)(cut.variables, cut.images)
    assert logits.shape == (3, 5)


def test_saved_and_loaded():
    """Through bytes and JSON, into the tree of a fresh module."""
    cut = Cut("cifar_resnet B")
    base = Architecture("cifar_resnet", {"num_classes": 5, "depth": 8, "width": 4, "shortcut": "B"}, {}, (), (8, 8, 3))
    record = Architecture(
        base.model, base.arguments, cut.architecture.layers, cut.architecture.dropped, base.input_shape
    )
    text, data = json.dumps(record.to_json()), serialization.to_bytes(cut.sliced)
    module = Architecture.from_json(json.loads(text)).module()
    empty = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(module.init, jax.random.key(0), cut.images)
    )
    loaded = serialization.from_bytes(empty, data)
    expected = jax.jit(cut.student.apply)(cut.sliced, cut.images)
    np.testing.assert_array_equal(jax.jit(module.apply)(loaded, cut.images), expected)


# --- layers that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "dropped", "parts"),
    [
        ({"block/conv3": {"features": 3}}, (), ["no layer 'block/conv3'", "did you mean 'block/conv"]),
        ({}, ("block/bn3",), ["no layer 'block/bn3'", "did you mean 'block/bn"]),
        ({"dense/kernel": {"features": 3}}, ("blok",), ["no layer 'blok'", "did you mean 'block'"]),
        ({"stage1/conv": {"features": 4}, "nowhere/at/all": {"features": 1}}, (), ["no layer 'nowhere/at/all'"]),
    ],
)
def test_a_layer_that_does_not_exist_is_an_error(layers, dropped, parts):
    module, shape = small("small_cnn")
    student = StudentModule.of(module, layers, dropped)
    for method in (student.init, jax.jit(student.init)):
        with pytest.raises(ValueError) as raised:
            jax.eval_shape(method, jax.random.key(0), image(*shape))
        for part in parts:
            assert part in str(raised.value)


def test_compiled_submodules_are_not_mistaken_for_missing_ones():
    """`nn.jit` runs a layer's code once; its second call is cached, so its sublayers are not called."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(nn.relu(nn.jit(Block)(name="block")(x)))

    student = StudentModule.of(Net(), {"block/dense": {"features": 2}}, ())
    x = image(4)
    variables = variables_of(student, x)
    assert variables["params"]["block"]["dense"]["kernel"].shape == (4, 2)
    for _ in range(2):
        assert student.apply(variables, x).shape == (3, 3)


# --- the record -----------------------------------------------------------------------------------------------------

GOOD = {
    "format": 1,
    "model": "vit",
    "arguments": {"num_classes": 5},
    "layers": {"block1/attention/query": {"features": [2, 4]}, "block1/dense1": {"features": 7}},
    "dropped": ["block2/dense2"],
    "input_shape": [8, 8, 3],
}


def test_json_and_back():
    architecture = Architecture.from_json(GOOD)
    assert architecture.layers["block1/attention/query"]["features"] == (2, 4)
    assert json.loads(json.dumps(architecture.to_json())) == GOOD
    assert Architecture.from_json(architecture.to_json()) == architecture


def test_a_record_without_cuts_is_the_model_itself():
    record = Architecture("mlp", {"num_classes": 3, "hidden": [4]}, input_shape=(8,))
    assert record.module() == models.mlp(num_classes=3, hidden=(4,))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ([1], ["a JSON object is expected, not list"]),
        ({"format": 2}, ["format 2", "reads 1"]),
        ({"format": None}, ["format None"]),
        ({"layer": {}}, ["unknown key 'layer'", "did you mean 'layers'"]),
        ({"model": 3}, ["'model' must be a str, not 3"]),
        ({"arguments": []}, ["'arguments' must be a dict"]),
        ({"layers": None}, ["'layers' must be a dict, not None"]),
        ({"layers": {"a": {}}}, ["layers['a'] must map attributes to sizes, not {}"]),
        ({"layers": {"a": {"features": 0}}}, ["layers['a']", "{'features': 0}"]),
        ({"layers": {"a": {"features": -1}}}, ["layers['a']"]),
        ({"layers": {"a": {"features": 2.5}}}, ["layers['a']"]),
        ({"layers": {"a": {"features": True}}}, ["layers['a']"]),
        ({"layers": {"a": {"features": "8"}}}, ["layers['a']"]),
        ({"layers": {"a": {"features": []}}}, ["layers['a']"]),
        ({"layers": {"a": {"features": 1 << 40}}}, ["layers['a']"]),
        ({"layers": {"a": 3}}, ["layers['a']"]),
        ({"dropped": "block"}, ["'dropped' must be a list"]),
        ({"dropped": [1]}, ["'dropped' must list layer paths, not [1]"]),
        ({"input_shape": [8, 8.0]}, ["'input_shape' must list sizes, not [8, 8.0]"]),
        ({"input_shape": [0]}, ["'input_shape'"]),
        ({"input_shape": 8}, ["'input_shape' must be a list"]),
    ],
)
def test_bad_records_are_refused(change, parts):
    record = {**GOOD, **change} if isinstance(change, dict) else change
    with pytest.raises(ValueError) as raised:
        Architecture.from_json(record)
    for part in ["architecture:", *parts]:
        assert part in str(raised.value)


@pytest.mark.parametrize("key", [key for key in GOOD if key != "format"])
def test_missing_keys_are_named(key):
    with pytest.raises(ValueError, match=f"'{key}' must be"):
        Architecture.from_json({other: value for other, value in GOOD.items() if other != key})


def unannotated(*, num_classes):
    raise AssertionError("called")


def annotated(*, num_classes: int) -> nn.Module:
    return nn.Dense(num_classes)


def misleading() -> "list[nn.Module]":
    raise AssertionError("called")


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("os:system", {"command": "exit 1"}),
        ("subprocess:check_output", {"args": ["false"]}),
        ("builtins:eval", {"source": "1/0"}),
        ("subprocess:Popen", {"args": ["false"]}),
        ("flax.linen:relu", {"x": 1}),
        (f"{__name__}:unannotated", {"num_classes": 3}),
        (f"{__name__}:misleading", {}),
    ],
)
def test_a_record_from_elsewhere_calls_nothing_but_networks(model, arguments):
    record = Architecture.from_json({**GOOD, "model": model, "arguments": arguments})
    with pytest.raises(ValueError, match="annotate it"):
        record.module()


def test_networks_of_other_packages():
    record = Architecture(f"{__name__}:annotated", {"num_classes": 3}, input_shape=(4,))
    assert record.module() == nn.Dense(3)
    assert Architecture("flax.linen:Dense", {"features": 3}).module() == nn.Dense(3)


def test_bfloat16_and_no_batch_limit():
    """The record holds no batch size and no dtype, so any works."""
    cut = Cut("mlp")
    half = jax.tree.map(jnp.bfloat16, cut.sliced)
    logits = jax.eval_shape(cut.student.apply, half, jnp.zeros((7, 8, 8, 1), jnp.bfloat16))
    assert logits.shape == (7, 5) and logits.dtype == jnp.bfloat16


class ResidualNNX(nnx.Module):
    """Two residual blocks of an NNX network."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.first, self.second = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        x = x + self.first(nnx.relu(x))
        return self.head(x + self.second(nnx.relu(x)))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_student_without_branches_computes_in_the_precision_of_the_run(kind):
    """What dropped layers return does not widen what it is added to: every product has operands in bfloat16."""
    if kind == "linen":
        module, x = build("cifar_resnet", {"depth": 8, "width": 4, "num_classes": 5}), image(8, 8, 3)
        network = trace(module, x, train=False)
    else:
        network, x = trace(ResidualNNX(), np.ones((2, 6), np.float32)), np.ones((2, 6), np.float32)
    keep = {g.name: np.full(g.size, g.kind != "branches") for g in network.topology.groups}
    student = network.student(keep)
    assert any(g.kind == "branches" for g in network.topology.groups)
    variables = adapter_for(student).abstract_variables(student, network.inputs, network.kwargs)
    for precision, dtype in (("bf16", jnp.bfloat16), ("fp32", jnp.float32)):
        program = flatten_jaxpr(jax.make_jaxpr(lambda v, x, p=precision: apply_eval(student, v, x, p))(variables, x))
        products = [op for op in program.ops if op.name in ("dot_general", "conv_general_dilated", "product")]
        assert products and all(program.avals[v].dtype == dtype for op in products for v in op.inputs)
