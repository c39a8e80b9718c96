"""Evaluates an image classifier on a data set: `python -m kdsearch_jax.evaluate NETWORK_DIR [--teacher DIR]`.

Images are normalised as in the network's training, with the numbers stored beside it, whatever the data set is.
"""

# No `from __future__ import annotations` here: tyro reads the types at run time.

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from kdsearch_jax import storage
from kdsearch_jax.runs import command_line


@dataclass(frozen=True)
class EvaluateOptions(command_line.Options):
    """What to evaluate, and on which data."""

    network: tyro.conf.Positional[Path] = field(kw_only=True)
    """A network's directory (RUN/student, RUN/teacher/network, …)."""
    teacher: Path | None = None
    """The directory of a network to compare with, by KL divergence and agreement."""
    data: str | None = None
    """digits, npz:FILE or a TFDS name; by default the data set that the network was trained on."""
    data_dir: str | None = None
    """The data directory of TFDS."""
    split: Literal["test", "validation", "train"] = "test"
    """The examples to evaluate on."""
    batch_size: int = 500
    """Images per call, over all devices."""


def main(argv: list[str]) -> int:
    """Prints the metrics of a network, and of its teacher if one is given."""
    options = command_line.parse_options(argv, EvaluateOptions, "kdsearch_jax.evaluate", __doc__ or "")
    import jax

    from kdsearch_jax.runs import stored_evaluation

    directories = {"network": options.network, **({"teacher": options.teacher} if options.teacher else {})}
    table = stored_evaluation.evaluation_table(
        directories, options.data, options.data_dir, options.split, options.batch_size, options.trust_code
    )
    if jax.process_index() == 0:
        print(storage.display_paths(table))
    return 0


if __name__ == "__main__":
    command_line.run(main)
