"""Trains a teacher: `python -m kdsearch_jax.teacher [--config NAME] [any setting]`; the network is RUN/teacher/network.

`python -m kdsearch_jax.search --resume --workdir RUN`, with the same settings, goes on from there.
"""

from kdsearch_jax import cli, storage


def main(argv: list[str]) -> int:
    """Runs the teacher's stage only."""
    options, experiment = cli.parse(argv, cli.RunOptions, "kdsearch_jax.teacher", __doc__ or "")
    from kdsearch_jax import rundir, stages  # jax and all else, which --help does not need
    from kdsearch_jax.road import prepare

    assert options.workdir is not None
    command = {"command": "teacher"}
    resume = rundir.goes_on(options.workdir, experiment, command, options.resume)
    road = prepare(experiment, options.workdir, resume=resume, searches=False, trust_code=options.trust_code)
    with rundir.run_directory(options.workdir, experiment, command, resume=resume, data=road.fingerprint):
        stages.run(road, resume=resume, stop_after="teacher")
    print(storage.shown(f"teacher: {road.teacher}"))
    return 0


if __name__ == "__main__":
    cli.run(main)
