"""Fast convolutions equal XLA's: values, gradients, programs for other platforms; and modules are left unchanged."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from kdsearch_jax.adapters.convolution.dispatch import conv_general_dilated, fast_convolutions

pytestmark = pytest.mark.usefixtures("quick_compilation")
NHWC = ("NHWC", "HWIO", "NHWC")


def numbers(seed: int, *shapes: tuple[int, ...], dtype: object = jnp.float32) -> list[jax.Array]:
    """Small integers, whose sums are exact in any order."""
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.integers(-2, 3, shape), dtype) for shape in shapes]


def assert_same(fast: object, native: object) -> None:
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(native), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def results(convolution, x, w, **kwargs):
    """The convolution, and the gradients of both operands."""

    @jax.jit
    def run(x, w):
        y, pullback = jax.vjp(lambda x, w: convolution(x, w, **kwargs), x, w)
        (cotangent,) = numbers(2, y.shape, dtype=y.dtype)
        return y, pullback(cotangent)

    return run(x, w)


@st.composite
def cases(draw):
    """(dtype, shape of x, shape of w, keyword arguments)."""
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([2, 3, 5, 8]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    each = [draw(st.tuples(*[st.integers(1, 3)] * 3)) for _ in range(rank)]
    taps, strides, dilation = map(list, zip(*each, strict=True))
    space = [d * (k - 1) + draw(st.integers(1, 6)) for k, _, d in each]  # always room for one window
    padding = draw(st.sampled_from(["SAME", "VALID", "SAME_LOWER", "numbers"]))
    if padding == "numbers":
        padding = [draw(st.sampled_from([(0, 0), (1, 2), (3, 0)])) for _ in range(rank)]
    letters = "DHW"[:rank]
    orders = [
        (f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        (f"NC{letters}", f"OI{letters}", f"NC{letters}"),
        (f"C{letters}N", f"I{letters}O", f"N{letters[::-1]}C"),
    ]
    order = draw(st.sampled_from(orders))
    sizes = {"N": draw(st.sampled_from([1, 4, 6])), "C": inputs, **dict(zip(letters, space, strict=True))}
    kernel = {"I": inputs // groups, "O": outputs, **dict(zip(letters, taps, strict=True))}
    shapes = tuple(sizes[axis] for axis in order[0]), tuple(kernel[axis] for axis in order[1])
    kwargs = {"window_strides": strides, "rhs_dilation": dilation, "padding": padding}
    dtype = draw(st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]))
    preferred = draw(st.sampled_from([None, jnp.float32]))
    kwargs |= {"dimension_numbers": order, "feature_group_count": groups, "preferred_element_type": preferred}
    return dtype, *shapes, kwargs


def case(x, w, groups, **kwargs):
    known = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, "feature_group_count": groups}
    return jnp.float32, x, w, {**known, **kwargs}


@settings(max_examples=12)
@given(cases())
@example(case((2, 9, 8, 6), (7, 5, 1, 6), 6))
@example(case((3, 7, 7, 6), (3, 3, 1, 12), 6, window_strides=(2, 3), padding=((1, -1), (-1, 2))))
@example(case((3, 7, 8, 32), (3, 3, 2, 32), 16, window_strides=(2, 2)))
@example(case((40, 3, 3, 10), (1, 1, 2, 20), 5))  # several images at once
def test_values_and_gradients_are_those_of_jax(drawn):
    dtype, x_shape, w_shape, kwargs = drawn
    x, w = numbers(1, x_shape, w_shape, dtype=dtype)
    assert_same(results(conv_general_dilated, x, w, **kwargs), results(lax.conv_general_dilated, x, w, **kwargs))


@pytest.mark.parametrize("groups", [8, 16])
def test_real_numbers_agree_up_to_rounding(groups):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(2, 9, 9, 16)), random.normal(size=(3, 3, 16 // groups, 16))
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    kwargs = case((), (), groups)[-1]
    fast, native = (results(f, x, w, **kwargs) for f in (conv_general_dilated, lax.conv_general_dilated))
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(native), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))},
        {"feature_group_count": 1, "batch_group_count": 4},
        {"feature_group_count": 1, "dimension_numbers": ("NWHC", "HWIO", "NHWC")},
        {"padding": ((-2, -2), (0, 0))},  # no output
    ],
)
def test_what_is_not_covered_is_left_to_jax(kwargs):
    inputs = 4 if kwargs.get("feature_group_count") == 1 else 1
    x, w = numbers(0, (4, 5, 6, 4), (3, 3, inputs, 4))
    kwargs = {**case((), (), 4)[-1], **kwargs}
    fast, native = (
        jax.make_jaxpr(lambda x, w, f=f: f(x, w, **kwargs))(x, w)
        for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert str(fast) == str(native)


def test_no_images():
    x, w = numbers(0, (0, 5, 5, 10), (3, 3, 2, 10))
    kwargs = case((), (), 5)[-1]
    assert_same(results(conv_general_dilated, x, w, **kwargs), results(lax.conv_general_dilated, x, w, **kwargs))


def test_wrong_arguments_raise_as_in_jax():
    x, w = numbers(0, (1, 5, 5, 4), (3, 3, 2, 4))
    for convolution in (lax.conv_general_dilated, conv_general_dilated):
        with pytest.raises(ValueError, match="feature_group_count"):
            convolution(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=4)


@pytest.mark.parametrize("shape", [(3, 3, 1, 10), (3, 3, 2, 10)], ids=["depthwise", "grouped"])
def test_other_platforms_get_one_convolution(shape):
    groups = 10 // shape[2]

    def lowered(platform: str, function) -> str:
        traced = jax.jit(function).trace(jnp.zeros((2, 8, 8, 10)), jnp.zeros(shape))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def fast(x, w):
        return conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups)

    def gradient(x, w):
        return jax.grad(lambda x, w: fast(x, w).sum(), (0, 1))(x, w)

    for platform in ("tpu", "cuda"):
        for function, count in ((fast, 1), (gradient, 2)):
            text = lowered(platform, function)
            assert text.count("stablehlo.convolution") == count
            assert "stablehlo.while" not in text
            assert "stablehlo.dot_general" not in text
    assert "stablehlo.convolution" not in lowered("cpu", fast)
    assert "stablehlo.convolution" not in lowered("cpu", gradient)


@pytest.mark.parametrize("shape", [(3, 3, 1, 10), (3, 3, 2, 10)], ids=["depthwise", "grouped"])
def test_an_exported_program_is_equal_for_any_batch(shape):
    (w,) = numbers(0, shape)
    kwargs = case((), (), 10 // shape[2])[-1]
    (batch,) = jax.export.symbolic_shape("batch")
    function = jax.jit(lambda x: conv_general_dilated(x, w, **kwargs))
    exported = jax.export.export(function, platforms=("cpu", "tpu", "cuda"))(
        jax.ShapeDtypeStruct((batch, 6, 6, 10), jnp.float32)
    )
    loaded = jax.export.deserialize(exported.serialize())
    for size in (1, 3):
        (x,) = numbers(size, (size, 6, 6, 10))
        assert_same(loaded.call(x), lax.conv_general_dilated(x, w, **kwargs))


def test_transformations():
    """Per-example gradients, gradients of gradients, and rematerialisation."""
    x, w = numbers(0, (3, 1, 6, 6, 10), (3, 3, 2, 10))
    kwargs = case((), (), 5)[-1]

    def run(convolution):
        def loss(w, x):
            return (convolution(x, w, **kwargs) ** 2).sum()

        def second(w):
            return (jax.grad(loss)(w, x[0]) * jnp.arange(w.size).reshape(w.shape) % 3).sum()

        return jax.jit(lambda w: (jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0))(w, x), jax.grad(second)(w)))(w)

    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


def test_inside_of_shard_map():
    x, w = numbers(0, (2, 5, 5, 10), (3, 3, 2, 10))
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec

    def run(convolution):
        def gradients(x, w):
            return jax.grad(lambda x, w: (convolution(x, w, **case((), (), 5)[-1]) ** 2).sum(), (0, 1))(x, w)

        sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=(spec("data"), spec()))
        return jax.jit(sharded)(x, w)

    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


# --- in models --------------------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """MobileNetV2's block, with batch normalisation and a skip."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        y = nn.Conv(4 * x.shape[-1], (1, 1), use_bias=False, name="expand")(x)
        y = nn.relu6(nn.BatchNorm(use_running_average=not train, name="norm")(y))
        y = nn.Conv(y.shape[-1], (3, 3), feature_group_count=y.shape[-1], padding="CIRCULAR", name="depthwise")(y)
        return x + nn.Conv(x.shape[-1], (1, 1), name="project")(nn.relu6(y))


