"""Ungrouped convolutions: XLA's values and derivatives with and without native kernels; XLA's own elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax import lax

from kdsearch_jax.adapters import apply, registry
from kdsearch_jax.adapters.convolution import native
from kdsearch_jax.adapters.convolution.dispatch import conv_general_dilated
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.distill.objective import classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.distill.steps import distill_step, supervised_step
from kdsearch_jax.training import optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import create_state

pytestmark = pytest.mark.usefixtures("quick_compilation")
PRODUCT = "kdsearch_convolution_product"  # the primitive's name in a jaxpr


@pytest.fixture(params=["kernels", "no kernels"])
def kernels(request, monkeypatch):
    """With native kernels, if there is a compiler, and without."""
    monkeypatch.setenv("KDSEARCH_NATIVE", "1" if request.param == "kernels" else "0")
    native.ready.cache_clear()
    if request.param == "kernels" and not native.ready():
        pytest.skip("there is no C++ compiler")
    yield
    native.ready.cache_clear()


def numbers(seed, *shapes, dtype=jnp.float32):
    """Small integers, whose sums are exact in any order."""
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.integers(-2, 3, shape), dtype) for shape in shapes]


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def assert_close(found, expected, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(jnp.abs(b).max())), rtol=0)


def numbering(rank):
    letters = "HW"[:rank]
    return f"N{letters}C", f"{letters}IO", f"N{letters}C"


def case(x, w, strides=(1, 1), padding="SAME", dilation=(1, 1), dtype=jnp.float32):
    how = {"window_strides": strides, "padding": padding, "rhs_dilation": dilation}
    return dtype, x, w, {**how, "dimension_numbers": numbering(len(x) - 2)}


@st.composite
def cases(draw):
    """(dtype, shape of x, shape of w, keyword arguments)."""
    rank = draw(st.integers(1, 2))
    each = [draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))) for _ in range(rank)]
    taps, strides, dilation = zip(*each, strict=True)
    padding = draw(st.sampled_from(["SAME", "VALID", "SAME_LOWER", "numbers"]))
    if padding == "numbers":
        padding = [draw(st.sampled_from([(0, 0), (1, 2), (3, 0), (-1, 1)])) for _ in range(rank)]
    space = [d * (k - 1) + 2 + draw(st.integers(0, 14)) for k, _, d in each]
    widths = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 50])
    inputs, outputs = draw(widths), draw(widths)
    dtype = draw(st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]))
    x = (draw(st.integers(1, 5)), *space, inputs)
    return case(x, (*taps, inputs, outputs), strides, padding, dilation, dtype)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
@example(case((3, 17, 19, 16), (3, 3, 16, 16)))
@example(case((2, 8, 9, 11), (3, 3, 11, 23), (2, 2), ((1, 1), (1, 1))))  # odd widths
@example(case((2, 40, 37, 3), (7, 7, 3, 64), (2, 2)))
@example(case((4, 6, 6, 33), (1, 1, 33, 70)))
@example(case((2, 20, 5), (3, 5, 4), (2,), "VALID", (2,)))
@example(case((3, 9, 9, 8), (3, 3, 8, 8), (3, 3)))  # taps that meet no input
def test_values_and_gradients_are_those_of_jax(kernels, drawn):
    dtype, x_shape, w_shape, kwargs = drawn
    x, w = numbers(1, x_shape, w_shape, dtype=dtype)

    def run(convolution):
        @jax.jit
        def products(x, w):
            y, pullback = jax.vjp(partial(convolution, **kwargs), x, w)
            (cotangent,) = numbers(2, y.shape, dtype=y.dtype)
            return y, pullback(cotangent)

        return products(x, w)

    assert_same(run(conv_general_dilated), run(cropped_convolution))


def cropped_convolution(x, w, *, padding, **kwargs):
    """JAX's convolution of a cropped input where padding is negative, for which XLA:CPU's own gradients are wrong."""
    if not isinstance(padding, str):
        starts, ends = zip(*((max(-before, 0), max(-after, 0)) for before, after in padding), strict=True)
        x = x[:, *(slice(a, n - b) for a, b, n in zip(starts, ends, x.shape[1:-1], strict=True))]
        padding = [(max(before, 0), max(after, 0)) for before, after in padding]
    return lax.conv_general_dilated(x, w, padding=padding, **kwargs)


@settings(max_examples=8)
@given(cases())
@example(case((3, 8, 10, 7), (3, 3, 7, 11)))  # pairs of positions
@example(case((2, 8, 11, 7), (5, 5, 7, 9), (2, 1), ((0, 0), (3, -2))))
@example(case((2, 9, 9, 26), (3, 3, 26, 42), (2, 2)))
def test_programs_to_be_exported_compute_the_same(drawn):
    dtype, x_shape, w_shape, kwargs = drawn
    x, w = numbers(1, x_shape, w_shape, dtype=dtype)
    (batch,) = jax.export.symbolic_shape("batch")
    function = jax.jit(lambda x: conv_general_dilated(x, w, **kwargs, portable=True))
    exported = jax.export.export(function, platforms=("cpu", "tpu", "cuda"))(
        jax.ShapeDtypeStruct((batch, *x.shape[1:]), dtype)
    )
    assert_same(jax.export.deserialize(exported.serialize()).call(x), lax.conv_general_dilated(x, w, **kwargs))


def test_real_numbers_agree_up_to_rounding(kernels):
    """The gradients of a ResNet's three stages, within 1e-6 of their scale, against float64."""
    random = np.random.default_rng(0)
    for size, width in ((32, 16), (16, 32), (8, 64)):
        x, w, g = (
            random.normal(size=s) for s in ((16, size, size, width), (3, 3, width, width), (16, size, size, width))
        )
        kwargs = case(x.shape, w.shape)[-1]

        def products(x, w, g, convolution, kwargs=kwargs):
            y, pullback = jax.vjp(partial(convolution, **kwargs), x, w)
            return y, pullback(g)

        with jax.enable_x64(True):
            expected = jax.jit(partial(products, convolution=lax.conv_general_dilated))(x, w, g)
            expected = jax.tree.map(np.asarray, expected)
        narrow = [jnp.asarray(z, jnp.float32) for z in (x, w, g)]
        assert_close(jax.jit(partial(products, convolution=conv_general_dilated))(*narrow), expected)


