"""What Linen and NNX need: modules as pure functions, resized modules, how a module is called, models by name,
fast convolutions on CPUs.

Imports `tracing` and, on request, `models`.
"""
