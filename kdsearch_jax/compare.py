"""Compares searched students with hand-made ones from the same teacher.

    python -m kdsearch_jax.compare --config NAME [--seeds 0 1 2] [--match both] [--rows …] --workdir DIR

`--rows … external:DIR` adds a student of any origin, whose network is in the directory DIR (`kd.save`).

Every student has the same teacher, budget, data and training recipe, and as many updates as search and retraining
together; only the way it is made differs (`rows`). Each row and seed has its own directory in DIR (`make_rows`), so an
interrupted comparison can be resumed, several processes can share one, and rows and seeds can be added. The table
(`table`) has the mean and standard deviation over the seeds, and differences paired by seed.
"""

# No `from __future__ import annotations` here: tyro reads the types at run time.

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdsearch_jax import storage
from kdsearch_jax.pruning.settings import BOUNDS
from kdsearch_jax.runs import command_line
from kdsearch_jax.runs.comparison.rows import check_seeds, select_rows
from kdsearch_jax.runs.config import Experiment
from kdsearch_jax.runs.locks import locked
from kdsearch_jax.storage.files import core_numbers, read_json_object, write_json


@dataclass(frozen=True)
class CompareOptions(command_line.RunOptions):
    """What is compared."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds; each student is made once per seed."""
    rows: tuple[str, ...] = ()
    """Students to make; all by default: searched, layers, uniform, both, random, magnitude, bn_scale, slimming,
    scratch, scratch2. external:DIR adds a student made elsewhere, within the budget: a directory as of `kd.save`."""
    match: Literal["macs", "both"] = "both"
    """Match students by the budget's MACs (macs), or also by the parameters of the uniform student (both)."""
    latency: bool = True
    """Measure the time per image of all students, alternating between them."""
    jobs: int = 1
    """Rows to make at a time, each in a process of its own with its share of the cores."""
    table: bool = True
    """Write the table and the report at the end."""


def main(argv: list[str]) -> int:
    """Makes the missing students and writes the table of all finished ones."""
    options, experiment = command_line.parse(argv, CompareOptions, "kdsearch_jax.compare", __doc__ or "", resumes=True)
    import jax  # --help does not need the following

    from kdsearch_jax import reporting
    from kdsearch_jax.runs import directories, stages
    from kdsearch_jax.runs.comparison import external, jobs, make_rows, table
    from kdsearch_jax.runs.setup import prepare_run

    check_seeds(options.seeds)
    if options.jobs < 1:
        raise ValueError(f"jobs: {options.jobs} is not possible; give at least 1")
    rows = select_rows(options.rows)
    if jax.process_count() > 1:
        raise ValueError("compare: runs in a single process; start several with different --seeds instead")
    _check_budget(experiment)
    directory = options.workdir
    assert directory is not None
    experiment = dataclasses.replace(experiment, baselines=())
    check_same_comparison(directory, options.match)
    setup = prepare_run(experiment, directory, resume=True, trust_code=options.trust_code)
    students = external.load_students(setup, rows, options.trust_code)
    if setup.provided_teacher is not None:
        make_rows.check_teacher(setup, setup.provided_teacher)
        external.check_budget(setup, students, make_rows.matched_budget(setup, options.match))
    with locked(directory, wait=True):
        check_same_comparison(directory, options.match, setup.fingerprint)  # another process may have begun since
        write_json(directory / "setup.json", {"match": options.match, "data": setup.fingerprint})
        directories.new_run_directory(directory, experiment, (directory / "config.json").is_file())
    with locked(directory / "teacher", wait=True):
        stages.teach(setup, True)
    if setup.provided_teacher is None:
        make_rows.check_teacher(setup, setup.load(setup.teacher_directory))
    budget = make_rows.matched_budget(setup, options.match)
    external.check_budget(setup, students, budget)
    if options.jobs > 1:
        flags = [f"--{name.replace('_', '-')}" for name in ("trust_code", "traceback") if getattr(options, name)]
        pending = jobs.pending(setup, rows, students, options.seeds, ("--match", options.match, *flags))
        jobs.run(pending, options.jobs, core_numbers())
    else:
        for seed in options.seeds:
            for row in rows:
                make_rows.make_row(setup, row, seed, budget, students.get(row.name))
    if not options.table:
        return 0
    comparison = table.collect(setup, budget, options.match, latency=options.latency)
    table.write(directory, comparison)
    print(table.markdown(comparison))
    if comparison["seeds"]:
        print(storage.display_paths(f"report: {reporting.write_report(directory)}"))
    return 0


def _check_budget(experiment: Experiment) -> None:
    """Raises ValueError if students cannot be matched by the budget."""
    if experiment.budgets:
        raise ValueError(f"budgets: {experiment.budgets}: a comparison has a single budget; give --budget.macs instead")
    for name in BOUNDS:
        if name not in ("macs", "params") and getattr(experiment.budget, name) is not None:
            raise ValueError(f"budget.{name}: students are matched by MACs and parameters; give --budget.macs instead")


def check_same_comparison(directory: Path, match: str, data: str | None = None) -> None:
    """Raises ValueError if the directory holds anything but this comparison.

    data: fingerprint of the data; None if they have not been read yet.
    """
    if not (directory / "config.json").is_file():
        return
    if not (directory / "setup.json").is_file():
        raise ValueError(f"{directory} holds a run, not a comparison; give another --workdir")
    before = read_json_object(directory / "setup.json")
    if before.get("match") != match:
        raise ValueError(
            f"match: {directory} holds a comparison with --match {before.get('match')}; give that, or another --workdir"
        )
    if data is not None and before.get("data", data) != data:
        raise ValueError(
            f"data: {directory} holds a comparison on other data (fingerprint {before['data']}, now {data}); give "
            "those, or another --workdir"
        )


if __name__ == "__main__":
    command_line.run(main)
