"""What a case of bad input is, and how files are broken by chance.

A case is a command line in a directory of its own. Cases that are broken on purpose must be refused; mutants by chance
may be harmless, and must then give what the valid file gives.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Write = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """argv: of `command`; write: makes the case's files; valid: the reference whose output a harmless mutant has."""

    kind: str
    name: str
    command: str
    argv: tuple[str, ...]
    write: Write
    valid: str | None = None


TRAIN = ("--config", "config.json", "--workdir", "run")
UNTAUGHT = ("--config", "config.json", "--teacher-from", "no-such-teacher")  # ends where the settings have been read
EVALUATE = ("net", "--data", "digits")
IMAGES = ("net", "--data", "tiny", "--data-dir", "tfds")
# What stands where something else is expected, in JSON.
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**9,
    10**30,
    float("nan"),
    1e308,
    "",
    "16",
    "\ud800",
    "\x1b[2J\n",
    [],
    [1, "a"],
    {},
    {"a": {}},
)


def nested(depth: int) -> Any:
    """A list in a list in a list …"""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """The content with bytes changed, cut off, repeated or put in."""
    changed, kind = bytearray(content), int(random.integers(5))
    at = int(random.integers(len(changed))) if changed else 0
    if kind == 0 and changed:
        for place in random.integers(len(changed), size=1 + int(random.integers(8))):
            changed[int(place)] = int(random.integers(256))
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at:at] = random.bytes(1 + int(random.integers(16)))
    elif kind == 3:
        changed[at : at + 4] = b"\xff\xff\xff\x7f"
    else:
        changed[at:at] = changed[at : at + 1 + int(random.integers(64))]
    return bytes(changed)


def replaced(value: Any, random: np.random.Generator) -> Any:
    """A JSON value with one part of it, at any depth, replaced by something else, removed or added."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                todo.append(node[key])
    node, key = places[random.integers(len(places))]
    kind = random.integers(4)
    if kind == 0 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif kind == 1:
        node[key] = nested(int(random.choice([3, 63, 500])))
    else:
        node[key] = WRONG[random.integers(len(WRONG))]
    return value


def config(root: Path, content: bytes | None = None) -> Write:
    """The run's config.json, or this in its place."""
    valid = (root / "config.json").read_bytes()
    return lambda box: (box / "config.json").write_bytes(valid if content is None else content) and None


def both(*writes: Write) -> Write:
    """All of them."""

    def write(box: Path) -> None:
        for each in writes:
            each(box)

    return write


def copied(root: Path, *names: str, to: str | None = None) -> Write:
    """Copies of these valid files and directories; `to`: a single one under another name."""

    def write(box: Path) -> None:
        for name in names:
            (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, box / (to or name))

    return write
