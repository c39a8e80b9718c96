"""The rows of a comparison: how each student is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kdsearch_jax.tracing.messages import nearest


@dataclass(frozen=True)
class Row:
    """A way to make students.

    how: `search`; `cut`, from the teacher by the rule of `kdsearch_jax.pruning.baselines` of this name; or `scratch`,
    the
    searched shape freshly initialised. times: of the steps that the others have. supervised: searched by the labels.
    """

    name: str
    label: str
    how: Literal["search", "cut", "scratch"] = "cut"
    times: int = 1
    supervised: bool = False


ROWS = {
    row.name: row
    for row in (
        Row("searched", "searched", "search"),
        Row("layers", "fewer layers"),
        Row("uniform", "fewer channels (uniform)"),
        Row("both", "fewer layers and channels"),
        Row("random", "random channels"),
        Row("magnitude", "magnitude (L1 norm)"),
        Row("bn_scale", "BatchNorm scale"),
        Row("slimming", "searched without the teacher", "search", supervised=True),
        Row("scratch", "searched shape, from scratch", "scratch"),
        Row("scratch2", "searched shape, from scratch, twice the steps", "scratch", times=2),
    )
}


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in the order of the table; all where there are no names.

    Raises:
      ValueError: an unknown name.
    """
    for name in names:
        if name not in ROWS:
            raise ValueError(f"rows: {name!r} is unknown; {nearest(name, ROWS)}")
    return [row for row in ROWS.values() if row.name in (names or ROWS)]


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError where there are none, one is given twice, or one cannot be a seed."""
    if not seeds:
        raise ValueError("seeds: there are none; give at least one, as in --seeds 0 1 2")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds: {seed} is not possible; give whole numbers from 0 to {2**32 - 1}")
    if twice := [seed for seed in dict.fromkeys(seeds) if list(seeds).count(seed) > 1]:
        raise ValueError(f"seeds: {twice[0]} is there {list(seeds).count(twice[0])} times; give each once")
