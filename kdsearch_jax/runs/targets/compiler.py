"""Compiles a program for a target and keeps what the compiler says about it.

Results are cached in the user's cache directory, by the program's text, the target and the versions of JAX and libtpu:
compiling a training step takes seconds to minutes, reading the cache nothing. Several processes may compile at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from kdsearch_jax.adapters.user_cache import user_cache
from kdsearch_jax.runs.targets.chips import CHIPS, Target, TargetError, compiler_version
from kdsearch_jax.runs.targets.program_text import ProgramCounts, Scope, read_program

log = logging.getLogger(__name__)

_FORMAT = 1  # of the cached records
_EXHAUSTED = re.compile(r"\(?([\d.]+)([KMGT])\)? (?:exceeds|of)")
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass(frozen=True)
class Estimates:
    """What the compiler says about one program, of one device. Nothing was measured.

    Attributes:
      target: its name. versions: of jax and libtpu. seconds: that compiling took.
      fits: whether the program fits into HBM. memory: bytes {"arguments", "outputs", "temporaries", "aliased", "code",
        "peak"}; if it does not fit, "peak" alone, or nothing where the compiler does not say.
      flops, bytes: of XLA's cost analysis on logical sizes, a loop's body counted once; None if they are not positive.
      counts: of the program's text.
    """

    target: str
    versions: Mapping[str, str]
    seconds: float
    fits: bool
    memory: Mapping[str, float]
    flops: float | None
    bytes: float | None
    counts: ProgramCounts = field(default_factory=ProgramCounts)

    @property
    def cycles(self) -> float:
        """Estimated cycles of what always runs."""
        return self.counts.cycles

    @property
    def milliseconds(self) -> float:
        """Estimated cycles over the chip's clock: without collectives, custom calls and conditional branches."""
        return 1e3 * self.cycles / CHIPS[self.target.split(":")[1]].clock

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the inverse is `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Estimates:
        """The inverse of `to_json`."""
        counts = dict(record["counts"])
        counts["scopes"] = {name: Scope(**values) for name, values in counts["scopes"].items()}
        return Estimates(**{**record, "counts": ProgramCounts(**counts)})


def compile_for(target: Target, function: Any, *arguments: Any, name: str = "program") -> Estimates:
    """Compiles a jitted function for a target, or reads what that gave before.

    Args:
      function: of `jax.jit`.
      arguments: abstract, with shardings over `target.mesh()`.
      name: for the log.

    Raises:
      TargetError: libtpu is not installed, or the compiler fails for another reason than lack of memory.
    """
    versions = {"jax": jax.__version__, "libtpu": compiler_version()}
    lowered = function.lower(*arguments)
    key = "\n".join((str(_FORMAT), target.name, *versions.values(), str(lowered.in_tree), lowered.as_text()))
    path = user_cache() / "targets" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if (found := _read(path)) is not None:
        return found
    log.info("compiling %s for %s", name, target.name)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        line = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in line or "memory" not in line:
            raise TargetError(f"--target: {target.name}: the compiler fails on {name}: {line[:300]}") from error
        need = _EXHAUSTED.search(line)
        memory = {"peak": float(need[1]) * _UNITS[need[2]]} if need else {}
        result = Estimates(target.name, versions, time.perf_counter() - start, False, memory, None, None)
    else:
        seconds, memory, analysis = time.perf_counter() - start, _memory(compiled), compiled.cost_analysis()
        analysis = (analysis[0] if isinstance(analysis, list) else analysis) or {}
        flops, traffic = (_positive(analysis.get(key)) for key in ("flops", "bytes accessed"))
        fits = memory["peak"] <= target.chip.memory
        counts = read_program(compiled.as_text() or "")
        result = Estimates(target.name, versions, seconds, fits, memory, flops, traffic, counts)
    _write(path, result)
    return result


def _memory(compiled: Any) -> dict[str, float]:
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    peak = sum(parts.values()) - 2 * parts["aliased"]
    return {**{name: float(value) for name, value in parts.items()}, "peak": float(peak)}


def _positive(value: Any) -> float | None:
    """A number of the cost analysis; None if it is nonsense, as it is for programs with many custom calls."""
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _read(path: Path) -> Estimates | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file is written again
        return Estimates.from_json(json.loads(path.read_text()))
    return None


def _write(path: Path, result: Estimates) -> None:
    """Writes a record in one step, so that other processes read all of it or nothing."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(result.to_json(), file)
        os.replace(file.name, path)
