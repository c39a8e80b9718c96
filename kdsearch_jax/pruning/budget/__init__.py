"""Budgets: what the student may cost, and the exact selection of units within it.

`limits` holds the bounds, `estimate` models measured costs, `multipliers` weighs several bounds against each other,
`selection` chooses units by `pieces`, and by `exact` search where these are few.
"""

from kdsearch_jax.pruning.budget.estimate import Estimate
from kdsearch_jax.pruning.budget.limits import (
    FLOOR,
    BudgetError,
    BudgetWarning,
    Limits,
    bound_of,
    multiple,
    resolve,
    smallest,
)
from kdsearch_jax.pruning.budget.selection import Selection, choose, select

__all__ = [
    "FLOOR",
    "BudgetError",
    "BudgetWarning",
    "Estimate",
    "Limits",
    "Selection",
    "bound_of",
    "choose",
    "multiple",
    "resolve",
    "select",
    "smallest",
]
