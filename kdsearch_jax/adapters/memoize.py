"""What is made once and used again: traced and compiled functions by the module that they run, and a run's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _Identity:
    """Stands for a value that has no hash: equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def remembered(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorates a function of immutable arguments: its `maxsize` latest results are kept, by equal arguments.

    An argument that has no hash, such as a module with an array for an attribute, is equal to itself alone.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        def run(*keys: Any) -> T:
            return function(*(key.value if isinstance(key, _Identity) else key for key in keys))

        kept = functools.lru_cache(maxsize)(run)

        @functools.wraps(function)
        def call(*arguments: Any) -> T:
            return kept(*map(_key, arguments))

        return call

    return decorate


def _key(argument: Any) -> Any:
    try:
        hash(argument)
    except TypeError:
        return _Identity(argument)
    return argument


class Memory:
    """The latest values of a run, by key."""

    def __init__(self, most: int = 8):
        self._most = most
        self._values: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """The value that was made for this key, or else what `make` gives."""
        value = self._values.pop(key) if key in self._values else make()
        self._values[key] = value  # the latest is the last
        while len(self._values) > self._most:
            self._values.pop(next(iter(self._values)))
        return value
