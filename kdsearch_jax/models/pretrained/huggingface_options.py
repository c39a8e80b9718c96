"""Reading a JSON file that may come from anybody: keys that are known, sizes within bounds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MOST_PIXELS = 4096  # of an image's side
_MOST_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where it holds none, or is too large."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_MOST_BYTES} are read")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); is it complete?") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(record).__name__}")
    return record


class Options:
    """The values of a JSON object, key by key; `finish` raises for what nobody asked for.

    A key that is absent, or null, has the default given. A value out of bounds raises ValueError, which names file,
    key, bounds and value.

    Args:
      path: the file, for messages.
      record: what it holds.
      harmless: keys that nobody need ask for.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], harmless: Iterable[str] = ()):
        self.path, self.record, self.asked = path, record, set(harmless)

    def get(self, key: str, default: Any) -> Any:
        """The value as it stands there."""
        self.asked.add(key)
        value = self.record.get(key)
        return default if value is None else value

    def error(self, key: str, expected: str) -> ValueError:
        """The error that says what the value must be."""
        return ValueError(f"{self.path}: {key!r} must be {expected}, got {self.record.get(key)!r:.80}")

    def size(self, key: str, default: int, most: int) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(key, default)
        if not is_size(value, most):
            raise self.error(key, f"a whole number from 1 to {most}")
        return value

    def sizes(self, key: str, default: tuple[int, ...], most: int) -> list[int]:
        """One to eight of them."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= 8 or not all(is_size(n, most) for n in value):
            raise self.error(key, f"a list of 1 to 8 whole numbers from 1 to {most}")
        return list(value)

    def sides(self, key: str, default: int, most: int) -> tuple[int, int]:
        """(height, width), given as one number or two."""
        value = self.get(key, default)
        value = [value, value] if not isinstance(value, (list, tuple)) else value
        if len(value) != 2 or not all(is_size(n, most) for n in value):
            raise self.error(key, f"one or two whole numbers from 1 to {most}")
        return value[0], value[1]

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number within these bounds."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def only(self, key: str, value: Any) -> None:
        """Raises where the option is another than the default, the one that is supported."""
        if self.get(key, value) != value:
            raise self.error(key, f"{value!r} (other values are not supported)")

    def finish(self) -> None:
        """Raises for keys that nobody asked for."""
        if unknown := sorted(self.record.keys() - self.asked):
            raise ValueError(
                f"{self.path}: {', '.join(map(repr, unknown[:5]))} is not known here, and may stand for another "
                f"network; where it does not, remove it from the file"
            )


def is_size(value: Any, most: int) -> bool:
    """Whether it is a whole number from 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
