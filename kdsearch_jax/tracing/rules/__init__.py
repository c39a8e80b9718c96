"""The rules of the interpreter, by primitive: each moves, joins or freezes the labels of its operands."""

from kdsearch_jax.tracing.analysis import Rule
from kdsearch_jax.tracing.rules import control_flow, data_movement, elementwise, indexing, mixing, products

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **data_movement.RULES,
    **mixing.RULES,
    **indexing.RULES,
    **products.RULES,
    **control_flow.RULES,
}
