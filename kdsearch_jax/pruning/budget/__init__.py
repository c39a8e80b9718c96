"""Budgets: what the student may cost, the closed loop that moves λ2 there, and the exact landing.

`limits` says what is bounded, `estimate` models what can only be measured, `multipliers` weighs several bounds against
each other, `loop` finds λ2, `selection` lands, by `pieces`, `exact` where these are few.
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
from kdsearch_jax.pruning.budget.loop import level, recalled, target, too_large
from kdsearch_jax.pruning.budget.multipliers import cost_of, multipliers, protected
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
    "cost_of",
    "level",
    "multiple",
    "multipliers",
    "protected",
    "recalled",
    "resolve",
    "select",
    "smallest",
    "target",
    "too_large",
]
