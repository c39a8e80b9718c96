"""What a network is worth: predictions on a split, each example exactly once, and time per image.

    python -m kdsearch_jax.evaluate NETWORK_DIR [--teacher DIR] [--data NAME]

`predict` runs the network over all devices; the last batch is padded to the size of the others, so that there is one
compilation, and what was padded is dropped. `score` compares logits with labels, and with a teacher's logits. Images
are normalised as the network was trained, by the numbers stored with it, whatever data it is shown.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

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
    """A network's directory to compare with: divergence and agreement."""
    data: str | None = None
    """digits, npz:FILE or a TFDS name; the data set that the network was trained on if left out."""
    data_dir: str | None = None
    """Where TFDS keeps its data."""
    split: Literal["test", "validation", "train"] = "test"
    """Which examples."""
    batch_size: int = 500
    """Images a call, over all devices."""


def main(argv: list[str]) -> int:
    """Prints the accuracy of a network, and of its teacher if one is given, on a split of a data set."""
    options = command_line.parse_options(
        argv, EvaluateOptions, "kdsearch_jax.evaluate", "Accuracy of a network on a data set, each example once."
    )
    import jax

    from kdsearch_jax.runs import stored_evaluation

    directories = {"network": options.network, **({"teacher": options.teacher} if options.teacher else {})}
    table = stored_evaluation.compared(
        directories, options.data, options.data_dir, options.split, options.batch_size, options.trust_code
    )
    if jax.process_index() == 0:
        print(storage.display_paths(table))
    return 0


if __name__ == "__main__":
    command_line.run(main)
