"""The pruning library: gates, the proximal search as an optax transformation, budgets, criteria, verified cuts.

Imports `tracing` and `adapters`: no settings files, no storage, no models, no reports.
"""
