"""Distils into a student that a search has cut: `python -m kdsearch_jax.retrain --search-from RUN [any setting]`.

Takes teacher and search from RUN, retrains in a run directory of its own, and delivers as the main command does.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

from dataclasses import dataclass
from pathlib import Path

from kdsearch_jax import storage
from kdsearch_jax.runs import command_line


@dataclass(frozen=True)
class RetrainOptions(command_line.RunOptions):
    """Where the cut student is."""

    search_from: Path | None = None
    """A run whose finished search (and teacher) is used."""


def main(argv: list[str]) -> int:
    """Runs retraining, baselines and delivery."""
    options, experiment = command_line.parse(argv, RetrainOptions, "kdsearch_jax.retrain", __doc__ or "")
    from kdsearch_jax.runs import delivery, directories, stages  # jax and all else, which --help does not need
    from kdsearch_jax.runs.setup import prepare

    assert options.workdir is not None
    if options.search_from is None and not (options.resume and (options.workdir / "search" / "network").is_dir()):
        raise command_line.UsageError("--search-from is missing; give a run whose search is finished")
    origin = options.search_from and storage.display_paths(str(options.search_from))
    command = {"command": "retrain", "--search-from": origin}
    resume = directories.goes_on(options.workdir, experiment, command, options.resume)
    start, trust = options.search_from, options.trust_code
    setup = prepare(experiment, options.workdir, resume=resume, search_from=start, trust_code=trust)
    with directories.run_directory(options.workdir, experiment, command, resume=resume, data=setup.fingerprint):
        results = stages.run(setup, resume=resume)
    assert results is not None
    print(delivery.table(results))
    return 0


if __name__ == "__main__":
    command_line.run(main)
