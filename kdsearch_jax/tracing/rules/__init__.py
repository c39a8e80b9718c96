"""The rules of the walk, by primitive: each moves, joins or freezes the labels of its operands."""

from kdsearch_jax.tracing.findings import Rule
from kdsearch_jax.tracing.rules import elementwise, loops, mixing, moving, products

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **moving.RULES,
    **mixing.RULES,
    **products.RULES,
    **loops.RULES,
}
