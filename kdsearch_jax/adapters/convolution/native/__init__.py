"""Convolutions in C++ for XLA's CPU backend, compiled on first use by the machine's own compiler.

XLA:CPU computes the gradient of a convolution kernel about four times slower than PyTorch, and convolutions with few
channels about twice as slow. `convolution.cc` has the three products of a convolution (values, gradient of the input,
gradient of the kernel) as handlers of XLA's foreign function interface (`jax.ffi`). They use the compiler's vector
extensions and XLA's thread pool; results do not depend on the number of threads.

`ready` compiles them once per machine, JAX version and source into the user's cache directory, compares them with
XLA's own convolution, and registers them. It returns False and logs the reason if this is not Linux, there is no C++
compiler (`CXX`, `c++`, `g++`, `clang++`), compilation fails, or KDSEARCH_NATIVE=0; callers then use XLA's convolutions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kdsearch_jax.adapters.user_cache import user_cache

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("convolution.cc")
HANDLERS = ("forward", "input_gradient", "kernel_gradient")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_COMPILERS = ("c++", "g++", "clang++")


class UnavailableError(RuntimeError):
    """The kernels cannot be compiled, or their results differ from XLA's."""


@functools.cache
def ready() -> bool:
    """Whether the kernels can be called; compiles and registers them on the first call."""
    if os.environ.get("KDSEARCH_NATIVE", "1") == "0":
        return False
    try:
        compiler = _compiler()
        final = user_cache() / f"convolution-{_digest(compiler)}.so"
        if final.is_file():
            _register(final)
            return True
        log.info("compiling convolutions for this CPU, once: %s", final)
        with tempfile.TemporaryDirectory(dir=final.parent) as folder:
            library = Path(folder) / final.name
            _compile(compiler, library)
            _register(library)
            _check()
            library.replace(final)
    except (UnavailableError, OSError, subprocess.SubprocessError) as error:
        log.info("using XLA's own convolutions on this CPU, training takes about twice as long: %s", error)
        return False
    return True


def product(handler: str, result: tuple[int, ...], a: Array, b: Array, shape: Sequence[int]) -> Array:
    """One of the three products of float32 arrays, channels last.

    Args:
      handler: "forward" of (x, w), "input_gradient" of (y, w), or "kernel_gradient" of (x, y).
      result: shape of what is returned.
      shape: images, height, width, inputs, kernel height, kernel width, outputs, output height, output width, then two
        each of strides, padding before, and dilation.
    """
    call = jax.ffi.ffi_call(f"kdsearch_{handler}", jax.ShapeDtypeStruct(result, jnp.float32))
    return call(a, b, shape=np.asarray(shape, np.int64))


def _compiler() -> str:
    if sys.platform != "linux":
        raise UnavailableError(f"no kernels for {sys.platform}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None or shutil.which(compiler) is None:
        raise UnavailableError("there is no C++ compiler; install g++ or set CXX")
    return compiler


def _digest(compiler: str) -> str:
    """A hash of everything that the compiled library depends on."""
    parts = (compiler, *_FLAGS, jax.__version__, _processor())
    return hashlib.sha256(SOURCE.read_bytes() + "|".join(parts).encode()).hexdigest()[:20]


def _compile(compiler: str, target: Path) -> None:
    command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        raise UnavailableError(f"{compiler} failed: {lines[0][:200]}")


def _register(library: Path) -> None:
    handlers = ctypes.CDLL(str(library))
    for name in HANDLERS:
        capsule = jax.ffi.pycapsule(getattr(handlers, f"kdsearch_{name}"))
        jax.ffi.register_ffi_target(f"kdsearch_{name}", capsule, platform="cpu")


def _processor() -> str:
    """The processor's features, since machines with different processors may share a home directory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _check() -> None:
    """Raises UnavailableError if the kernels differ from XLA's on small integers, whose sums are exact."""
    random, strides, pads = np.random.default_rng(0), (2, 1), ((1, 1), (2, 0))
    x, w = (random.integers(-3, 4, shape).astype(np.float32) for shape in ((3, 9, 20, 19), (3, 3, 19, 37)))
    shape = (3, 9, 20, 19, 3, 3, 37, 5, 20, *strides, 1, 2, 1, 1)

    def both(x: Array, w: Array) -> list[tuple[Array, Array]]:
        numbers = ("NHWC", "HWIO", "NHWC")
        y, pullback = jax.vjp(
            lambda x, w: lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=numbers), x, w
        )
        of_x, of_w = pullback(y)
        operands = {"forward": (x, w, y), "input_gradient": (y, w, of_x), "kernel_gradient": (x, y, of_w)}
        return [(product(name, c.shape, a, b, shape), c) for name, (a, b, c) in operands.items()]

    with jax.ensure_compile_time_eval():
        results = jax.jit(both)(x, w)
    for name, (ours, theirs) in zip(HANDLERS, results, strict=True):
        if not np.array_equal(ours, theirs):
            raise UnavailableError(f"the compiled {name} differs from XLA's")
