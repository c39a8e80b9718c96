"""evidence.npz: on which examples student and teacher agree, and those on which they differ most.

`collect` is a pure function from the logits of several networks on one split to a dictionary of arrays, bounded in
size whatever the split; `write` puts it beside `results.json` (no pickle), `read` takes it back. Networks are called by
their names in `results.json`; "teacher" must be among them, and one of them is the student that is compared with it.

How far two networks are apart on an example is the total variation of their probabilities, ½ Σ_c |p(c) − q(c)|: 0 where
they are equal, 1 where what one holds possible the other excludes.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdsearch_jax.storage.files import read_arrays, write_arrays

log = logging.getLogger(__name__)

FORMAT = 1
FILE = "evidence.npz"
SHOWN = 48  # examples kept with their images
LIKELY = 3  # classes kept of each network's opinion on them
SIDE = 96  # pixels; larger images are averaged down
MOST = 200_000  # examples of which predictions are kept; of more, so many spread evenly
_CHUNK = 8192  # examples whose probabilities are in memory at a time


@dataclass(frozen=True, eq=False)
class Evidence:
    """What `evidence.npz` says.

    Args:
      split: of what the examples are: "test".
      student: the name of the network that is compared with the teacher.
      examples: how many the split has; `labels` has fewer where it was large.
      labels: (n,) classes.
      predictions: {network: (n,) classes}, the same examples.
      class_names: one a class; its number where the data have no name for it.
      shown: (m,) numbers within the split of the examples that student and teacher see most differently, those first.
      shown_labels, apart: (m,) their labels, and total variation between student and teacher.
      likely: {"teacher", "student": (classes (m, ≤ 3), probabilities (m, ≤ 3))}, the most likely first.
      given: {"teacher", "student": (m,) probability of the label}.
      images: (m, height, width, channels) uint8, or None where the examples are no images.
    """

    split: str
    student: str
    examples: int
    labels: NDArray[np.integer]
    predictions: dict[str, NDArray[np.integer]]
    class_names: tuple[str, ...]
    shown: NDArray[np.integer]
    shown_labels: NDArray[np.integer]
    apart: NDArray[np.floating]
    likely: dict[str, tuple[NDArray[np.integer], NDArray[np.floating]]]
    given: dict[str, NDArray[np.floating]]
    images: NDArray[np.uint8] | None


def write(
    directory: str | Path,
    split: str,
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    images: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    student: str = "student",
) -> Path | None:
    """Writes `collect(…)` to DIRECTORY/evidence.npz, whole or not at all; returns its path.

    None, and a warning, where logits are not finite: what a diverged network holds likely is nothing to show.
    """
    path = Path(directory) / FILE
    if broken := [name for name, values in logits.items() if not np.isfinite(values).all()]:
        log.warning("no %s: the logits of %s are not all finite", FILE, ", ".join(broken))
        path.unlink(missing_ok=True)
        return None
    write_arrays(path, collect(split, logits, labels, images, class_names, student), compress=True)
    return path


def collect(
    split: str,
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    images: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    student: str = "student",
) -> dict[str, Any]:
    """The arrays of `evidence.npz`.

    Args:
      split: the name of the split, for the page.
      logits: {network: (examples, classes)}, with "teacher" and `student` among them; finite, or -inf for some classes.
      labels: (examples,) integers in [0, classes).
      images: uint8 (examples, height, width, 1, 3 or 4 channels); left out where they are anything else.
      class_names: one a class, or () for numbers.

    Raises:
      ValueError: the networks, the labels and the images do not fit together.
    """
    labels = np.asarray(labels)
    classes = _check(logits, labels, class_names, student)
    count = len(labels)
    kept = np.arange(count) if count <= MOST else np.linspace(0, count - 1, MOST).round().astype(np.int64)
    small = np.min_scalar_type(classes)
    pair = {"teacher": logits["teacher"], "student": logits[student]}
    apart = np.concatenate(
        [_apart(*(values[i : i + _CHUNK] for values in pair.values())) for i in range(0, count, _CHUNK)]
    )  # fmt: skip
    shown = np.lexsort((np.arange(count), -apart))[:SHOWN]
    shown = shown[apart[shown] > 0]
    found = {
        "format": np.int32(FORMAT),
        "split": np.str_(split),
        "student": np.str_(student),
        "examples": np.int64(count),
        "labels": labels[kept].astype(small),
        "class_names": np.array([*map(str, class_names)] or [*map(str, range(classes))], np.str_),
        "shown": shown.astype(np.int64),
        "shown_labels": labels[shown].astype(small),
        "apart": apart[shown].astype(np.float32),
    }
    for name, values in logits.items():
        found[f"predictions/{name}"] = values.argmax(-1)[kept].astype(small)
    for name, values in pair.items():
        chances = softmax(values[shown])
        likely = np.argsort(-chances, axis=-1, kind="stable")[:, :LIKELY]
        found[f"likely/{name}"] = likely.astype(small)
        found[f"chances/{name}"] = np.take_along_axis(chances, likely, -1).astype(np.float32)
        found[f"given/{name}"] = chances[np.arange(len(shown)), labels[shown]].astype(np.float32)
    if images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3, 4):
        if len(images) != count:
            raise ValueError(f"images: there are {len(images)}, but {count} labels; give the images of this split")
        found["images"] = shrink(images[shown])
    return found


def read(path: Path) -> Evidence | None:
    """What `write` wrote, or None where there is no such file. Raises ValueError, in one line, where it is damaged."""
    if not path.is_file():
        return None
    try:
        files = read_arrays(path)
        if int(files["format"]) != FORMAT:
            raise ValueError(f"its format is {int(files['format'])}, and {FORMAT} can be read; write the run again")
        pairs = ("teacher", "student")
        found = Evidence(
            split=str(files["split"]),
            student=str(files["student"]),
            examples=int(files["examples"]),
            labels=files["labels"],
            predictions={n.partition("/")[2]: files[n] for n in files if n.startswith("predictions/")},
            class_names=tuple(map(str, files["class_names"])),
            shown=files["shown"],
            shown_labels=files["shown_labels"],
            apart=files["apart"],
            likely={name: (files[f"likely/{name}"], files[f"chances/{name}"]) for name in pairs},
            given={name: files[f"given/{name}"] for name in pairs},
            images=files.get("images"),
        )
        _check_read(found)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return found


def softmax(logits: np.ndarray) -> NDArray[np.float64]:
    """Probabilities over the last axis, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def shrink(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (n, height, width, channels) averaged over squares of pixels until no side is longer than `SIDE`."""
    if not images.size:
        return images
    step = -(-max(images.shape[1:3]) // SIDE)
    height, width = (max(side // step, 1) for side in images.shape[1:3])
    tall, wide = min(step, images.shape[1]), min(step, images.shape[2])
    squares = images[:, : height * tall, : width * wide].reshape(len(images), height, tall, width, wide, -1)
    return squares.mean((2, 4)).round().astype(np.uint8)


def _apart(one: np.ndarray, other: np.ndarray) -> NDArray[np.float64]:
    return 0.5 * np.abs(softmax(one) - softmax(other)).sum(-1)


def _check(logits: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str], student: str) -> int:
    """The number of classes; ValueError where the arguments do not fit."""
    if missing := {"teacher", student} - set(logits):
        raise ValueError(f"logits: of {', '.join(sorted(missing))} there are none, only of {', '.join(logits)}")
    shapes = {name: values.shape for name, values in logits.items()}
    shape = shapes["teacher"]
    if len(shape) != 2 or 0 in shape or any(other != shape for other in shapes.values()):
        raise ValueError(f"logits: shapes {shapes}; give (examples, classes), of every network the same")
    if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: {labels.dtype} {labels.shape}; give {shape[0]} integers, one an example")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise ValueError(f"labels: from {labels.min()} to {labels.max()}, but the networks tell apart {shape[1]}")
    for name, values in logits.items():
        if not (np.isfinite(values) | (values == -np.inf)).all() or (values == -np.inf).all(-1).any():
            raise ValueError(f"logits: those of {name} are not all finite; leave that network out")
    if class_names and len(class_names) != shape[1]:
        raise ValueError(f"class_names: {len(class_names)} names for {shape[1]} classes; give one each, or ()")
    return shape[1]


def _check_read(found: Evidence) -> None:
    rows, shown, classes = found.labels.shape, found.shown.shape, len(found.class_names)
    arrays = [*found.predictions.values(), found.shown_labels, *(pair[0] for pair in found.likely.values())]
    fits = {"teacher", found.student} <= found.predictions.keys()
    fits &= len(rows) == 1 and len(shown) == 1 and all(p.shape == rows for p in found.predictions.values())
    fits &= all(p[0].shape == p[1].shape and p[0].shape[:1] == shown for p in found.likely.values())
    fits &= all(part.shape == shown for part in (found.shown_labels, found.apart, *found.given.values()))
    fits &= all(not len(a) or (a.min() >= 0 and a.max() < classes) for a in (found.labels, *arrays))
    fits &= found.images is None or (found.images.ndim == 4 and found.images.shape[:1] == shown)
    if not fits:
        raise ValueError("its arrays do not fit together")
