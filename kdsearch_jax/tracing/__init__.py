"""Reads a jaxpr: which indices of which parameters belong together, what each costs, what must stay and why.

Imports jax, numpy and scipy alone.
"""
