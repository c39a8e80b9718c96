"""The rows of a comparison: the ways to make a student, and students that were made elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdsearch_jax import storage
from kdsearch_jax.tracing.messages import nearest

EXTERNAL = "external:"  # before the directory of a student that was made elsewhere


@dataclass(frozen=True)
class Row:
    """A way to make students.

    Attributes:
      how: `search`; `cut` from the teacher by the rule of this name in `kdsearch_jax.pruning.baselines`; or `scratch`:
        the searched shape with new initial values; or `external`: read from `source`.
      times: multiple of the steps that the other rows train for.
      supervised: search by the labels instead of the teacher.
      source: directory of an external student.
    """

    name: str
    label: str
    how: Literal["search", "cut", "scratch", "external"] = "cut"
    times: int = 1
    supervised: bool = False
    source: Path | None = None

    @property
    def argument(self) -> str:
        """How the command line names it."""
        return self.name if self.source is None else f"{EXTERNAL}{self.source}"


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


def select_rows(names: Sequence[str]) -> list[Row]:
    """The rows with these names, in the order of the table, then external ones; all rows if there are no names.

    Raises:
      ValueError: a name is unknown, or two external students have the same one.
    """
    external: dict[str, Row] = {}
    for name in names:
        if not name.startswith(EXTERNAL):
            if name not in ROWS:
                raise ValueError(f"rows: {name!r} is unknown; {nearest(name, [*ROWS, f'{EXTERNAL}DIR'])}")
            continue
        row = _external_row(name)
        if (other := external.setdefault(row.name, row)) is not row:
            raise ValueError(f"rows: {other.source} and {row.source} have the same name; rename one of the directories")
    return [*(row for row in ROWS.values() if row.name in names or not names), *external.values()]


def _external_row(name: str) -> Row:
    """The row of `external:DIR`, named by the directory."""
    given = name.removeprefix(EXTERNAL)
    source = storage.local_copy(given, "rows") if given else Path()
    if not given or not source.is_dir():
        raise ValueError(
            f"rows: {name}: there is no directory {given!r}; give one with a network, as kd.save writes it"
        )
    label = given.rstrip("/").rpartition("/")[2] or source.resolve().name
    return Row("external-" + re.sub(r"[^\w.-]+", "-", label), label, "external", source=source)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError if there are no seeds, or one is repeated or out of range."""
    if not seeds:
        raise ValueError("seeds: give at least one, as in --seeds 0 1 2")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds: {seed} is not possible; give whole numbers from 0 to {2**32 - 1}")
    if repeated := [seed for seed in dict.fromkeys(seeds) if list(seeds).count(seed) > 1]:
        raise ValueError(f"seeds: {repeated[0]} is repeated; give each once")
