"""Dense convolutions in C++ for XLA's CPU backend, compiled on first use by the machine's own compiler.

XLA:CPU computes the gradient of a convolution's kernel about four times slower than PyTorch, and convolutions of few
channels about twice as slow. `convolution.cc` has the three products of a convolution (values, gradient of the input,
gradient of the kernel) as handlers of XLA's foreign function interface (`jax.ffi`). They use the compiler's portable
vectors and XLA's own threads; results do not depend on the number of threads.

`ready` compiles them once per machine, JAX version and source into the user's cache directory, compares them with
XLA's own convolution, and registers them. It returns False, and says why in the log, where this is not Linux, there is
no C++ compiler (`CXX`, `c++`, `g++`, `clang++`), the compiler fails, or KDSEARCH_NATIVE=0. Callers then use XLA's.
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

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("convolution.cc")
HANDLERS = ("forward", "input_gradient", "kernel_gradient")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_COMPILERS = ("c++", "g++", "clang++")


class UnavailableError(RuntimeError):
    """The kernels cannot be compiled, or compute something else than XLA."""


@functools.cache
def ready() -> bool:
    """Whether the kernels can be called; compiles and registers them on the first call."""
    if os.environ.get("KDSEARCH_NATIVE", "1") == "0":
        return False
    try:
        compiler = _compiler()
        final = _cache() / f"convolution-{_digest(compiler)}.so"
        if final.is_file():
            _register(final)
            return True
        log.info("compiling convolutions for this CPU, once: %s", final)
        with tempfile.TemporaryDirectory(dir=final.parent) as folder:
            made = Path(folder) / final.name
            _compile(compiler, made)
            _register(made)
            _check()
            made.replace(final)
    except (UnavailableError, OSError, subprocess.SubprocessError) as error:
        log.info("convolutions on this CPU are XLA's own, training takes about twice as long: %s", error)
        return False
    return True


def product(handler: str, result: tuple[int, ...], a: Array, b: Array, shape: Sequence[int]) -> Array:
    """One of the three products, of float32 arrays with channels last.

    Args:
      handler: "forward" of (x, w), "input_gradient" of (y, w), or "kernel_gradient" of (x, y).
      result: shape of what is returned.
      shape: images, height, width, inputs, height and width of the kernel, outputs, height and width of the output, and
        for both axes in turn: strides, padding before, dilation.
    """
    call = jax.ffi.ffi_call(f"kdsearch_{handler}", jax.ShapeDtypeStruct(result, jnp.float32))
    return call(a, b, shape=np.asarray(shape, np.int64))


def _compiler() -> str:
    if sys.platform != "linux":
        raise UnavailableError(f"no kernels for {sys.platform}")
    found = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if found is None or shutil.which(found) is None:
        raise UnavailableError("there is no C++ compiler; install g++ or set CXX")
    return found


def _digest(compiler: str) -> str:
    """Names a library by all that it depends on."""
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
    """What the machine's processor can do: a home directory may be shared by different machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine() + found


def _cache() -> Path:
    """A directory that only the user can write to."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "kdsearch_jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if os.access(folder, os.W_OK) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="kdsearch_jax-"))


def _check() -> None:
    """Raises UnavailableError where the kernels differ from XLA's on small whole numbers, whose sums are exact."""
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
        found = jax.jit(both)(x, w)
    for name, (ours, theirs) in zip(HANDLERS, found, strict=True):
        if not np.array_equal(ours, theirs):
            raise UnavailableError(f"the compiled {name} differs from XLA's")
