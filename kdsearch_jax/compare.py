"""Is a searched student better than one made by hand? The experiment, from one teacher, and its table.

    python -m kdsearch_jax.compare --config NAME [--seeds 0 1 2] [--match both] [--rows …] --workdir DIR

Every student has the same teacher, budget, data and training recipe, and as many updates as search and retraining have
together; what differs is how it was made (`rows`). Each row with each seed has a directory of its own in DIR
(`making`), so an interrupted comparison goes on, several processes may share one, and rows and seeds can be added.
What is finished is collected (`table`): mean and standard deviation over the seeds, and differences paired by seed.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdsearch_jax import storage
from kdsearch_jax.pruning.settings import BOUNDS
from kdsearch_jax.runs import command_line
from kdsearch_jax.runs.comparison.rows import check_seeds, chosen
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.runs.locks import locked
from kdsearch_jax.storage.files import read_json_object, write_json


@dataclass(frozen=True)
class CompareOptions(command_line.RunOptions):
    """What is compared, and how often."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each student is made once with each."""
    rows: tuple[str, ...] = ()
    """Students to make; all if left out: searched, layers, uniform, both, random, magnitude, bn_scale, slimming,
    scratch, scratch2."""
    match: Literal["macs", "both"] = "both"
    """Students have the budget's MACs (macs), or also at most the parameters of the uniform student (both)."""
    latency: bool = True
    """Measure the time per image of all students, in turns."""


def main(argv: list[str]) -> int:
    """Makes the students that are missing, and collects all that there are."""
    options, experiment = command_line.parse(_named(argv), CompareOptions, "kdsearch_jax.compare", __doc__ or "")
    import jax  # which --help does not need, and what follows needs

    from kdsearch_jax import reporting
    from kdsearch_jax.runs import directories, stages
    from kdsearch_jax.runs.comparison import making, table
    from kdsearch_jax.runs.setup import prepare

    check_seeds(options.seeds)
    rows = chosen(options.rows)
    if jax.process_count() > 1:
        raise ValueError("compare: it runs in one process; start several with different --seeds instead")
    _check_budget(experiment)
    directory = options.workdir
    assert directory is not None
    experiment = dataclasses.replace(experiment, baselines=())
    check_own(directory, options.match)
    setup = prepare(experiment, directory, resume=True, trust_code=options.trust_code)
    if setup.given is not None:
        making.check_teacher(setup, setup.given)
    with locked(directory, wait=True):
        check_own(directory, options.match, setup.fingerprint)  # another process may have begun meanwhile
        write_json(directory / "setup.json", {"match": options.match, "data": setup.fingerprint})
        directories.new_run_directory(directory, experiment, (directory / "config.json").is_file())
    with locked(directory / "teacher", wait=True):
        stages.teach(setup, True)
    if setup.given is None:
        making.check_teacher(setup, setup.load(setup.teacher))
    budget = making.matched(setup, options.match)
    for seed in options.seeds:
        for row in rows:
            making.make(setup, row, seed, budget)
    comparison = table.collect(setup, budget, options.match, latency=options.latency)
    table.write(directory, comparison)
    print(table.markdown(comparison))
    if comparison["seeds"]:
        print(storage.display_paths(f"report: {reporting.write_report(directory)}"))
    return 0


def _named(argv: list[str]) -> list[str]:
    """The line with --config before a bare name, or with the experiment of the directory that it names alone."""
    if argv and not argv[0].startswith("-"):
        return ["--config", *argv]
    if any(token.partition("=")[0] in ("--config", "--quick", "--resume") for token in argv):
        return argv
    given = [v for token, v in itertools.pairwise(argv) if token == "--workdir"]
    given += [token.partition("=")[2] for token in argv if token.startswith("--workdir=")]
    own = storage.local_copy(given[0], "--workdir", entire_run=True) / "config.json" if given else None
    return ["--config", str(own), *argv] if own is not None and own.is_file() else argv


def _check_budget(experiment: Experiment) -> None:
    """Raises ValueError where students cannot be matched by it."""
    if experiment.budgets:
        raise ValueError(f"budgets: {experiment.budgets} are several, a comparison has one; give --budget.macs instead")
    for name in BOUNDS:
        if name not in ("macs", "params") and getattr(experiment.budget, name) is not None:
            raise ValueError(f"budget.{name}: students are matched by MACs and parameters; give --budget.macs instead")


def check_own(directory: Path, match: str, data: str | None = None) -> None:
    """Raises ValueError where the directory holds something else than this comparison.

    data: fingerprint of its data; None where they are not read yet.
    """
    if not (directory / "config.json").is_file():
        return
    if not (directory / "setup.json").is_file():
        raise ValueError(f"{directory} holds a run, and no comparison; give another --workdir")
    before = read_json_object(directory / "setup.json")
    if before.get("match") != match:
        raise ValueError(
            f"match: {directory} holds a comparison with --match {before.get('match')}; give that, or another "
            "--workdir than this"
        )
    if data is not None and before.get("data", data) != data:
        raise ValueError(
            f"data: {directory} holds a comparison on others (fingerprint {before['data']}, now {data}); give those, "
            "or another --workdir than this"
        )


if __name__ == "__main__":
    command_line.run(main)
