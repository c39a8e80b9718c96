"""Convolutions in C++ for XLA's CPU backend, compiled on first use by the machine's own compiler.

XLA:CPU computes the gradient of a convolution kernel about four times slower than PyTorch, and convolutions with few
channels about twice as slow. `convolution.cc` has the three products of a convolution (values, gradient of the input,
gradient of the kernel) as handlers of XLA's foreign function interface (`jax.ffi`). They use the compiler's vector
extensions and XLA's thread pool; results do not depend on the number of threads. `convolution_bf16.cc` has the same
products of bfloat16 numbers, for x86 processors with AMX.

`ready` compiles them once per machine, JAX version and source into the user's cache directory, compares them with
XLA's own convolution, and registers them. It returns False and logs the reason if this is not Linux, there is no C++
compiler (`CXX`, `c++`, `g++`, `clang++`), compilation fails, the processor lacks what they need, or KDSEARCH_NATIVE=0;
callers then do without them.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kdsearch_jax.adapters.user_cache import user_cache

log = logging.getLogger(__name__)

HANDLERS = ("forward", "input_gradient", "kernel_gradient")
_COMPILERS = ("c++", "g++", "clang++")
_COMMON_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class _Library:
    """A source file with all of `HANDLERS`, once for each suffix of their names.

    Attributes:
      kinds: {suffix: dtype of the arrays}.
      features: that the processor must have, as /proc/cpuinfo names them.
    """

    source: Path
    kinds: Mapping[str, Any]
    flags: tuple[str, ...] = _COMMON_FLAGS
    features: tuple[str, ...] = ()


_FLOAT32 = _Library(_HERE / "convolution.cc", {"": jnp.float32})
_BF16 = _Library(
    _HERE / "convolution_bf16.cc",
    {"_bf16": jnp.bfloat16, "_rounded": jnp.float32},
    (*_COMMON_FLAGS, "-mamx-tile", "-mamx-bf16"),
    ("amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512vl"),
)


_registered: set[Path] = set()  # sources; XLA keeps handlers for the rest of the process and refuses another copy


class UnavailableError(RuntimeError):
    """The kernels cannot be compiled, or their results differ from XLA's."""


@functools.cache
def ready(*, bf16: bool = False) -> bool:
    """Whether the kernels can be called; compiles and registers them on the first call.

    Args:
      bf16: those that multiply bfloat16 numbers, for processors with AMX; otherwise those that compute in float32.
    """
    if os.environ.get("KDSEARCH_NATIVE", "1") == "0":
        return False
    try:
        _prepare(_BF16 if bf16 else _FLOAT32)
    except (UnavailableError, OSError, subprocess.SubprocessError) as error:
        if bf16:
            log.info("not multiplying bfloat16 numbers on this CPU: %s", error)
        else:
            log.info("using XLA's own convolutions on this CPU, training takes about twice as long: %s", error)
        return False
    return True


def product(
    handler: str, result: tuple[int, ...], a: Array, b: Array, shape: Sequence[int], *, rounded: bool = False
) -> Array:
    """One of the three products of two float32 or two bfloat16 arrays, channels last, in their dtype.

    Args:
      handler: "forward" of (x, w), "input_gradient" of (y, w), or "kernel_gradient" of (x, y).
      result: shape of what is returned.
      shape: images, height, width, inputs, kernel height, kernel width, outputs, output height, output width, then two
        each of strides, padding before, and dilation.
      rounded: round float32 arrays to bfloat16 before they are multiplied. This and bfloat16 arrays need
        `ready(bf16=True)`.
    """
    suffix = "_bf16" if a.dtype == jnp.bfloat16 else "_rounded" if rounded else ""
    call = jax.ffi.ffi_call(f"kdsearch_{handler}{suffix}", jax.ShapeDtypeStruct(result, a.dtype))
    return call(a, b, shape=np.asarray(shape, np.int64))


def _prepare(library: _Library) -> None:
    """Registers a library's handlers; compiles and checks it first unless it is in the cache."""
    compiler = _compiler()
    if missing := sorted(set(library.features) - set(_processor().split())):
        raise UnavailableError(f"the processor has no {missing[0]}")
    final = user_cache() / f"{library.source.stem}-{_digest(compiler, library)}.so"
    if final.is_file():
        return _register(library, final)
    log.info("compiling convolutions for this CPU, once: %s", final)
    with tempfile.TemporaryDirectory(dir=final.parent) as folder:
        compiled = Path(folder) / final.name
        _compile(compiler, library, compiled)
        _register(library, compiled)
        _check(library)
        compiled.replace(final)
    return None


def _compiler() -> str:
    if sys.platform != "linux":
        raise UnavailableError(f"no kernels for {sys.platform}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None or shutil.which(compiler) is None:
        raise UnavailableError("there is no C++ compiler; install g++ or set CXX")
    return compiler


def _digest(compiler: str, library: _Library) -> str:
    """A hash of everything that the compiled library depends on."""
    parts = (compiler, *library.flags, jax.__version__, _processor())
    code = library.source.read_bytes() + (_HERE / "convolution.h").read_bytes()
    return hashlib.sha256(code + "|".join(parts).encode()).hexdigest()[:20]


def _compile(compiler: str, library: _Library, target: Path) -> None:
    command = [compiler, *library.flags, f"-I{jax.ffi.include_dir()}", str(library.source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        raise UnavailableError(f"{compiler} failed: {lines[0][:200]}")


def _register(library: _Library, compiled: Path) -> None:
    if library.source in _registered:
        return
    handlers = ctypes.CDLL(str(compiled))
    if library is _BF16 and handlers.kdsearch_request_tiles() != 0:
        raise UnavailableError("the operating system does not grant the use of AMX")
    for name in (f"kdsearch_{handler}{suffix}" for handler in HANDLERS for suffix in library.kinds):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(handlers, name)), platform="cpu")
    _registered.add(library.source)


def _processor() -> str:
    """The processor's features, since machines with different processors may share a home directory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _check(library: _Library) -> None:
    """Raises UnavailableError if the kernels differ from XLA's on small integers, whose sums are exact in float32."""
    random, strides, pads = np.random.default_rng(0), (2, 1), ((1, 1), (2, 0))
    shapes = (3, 9, 20, 19), (3, 3, 19, 37), (3, 5, 20, 37)
    x, w, y = (random.integers(-3, 4, shape).astype(np.float32) for shape in shapes)
    shape = (3, 9, 20, 19, 3, 3, 37, 5, 20, *strides, 1, 2, 1, 1)

    def both(x: Array, w: Array, y: Array) -> list[tuple[str, Array, Array]]:
        numbers = ("NHWC", "HWIO", "NHWC")
        value, pullback = jax.vjp(
            lambda x, w: lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=numbers), x, w
        )
        of_x, of_w = pullback(y)
        operands = {"forward": (x, w, value), "input_gradient": (y, w, of_x), "kernel_gradient": (x, y, of_w)}
        return [
            (
                name,
                product(name, c.shape, a.astype(dtype), b.astype(dtype), shape, rounded=suffix == "_rounded"),
                c.astype(dtype),
            )
            for suffix, dtype in library.kinds.items()
            for name, (a, b, c) in operands.items()
        ]

    with jax.ensure_compile_time_eval():
        for name, ours, theirs in both(*map(jnp.asarray, (x, w, y))):
            if not np.array_equal(ours, theirs):
                raise UnavailableError(f"the compiled {name} differs from XLA's")
