"""What a network to be tried is, and what is recorded of a trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

Status = Literal["passed", "traced", "nothing", "failed", "broken"]


class CallSpec(NamedTuple):
    """A module and how it is called: inputs are pytrees of arrays with a leading batch axis."""

    module: Any
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One network. make: builds it, and imports what that needs; full: at its published size, so traced only."""

    name: str
    make: Callable[[], CallSpec]
    full: bool = False


@dataclass(frozen=True)
class Package:
    """Networks of one origin. requirements: what pip installs, and nothing that it depends on; own: of this project."""

    name: str
    requirements: tuple[str, ...]
    variants: tuple[Variant, ...]
    own: bool = False


@dataclass
class Record:
    """What came of a trial.

    status: `passed`: both students equal the gated network; `traced`: at full size, no parameter was made; `nothing`:
    nothing in it can be pruned; `failed`: the student is not the network, or tracing raised; `broken`: the network does
    not run by itself on these versions. share: of its MACs that can go; half, branches: the largest difference of the
    outputs over their scale; effect: the same between the student and the gated network with nothing removed.
    """

    package: str
    variant: str
    status: Status
    reason: str = ""
    version: str = ""
    library: str = ""
    seconds: float = 0.0
    trace_seconds: float = 0.0
    macs: int = 0
    params: int = 0
    share: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    frozen: int = 0
    half: float | None = None
    branches: float | None = None
    effect: float | None = None


def images(*shape: int, batch: int = 2) -> np.ndarray:
    """Normal images (batch, height, width, channels)."""
    return np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)


def tokens(length: int, vocabulary: int = 64, batch: int = 2) -> np.ndarray:
    """Random token numbers (batch, length)."""
    return np.random.default_rng(0).integers(3, vocabulary, (batch, length)).astype(np.int32)
