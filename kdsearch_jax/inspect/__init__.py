"""What of a network can be pruned, and why the rest can not: no data, no parameters, a trace alone.

    python -m kdsearch_jax.inspect --model vit
    python -m kdsearch_jax.inspect --model mypkg.models:make_net --input-shape 224 224 3 [--json]
    python -m kdsearch_jax.inspect --model mypkg.models:Encoder --inputs int32[128] mask=bool[128]
    python -m kdsearch_jax.inspect --model vit --measure --budget.batch-size 8

Groups that are named alike but for numbers share a line: what they cost together, where all of them could be emptied.
What is frozen is listed by reason. The smallest student keeps one unit of each group (one multiple of budget.round_to)
and no residual branch. `--measure` builds both with random parameters and measures time and memory of a call on this
device; whether a budget on these can be met is known only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsearch_jax.inspect.tables import alike, common, frozen_lines, group_lines, heading, report, traced

__all__ = ["alike", "common", "frozen_lines", "group_lines", "heading", "report", "traced"]


def __getattr__(name: str) -> Any:  # what is not needed for --help is imported when it is asked for
    import kdsearch_jax.inspect.tables as library

    return getattr(library, name)
