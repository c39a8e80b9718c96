"""Data sets as splits of arrays; batches, augmentation, streaming, and transfer to the devices.

Imports `adapters` and `storage`.
"""
