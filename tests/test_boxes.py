"""Parameters with sharding metadata are pruned as without it, and returned with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct, traverse_util
from flax.core import freeze, meta
from proof import groups, image, prove, random_gates, random_keep, variables_of

import kdsearch_jax as kd
from kdsearch_jax.adapters import boxes
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import gates, surgery
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.runs import teacher_weights
from kdsearch_jax.storage import networks

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = image(5, 12)
INIT = nn.initializers.lecun_normal()


class Mine(struct.PyTreeNode, meta.AxisMetadata):
    """A user's own box class."""

    value: jax.Array
    note: str = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def with_note(init, names):
    return lambda *args: Mine(init(*args), "-".join(map(str, names)))


KINDS = {
    "none": lambda init, names: init,
    "partitioned": nn.with_partitioning,
    "logical": nn.with_logical_partitioning,
    "mine": with_note,
    "in one another": lambda init, names: nn.with_partitioning(with_note(init, names), names),
}


class Block(nn.Module):
    kind: str
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, _=None):
        box, dtype = KINDS[self.kind], jnp.dtype(self.dtype)
        settings = {"use_bias": False, "dtype": dtype, "param_dtype": dtype}
        y = nn.RMSNorm(dtype=dtype, scale_init=box(nn.initializers.ones, ("norm",)), name="norm")(x)
        y = nn.Dense(40, kernel_init=box(INIT, ("embed", "mlp")), name="up", **settings)(y)
        scale = self.param("scale", box(nn.initializers.ones, ("mlp",)), (y.shape[-1],), dtype)
        y = nn.relu(y) * scale[None, None]
        return x + nn.Dense(x.shape[-1], kernel_init=box(INIT, ("mlp", "embed")), name="down", **settings)(y), None


class Net(nn.Module):
    kind: str = "none"
    scan: bool = False
    remat: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        x = nn.Dense(12, kernel_init=KINDS[self.kind](INIT, (None, "embed")), name="stem")(x)
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            stack = nn.scan(block, metadata_params={nn.PARTITION_NAME: "layers"}, **axes)
            x, _ = stack(self.kind, self.dtype, name="blocks")(x, None)
        else:
            for number in range(2):
                x, _ = block(self.kind, self.dtype, name=f"block{number}")(x)
        return nn.Dense(4, kernel_init=KINDS[self.kind](INIT, ("embed", "out")), name="head")(x)


def specs(variables):
    return {"/".join(path): spec for path, spec in traverse_util.flatten_dict(nn.get_partition_spec(variables)).items()}


def initial(module, x=X):
    """Variables in boxes as from `init`, with random values."""
    made = jax.eval_shape(module.init, jax.random.key(0), x)
    plain = variables_of(module, x)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, boxes.unboxed(made))
    values = jax.tree.map(lambda leaf, dtype: jnp.asarray(leaf, dtype), boxes.unboxed(plain), dtypes)
    return boxes.boxed(values, boxes.boxes_of(made))


def cut(module, variables, x=X):
    """(the student, its variables), proved."""
    network, rng = trace(module, x), np.random.default_rng(0)
    chosen, keep = random_gates(network.topology, rng), random_keep(network.topology, rng)
    sliced, _ = surgery.slice_network(variables, chosen, keep, network, Architecture("none", {}, input_shape=(1,)))
    surgery.verify(network, variables, chosen, keep, sliced, x)
    return network.student(keep), sliced


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
@pytest.mark.parametrize(
    "options", [{}, {"scan": True}, {"remat": True, "dtype": "bfloat16"}, {"scan": True, "remat": True}]
)
def test_boxes_change_nothing(kind, options):
    """The same groups and the same student, each array in its box."""
    if "scan" in options and kind == "in one another":
        pytest.skip("Flax adds no axis to a box within a box")
    whole, plain = Net(kind, **options), Net(**options)
    variables = initial(whole)
    assert groups(trace(whole, X)) == groups(trace(plain, X))
    student, sliced = cut(whole, variables)
    expected, values = cut(plain, boxes.unboxed(variables))
    jax.tree.map(np.testing.assert_array_equal, boxes.unboxed(sliced), values)
    np.testing.assert_array_equal(student.apply(sliced, X), expected.apply(values, X))
    found = boxes.boxes_of(sliced)
    assert found and {path: _outside(box) for path, box in found.items()} == {
        path: _outside(box) for path, box in boxes.boxes_of(variables).items() if path in found
    }
    made = jax.eval_shape(student.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, sliced)


