"""What widths a device pads to: units that cost nothing, and units whose removal saves nothing.

| platform | multiples | why |
|---|---|---|
| tpu | 8 and 128 | registers and matrix unit work on tiles of 8 sublanes by 128 lanes, to which arrays are padded |
| gpu | 8 | tensor cores read 16 bytes at a time: 8 numbers in fp16 and bf16 (4 in TF32, which 8 is a multiple of) |
| cpu | 1 | not measured: matrix kernels mask or finish what does not fill a vector |
| other | 1 | not known |

TPU: Cloud TPU documentation, "Cloud TPU performance guide": registers of 8 x 128, and XLA pads what does not fill
them. GPU: the usual rule for tensor cores in half precision. Neither was measured here.

A group wider than the larger multiple keeps to it, a narrower one to the smaller; one that is narrower than this too,
and heads, groups of a convolution and branches, which are not an axis by themselves, keep to 1. Which of two axes lies
along the lanes is the compiler's choice: padded costs are of either, by the same rule, and so an estimate.
"""

from __future__ import annotations

import jax
import numpy as np

from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.topology import Topology

MULTIPLES: dict[str, tuple[int, ...]] = {"tpu": (8, 128), "gpu": (8,), "cpu": (1,)}
_WIDTHS = ("channels", "neurons", "values")  # kinds of units that are places of an axis


def platform() -> str:
    """`cpu`, `gpu`, `tpu`, …: what this process computes on."""
    return jax.default_backend()


def multiple_of(width: int, on: str | None = None) -> int:
    """What a width is padded to a multiple of, on a platform (None: this one); 1 where it is too narrow to tell."""
    found = [m for m in MULTIPLES.get(on or platform(), (1,)) if m <= width]
    return max(found, default=1)


def multiples(topology: Topology, on: str | None = None) -> dict[str, int]:
    """{group: what its width should be a multiple of}."""
    return {g.name: multiple_of(g.size, on) if g.kind in _WIDTHS else 1 for g in topology.groups}


def padded_macs(topology: Topology, keep: np.ndarray, on: str | None = None) -> float:
    """MACs of one example with every axis that may lose units padded as the platform pads it."""
    cost = topology.macs
    sizes = cost.base + cost.counts @ np.asarray(keep, float)
    varies = np.diff(cost.counts.indptr) > 0
    whole = cost.base + cost.counts @ np.ones(topology.units)
    step = np.array([multiple_of(int(w), on) if v else 1 for w, v in zip(whole, varies, strict=True)])
    padded = Cost(cost.constants, cost.factors, cost.alive, np.ceil(sizes / step) * step, cost.counts * 0.0)
    return padded.total(keep)


def padded_share(topology: Topology, keep: np.ndarray, on: str | None = None) -> float:
    """MACs with padding over MACs without: 1 where no width is wasted, 1.25 where a fifth of the work is on padding."""
    return padded_macs(topology, keep, on) / max(topology.macs.total(keep), 1e-30)
