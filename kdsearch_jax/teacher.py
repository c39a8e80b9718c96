"""Trains a teacher: `python -m kdsearch_jax.teacher [--config NAME] [any setting]`; writes RUN/teacher/network.

`python -m kdsearch_jax.search --resume --workdir RUN` with the same settings continues from there.
"""

from kdsearch_jax import storage
from kdsearch_jax.runs import command_line


def main(argv: list[str]) -> int:
    """Runs the teacher stage only."""
    options, experiment = command_line.parse(argv, command_line.RunOptions, "kdsearch_jax.teacher", __doc__ or "")
    from kdsearch_jax.runs.execution import execute  # imports JAX, which --help does not need

    setup, _ = execute(options, experiment, {"command": "teacher"}, stop_after="teacher")
    print(storage.display_paths(f"teacher: {setup.teacher_directory}"))
    return 0


if __name__ == "__main__":
    command_line.run(main)