def _outside(box):
    return jax.tree.structure(box)


def test_branches_that_are_dropped_in_bfloat16():
    """Their zeros are constants of a dtype that is not a NumPy number."""
    module = Net("logical", dtype="bfloat16")
    prove(trace(module, X), boxes.unboxed(initial(module)), X, hows=("one", "branches"))


def test_pruned_and_searched_in_ones_own_loop():
    """`prune` and `GatedSearch` return boxes, also after training weights and gates."""
    module = Net("logical", scan=True)
    variables, network = initial(module), trace(module, X)
    student = kd.prune(network, variables, kd.magnitude(), kd.Budget(macs=0.69), X)
    assert specs(student.variables) == specs(variables)
    search = kd.GatedSearch(network, kd.Budget(macs=0.69), steps=20)
    params = search.init(variables)
    tx = search.optimizer(optax.sgd(1e-3))
    target = module.apply(variables, X)

    def update(carry, _):
        params, state = carry
        slope = jax.grad(lambda p: jnp.square(search.apply(p, X) - target).mean())(params)
        updates, state = tx.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, length=20))((params, tx.init(params)))
    assert specs(search.finish(params, state, X).variables) == specs(variables)


def test_folding_keeps_boxes():
    module = Net("logical", scan=True)
    variables, topology = freeze(initial(module)), trace(module, X).topology
    folded = jax.jit(lambda v: gates.fold(v, gates.init(topology, 2.0), topology))(variables)
    assert jax.tree.structure(folded) == jax.tree.structure(variables) and specs(folded) == specs(variables)


@pytest.mark.parametrize("kind", ["partitioned", "none"])
def test_variables_in_boxes_that_the_module_does_not_make_and_the_reverse(kind):
    """Only the arrays must match; a student has the boxes that its teacher was passed with."""
    module, other = Net(kind), Net("none" if kind == "partitioned" else "partitioned")
    variables = initial(other)
    fitted = teacher_weights.match_variables(
        variables, module, CallSpec(("x",), {"x": jax.ShapeDtypeStruct((5, 12), jnp.float32)}), "variables"
    )
    jax.tree.map(np.testing.assert_array_equal, fitted, boxes.unboxed(variables))
    _, sliced = cut(module, variables)
    assert bool(boxes.boxes_of(sliced)) is (kind == "none")


def test_what_files_say_of_boxes(tmp_path):
    """Names and rules are stored; a user's own box is created by the module's code."""
    call = CallSpec(("x",), {"x": jax.ShapeDtypeStruct((5, 12), jnp.float32)})
    for kind in ("partitioned", "logical", "mine", "none"):
        module = Net(kind, scan=kind != "mine")
        student, sliced = cut(module, initial(module))
        networks.save_network(tmp_path / kind, Architecture.of(student, (), call), sliced, {"macs": 1, "params": 1})
        again, variables = kd.load(tmp_path / kind)
        assert again == student and jax.tree.structure(variables) == jax.tree.structure(sliced)
        jax.tree.map(np.testing.assert_array_equal, variables, sliced)
    rules = (("embed", "data"), ("mlp", ("model", "more")), ("out", None))
    box = nn.LogicallyPartitioned(jnp.ones((2, 3)), ("embed", None), rules=rules)
    record = json.loads(json.dumps(boxes.boxes_to_json({"a": box})))
    made = boxes.boxes_from_json(record, dict)["a"]
    assert (made.names, made.rules) == (box.names, box.rules)
    for damaged in ({"a": 3}, {"a": {"kind": "Partitioned"}}, {"a": {}}):
        with pytest.raises(ValueError, match="boxes: 'a'"):
            boxes.boxes_from_json(damaged, dict)


