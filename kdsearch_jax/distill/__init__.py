"""Distillation: losses, what a network is compared by, features, ensembles, cached teachers, and the update functions
of search and retraining.

Imports `training`, `data` and `pruning`.
"""
