"""Adds budgets to a finished run, in its own directory and without another search: `--from RUN --budgets 0.4`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from kdsearch_jax import cutting, front
from kdsearch_jax.config import Experiment, differences, load_experiment, to_json
from kdsearch_jax.files import write_json
from kdsearch_jax.fitting import meet
from kdsearch_jax.road import Road, prepare


def added(run: Path, asked: Experiment) -> Road:
    """The road of the run in `run` with the budgets of `asked` added, which `config.json` then names as well.

    Raises:
      ValueError: the run is not finished, `asked` differs in more than budgets, a budget is there already, cannot be
        met, or is above all that the search passed; nothing is written then.
    """
    for needed in ("config.json", "results.json"):
        if not (run / needed).is_file():
            raise ValueError(
                f"front_from: {run} is no finished run ({needed} is missing); finish it by --resume --workdir {run}"
            )
    old = load_experiment(str(run / "config.json"))
    if different := differences(dataclasses.replace(asked, budgets=old.budgets), old):
        raise ValueError(f"front_from: budgets are added as the run was made; leave out {'; '.join(different)}")
    there = set(old.budgets) or {getattr(old.budget, front.driver(old.budget))}
    if again := sorted(there & set(asked.budgets)):
        raise ValueError(f"budgets: {again[0]} is in {run} already; give others, or --resume --workdir {run}")
    budgets = tuple(sorted({*old.budgets, *asked.budgets}, reverse=True))
    new = dataclasses.replace(old, budgets=budgets)
    road = prepare(new, run, resume=True)
    tails = {point.tail for point in front.points(old)}
    cutting.check(road, [point for point in front.points(new) if point.tail not in tails])
    if jax.process_index() == 0:
        write_json(run / "config.json", to_json(new))
    meet("budgets added")
    return road
