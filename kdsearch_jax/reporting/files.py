"""Reading what runs have written; a file that is there and cannot be read is an error that names it.

A line of metrics is left out with a warning: the curves of a stage that has ended have no other source.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kdsearch_jax.storage.files import parse_json, read_json_object

log = logging.getLogger(__name__)


def json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file."""
    if not path.is_file():
        return None
    return read_json_object(path)


def with_rows(path: Path, key: str) -> dict[str, Any] | None:
    """The JSON object in `path`, whose entry `key` is a list of objects; None where there is no such file."""
    record = json_object(path)
    if record is not None and not all(isinstance(row, dict) for row in record.get(key, [None])):
        raise ValueError(f"{path} is damaged: {key!r} must be a list of objects, not {record.get(key)!r:.80}")
    return record


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; what is no row is left out, a last line cut short by a kill without a word."""
    if not path.is_file():
        return []
    rows, lines = [], path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            if number < len(lines):
                log.warning("%s is damaged in line %d, which is left out: %s", path, number, error)
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int | float)]
