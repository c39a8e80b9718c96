"""What belongs to a directory of a store: names, sizes and digests of its files, in one object that is replaced whole.

Also which local files do: not those whose names begin with a dot, nor what Orbax has not finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from kdsearch_jax.storage.files import DamagedError

FORMAT, VERSION = "kdsearch_jax directory", 1
OURS = ".kdsearch"
MANIFEST, STAGED, WRITING = (f"{OURS}/{name}" for name in ("manifest.json", "staged", "writing"))
_LATER = re.compile(r"checkpoints.*|tensorboard")  # folders that are brought only when asked for


@dataclass(frozen=True)
class Entry:
    """A file of a directory; sha256: None where none is kept; staged: the object that is to take its place."""

    bytes: int
    sha256: str | None = None
    staged: str | None = None

    def like(self, other: Entry | None) -> bool:
        """Whether both have the same content, as far as they say."""
        return other is not None and (self.bytes, self.sha256) == (other.bytes, other.sha256)


@dataclass(frozen=True)
class Manifest:
    """What belongs to a directory. writer: of this version, None where there is no manifest."""

    files: Mapping[str, Entry] = field(default_factory=dict)
    writer: str | None = None
    sequence: int = 0

    def to_json(self) -> bytes:
        """As it is stored."""
        files = {
            name: {"bytes": e.bytes, **({"sha256": e.sha256} if e.sha256 else {}), **_staged(e)}
            for name, e in sorted(self.files.items())
        }
        head = {"format": FORMAT, "version": VERSION, "writer": self.writer, "sequence": self.sequence}
        return (json.dumps({**head, "files": files}, indent=0) + "\n").encode()

    @staticmethod
    def of(content: bytes, where: str) -> Manifest:
        """Inverts `to_json`. Raises DamagedError where it is none, or names files that are not below the directory."""
        try:
            found: dict[str, Any] = json.loads(content)
            if (found["format"], found["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {found['format']!r:.40}, version {found['version']!r:.20} is not known here")
            files = {checked(n): Entry(e["bytes"], e.get("sha256"), e.get("staged")) for n, e in found["files"].items()}
            for entry in files.values():
                digest = entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
                if type(entry.bytes) is not int or entry.bytes < 0 or not digest:
                    raise ValueError("a file is described wrongly")
                if entry.staged is not None and not re.fullmatch(rf"{re.escape(STAGED)}/[\w-]+", entry.staged):
                    raise ValueError(f"{entry.staged!r:.80} is not where changed files wait")
            writer, sequence = found["writer"], found["sequence"]
            if not isinstance(writer, str | None) or type(sequence) is not int:
                raise ValueError(f"it was written by {writer!r:.40}, for the {sequence!r:.40}th time")
            return Manifest(files, writer, sequence)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            raise DamagedError(f"{where} is damaged: {text:.200}; take another copy of the directory") from None


def _staged(entry: Entry) -> dict[str, str]:
    return {"staged": entry.staged} if entry.staged else {}


def checked(name: Any) -> str:
    """A name that means a file below its directory. Raises DamagedError."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise DamagedError(f"{name!r:.120} is no name of a file below a directory")
    return name


def is_own(name: str) -> bool:
    """Whether a file or folder is part of a directory, and not somebody's temporary file."""
    return not name.startswith(".") and "orbax-checkpoint-tmp" not in name


def is_loose(name: str) -> bool:
    """Whether the newest content of a file stands, whatever else is published with it."""
    path = PurePosixPath(name)
    return path.suffix == ".jsonl" or "tensorboard" in path.parts[:-1] or "report" in path.parts[:-1]


def is_below(name: str, below: str) -> bool:
    """Whether a file is in the folder `below`, or is that file; everything is in ""."""
    return not below or name == below or name.startswith(f"{below}/")


def is_brought(name: str, below: str) -> bool:
    """Whether a file is brought without being asked for."""
    return not any(_LATER.fullmatch(part) for part in PurePosixPath(name[len(below) :].lstrip("/")).parts[:-1])
