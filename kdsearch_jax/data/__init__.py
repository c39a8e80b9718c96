"""Data sets as splits of arrays, batches, augmentation, streaming, and their way to the devices.

Imports `adapters` and `storage`.
"""
