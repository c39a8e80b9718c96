"""Reads untrusted JSON configurations: only known keys, sizes within bounds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_PIXELS = 4096  # of an image's side
_MAX_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError for anything else, or a file that is too large."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the limit of {_MAX_BYTES}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); is it complete?") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must contain a JSON object, not a {type(record).__name__}")
    return record


class ConfigReader:
    """Reads the values of a JSON object by key; `check_all_read` raises for keys that have not been read.

    A missing or null value is replaced by the default. A value out of bounds raises ValueError, which names file, key,
    bounds and value.

    Args:
      path: the file, for messages.
      record: its content.
      ignored: keys that need not be read.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], ignored: Iterable[str] = ()):
        self.path, self.record, self._read = path, record, set(ignored)

    def get(self, key: str, default: Any) -> Any:
        """The value, unchecked."""
        self._read.add(key)
        value = self.record.get(key)
        return default if value is None else value

    def error(self, key: str, expected: str) -> ValueError:
        """An error that says what the value must be."""
        return ValueError(f"{self.path}: {key!r} must be {expected}, got {self.record.get(key)!r:.80}")

    def size(self, key: str, default: int, limit: int) -> int:
        """An integer from 1 to `limit`."""
        value = self.get(key, default)
        if not is_size(value, limit):
            raise self.error(key, f"an integer from 1 to {limit}")
        return value

    def sizes(self, key: str, default: tuple[int, ...], limit: int) -> list[int]:
        """One to eight integers from 1 to `limit`."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= 8 or not all(is_size(n, limit) for n in value):
            raise self.error(key, f"a list of 1 to 8 integers from 1 to {limit}")
        return list(value)

    def sides(self, key: str, default: int, limit: int) -> tuple[int, int]:
        """(height, width), given as one integer or two."""
        value = self.get(key, default)
        value = [value, value] if not isinstance(value, (list, tuple)) else value
        if len(value) != 2 or not all(is_size(n, limit) for n in value):
            raise self.error(key, f"one or two integers from 1 to {limit}")
        return value[0], value[1]

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number within the bounds, inclusive."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def require(self, key: str, value: Any) -> None:
        """Raises unless the value is the default, the only supported one."""
        if self.get(key, value) != value:
            raise self.error(key, f"{value!r} (other values are not supported)")

    def check_all_read(self) -> None:
        """Raises ValueError for keys that have not been read."""
        if unknown := sorted(self.record.keys() - self._read):
            raise ValueError(
                f"{self.path}: unknown key {', '.join(map(repr, unknown[:5]))}, which may mean another network; remove "
                "it from the file if it does not"
            )


def is_size(value: Any, limit: int) -> bool:
    """Whether a value is an integer from 1 to `limit`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit
