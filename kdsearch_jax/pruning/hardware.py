"""Width multiples that a device pads to: removing units within a multiple saves nothing.

| platform | multiples | why |
|---|---|---|
| tpu | 8 and 128 | registers and matrix unit work on tiles of 8 sublanes by 128 lanes, and arrays are padded to them |
| gpu | 8 | tensor cores read 16 bytes at a time: 8 numbers in fp16 and bf16 (4 in TF32, which divides 8) |
| cpu | 1 | not measured: matrix kernels mask or finish what does not fill a vector |
| other | 1 | not known |

Sources: Cloud TPU documentation, "Cloud TPU performance guide", for the 8 x 128 registers and XLA's padding; for GPUs
the usual rule for tensor cores in half precision. Neither was measured here.

A group at least as wide as the larger multiple uses it, a narrower one the smaller multiple, and an even narrower one
1. Heads, groups of a convolution and branches use 1, since they are not an axis by themselves. The compiler decides
which of two axes is placed along the lanes; the padded costs apply the same rule to both and are estimates.
"""

from __future__ import annotations

import jax
import numpy as np

from kdsearch_jax.tracing.cost import Cost
from kdsearch_jax.tracing.topology import Topology

MULTIPLES: dict[str, tuple[int, ...]] = {"tpu": (8, 128), "gpu": (8,), "cpu": (1,)}
WIDTHS = ("channels", "neurons", "queries", "values", "width")  # kinds of units that are indices of an axis


def current_platform() -> str:
    """`cpu`, `gpu`, `tpu`, …: the platform that this process computes on."""
    return jax.default_backend()


def multiple_of(width: int, platform: str | None = None) -> int:
    """The multiple that a width should have on a platform (None: the current one); 1 if it is too narrow."""
    multiples = [m for m in MULTIPLES.get(platform or current_platform(), (1,)) if m <= width]
    return max(multiples, default=1)


def multiples(topology: Topology, platform: str | None = None) -> dict[str, int]:
    """{group: multiple that its width should have}."""
    return {g.name: multiple_of(g.size, platform) if g.kind in WIDTHS else 1 for g in topology.groups}


def padded_macs(topology: Topology, keep: np.ndarray, platform: str | None = None) -> float:
    """MACs of one example, with every prunable axis padded as the platform pads it; keep: (units,) of 0 and 1."""
    cost = topology.macs
    sizes = cost.base + cost.counts @ np.asarray(keep, float)
    varies = np.diff(cost.counts.indptr) > 0
    whole = cost.base + cost.counts @ np.ones(topology.units)
    step = np.array([multiple_of(int(w), platform) if v else 1 for w, v in zip(whole, varies, strict=True)])
    padded = Cost(cost.constants, cost.factors, cost.alive, np.ceil(sizes / step) * step, cost.counts * 0.0)
    return padded.total(keep)


def padded_share(topology: Topology, keep: np.ndarray, platform: str | None = None) -> float:
    """MACs with padding over MACs without: 1 without waste, 1.25 if a fifth of the work is padding."""
    return padded_macs(topology, keep, platform) / max(topology.macs.total(keep), 1e-30)