def test_derivatives_of_every_kind(kernels):
    """Forward mode, second derivatives, per-example gradients, loops and rematerialisation."""
    x, w = numbers(0, (3, 2, 6, 6, 5), (3, 3, 5, 5))
    kwargs = case(x.shape[1:], w.shape)[-1]

    def run(convolution):
        def loss(w, x):
            return (convolution(x, w, **kwargs) ** 2).sum()

        def looped(w, x):
            return (lax.scan(lambda z, _: (convolution(z, w, **kwargs) % 3, None), x, length=3)[0] ** 2).sum()

        @jax.jit
        def everything(w):
            return (
                jax.jvp(loss, (w, x[0]), (w % 2, x[1])),
                jax.jvp(jax.grad(loss, (0, 1)), (w, x[0]), (w % 2, x[1])),
                jax.grad(lambda w: (jax.grad(loss)(w, x[0]) * (w % 3)).sum())(w),
                jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0))(w, x),
                jax.vmap(jax.grad(loss, 1), (None, 0))(w, x),
                jax.vmap(loss, (0, None))(jnp.stack([w, w + 1]), x[0]),
                jax.grad(looped)(w, x[0]),
            )

        return everything(w)

    assert PRODUCT in str(jax.make_jaxpr(partial(conv_general_dilated, **kwargs))(x[0], w))
    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


def test_results_do_not_depend_on_threads():
    """Bit-identical to one core; the number of threads is set when the process starts."""
    if not native.ready() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core, or no compiler")
    code = (
        "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])\n"
        "import hashlib, jax, numpy as np\n"
        "from kdsearch_jax.adapters.convolution.dispatch import conv_general_dilated as conv\n"
        "f = lambda x, w: conv(x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))\n"
        "x, w = (np.random.default_rng(0).normal(size=s).astype('f') for s in ((9, 13, 13, 20), (3, 3, 20, 40)))\n"
        "y, pullback = jax.vjp(jax.jit(f), x, w)\n"
        "print(hashlib.sha256(b''.join(np.asarray(z).tobytes() for z in (y, *pullback(y)))).hexdigest())\n"
    )
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    assert len({run([sys.executable, "-c", code, str(cores)]).stdout for cores in (1, 2)}) == 1


@pytest.mark.parametrize("reason", ["float64", "int32", "3 axes", "symbolic batch", "several devices"])
def test_what_is_not_covered_is_left_to_jax(reason, monkeypatch):
    dtype = {"float64": jnp.float64, "int32": jnp.int32}.get(reason, jnp.float32)
    rank = 3 if reason == "3 axes" else 2
    batch = jax.export.symbolic_shape("batch")[0] if reason == "symbolic batch" else 4
    if reason == "several devices":
        monkeypatch.setattr(jax, "device_count", lambda: 2)
    with jax.enable_x64(reason == "float64"):
        x = jax.ShapeDtypeStruct((batch, *(6, 6, 6)[:rank], 4), dtype)
        w = jax.ShapeDtypeStruct((*(3, 3, 3)[:rank], 4, 4), dtype)
        numbers = ("NHWC", "HWIO", "NHWC") if rank == 2 else ("NDHWC", "DHWIO", "NDHWC")
        found, expected = (
            jax.make_jaxpr(partial(f, window_strides=(1,) * rank, padding="SAME", dimension_numbers=numbers))(x, w)
            for f in (conv_general_dilated, lax.conv_general_dilated)
        )
    assert str(found) == str(expected)


def test_a_second_copy_is_not_registered(monkeypatch, tmp_path):
    """XLA keeps what a process has registered; another cache directory has another copy of it."""
    jax.devices()  # before that, XLA only collects what is registered
    if not native.ready():
        pytest.skip("there is no C++ compiler")
    copies = tmp_path / "kdsearch_jax"
    copies.mkdir(mode=0o700)
    for library in native.user_cache().glob("*.so"):
        shutil.copy(library, copies)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.ready.cache_clear()
    assert native.ready()
    native.ready.cache_clear()


