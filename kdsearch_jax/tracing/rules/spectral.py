"""The rule for Fourier transforms: free along the axes that are not transformed."""

from __future__ import annotations

from kdsearch_jax.tracing.findings import Context, Rule
from kdsearch_jax.tracing.labels import FIXED, Value, blend


def _fft(c: Context, ins: list[Value]) -> list[Value]:
    """Mixes the last axes, as many as there are lengths; linear in the others."""
    rank, count = len(c.shape(0)), len(c.op.params["fft_lengths"])
    kept = range(rank - count)
    value = c.found.settle(ins[0], kept)
    for axis in value.axes[rank - count :]:
        c.freeze(axis, "its units are mixed by")
    c.found.uncounted.add(c.op.name)
    return [blend(ins, [*(value.axes[i] for i in kept), *[FIXED] * count], value.linear)]


RULES: dict[str, Rule] = {"fft": _fft}
