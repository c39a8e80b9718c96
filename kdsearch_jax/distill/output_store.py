"""Teacher outputs of training updates on disk, in float16, for every process that trains on the same batches.

    header.json    what the outputs depend on, their shape, and the number of updates that the files have room for
    outputs.bin    (updates, batch, classes), memory-mapped when read
    digests.bin    (updates, 32): SHA-256 of the header's digest, the update's number and its outputs

An update is stored only if its digest matches. A process that is killed while it writes leaves an update that does not
match, which is computed again. Several processes may fill the same files: the first one to store an update wins, and
the others use what it stored.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.storage.files import DamagedError, json_digest, one_line, read_sealed, write_sealed

VERSION = 1
_DIGEST = hashlib.sha256().digest_size

log = logging.getLogger(__name__)


class OutputStore:
    """The outputs in a directory, which is created if needed.

    Args:
      directory: of the files.
      origin: JSON values that the outputs depend on, such as the teacher's digest and the augmentation.
      shape: (batch, classes) of an update's outputs.
      updates: number of updates to make room for, at least.

    Raises:
      ValueError: the directory holds outputs of another origin or shape.
      OSError: it cannot be written.
    """

    def __init__(self, directory: Path, origin: Mapping[str, Any], shape: tuple[int, ...], updates: int):
        self.directory, self.shape = directory, tuple(shape)
        self._identity = {"version": VERSION, **origin, "shape": list(shape), "dtype": "float16"}
        self._salt = json_digest(self._identity).encode()
        self._row_bytes = 2 * math.prod(shape)
        self._warned = False
        directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self.updates = max(updates, self._known_updates(), 1)
            for path, size in ((self._outputs, self._row_bytes), (self._digests, _DIGEST)):
                with path.open("ab") as file:
                    if file.tell() < self.updates * size:
                        file.truncate(self.updates * size)  # sparse
            write_sealed(self._header, {**self._identity, "updates": self.updates})
        self._mapped = np.memmap(self._outputs, np.float16, "r", shape=(self.updates, *self.shape))
        self._mapped_digests = np.memmap(self._digests, np.uint8, "r", shape=(self.updates, _DIGEST))

    @property
    def bytes(self) -> int:
        """Bytes of all outputs."""
        return self.updates * self._row_bytes

    def count(self, updates: int) -> int:
        """How many of the first `updates` are stored, by their digests' presence alone."""
        return int(self._mapped_digests[:updates].any(axis=1).sum())

    def read(self, update: int) -> NDArray[np.float16] | None:
        """The outputs of an update, None if they are not stored or their digest does not match."""
        digest = self._mapped_digests[update].tobytes()
        if not any(digest):
            return None
        outputs = np.array(self._mapped[update])
        if digest != self._digest_of(update, outputs):
            log.warning("%s: update %d does not match its digest; it is computed again", self.directory, update)
            return None
        return outputs

    def write(self, update: int, outputs: NDArray[np.float16]) -> NDArray[np.float16]:
        """Stores the outputs of an update unless another process has; returns those that are stored.

        A disk that is full is reported once, and then nothing is stored.
        """
        try:
            with self._locked():
                if (found := self.read(update)) is not None:
                    return found
                content = np.ascontiguousarray(outputs, np.float16).tobytes()
                for path, part in ((self._outputs, content), (self._digests, self._digest_of(update, outputs))):
                    with path.open("r+b", buffering=0) as file:
                        _write_all(file.fileno(), part, update * len(part))
        except OSError as error:
            if not self._warned:
                log.warning(
                    "%s: outputs are not stored (%s), but computed in every row", self.directory, one_line(error)
                )
            self._warned = True
        return outputs

    def _digest_of(self, update: int, outputs: NDArray[np.float16]) -> bytes:
        digest = hashlib.sha256(self._salt + update.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(outputs, np.float16).tobytes())
        return digest.digest()

    def _known_updates(self) -> int:
        """The updates that the files have room for, 0 if there are none yet or their header is damaged."""
        try:
            header = read_sealed(self._header)
        except FileNotFoundError:
            return self._start_again()
        except DamagedError as error:
            log.warning("%s; the outputs are computed again", error)
            return self._start_again()
        updates = header.pop("updates", None)
        for name in {**self._identity, **header}:
            if (stored := header.get(name)) != (now := self._identity.get(name)):
                raise ValueError(
                    f"distill.cache: {self.directory} has the teacher's outputs for {name} {stored}, not {now}; remove "
                    "it, or give another --workdir"
                )
        return updates if isinstance(updates, int) else self._start_again()

    def _start_again(self) -> int:
        for path in (self._digests, self._outputs):
            path.unlink(missing_ok=True)
        return 0

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / "lock").open("a") as file:
            with contextlib.suppress(OSError):  # a file system without locks: a torn update fails its digest
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def _header(self) -> Path:
        return self.directory / "header.json"

    @property
    def _outputs(self) -> Path:
        return self.directory / "outputs.bin"

    @property
    def _digests(self) -> Path:
        return self.directory / "digests.bin"


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    """Writes at an offset; a mapped page of a full disk would kill the process instead of raising OSError."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)
