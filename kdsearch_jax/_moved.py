"""Modules of version 0.1 under their old names: what they held is imported from where it lives now, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(old: str, home: str, renamed: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has moved.

    Args:
      old: the module's name. home: the module that has its attributes now. renamed: {old name: new name} of some.
    """

    def look_up(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        new = (renamed or {}).get(name, name)
        value = getattr(importlib.import_module(home), new)
        warnings.warn(f"{old}.{name} is {home}.{new} since 0.2", DeprecationWarning, stacklevel=2)
        return value

    return look_up
