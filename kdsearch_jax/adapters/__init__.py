"""Support for Linen and NNX modules: modules as pure functions, resized modules, call specifications, models by name,
device placement, and fast convolutions on CPUs.

Imports `tracing`, and `models` only when a built-in model is asked for.
"""
