"""What a network is worth: predictions on a split, each example exactly once, and time per image.

    python -m kdsearch_jax.evaluate NETWORK_DIR [--teacher DIR] [--data NAME]

`predict` runs the network over all devices; the last batch is padded to the size of the others, so that there is one
compilation, and what was padded is dropped. `score` compares logits with labels, and with a teacher's logits. Images
are normalised as the network was trained, by the numbers stored with it, whatever data it is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsearch_jax.evaluate.scores import (
        clock,
        evaluate,
        executable,
        measure_latency,
        measure_memory,
        measurer,
        predict,
        score,
    )

__all__ = ["clock", "evaluate", "executable", "measure_latency", "measure_memory", "measurer", "predict", "score"]


def __getattr__(name: str) -> Any:  # what is not needed for --help is imported when it is asked for
    import kdsearch_jax.evaluate.scores as library

    return getattr(library, name)
