"""The name that `kdsearch_jax.pruning.budgets` and `.selection` had in 0.1; to be removed in 0.3."""

from __future__ import annotations

import warnings
from typing import Any

from kdsearch_jax._moved import moved

__getattr__ = moved(__name__, "kdsearch_jax.pruning.budgets", {"smallest": "smallest_keep"})


def select(topology: Any, limits: Any, importance: Any) -> Any:
    """`kdsearch_jax.pruning.selection.choose(…).keep`, with the warning of 0.1 as a `BudgetWarning`."""
    from kdsearch_jax.pruning.budgets import BudgetWarning
    from kdsearch_jax.pruning.selection import choose

    message = "kdsearch_jax.budget.select is kdsearch_jax.pruning.selection.choose(…).keep since 0.2"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    selection = choose(topology, limits, importance)
    if selection.note:
        warnings.warn(selection.note, BudgetWarning, stacklevel=2)
    return selection.keep
