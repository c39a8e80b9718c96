"""A finished network as one file for others: `python -m kdsearch_jax.export NETWORK --out DIRECTORY`.

    student.safetensors   the arrays under flat names ("params/stage1/conv/kernel"); architecture, info and digests as
                          metadata. `load_safetensors` makes the module of it; any other program can read the arrays.
    student.stablehlo     the compiled-to-be function images → logits with its arrays inside, for CPU, CUDA and TPU and
                          any batch size. `jax.export.deserialize` runs it; neither Flax nor this package is needed.
    manifest.json         what each file holds, takes and returns, and how far its outputs were off.

Both take what the network takes (normalised float32 images, or the inputs that `architecture.json` describes) and
return its outputs. Each file is read again by a fresh process, run on random inputs at two batch sizes, and compared
with the network's own outputs, each entry by its own scale (`kdsearch_jax.pruning.equality`), before it gets its
name. That
process always runs on the CPU, in full float32. The outputs of a network of a module object, which no other process can
make again, are stored for that process.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kdsearch_jax import export, storage
from kdsearch_jax.runs import command_line
from kdsearch_jax.storage import export_formats


@dataclass(frozen=True, kw_only=True)
class ExportOptions(command_line.Options):
    """What to write, and where."""

    network: tyro.conf.Positional[Path]
    """The network's directory, such as RUN/student."""
    out: Path
    """The directory to write to; may be the network's."""
    formats: tuple[Literal["safetensors", "stablehlo"], ...] = ("safetensors", "stablehlo")
    """What to write."""
    check: bool = False
    """Only compare the files that are there with the network."""


def main(argv: list[str]) -> int:
    """Exports a network, or checks what was exported before, and prints the files' names."""
    options = command_line.parse_options(
        argv, ExportOptions, "kdsearch_jax.export", (export.__doc__ or "").split("\n\n")[0]
    )
    if options.check:
        found = export_formats.check(options.network, options.out, options.formats, trust_code=options.trust_code)
    else:
        found = export_formats.export(options.network, options.out, options.formats, trust_code=options.trust_code)[
            "files"
        ]
    for name, file in found.items():
        told = f"{name}: outputs agree within {file['difference']:.2g} of their own scale"
        print(storage.display_paths(f"{options.out}: {told}"))
    return 0


if __name__ == "__main__":
    command_line.run(main)
