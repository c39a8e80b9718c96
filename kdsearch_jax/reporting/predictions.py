"""Predictions of a run's networks on one split: where student and teacher agree, and where they differ most.

`write_predictions` reduces logits to arrays whose size is bounded for any split and writes them next to `results.json`,
as `evidence.npz` (no pickle); `read_predictions` reads them back. Networks are named as in `results.json`.

The distance between two networks on an example is the total variation of their probabilities, ½ Σ_c |p(c) − q(c)|: 0 if
they are equal, 1 if each rules out what the other considers possible.
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
MAX_SELECTED = 48  # examples kept with their images
TOP_CLASSES = 3  # classes kept of each network's probabilities on these
MAX_SIDE = 96  # pixels; larger images are averaged down
MAX_EXAMPLES = 200_000  # examples whose predictions are kept; of more, this many at even spacing
_CHUNK = 8192  # examples whose probabilities are in memory at a time
_COMPARED = "teacher", "student"


@dataclass(frozen=True, eq=False)
class Predictions:
    """What `evidence.npz` holds, for n examples, of which m were selected because student and teacher differ most.

    Args:
      split: name of the split: "test".
      student: name of the network that is compared with the teacher.
      examples: size of the split; n may be smaller.
      labels: (n,) classes.
      predicted: {network: (n,) classes}.
      class_names: one per class; its number where the data has no names.
      selected: (m,) indices within the split, largest distance first.
      selected_labels: (m,) classes.
      distance: (m,) total variation between student and teacher.
      top_classes: {"teacher", "student": (m, ≤ 3) classes}, most probable first.
      top_probabilities: {"teacher", "student": (m, ≤ 3)}.
      label_probability: {"teacher", "student": (m,)}.
      images: (m, height, width, channels) uint8, or None if the examples are not images.
    """

    split: str
    student: str
    examples: int
    labels: NDArray[np.integer]
    predicted: dict[str, NDArray[np.integer]]
    class_names: tuple[str, ...]
    selected: NDArray[np.integer]
    selected_labels: NDArray[np.integer]
    distance: NDArray[np.floating]
    top_classes: dict[str, NDArray[np.integer]]
    top_probabilities: dict[str, NDArray[np.floating]]
    label_probability: dict[str, NDArray[np.floating]]
    images: NDArray[np.uint8] | None

    def correct(self, network: str) -> NDArray[np.bool_]:
        """Whether a network predicts the label: (n,)."""
        return self.predicted[network] == self.labels


# --- statistics -------------------------------------------------------------------------------------------------------


def confusion_matrix(predictions: Predictions, network: str) -> NDArray[np.int64]:
    """Number of examples of a class (row) that the network assigns to a class (column): (classes, classes)."""
    classes = len(predictions.class_names)
    flat = predictions.labels.astype(np.int64) * classes + predictions.predicted[network]
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def outcome_counts(predictions: Predictions) -> NDArray[np.int64]:
    """[[both correct, only the teacher correct], [only the student correct, both wrong]]: (2, 2) examples."""
    teacher, student = (predictions.correct(name) for name in ("teacher", predictions.student))
    return np.array([[(a & b).sum() for b in (student, ~student)] for a in (teacher, ~teacher)])


def most_common_errors(predictions: Predictions, network: str, limit: int) -> list[tuple[int, int, int]]:
    """(label, prediction, count) of a network's most common errors, without building a confusion matrix."""
    wrong = ~predictions.correct(network)
    pairs = np.stack([predictions.labels[wrong], predictions.predicted[network][wrong]], -1).astype(np.int64)
    errors, counts = np.unique(pairs.reshape(-1, 2), axis=0, return_counts=True)
    order = np.lexsort((*errors.T[::-1], -counts))[:limit]
    return [(int(errors[i, 0]), int(errors[i, 1]), int(counts[i])) for i in order]


def class_accuracy(predictions: Predictions, network: str) -> NDArray[np.float64]:
    """Share of each class's examples that the network gets right, NaN for a class without examples: (classes,)."""
    classes = len(predictions.class_names)
    correct = np.bincount(predictions.labels[predictions.correct(network)], minlength=classes)
    total = np.bincount(predictions.labels, minlength=classes)
    return np.where(total > 0, correct / np.maximum(total, 1), np.nan)


def paired_difference(predictions: Predictions, network: str) -> tuple[float, float]:
    """Accuracy of the student minus that of another network, and its standard error over the shared examples."""
    difference = predictions.correct(predictions.student).astype(float) - predictions.correct(network)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


# --- the file ---------------------------------------------------------------------------------------------------------


def write_predictions(
    directory: str | Path,
    split: str,
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    images: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    student: str = "student",
) -> Path | None:
    """Writes DIRECTORY/evidence.npz, whole or not at all, and returns its path.

    Args:
      directory: of the run.
      split: name of the split, for the page.
      logits: {network: (examples, classes)}, with "teacher" and `student` among them.
      labels: (examples,) integers in [0, classes).
      images: uint8 (examples, height, width, 1, 3 or 4 channels); anything else is left out.
      class_names: one per class, or () to use numbers.
      student: name of the network to compare with the teacher.

    Returns:
      None, after a warning and with no file left, if logits are not finite: a diverged network has no probabilities.

    Raises:
      ValueError: logits, labels, images and names do not fit together.
    """
    path = Path(directory) / FILE
    if diverged := [name for name, values in logits.items() if not np.isfinite(values).all()]:
        log.warning("%s was not written: the logits of %s are not all finite", FILE, ", ".join(diverged))
        path.unlink(missing_ok=True)
        return None
    labels = np.asarray(labels)
    _check_arguments(logits, labels, images, class_names, student)
    write_arrays(path, _reduce(split, logits, labels, images, class_names, student), compress=True)
    return path


def _reduce(
    split: str,
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    images: np.ndarray | None,
    class_names: Sequence[str],
    student: str,
) -> dict[str, Any]:
    count, classes = logits["teacher"].shape
    class_type = np.min_scalar_type(classes)
    compared = dict(zip(_COMPARED, (logits["teacher"], logits[student]), strict=True))
    starts = range(0, count, _CHUNK)
    distance = np.concatenate([_distance(*(v[i : i + _CHUNK] for v in compared.values())) for i in starts])
    selected = np.lexsort((np.arange(count), -distance))[:MAX_SELECTED]
    selected = selected[distance[selected] > 0]
    sample = np.linspace(0, count - 1, min(count, MAX_EXAMPLES)).round().astype(np.int64)
    arrays = {
        "format": np.int32(FORMAT),
        "split": np.str_(split),
        "student": np.str_(student),
        "examples": np.int64(count),
        "labels": labels[sample].astype(class_type),
        "class_names": np.array([*map(str, class_names)] or [*map(str, range(classes))], np.str_),
        "shown": selected.astype(np.int64),
        "shown_labels": labels[selected].astype(class_type),
        "apart": distance[selected].astype(np.float32),
    }
    for name, values in logits.items():
        arrays[f"predictions/{name}"] = values.argmax(-1)[sample].astype(class_type)
    for name, values in compared.items():
        probabilities = _softmax(values[selected])
        top = np.argsort(-probabilities, axis=-1, kind="stable")[:, :TOP_CLASSES]
        arrays[f"likely/{name}"] = top.astype(class_type)
        arrays[f"chances/{name}"] = np.take_along_axis(probabilities, top, -1).astype(np.float32)
        arrays[f"given/{name}"] = probabilities[np.arange(len(selected)), labels[selected]].astype(np.float32)
    if images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3, 4):
        arrays["images"] = _shrink(images[selected])
    return arrays


