"""Exports a network for use elsewhere: `python -m kdsearch_jax.export NETWORK --out DIRECTORY`.

    student.safetensors   the arrays under flat names ("params/stage1/conv/kernel"), with architecture, info and digests
                          as metadata. `load_safetensors` restores the module; any other program can read the arrays.
    student.stablehlo     the function images → logits including its arrays, for CPU, CUDA and TPU and any batch size.
                          `jax.export.deserialize` runs it without Flax and without this package.
    manifest.json         what each file contains, takes and returns, and how far its outputs differ.

Both take the network's inputs (normalised float32 images, or what `architecture.json` describes) and return its
outputs. Before a file gets its final name, a new process reads it, runs it on random inputs at two batch sizes, and
compares the outputs with the network's own, each entry by its own scale (`kdsearch_jax.pruning.equality`). That process
runs on the CPU in full float32. If the network's module was passed in as an object, which no other process can rebuild,
its outputs are stored for the comparison.
"""

# No `from __future__ import annotations` here: tyro reads the types at run time.

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kdsearch_jax import export, storage
from kdsearch_jax.runs import command_line


@dataclass(frozen=True, kw_only=True)
class ExportOptions(command_line.Options):
    """What to write, and where."""

    network: tyro.conf.Positional[Path]
    """The network's directory, such as RUN/student."""
    out: Path
    """The directory to write to; may be the network's own."""
    formats: tuple[Literal["safetensors", "stablehlo"], ...] = ("safetensors", "stablehlo")
    """The formats to write."""
    check: bool = False
    """Only compare existing files with the network."""


def main(argv: list[str]) -> int:
    """Exports a network, or checks earlier exports, and prints the names of the files."""
    options = command_line.parse_options(
        argv, ExportOptions, "kdsearch_jax.export", (export.__doc__ or "").split("\n\n")[0]
    )
    from kdsearch_jax.storage import export_formats  # imports JAX, which --help does not need

    if options.check:
        files = export_formats.check(options.network, options.out, options.formats, trust_code=options.trust_code)
    else:
        manifest = export_formats.export(options.network, options.out, options.formats, trust_code=options.trust_code)
        files = manifest["files"]
    for name, file in files.items():
        line = f"{options.out}: {name}: outputs agree within {file['difference']:.2g} of their scale"
        print(storage.display_paths(line))
    return 0


if __name__ == "__main__":
    command_line.run(main)
