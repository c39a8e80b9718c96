"""A directory of the user's own for what is expensive to make and can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """`kdsearch_jax` in the user's cache directory (XDG_CACHE_HOME); a temporary one if others may write there."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "kdsearch_jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="kdsearch_jax-"))
