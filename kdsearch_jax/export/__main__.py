"""`python -m kdsearch_jax.export NETWORK --out DIRECTORY`: a finished network as one file for others."""

# No `from __future__ import annotations` here: the command line is read off the types.

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kdsearch_jax import cli, export, storage


@dataclass(frozen=True, kw_only=True)
class ExportOptions(cli.Options):
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
    options = cli.parse_options(argv, ExportOptions, "kdsearch_jax.export", (export.__doc__ or "").split("\n\n")[0])
    if options.check:
        found = export.check(options.network, options.out, options.formats, trust_code=options.trust_code)
    else:
        found = export.export(options.network, options.out, options.formats, trust_code=options.trust_code)["files"]
    for name, file in found.items():
        told = f"{name}: outputs agree within {file['difference']:.2g} of their own scale"
        print(storage.shown(f"{options.out}: {told}"))
    return 0


if __name__ == "__main__":
    cli.run(main)
