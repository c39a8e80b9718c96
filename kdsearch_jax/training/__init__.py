"""A training loop for any update function: state, optimiser, checkpoints, metrics, preemption, several processes.

Imports `data`, `storage` and `adapters`; independent of pruning and distillation.
"""
