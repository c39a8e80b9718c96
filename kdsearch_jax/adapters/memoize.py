"""Caches for traced and compiled functions, by the module that they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _ById:
    """Wraps a value without a hash: equal only to a wrapper of the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def memoize(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """`functools.lru_cache` that also takes arguments without a hash, which are compared by identity.

    A module that has an array for an attribute is such an argument.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(maxsize)
        def cached(*keys: Any) -> T:
            return function(*(key.value if isinstance(key, _ById) else key for key in keys))

        @functools.wraps(function)
        def call(*arguments: Any) -> T:
            return cached(*map(_hashable, arguments))

        return call

    return decorate


def _hashable(argument: Any) -> Any:
    try:
        hash(argument)
    except TypeError:
        return _ById(argument)
    return argument


class RecentValues:
    """The values used most recently, by key.

    Args:
      maxsize: how many to keep.
    """

    def __init__(self, maxsize: int = 8):
        self._maxsize = maxsize
        self._values: dict[Any, Any] = {}

    def get_or_make(self, key: Any, make: Callable[[], T]) -> T:
        """The value of a key; `make` is called where there is none."""
        value = self._values.pop(key) if key in self._values else make()
        self._values[key] = value  # the most recent one is the last
        while len(self._values) > self._maxsize:
            self._values.pop(next(iter(self._values)))
        return value
