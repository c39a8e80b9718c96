"""Who takes which class for which: counts out of `Evidence`, and the figure of teacher, student and difference."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from kdsearch_jax.reporting.evidence import Evidence
from kdsearch_jax.reporting.look import INK, KEPT, REMOVED, SOFT, Canvas, Look, bare, blank, legend, plain
from kdsearch_jax.reporting.record import Run

DRAWN = 256  # classes; of more a picture would show nothing
_NAMED, _NUMBERED = 20, 10  # classes that fit as names along an axis, and as numbers into cells
_FAINT = 0.55  # strongest colour under a number, which must stay readable


def confusion(found: Evidence, name: str) -> NDArray[np.int64]:
    """How often examples of a class (row) are given a class (column) by the network: (classes, classes)."""
    classes = len(found.class_names)
    flat = found.labels.astype(np.int64) * classes + found.predictions[name]
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def outcomes(found: Evidence) -> NDArray[np.int64]:
    """[[both right, only the teacher right], [only the student right, both wrong]]: (2, 2) examples."""
    teacher, student = (found.predictions[name] == found.labels for name in ("teacher", found.student))
    return np.array([[(one & other).sum() for other in (student, ~student)] for one in (teacher, ~teacher)])


def pairs(found: Evidence, name: str, most: int) -> list[tuple[int, int, int]]:
    """The commonest errors of a network, (label, prediction, count), without a table of classes × classes."""
    wrong = found.predictions[name] != found.labels
    both = np.stack([found.labels[wrong], found.predictions[name][wrong]], -1).astype(np.int64)
    errors, counts = np.unique(both.reshape(-1, 2), axis=0, return_counts=True)
    order = np.lexsort((*errors.T[::-1], -counts))[:most]
    return [(int(errors[i, 0]), int(errors[i, 1]), int(counts[i])) for i in order]


def recall(found: Evidence, name: str) -> NDArray[np.float64]:
    """Share of each class that the network gets right, NaN of a class without examples: (classes,)."""
    classes = len(found.class_names)
    right = np.bincount(found.labels[found.predictions[name] == found.labels], minlength=classes)
    every = np.bincount(found.labels, minlength=classes)
    return np.where(every > 0, right / np.maximum(every, 1), np.nan)


def figure(run: Run, look: Look) -> Canvas | None:
    """Confusion of the teacher and of the student against the labels, and what changed from one to the other."""
    found = run.evidence
    if found is None or len(found.class_names) > DRAWN:
        return None
    shares = [_shares(confusion(found, name)) for name in ("teacher", found.student)]
    body = blank(look, 10.6 if look.narrow else 3.7)
    grid = body.subplots(3 if look.narrow else 1, 1 if look.narrow else 3, squeeze=False).ravel()
    classes = len(found.class_names)
    strongest = _FAINT if classes <= _NUMBERED else 1.0
    wrong = max(float((share * ~np.eye(classes, dtype=bool)).max()) for share in shares) or 1.0
    for axes, share, title in zip(grid, shares, ("Teacher", "Student"), strict=False):
        _matrix(axes, share * np.where(np.eye(classes), 1, -1), np.where(np.eye(classes), 1.0, wrong), strongest)
        _label(axes, found, f"{title}, % of each class", share, "{:.0f}", look)
    change = (shares[1] - shares[0]) * np.where(np.eye(classes), 1, -1)
    _matrix(grid[2], change, np.full_like(change, np.abs(change).max() or 1.0), strongest)
    _label(grid[2], found, "Student minus teacher, points", shares[1] - shares[0], "{:+.0f}", look)
    legend(body, look, [("right, or better than the teacher", {"color": KEPT}),
                        ("wrong, or worse than the teacher", {"color": REMOVED})])  # fmt: skip
    return body


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _matrix(axes: Axes, signed: np.ndarray, largest: np.ndarray, strongest: float) -> None:
    """Cells as colour: blue above zero, orange below, none at zero; strength by the root of the share of `largest`."""
    image = np.empty((*signed.shape, 4))
    image[..., :3] = np.where(signed[..., None] > 0, to_rgb(KEPT), to_rgb(REMOVED))
    image[..., 3] = strongest * np.sqrt(np.minimum(np.abs(signed) / largest, 1))
    bare(axes).imshow(image, interpolation="nearest")
    axes.spines[:].set_visible(True)
    axes.spines[:].set_linewidth(0.6)


def _label(axes: Axes, found: Evidence, title: str, values: np.ndarray, form: str, look: Look) -> None:
    classes = len(found.class_names)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("prediction", fontsize=8.5, color=SOFT)
    axes.set_ylabel("label", fontsize=8.5, color=SOFT)
    font = 7.5 if classes <= 12 else 6.5
    if classes <= _NAMED:
        names = [plain(name, 11) for name in found.class_names]
        axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(classes), names)
        axes.tick_params(labelsize=font, labelcolor=INK)
    if classes <= _NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            if abs(100 * value) >= 0.5:
                said = form.format(100 * value).replace("-", "−")
                axes.text(column, row, said, ha="center", va="center", fontsize=6.5, color=INK)
