"""The rules of the walk, by primitive: each moves, joins or freezes the labels of its operands."""

from kdsearch_jax.tracing.findings import Rule
from kdsearch_jax.tracing.rules import (
    elementwise,
    experts,
    loops,
    mixing,
    moving,
    multilinear,
    products,
    rarer,
    spectral,
)

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **moving.RULES,
    **mixing.RULES,
    **products.RULES,
    **multilinear.RULES,
    **experts.RULES,
    **spectral.RULES,
    **rarer.RULES,
    **loops.RULES,
}
