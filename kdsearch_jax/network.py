"""The name that `kdsearch_jax.pruning.network` had in 0.1; to be removed in 0.3."""

from kdsearch_jax._moved import moved

__getattr__ = moved(__name__, "kdsearch_jax.pruning.network")
