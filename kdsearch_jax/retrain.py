"""Distils into a student that a search has cut: `python -m kdsearch_jax.retrain --search-from RUN [any setting]`.

Takes teacher and search from RUN, retrains in a run directory of its own, and delivers as the main command does.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

from dataclasses import dataclass
from pathlib import Path

from kdsearch_jax import cli, delivery, stages
from kdsearch_jax.road import prepare


@dataclass(frozen=True)
class RetrainOptions(cli.RunOptions):
    """Where the cut student is."""

    search_from: Path | None = None
    """A run whose finished search (and teacher) is used."""


def main(argv: list[str]) -> int:
    """Runs retraining, baselines and delivery."""
    options, experiment = cli.parse(argv, RetrainOptions, "kdsearch_jax.retrain", __doc__ or "")
    assert options.workdir is not None
    if options.search_from is None and not (options.resume and (options.workdir / "search" / "network").is_dir()):
        raise cli.UsageError("--search-from is missing; give a run whose search is finished")
    road = prepare(experiment, options.workdir, resume=options.resume, search_from=options.search_from)
    cli.new_run_directory(options.workdir, experiment, options.resume)
    results = stages.run(road, resume=options.resume)
    assert results is not None
    print(delivery.table(results))
    return 0


if __name__ == "__main__":
    cli.run(main)
