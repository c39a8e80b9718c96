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
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

log = logging.getLogger(__name__)

HANDLERS = ("forward", "input_gradient", "kernel_gradient")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_BF16_FLAGS = ("-mamx-tile", "-mamx-bf16")
_BF16_FEATURES = {"amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512vl"}  # as /proc/cpuinfo names them
_SUFFIXES = {jnp.float32: "", jnp.bfloat16: "_bf16"}
_COMPILERS = ("c++", "g++", "clang++")


class UnavailableError(RuntimeError):
    """The kernels cannot be compiled, or their results differ from XLA's."""


@functools.cache
def ready(dtype: Any = jnp.float32) -> bool:
    """Whether the kernels for arrays of this dtype can be called; compiles and registers them on the first call."""
    if os.environ.get("KDSEARCH_NATIVE", "1") == "0" or jnp.dtype(dtype) not in map(jnp.dtype, _SUFFIXES):
        return False
    narrow = jnp.dtype(dtype) == jnp.bfloat16
    if narrow and not _BF16_FEATURES <= set(_processor().split()):
        return False
    try:
        _prepare(dtype, Path(__file__).with_name("convolution_bf16.cc" if narrow else "convolution.cc"))
    except (UnavailableError, OSError, subprocess.SubprocessError) as error:
        if narrow:
            log.info("computing bfloat16 convolutions in float32 on this CPU: %s", error)
        else:
            log.info("using XLA's own convolutions on this CPU, training takes about twice as long: %s", error)
        return False
    return True


def _prepare(dtype: Any, source: Path) -> None:
    """Registers the kernels of a source, compiled and checked now unless a checked library is in the cache."""
    compiler = _compiler()
    flags = (*_FLAGS, *(_BF16_FLAGS if jnp.dtype(dtype) == jnp.bfloat16 else ()))
    final = _cache() / f"{source.stem}-{_digest(compiler, flags, source)}.so"
    if final.is_file():
        return _register(final, dtype)
    log.info("compiling convolutions for this CPU, once: %s", final)
    with tempfile.TemporaryDirectory(dir=final.parent) as folder:
        library = Path(folder) / final.name
        _compile(compiler, flags, source, library)
        _register(library, dtype)
        _check(dtype)
        library.replace(final)
    return None


def product(handler: str, result: tuple[int, ...], a: Array, b: Array, shape: Sequence[int]) -> Array:
    """One of the three products of two float32 or two bfloat16 arrays, channels last, in their dtype.

    Args:
      handler: "forward" of (x, w), "input_gradient" of (y, w), or "kernel_gradient" of (x, y).
      result: shape of what is returned.
      shape: images, height, width, inputs, kernel height, kernel width, outputs, output height, output width, then two
        each of strides, padding before, and dilation.
    """
    call = jax.ffi.ffi_call(f"kdsearch_{handler}{_suffix(a.dtype)}", jax.ShapeDtypeStruct(result, a.dtype))
    return call(a, b, shape=np.asarray(shape, np.int64))


def _suffix(dtype: Any) -> str:
    """What the names of the handlers for arrays of this dtype end with."""
    return next(suffix for known, suffix in _SUFFIXES.items() if jnp.dtype(known) == jnp.dtype(dtype))


def _compiler() -> str:
    if sys.platform != "linux":
        raise UnavailableError(f"no kernels for {sys.platform}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None or shutil.which(compiler) is None:
        raise UnavailableError("there is no C++ compiler; install g++ or set CXX")
    return compiler


def _digest(compiler: str, flags: Sequence[str], source: Path) -> str:
    """A hash of everything that the compiled library depends on."""
    parts = (compiler, *flags, jax.__version__, _processor())
    code = source.read_bytes() + source.with_name("convolution.h").read_bytes()
    return hashlib.sha256(code + "|".join(parts).encode()).hexdigest()[:20]


def _compile(compiler: str, flags: Sequence[str], source: Path, target: Path) -> None:
    command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        raise UnavailableError(f"{compiler} failed: {lines[0][:200]}")


def _register(library: Path, dtype: Any) -> None:
    handlers = ctypes.CDLL(str(library))
    if jnp.dtype(dtype) == jnp.bfloat16 and handlers.kdsearch_request_tiles() != 0:
        raise UnavailableError("the operating system does not grant the use of AMX")
    for name in (f"kdsearch_{handler}{_suffix(dtype)}" for handler in HANDLERS):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(handlers, name)), platform="cpu")


def _processor() -> str:
    """The processor's features, since machines with different processors may share a home directory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache() -> Path:
    """A directory that only the user can write to."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "kdsearch_jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="kdsearch_jax-"))


def _check(dtype: Any) -> None:
    """Raises UnavailableError if the kernels differ from XLA's on small integers, whose sums are exact in float32."""
    random, strides, pads = np.random.default_rng(0), (2, 1), ((1, 1), (2, 0))
    x, w, y = (
        random.integers(-3, 4, shape).astype(np.float32) for shape in ((3, 9, 20, 19), (3, 3, 19, 37), (3, 5, 20, 37))
    )
    shape = (3, 9, 20, 19, 3, 3, 37, 5, 20, *strides, 1, 2, 1, 1)

    def both(x: Array, w: Array, y: Array) -> list[tuple[Array, Array]]:
        numbers = ("NHWC", "HWIO", "NHWC")
        value, pullback = jax.vjp(
            lambda x, w: lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=numbers), x, w
        )
        of_x, of_w = pullback(y)
        operands = {"forward": (x, w, value), "input_gradient": (y, w, of_x), "kernel_gradient": (x, y, of_w)}
        return [
            (product(name, c.shape, a.astype(dtype), b.astype(dtype), shape), c.astype(dtype))
            for name, (a, b, c) in operands.items()
        ]

    with jax.ensure_compile_time_eval():
        results = jax.jit(both)(x, w, y)
    for name, (ours, theirs) in zip(HANDLERS, results, strict=True):
        if not np.array_equal(ours, theirs):
            raise UnavailableError(f"the compiled {name} differs from XLA's")