def test_without_a_compiler_xla_computes(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    native.ready.cache_clear()
    with caplog.at_level("INFO"):
        assert not native.ready()
    assert "XLA's own" in caplog.text
    x, w = numbers(0, (2, 6, 6, 3), (3, 3, 3, 5))
    kwargs = case(x.shape, w.shape)[-1]
    found, expected = (f(x, w, **kwargs) for f in (conv_general_dilated, lax.conv_general_dilated))
    native.ready.cache_clear()
    assert_same(found, expected)


# --- in models --------------------------------------------------------------------------------------------------------


class Block(nnx.Module):
    """An NNX residual block with BatchNorm and a 1-D convolution."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 12, (3, 3), strides=2, padding=((1, 1), (1, 1)), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.second = nnx.Conv(12, 12, (3, 3), rngs=rngs)
        self.line = nnx.Conv(12, 7, (3,), rngs=rngs)
        self.head = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = nnx.relu(x + self.second(nnx.relu(self.norm(x))))
        return self.head(self.line(x.reshape(x.shape[0], -1, 12)).mean(1))


class Small(nn.Module):
    """A similar Linen network, partly rematerialised."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(12, (3, 3), strides=2, use_bias=False, name="first")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(x + nn.remat(nn.Conv)(12, (3, 3), name="second")(y))
        x = nn.Conv(7, (3,), name="line")(x.reshape(x.shape[0], -1, 12))
        return nn.Dense(5, name="head")(x.mean(1))


def network(kind):
    """(module, variables)."""
    if kind == "nnx":
        return FunctionalModule.split(Block(nnx.Rngs(0)))
    module = Small() if kind == "linen" else registry.build("cifar_resnet", {"depth": 8, "num_classes": 5, "width": 4})
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))


def training_step(kind, precision="fp32", supervised=False):
    """(a step of distillation or of supervised training, its arguments)."""
    module, variables = network(kind)
    stage, run, task = StageConfig(steps=10), RunConfig(precision=precision), classification(DistillConfig())
    tx = optimizer.make_optimizer(stage)
    step = supervised_step(module, tx, stage, run, task)
    if not supervised:
        step = distill_step(module, module, tx, stage, run, task)
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(8, 16, 16, 3)), jnp.float32)
    batch = {"images": images, "labels": jnp.asarray(random.integers(0, 5, 8), jnp.int32)}
    teacher = jax.tree.map(lambda x: x * 0.9, variables)
    return step, (create_state(variables, tx), batch, jax.random.key(0), None if supervised else teacher)


@pytest.fixture
def plain(monkeypatch):
    """A function that runs another with the modules' own convolutions."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(apply, "fast_convolutions", lambda **_: nullcontext())
            return function()

    return run


@pytest.mark.parametrize("supervised", [False, True], ids=["distillation", "teacher"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_training_step_is_equal(kind, supervised, plain):
    step, arguments = training_step(kind, supervised=supervised)

    def run():
        return str(jax.make_jaxpr(lambda *a: step(*a))(*arguments)), jax.jit(lambda *a: step(*a))(*arguments)

    (own, expected), (inside, found) = plain(run), run()
    assert PRODUCT in inside
    assert PRODUCT not in own
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["resnet", "linen", "nnx"])
def test_programs_for_other_platforms_are_as_before(kind, precision, plain):
    step, arguments = training_step(kind, precision)
    for platform in ("tpu", "cuda"):

        def lowered(platform=platform):
            traced = jax.jit(lambda *a: step(*a)).trace(*arguments)
            return traced.lower(lowering_platforms=(platform,)).as_text()

        assert lowered() == plain(lowered)


def test_memory_that_is_freed_is_kept():
    code = (
        "import sys; from kdsearch_jax.runs import heap\n"
        "kept = heap.keep_freed()\n"
        "import numpy as np\n"
        "for _ in range(2): np.ones(1 << 24)\n"
        "pages = int(open('/proc/self/statm').read().split()[1])\n"
        "assert not kept or pages * 4096 > 1 << 27, (kept, pages)\n"
    )
    if sys.platform == "linux":
        subprocess.run([sys.executable, "-c", code], check=True)


def test_negative_padding_is_a_smaller_input(kernels):
    """XLA:CPU's own gradient of the kernel is wrong there."""
    x, w = numbers(0, (2, 7, 6, 3), (3, 3, 3, 4))

    def loss(x, w, padding):
        y = conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=numbering(2))
        return (y * jnp.arange(float(y.size)).reshape(y.shape)).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    of_x, of_w = gradients(x, w, ((-2, -1), (0, 0)))
    expected_x, expected_w = gradients(x[:, 2:-1], w, "VALID")
    assert_same((of_x[:, 2:-1], of_w), (expected_x, expected_w))
    assert not of_x[:, :2].any() and not of_x[:, -1:].any()
