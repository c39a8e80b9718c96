"""What is kept of the networks' predictions, and what a page says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from test_report import Page, add_evidence, make_run, text

from kdsearch_jax.reporting import confusion, evidence, page, record


@pytest.fixture
def logits() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    teacher = 3 * rng.standard_normal((300, 7)).astype(np.float32)
    return {"teacher": teacher, "student": teacher + rng.standard_normal((300, 7)).astype(np.float32)}


LABELS = np.random.default_rng(1).integers(0, 7, 300)


def test_the_examples_kept_are_those_furthest_apart(tmp_path: Path, logits: dict) -> None:
    images = np.random.default_rng(2).integers(0, 255, (300, 8, 8, 1), dtype=np.uint8)
    path = evidence.write(tmp_path, "test", logits, LABELS, images)
    found = evidence.read(path)
    teacher, student = (softmax(logits[name].astype(float), -1) for name in ("teacher", "student"))
    apart = np.abs(teacher - student).sum(-1) / 2
    assert found.shown.tolist() == np.argsort(-apart)[: evidence.SHOWN].tolist()
    np.testing.assert_allclose(found.apart, apart[found.shown], rtol=1e-6)
    np.testing.assert_array_equal(found.images, images[found.shown])
    for name, chances in (("teacher", teacher), ("student", student)):
        classes, values = found.likely[name]
        np.testing.assert_array_equal(classes[:, 0], logits[name][found.shown].argmax(-1))
        np.testing.assert_allclose(values, np.take_along_axis(chances[found.shown], classes.astype(int), -1), rtol=1e-6)
        np.testing.assert_allclose(found.given[name], chances[found.shown, LABELS[found.shown]], rtol=1e-6)
        assert (np.diff(values) <= 0).all()
        np.testing.assert_array_equal(found.predictions[name], logits[name].argmax(-1))


def test_counts_are_those_of_the_predictions(tmp_path: Path, logits: dict) -> None:
    found = evidence.read(evidence.write(tmp_path, "test", logits, LABELS))
    said = {name: values.argmax(-1) for name, values in logits.items()}
    counts = confusion.confusion(found, "student")
    assert counts.sum() == 300 and np.trace(counts) == (said["student"] == LABELS).sum()
    assert counts[2, 5] == ((LABELS == 2) & (said["student"] == 5)).sum()
    both = confusion.outcomes(found)
    assert both.sum() == 300 and both[0].sum() == (said["teacher"] == LABELS).sum()
    assert both[:, 0].sum() == (said["student"] == LABELS).sum()
    top = confusion.pairs(found, "student", 5)
    off = counts * (1 - np.eye(7, dtype=int))
    assert [n for _, _, n in top] == np.sort(off.ravel())[::-1][:5].tolist()
    assert all(counts[a, b] == n for a, b, n in top)
    np.testing.assert_allclose(confusion.recall(found, "student"), np.diag(counts) / counts.sum(1))


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(evidence, "MOST", 500)
    logits = {name: rng.standard_normal((2000, 400)).astype(np.float32) for name in ("teacher", "student")}
    labels = rng.integers(0, 400, 2000)
    images = np.broadcast_to(np.arange(2000, dtype=np.uint16)[:, None, None, None] % 251, (2000, 250, 100, 3))
    found = evidence.read(evidence.write(tmp_path, "test", logits, labels, images.astype(np.uint8)))
    assert found.examples == 2000 and len(found.labels) == 500 and found.images.shape == (48, 83, 33, 3)
    np.testing.assert_array_equal(found.images[:, 0, 0, 0], found.shown % 251)  # means over equal pixels
    assert (tmp_path / evidence.FILE).stat().st_size < 1e6
    assert {found.labels[0], found.labels[-1]} == {labels[0], labels[-1]}


def test_equal_networks_leave_nothing_to_show(tmp_path: Path, logits: dict) -> None:
    found = evidence.read(evidence.write(tmp_path, "test", {**logits, "student": logits["teacher"]}, LABELS))
    assert len(found.shown) == 0 and confusion.outcomes(found)[0, 1] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a["logits"].pop("student"), "logits: of student there are none"),
        (lambda a: a.update(labels=LABELS[:9]), "labels: int64 .9,.; give 300 integers"),
        (lambda a: a.update(labels=LABELS + 1), "labels: from 1 to 7, but the networks tell apart 7"),
        (lambda a: a["logits"].update(student=np.zeros((300, 6))), "of every network the same"),
        (lambda a: a.update(class_names=("cat",)), "1 names for 7 classes"),
        (lambda a: a.update(images=np.zeros((9, 4, 4, 3), np.uint8)), "images: there are 9, but 300 labels"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, logits: dict, change, said: str) -> None:
    arguments = {"logits": logits, "labels": LABELS}
    change(arguments)
    with pytest.raises(ValueError, match=said):
        evidence.write(tmp_path, "test", **arguments)
    assert not (tmp_path / evidence.FILE).exists()


def test_a_diverged_network_leaves_no_evidence(tmp_path: Path, logits: dict, caplog: pytest.LogCaptureFixture) -> None:
    evidence.write(tmp_path, "test", logits, LABELS)
    logits["student"][3] = np.nan
    assert evidence.write(tmp_path, "test", logits, LABELS) is None and "of student are not all finite" in caplog.text
    assert not (tmp_path / evidence.FILE).exists()


def test_the_page_counts_who_is_right(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    assert "There is no evidence.npz" in text(run)
    said = add_evidence(run, classes=4, names=("cat", "dog", "<b>", "cow"))
    right = {name: said[name] == said["labels"] for name in ("teacher", "student", "uniform")}
    lost, gained = (right["teacher"] & ~right["student"]).sum(), (~right["teacher"] & right["student"]).sum()
    shown = Page(page.page(record.read(run), {}))
    each = right["student"].astype(float) - right["uniform"]
    assert f"Student right Student wrong Teacher right {(right['teacher'] & right['student']).sum()}" in shown.text
    assert (
        lost != gained and f"Student minus teacher: {100 * (gained - lost) / 400:+.2f}".replace("-", "−") in shown.text
    )
    assert f"± {100 * each.std() / 20:.2f} (one standard error" in shown.text.replace("\u00a0", " ")
    assert "Label: <b>" in shown.text and not shown.all("b")[5:]
    top = confusion.pairs(record.read(run).evidence, "student", 1)[0]
    names = ("cat", "dog", "<b>", "cow")
    assert f"{names[top[0]]} → {names[top[1]]} {top[2]} " in shown.text


def test_many_classes_and_no_images(tmp_path: Path) -> None:
    """Above 256 classes the commonest errors take the picture's place; without images the examples are told."""
    run = make_run(tmp_path / "run", blocks=1)
    add_evidence(run, classes=300, images=False)
    found = record.read(run)
    assert confusion.figure(found, None) is None
    shown = Page(page.page(found, {}))
    assert "With 300 classes a picture of the confusion would show nothing" in shown.text
    assert not shown.all("img") and f"example {found.evidence.shown[0]} of the test split" in shown.text
    assert len(shown.all("tr")) < 400, "no table of classes × classes"