def test_searched_with_boxes(tmp_path):
    """bf16, scan and remat: the student's parameters have their teacher's metadata, also when loaded."""
    module = Net("logical", scan=True, remat=True, dtype="bfloat16")
    variables, data = initial(module), {"x": image(5, 12, batch=40)}
    found = kd.search(
        module, variables, data, budget=0.69, search_steps=4, retrain_steps=2, batch_size=8, workdir=tmp_path / "run"
    )
    assert specs(found.variables) == specs(variables)
    kernel = found.variables["params"]["blocks"]["up"]["kernel"]
    assert kernel.names == ("layers", "embed", "mlp") and kernel.value.dtype == jnp.bfloat16
    assert kernel.value.shape == (2, 12, found.variables["params"]["blocks"]["scale"].value.shape[-1])
    loaded, again = kd.load(tmp_path / "run" / "student")
    assert specs(again) == specs(variables)
    expected = found.module.apply(found.variables, X)
    np.testing.assert_array_equal(loaded.apply(again, X), expected)
    np.testing.assert_array_equal(loaded.apply(boxes.unboxed(again), X), expected)


# --- NNX ------------------------------------------------------------------------------------------------------------


class NnxNet(nnx.Module):
    """All ways to add metadata."""

    def __init__(self, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        column, row = (nnx.with_partitioning(init, names) for names in ((None, "model"), ("model", None)))
        self.up = nnx.Linear(12, 20, kernel_init=column, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(20), out_sharding=("model",), comment="mine")
        self.down = nnx.Linear(20, 12, kernel_init=row, rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(x + self.down(nnx.relu(self.up(x)) * self.scale[None, None]))


def check_nnx(module):
    """Variables of the module's student have its metadata and the student's sizes."""
    function, variables = FunctionalModule.split(module)
    student, sliced = cut(function, variables)
    bound = student.bind(sliced)
    assert bound.up.kernel.shape == (12, bound.up.out_features) and bound.up.out_features < 20
    for name, own in nnx.to_flat_state(nnx.state(bound, nnx.Param)):
        before = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))[name]
        assert own.get_metadata() == before.get_metadata()
    assert bound.scale.get_metadata("comment") == "mine" and bound.up.kernel.out_sharding == (None, "model")
    return bound(X), student.apply(sliced, X)


def test_nnx_metadata_is_kept():
    with nnx.use_eager_sharding(False):
        np.testing.assert_allclose(*check_nnx(NnxNet(rngs=nnx.Rngs(0))), atol=1e-6)
    function, _ = FunctionalModule.split(nnx.eval_shape(lambda: _lazy()))
    assert FunctionalModule.make(NnxNet, {}).leaves == function.leaves  # also where no mesh is set


def _lazy():
    with nnx.use_eager_sharding(False):
        return NnxNet(rngs=nnx.Rngs(0))


MESH = """
import contextlib, jax, jax.numpy as jnp, numpy as np, flax.linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from test_boxes import Net, NnxNet, X, check_nnx, cut, groups, initial, trace

variables = {kind: initial(Net(kind, scan=True)) for kind in ("partitioned", "logical")}
for axes in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        for kind, own in variables.items():
            with nn.logical_axis_rules([("mlp", "model"), ("embed", None), ("out", None)]):
                assert groups(trace(Net(kind, scan=True), X)) == groups(trace(Net(scan=True), X))
                cut(Net(kind, scan=True), own)
        np.testing.assert_allclose(*map(np.asarray, check_nnx(NnxNet(rngs=nnx.Rngs(0)))), atol=1e-6)
print("done")
"""


def test_under_a_mesh_whose_size_divides_no_student():
    """With two devices and an odd number of units, the caller's mesh does not affect what can be pruned."""
    own = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", MESH], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": own, "JAX_NUM_CPU_DEVICES": "2"},
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr
