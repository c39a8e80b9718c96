"""Structured pruning: gates, the proximal search as an optax transformation, budgets, selection, verified surgery.

What a user asks for is in `budgets` and `rules`, what it costs in `costs` (measured) and `counting` (on the device),
which units stay in `selection` and `landing`, the search in `search`, `transform` and `control`. Imports `tracing` and
`adapters` only: no settings files, no storage, no models, no reports.
"""
