"""The kinds of units, in a module that imports nothing, because settings name them."""

KINDS = ("channels", "neurons", "heads", "queries", "values", "width", "groups", "branches")
