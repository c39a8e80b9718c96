"""Distils into a student that a search has cut: `python -m kdsearch_jax.retrain --search-from RUN [any setting]`.

Takes teacher and search from RUN, retrains in its own run directory, and exports and reports as the main command does.
"""

# No `from __future__ import annotations` here: tyro reads the types at run time.

from dataclasses import dataclass
from pathlib import Path

from kdsearch_jax import storage
from kdsearch_jax.runs import command_line


@dataclass(frozen=True)
class RetrainOptions(command_line.RunOptions):
    """The search to start from."""

    search_from: Path | None = None
    """A run with a finished search, whose teacher and student are used."""


def main(argv: list[str]) -> int:
    """Runs retraining, baselines, export and report."""
    options, experiment = command_line.parse(argv, RetrainOptions, "kdsearch_jax.retrain", __doc__ or "")
    from kdsearch_jax.runs.execution import execute  # imports JAX, which --help does not need
    from kdsearch_jax.runs.results import format_table

    assert options.workdir is not None
    if options.search_from is None and not (options.resume and (options.workdir / "search" / "network").is_dir()):
        raise command_line.UsageError("--search-from is missing; give a run with a finished search")
    origin = options.search_from and storage.display_paths(str(options.search_from))
    command = {"command": "retrain", "--search-from": origin}
    _, results = execute(options, experiment, command, search_from=options.search_from)
    assert results is not None
    print(format_table(results))
    return 0


if __name__ == "__main__":
    command_line.run(main)
