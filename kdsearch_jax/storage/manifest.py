"""The manifest of a directory in an object store: names, sizes and digests of its files, in one replaceable object.

Also decides which local files belong to such a directory: not those whose names begin with a dot, nor what Orbax has
not finished.
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
CONTROL = ".kdsearch"  # the folder of our own objects
MANIFEST, STAGED, WRITING = (f"{CONTROL}/{name}" for name in ("manifest.json", "staged", "writing"))
_ON_DEMAND = re.compile(r"checkpoints.*|tensorboard")  # folders that are downloaded only on request


@dataclass(frozen=True)
class FileRecord:
    """A file of a directory.

    sha256: None if no digest is kept. staged: the object with the new content until it has been copied into place.
    """

    bytes: int
    sha256: str | None = None
    staged: str | None = None

    def same_content(self, other: FileRecord | None) -> bool:
        """Whether both have the same content, as far as size and digest tell."""
        return other is not None and (self.bytes, self.sha256) == (other.bytes, other.sha256)


@dataclass(frozen=True)
class Manifest:
    """The files of a directory.

    writer: identifies the process that wrote this version; None if there is no manifest. sequence: counts versions.
    """

    files: Mapping[str, FileRecord] = field(default_factory=dict)
    writer: str | None = None
    sequence: int = 0

    def to_json(self) -> bytes:
        """The content of the stored object."""
        files = {
            name: {"bytes": record.bytes}
            | ({"sha256": record.sha256} if record.sha256 else {})
            | ({"staged": record.staged} if record.staged else {})
            for name, record in sorted(self.files.items())
        }
        head = {"format": FORMAT, "version": VERSION, "writer": self.writer, "sequence": self.sequence}
        return (json.dumps({**head, "files": files}, indent=0) + "\n").encode()

    @staticmethod
    def from_json(content: bytes, source: str) -> Manifest:
        """Inverts `to_json`.

        Args:
          source: where the content was read, for error messages.

        Raises:
          DamagedError: it is not a manifest, or names files outside the directory.
        """
        try:
            value: dict[str, Any] = json.loads(content)
            if (value["format"], value["version"]) != (FORMAT, VERSION):
                raise ValueError(f"unknown format {value['format']!r:.40}, version {value['version']!r:.20}")
            files = {
                check_name(name): FileRecord(entry["bytes"], entry.get("sha256"), entry.get("staged"))
                for name, entry in value["files"].items()
            }
            for record in files.values():
                digest = record.sha256 is None or re.fullmatch("[0-9a-f]{64}", record.sha256)
                if type(record.bytes) is not int or record.bytes < 0 or not digest:
                    raise ValueError("a file has an invalid size or digest")
                if record.staged is not None and not re.fullmatch(rf"{re.escape(STAGED)}/[\w-]+", record.staged):
                    raise ValueError(f"{record.staged!r:.80} is not a staged object")
            writer, sequence = value["writer"], value["sequence"]
            if not isinstance(writer, str | None) or type(sequence) is not int:
                raise ValueError(f"invalid writer {writer!r:.40} or sequence {sequence!r:.40}")
            return Manifest(files, writer, sequence)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise DamagedError(f"{source} is damaged: {text:.200}; use another copy of the directory") from None


def check_name(name: Any) -> str:
    """Returns the name of a file inside a directory; DamagedError for any other value."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise DamagedError(f"{name!r:.120} does not name a file inside the directory")
    return name


def is_permanent(name: str) -> bool:
    """Whether a file or folder belongs to a directory, as opposed to a temporary file."""
    return not name.startswith(".") and "orbax-checkpoint-tmp" not in name


def is_growing(name: str) -> bool:
    """Whether a file is a log or report, of which the newest content is kept whatever it is published with."""
    path = PurePosixPath(name)
    return path.suffix == ".jsonl" or "tensorboard" in path.parts[:-1] or "report" in path.parts[:-1]


def is_below(name: str, folder: str) -> bool:
    """Whether a file is inside `folder`, or is `folder` itself; "" contains every file."""
    return not folder or name == folder or name.startswith(f"{folder}/")


def is_downloaded_by_default(name: str, folder: str) -> bool:
    """Whether downloading `folder` includes a file that is not asked for explicitly."""
    return not any(_ON_DEMAND.fullmatch(part) for part in PurePosixPath(name[len(folder) :].lstrip("/")).parts[:-1])
