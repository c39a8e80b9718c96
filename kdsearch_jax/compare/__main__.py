"""Searched against hand-made students: `python -m kdsearch_jax.compare [--config NAME] --workdir DIR [any setting]`.

From one teacher, under one budget, with equal steps. The same command goes on with a comparison that was interrupted;
`--rows` and `--seeds` may be others each time, also in processes side by side, and whatever is finished is collected:
comparison.json, comparison.md, comparison.csv and report/.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdsearch_jax import cli, storage
from kdsearch_jax.compare.rows import check_seeds, chosen
from kdsearch_jax.config import BOUNDS, Experiment
from kdsearch_jax.files import read_object, write_json
from kdsearch_jax.locks import locked


@dataclass(frozen=True)
class CompareOptions(cli.RunOptions):
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
    options, experiment = cli.parse(_named(argv), CompareOptions, "kdsearch_jax.compare", __doc__ or "")
    import jax  # which --help does not need, and what follows needs

    from kdsearch_jax import report, rundir, stages
    from kdsearch_jax.compare import making, table
    from kdsearch_jax.road import prepare

    check_seeds(options.seeds)
    rows = chosen(options.rows)
    if jax.process_count() > 1:
        raise ValueError("compare: it runs in one process; start several with different --seeds instead")
    _check_budget(experiment)
    directory = options.workdir
    assert directory is not None
    experiment = dataclasses.replace(experiment, baselines=())
    check_own(directory, options.match)
    road = prepare(experiment, directory, resume=True, trust_code=options.trust_code)
    if road.given is not None:
        making.check_teacher(road, road.given)
    with locked(directory, wait=True):
        check_own(directory, options.match, road.fingerprint)  # another process may have begun meanwhile
        write_json(directory / "setup.json", {"match": options.match, "data": road.fingerprint})
        rundir.new_run_directory(directory, experiment, (directory / "config.json").is_file())
    with locked(directory / "teacher", wait=True):
        stages.teach(road, True)
    if road.given is None:
        making.check_teacher(road, road.load(road.teacher))
    budget = making.matched(road, options.match)
    for seed in options.seeds:
        for row in rows:
            making.make(road, row, seed, budget)
    comparison = table.collect(road, budget, options.match, latency=options.latency)
    table.write(directory, comparison)
    print(table.markdown(comparison))
    if comparison["seeds"]:
        print(storage.shown(f"report: {report.write(directory)}"))
    return 0


def _named(argv: list[str]) -> list[str]:
    """The line with --config before a bare name, or with the experiment of the directory that it names alone."""
    if argv and not argv[0].startswith("-"):
        return ["--config", *argv]
    if any(token.partition("=")[0] in ("--config", "--quick", "--resume") for token in argv):
        return argv
    given = [v for token, v in itertools.pairwise(argv) if token == "--workdir"]
    given += [token.partition("=")[2] for token in argv if token.startswith("--workdir=")]
    own = storage.local(given[0], "--workdir", whole=True) / "config.json" if given else None
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
    before = read_object(directory / "setup.json")
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
    cli.run(main)
