"""Trains a teacher: `python -m kdsearch_jax.teacher [--config NAME] [any setting]`; the network is RUN/teacher/network.

`python -m kdsearch_jax.search --resume --workdir RUN`, with the same settings, goes on from there.
"""

from kdsearch_jax import cli, stages
from kdsearch_jax.road import prepare


def main(argv: list[str]) -> int:
    """Runs the teacher's stage only."""
    options, experiment = cli.parse(argv, cli.RunOptions, "kdsearch_jax.teacher", __doc__ or "")
    assert options.workdir is not None
    road = prepare(experiment, options.workdir, resume=options.resume, searches=False)
    cli.new_run_directory(options.workdir, experiment, options.resume)
    stages.run(road, resume=options.resume, stop_after="teacher")
    print(f"teacher: {road.teacher}")
    return 0


if __name__ == "__main__":
    cli.run(main)