class Cardinal(nn.Module):
    """ResNeXt's block, rematerialised."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        y = nn.remat(nn.Conv)(24, (3, 3), strides=2, feature_group_count=6, dtype=jnp.float32, name="grouped")(x)
        return nn.relu(y)


@pytest.mark.parametrize("block", [Inverted(), Cardinal()], ids=["inverted", "cardinal"])
def test_a_model_is_equal_inside_and_outside(block, key):
    x = jax.random.normal(key, (2, 7, 7, 12))
    variables = block.init(key, x)

    def loss(params, x):
        given = {**variables, "params": params}
        y, changed = block.apply(given, x, train=True, mutable=["batch_stats"])
        return (y**2).mean(), (y, changed)

    def run(x):
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    outside = str(jax.make_jaxpr(run)(x))
    expected = jax.jit(run)(x)
    with fast_convolutions():
        inside = str(jax.make_jaxpr(lambda x: run(x))(x))
        found = jax.jit(lambda x: run(x))(x)
    assert "platform_index" in inside
    assert "platform_index" not in outside
    assert str(jax.make_jaxpr(lambda x: run(x))(x)) == outside  # as before
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_a_function_of_the_author_stays_and_errors_leave_nothing_behind():
    met = []

    def own(*args, **kwargs):
        met.append(kwargs["feature_group_count"])
        raise RuntimeError("as the author wishes")

    class UserTeacher(nn.Module):
        function: object = None

        def setup(self):
            self.layer = nn.Conv(4, (3, 3), feature_group_count=4, conv_general_dilated=self.function)

        def __call__(self, x):
            before = self.layer.conv_general_dilated
            try:
                return self.layer(x)
            finally:
                assert self.layer.conv_general_dilated is before

    x = jnp.ones((1, 5, 5, 4))
    with pytest.raises(RuntimeError, match="author"), fast_convolutions():
        UserTeacher(own).init(jax.random.key(0), x)
    assert met == [4]
    with pytest.raises(Exception, match="kernel"), fast_convolutions():
        UserTeacher().apply({"params": {"layer": {"kernel": jnp.ones((1, 1, 1, 4))}}}, x)
    assert "platform_index" not in str(jax.make_jaxpr(UserTeacher().init)(jax.random.key(0), x))


def test_nnx_modules_are_put_back(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.grouped = nnx.Conv(10, 10, (3, 3), feature_group_count=5, rngs=rngs)
            self.plain = nnx.Conv(10, 10, (3, 3), rngs=rngs)
            self.own = nnx.Conv(10, 10, (3, 3), feature_group_count=10, conv_general_dilated=own, rngs=rngs)

        def __call__(self, x):
            return self.own(self.plain(self.grouped(x)))

    def own(*args, **kwargs):
        return lax.conv_general_dilated(*args, **kwargs)

    net, x = Net(nnx.Rngs(0)), jax.random.normal(key, (2, 5, 5, 10))
    expected = net(x)
    with pytest.raises(RuntimeError), fast_convolutions(net):
        assert net.grouped.conv_general_dilated is conv_general_dilated
        assert net.plain.conv_general_dilated is conv_general_dilated
        assert net.own.conv_general_dilated is own
        np.testing.assert_allclose(net(x), expected, atol=1e-5)
        raise RuntimeError
    assert net.grouped.conv_general_dilated is lax.conv_general_dilated
