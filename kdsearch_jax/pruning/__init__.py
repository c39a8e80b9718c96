"""The pruning library: the search as an optax transformation, rules, budgets, one-shot criteria and verified cuts.

Imports tracing, modules and surgery; no configuration files, no storage, no report.
"""