def read_predictions(directory: str | Path) -> Predictions | None:
    """Reads DIRECTORY/evidence.npz; None if there is none.

    Raises:
      ValueError: in one line, if the file is damaged or of another format.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        arrays = read_arrays(path)
        if int(arrays["format"]) != FORMAT:
            raise ValueError(f"format {int(arrays['format'])} is not supported, only {FORMAT}")
        predictions = Predictions(
            split=str(arrays["split"]),
            student=str(arrays["student"]),
            examples=int(arrays["examples"]),
            labels=arrays["labels"],
            predicted={
                name.partition("/")[2]: values for name, values in arrays.items() if name.startswith("predictions/")
            },
            class_names=tuple(map(str, arrays["class_names"])),
            selected=arrays["shown"],
            selected_labels=arrays["shown_labels"],
            distance=arrays["apart"],
            top_classes={name: arrays[f"likely/{name}"] for name in _COMPARED},
            top_probabilities={name: arrays[f"chances/{name}"] for name in _COMPARED},
            label_probability={name: arrays[f"given/{name}"] for name in _COMPARED},
            images=arrays.get("images"),
        )
        _check_read(predictions)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return predictions


def _softmax(logits: np.ndarray) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _distance(one: np.ndarray, other: np.ndarray) -> NDArray[np.float64]:
    return 0.5 * np.abs(_softmax(one) - _softmax(other)).sum(-1)


def _shrink(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (n, height, width, channels), averaged over squares of pixels until no side exceeds `MAX_SIDE`."""
    if not images.size:
        return images
    step = -(-max(images.shape[1:3]) // MAX_SIDE)
    height, width = (max(side // step, 1) for side in images.shape[1:3])
    tall, wide = min(step, images.shape[1]), min(step, images.shape[2])
    squares = images[:, : height * tall, : width * wide].reshape(len(images), height, tall, width, wide, -1)
    return squares.mean((2, 4)).round().astype(np.uint8)


def _check_arguments(
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    images: np.ndarray | None,
    class_names: Sequence[str],
    student: str,
) -> None:
    if missing := {"teacher", student} - set(logits):
        raise ValueError(f"logits: those of {', '.join(sorted(missing))} are missing; given are {', '.join(logits)}")
    shapes = {name: values.shape for name, values in logits.items()}
    shape = shapes["teacher"]
    if len(shape) != 2 or 0 in shape or any(other != shape for other in shapes.values()):
        raise ValueError(f"logits: shapes {shapes}; give (examples, classes), the same for every network")
    if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: {labels.dtype} {labels.shape}; give {shape[0]} integers, one per example")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise ValueError(f"labels: from {labels.min()} to {labels.max()}, but the networks have {shape[1]} classes")
    if class_names and len(class_names) != shape[1]:
        raise ValueError(f"class_names: {len(class_names)} names for {shape[1]} classes; give one per class, or ()")
    if images is not None and len(images) != len(labels):
        raise ValueError(f"images: {len(images)} images for {len(labels)} labels; give those of the same split")


def _check_read(predictions: Predictions) -> None:
    rows, selected, classes = predictions.labels.shape, predictions.selected.shape, len(predictions.class_names)
    per_example = (predictions.labels, *predictions.predicted.values())
    per_selected = (predictions.selected_labels, predictions.distance, *predictions.label_probability.values())
    tops = [(predictions.top_classes[name], predictions.top_probabilities[name]) for name in _COMPARED]
    class_arrays = (*per_example, predictions.selected_labels, *predictions.top_classes.values())
    fits = {"teacher", predictions.student} <= predictions.predicted.keys()
    fits &= len(rows) == 1 and len(selected) == 1 and all(array.shape == rows for array in per_example)
    fits &= all(a.shape == b.shape and a.shape[:1] == selected for a, b in tops)
    fits &= all(array.shape == selected for array in per_selected)
    fits &= all(not array.size or (array.min() >= 0 and array.max() < classes) for array in class_arrays)
    images = predictions.images
    fits &= images is None or (images.ndim == 4 and images.shape[:1] == selected)
    if not fits:
        raise ValueError("its arrays do not fit together")
