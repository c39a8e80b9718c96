"""Trains a teacher: `python -m kdsearch_jax.teacher [--config NAME] [any setting]`; the network is RUN/teacher/network.

`python -m kdsearch_jax.search --resume --workdir RUN`, with the same settings, goes on from there.
"""

from kdsearch_jax import storage
from kdsearch_jax.runs import command_line


def main(argv: list[str]) -> int:
    """Runs the teacher's stage only."""
    options, experiment = command_line.parse(argv, command_line.RunOptions, "kdsearch_jax.teacher", __doc__ or "")
    from kdsearch_jax.runs import directories, stages  # jax and all else, which --help does not need
    from kdsearch_jax.runs.setup import prepare

    assert options.workdir is not None
    command = {"command": "teacher"}
    resume = directories.goes_on(options.workdir, experiment, command, options.resume)
    setup = prepare(experiment, options.workdir, resume=resume, searches=False, trust_code=options.trust_code)
    with directories.run_directory(options.workdir, experiment, command, resume=resume, data=setup.fingerprint):
        stages.run(setup, resume=resume, stop_after="teacher")
    print(storage.display_paths(f"teacher: {setup.teacher}"))
    return 0


if __name__ == "__main__":
    command_line.run(main)
