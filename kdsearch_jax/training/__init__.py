"""A training loop for any update function: state, optimiser, checkpoints, metrics, preemption, many processes.

Imports `data`, `storage` and `adapters`; knows nothing of pruning or distillation.
"""
