"""Files on disk and in object stores: networks, exports, sealed JSON, and readers that trust no file.

Imports `models`, `tracing`, `adapters` and `pruning`.
"""

from kdsearch_jax.storage.bucket import StoreError
from kdsearch_jax.storage.object_store import (
    addresses_in_errors,
    claim,
    discard_copies,
    display_paths,
    local_copy,
    publish,
    refresh,
    remote_address,
    sync_processes,
)

__all__ = [
    "StoreError",
    "addresses_in_errors",
    "claim",
    "discard_copies",
    "display_paths",
    "local_copy",
    "publish",
    "refresh",
    "remote_address",
    "sync_processes",
]
