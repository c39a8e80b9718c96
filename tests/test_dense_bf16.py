"""Convolutions that multiply bfloat16 numbers on CPUs with AMX: products, derivatives, training."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax import lax
from test_dense import PRODUCT, case, cases, training_step

from kdsearch_jax.adapters import devices
from kdsearch_jax.adapters.apply import compiled_for
from kdsearch_jax.adapters.convolution import native
from kdsearch_jax.adapters.convolution.dispatch import conv_general_dilated
from kdsearch_jax.adapters.convolution.grouped import pad
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.training import loop

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(not native.ready(bf16=True), reason="no AMX for bfloat16 on this processor, or no C++ compiler"),
]


def real_numbers(seed, *shapes, dtype=jnp.float32):
    """Normal numbers that bfloat16 represents."""
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), jnp.bfloat16).astype(dtype) for shape in shapes]


def in_float32(kwargs):
    """XLA's convolution of float32 arrays. It is given no negative padding, which YNNPACK gets wrong in gradients."""

    def convolution(x, w):
        padding = kwargs["padding"]
        if isinstance(padding, str):
            spans = [d * (k - 1) + 1 for k, d in zip(w.shape, kwargs["rhs_dilation"], strict=False)]
            padding = lax.padtype_to_pads(x.shape[1:-1], spans, kwargs["window_strides"], padding)
        return lax.conv_general_dilated(pad(x, padding), w, **(kwargs | {"padding": "VALID"}))

    return convolution


@settings(max_examples=8)
@given(cases())
@example(case((3, 17, 19, 16), (3, 3, 16, 16)))
@example(case((2, 8, 9, 11), (3, 3, 11, 23), (2, 2), ((1, 1), (1, 1))))  # odd widths
@example(case((2, 40, 37, 3), (7, 7, 3, 64), (2, 2)))
@example(case((4, 6, 6, 33), (1, 1, 33, 70)))
@example(case((2, 20, 5), (3, 5, 4), (2,), "VALID", (2,)))
@example(case((3, 9, 9, 8), (3, 3, 8, 8), (3, 3)))  # taps that meet no input
@example(case((1, 90, 70, 40), (3, 3, 40, 20)))  # several bands of rows
def test_products_are_those_of_the_rounded_factors(drawn):
    """Equal to float32's up to the order of sums, and to the rounding of results that are bfloat16."""
    _, x_shape, w_shape, kwargs = drawn
    x, w = real_numbers(1, x_shape, w_shape)

    def products(convolution, x, w):
        y, pullback = jax.vjp(convolution, x, w)
        (cotangent,) = real_numbers(2, y.shape, dtype=y.dtype)
        return y, pullback(cotangent)

    @jax.jit
    def run(x, w):
        narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        rounded = products(partial(conv_general_dilated, **kwargs, rounded=True), x, w)
        return rounded, products(partial(conv_general_dilated, **kwargs), *narrow), products(in_float32(kwargs), x, w)

    *found, expected = run(x, w)
    for dtype, results in zip((jnp.float32, jnp.bfloat16), found, strict=True):
        for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            assert a.dtype == dtype
            relative = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
            scale = max(1e-3, float(jnp.abs(b).max()))
            np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=relative, atol=4e-6 * scale)


def test_derivatives_round_their_factors_too(monkeypatch):
    """Forward mode, second derivatives, per-example gradients and loops, as XLA computes them from rounded factors."""
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((3, 2, 6, 6, 5), (3, 3, 5, 5)))
    kwargs = case(x.shape[1:], w.shape)[-1]
    convolution = partial(conv_general_dilated, **kwargs, rounded=True)

    def loss(w, x):
        return (convolution(x, w) ** 2).sum()

    def everything(w):
        return (
            jax.jvp(loss, (w, x[0]), (w % 2, x[1])),
            jax.jvp(jax.grad(loss, (0, 1)), (w, x[0]), (w % 2, x[1])),
            jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0))(w, x),
            jax.vmap(jax.grad(loss, 1), (None, 0))(w, x),
            jax.vmap(loss, (0, None))(jnp.stack([w, w + 1]), x[0]),
            jax.grad(lambda w: lax.scan(lambda z, _: (jnp.sin(convolution(z, w)), None), x[0], length=2)[0].sum())(w),
        )

    found = jax.jit(everything)(w)
    monkeypatch.setenv("KDSEARCH_NATIVE", "0")
    native.ready.cache_clear()
    expected = jax.jit(lambda w: everything(w))(w)
    native.ready.cache_clear()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # A sum that lies between two bfloat16 numbers may be rounded to either.
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_do_not_depend_on_threads(dtype):
    """Bit-identical to one core; the number of threads is set when the process starts."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    code = (
        "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])\n"
        "import hashlib, jax, numpy as np\n"
        "from kdsearch_jax.adapters.convolution.dispatch import conv_general_dilated as conv\n"
        "how = dict(dimension_numbers=('NHWC', 'HWIO', 'NHWC'), rounded=True)\n"
        "f = lambda x, w: conv(x, w, (1, 1), 'SAME', **how)\n"
        "shapes = (9, 13, 13, 20), (3, 3, 20, 40)\n"
        "x, w = (jax.numpy.asarray(np.random.default_rng(0).normal(size=s), sys.argv[2]) for s in shapes)\n"
        "y, pullback = jax.vjp(jax.jit(f), x, w)\n"
        "print(hashlib.sha256(b''.join(np.asarray(z).tobytes() for z in (y, *pullback(y)))).hexdigest())\n"
    )
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    assert len({run([sys.executable, "-c", code, str(cores), dtype]).stdout for cores in (1, 2)}) == 1


def test_training_keeps_float32_but_for_the_factors():
    """The step's program for one CPU has no bfloat16 array, and its convolutions round; losses follow float32's."""
    mesh = devices.data_mesh()
    resident = {"arrays": {}, "mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)}
    losses = {}
    for precision in ("fp32", "bf16"):
        step, (state, batch, _, teacher) = training_step("resnet", precision)
        teacher = jax.tree.map(lambda leaf: leaf[::-1], teacher)
        update = loop.make_update(step, mesh, DataConfig(crop=0, flip=False), 0, scanned=False)
        program = str(update.trace(state, batch, resident, teacher).jaxpr)
        assert ("rounded=True" in program) == (precision == "bf16")
        assert PRODUCT in program
        assert "bf16[" not in program
        losses[precision] = []
        for _ in range(8):
            state, metrics = update(state, batch, resident, teacher)
            losses[precision].append(float(metrics["loss"]))
        kept = jax.tree.leaves((state.params, state.opt_state, state.model_state))
        assert {leaf.dtype for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)} == {jnp.dtype(jnp.float32)}
    assert losses["bf16"] != losses["fp32"]
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.05)


def test_other_devices_compute_in_bfloat16():
    """A step that is not known to be compiled for one CPU is cast as before."""
    step, arguments = training_step("resnet", "bf16")
    program = str(jax.make_jaxpr(lambda *a: step(*a))(*arguments))
    assert "bf16[" in program
    assert "rounded=True" not in program
    with compiled_for(devices.data_mesh()):
        assert "rounded=True" in str(jax.make_jaxpr(lambda *a: step(*a))(*arguments))
