"""A finished network as one file for others: `python -m kdsearch_jax.export NETWORK --out DIRECTORY`.

    student.safetensors   the arrays under flat names ("params/stage1/conv/kernel"); architecture, info and digests as
                          metadata. `load_safetensors` makes the module of it; any other program can read the arrays.
    student.stablehlo     the compiled-to-be function images → logits with its arrays inside, for CPU, CUDA and TPU and
                          any batch size. `jax.export.deserialize` runs it; neither Flax nor this package is needed.
    manifest.json         what each file holds, takes and returns, and how far its outputs were off.

Both take what the network takes (normalised float32 images, or the inputs that `architecture.json` describes) and
return its outputs. Each file is read again by a fresh process, run on random inputs at two batch sizes, and compared
with the network's own outputs, each entry by its own scale (`kdsearch_jax.equality`), before it gets its name. That
process always runs on the CPU, in full float32. The outputs of a network of a module object, which no other process can
make again, are stored for that process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsearch_jax.export.formats import (
        FORMATS,
        TOLERANCE,
        CannotExportError,
        check,
        export,
        holds_student,
        is_whole,
        load_safetensors,
        load_stablehlo,
        packed,
        read_safetensors,
    )

__all__ = [
    "FORMATS",
    "TOLERANCE",
    "CannotExportError",
    "check",
    "export",
    "holds_student",
    "is_whole",
    "load_safetensors",
    "load_stablehlo",
    "packed",
    "read_safetensors",
]


def __getattr__(name: str) -> Any:  # what is not needed for --help is imported when it is asked for
    import kdsearch_jax.export.formats as library

    return getattr(library, name)
