"""The recorded predictions of a run's networks, and what the page says about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from test_report import Page, add_predictions, make_run, page_text

from kdsearch_jax.reporting import predictions as predictions_lib
from kdsearch_jax.reporting.predictions import (
    class_accuracy,
    confusion_matrix,
    most_common_errors,
    outcome_counts,
    read_predictions,
    write_predictions,
)
from kdsearch_jax.reporting.rendering import render_page
from kdsearch_jax.reporting.result_figures import confusion
from kdsearch_jax.reporting.run_record import read_run

LABELS = np.random.default_rng(1).integers(0, 7, 300)


@pytest.fixture
def logits() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    teacher = 3 * rng.standard_normal((300, 7)).astype(np.float32)
    return {"teacher": teacher, "student": teacher + rng.standard_normal((300, 7)).astype(np.float32)}


def test_the_examples_with_the_largest_distance_are_selected(tmp_path: Path, logits: dict) -> None:
    images = np.random.default_rng(2).integers(0, 255, (300, 8, 8, 1), dtype=np.uint8)
    write_predictions(tmp_path, "test", logits, LABELS, images)
    read = read_predictions(tmp_path)
    teacher, student = (softmax(logits[name].astype(float), -1) for name in ("teacher", "student"))
    distance = np.abs(teacher - student).sum(-1) / 2
    assert read.selected.tolist() == np.argsort(-distance)[: predictions_lib.MAX_SELECTED].tolist()
    np.testing.assert_allclose(read.distance, distance[read.selected], rtol=1e-6)
    np.testing.assert_array_equal(read.images, images[read.selected])
    for name, probabilities in (("teacher", teacher), ("student", student)):
        top, values = read.top_classes[name], read.top_probabilities[name]
        of_selected = probabilities[read.selected]
        np.testing.assert_array_equal(top[:, 0], logits[name][read.selected].argmax(-1))
        np.testing.assert_allclose(values, np.take_along_axis(of_selected, top.astype(int), -1), rtol=1e-6)
        of_label = probabilities[read.selected, LABELS[read.selected]]
        np.testing.assert_allclose(read.label_probability[name], of_label, rtol=1e-6)
        assert (np.diff(values) <= 0).all()
        np.testing.assert_array_equal(read.predicted[name], logits[name].argmax(-1))


def test_statistics_count_the_predictions(tmp_path: Path, logits: dict) -> None:
    write_predictions(tmp_path, "test", logits, LABELS)
    read = read_predictions(tmp_path)
    predicted = {name: values.argmax(-1) for name, values in logits.items()}
    counts = confusion_matrix(read, "student")
    assert counts.sum() == 300 and np.trace(counts) == (predicted["student"] == LABELS).sum()
    assert counts[2, 5] == ((LABELS == 2) & (predicted["student"] == 5)).sum()
    outcomes = outcome_counts(read)
    assert outcomes.sum() == 300 and outcomes[0].sum() == (predicted["teacher"] == LABELS).sum()
    assert outcomes[:, 0].sum() == (predicted["student"] == LABELS).sum()
    errors = most_common_errors(read, "student", 5)
    off_diagonal = counts * (1 - np.eye(7, dtype=int))
    assert [count for _, _, count in errors] == np.sort(off_diagonal.ravel())[::-1][:5].tolist()
    assert all(counts[label, prediction] == count for label, prediction, count in errors)
    np.testing.assert_allclose(class_accuracy(read, "student"), np.diag(counts) / counts.sum(1))


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(predictions_lib, "MAX_EXAMPLES", 500)
    logits = {name: rng.standard_normal((2000, 400)).astype(np.float32) for name in ("teacher", "student")}
    labels = rng.integers(0, 400, 2000)
    images = np.broadcast_to(np.arange(2000, dtype=np.uint16)[:, None, None, None] % 251, (2000, 250, 100, 3))
    path = write_predictions(tmp_path, "test", logits, labels, images.astype(np.uint8))
    read = read_predictions(tmp_path)
    assert read.examples == 2000 and len(read.labels) == 500 and read.images.shape == (48, 83, 33, 3)
    np.testing.assert_array_equal(read.images[:, 0, 0, 0], read.selected % 251)  # means over equal pixels
    assert path.stat().st_size < 1e6
    assert {read.labels[0], read.labels[-1]} == {labels[0], labels[-1]}


def test_equal_networks_select_no_example(tmp_path: Path, logits: dict) -> None:
    write_predictions(tmp_path, "test", {**logits, "student": logits["teacher"]}, LABELS)
    read = read_predictions(tmp_path)
    assert len(read.selected) == 0 and outcome_counts(read)[0, 1] == 0


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda a: a["logits"].pop("student"), "logits"),
        (lambda a: a.update(labels=LABELS[:9]), "labels"),
        (lambda a: a.update(labels=LABELS + 1), "labels"),
        (lambda a: a["logits"].update(student=np.zeros((300, 6))), "logits"),
        (lambda a: a.update(class_names=("cat",)), "class_names"),
        (lambda a: a.update(images=np.zeros((9, 4, 4, 3), np.uint8)), "images"),
    ],
    ids=["no student", "too few labels", "label out of range", "other classes", "too few names", "too few images"],
)
def test_arguments_that_do_not_fit_are_named(tmp_path: Path, logits: dict, change, argument: str) -> None:
    arguments = {"logits": logits, "labels": LABELS}
    change(arguments)
    with pytest.raises(ValueError, match=f"^{argument}: ") as error:
        write_predictions(tmp_path, "test", **arguments)
    assert "\n" not in str(error.value) and not (tmp_path / predictions_lib.FILE).exists()


def test_a_diverged_network_leaves_no_file(tmp_path: Path, logits: dict, caplog: pytest.LogCaptureFixture) -> None:
    write_predictions(tmp_path, "test", logits, LABELS)
    logits["student"][3] = np.nan
    assert write_predictions(tmp_path, "test", logits, LABELS) is None and "student" in caplog.text
    assert not (tmp_path / predictions_lib.FILE).exists()


def test_the_page_shows_outcomes_and_errors(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    names = ("cat", "dog", "<b>", "cow")
    predicted = add_predictions(run, classes=4, names=names)
    correct = {name: predicted[name] == predicted["labels"] for name in ("teacher", "student", "uniform")}
    page = Page(render_page(read_run(run), {}))
    assert f"Teacher correct {(correct['teacher'] & correct['student']).sum()}" in page.text
    for name in ("teacher", "uniform"):
        difference = correct["student"].astype(float) - correct[name]
        shown = f"{100 * difference.mean():+.2f} ± {100 * difference.std() / 20:.2f} points"
        assert difference.mean() and shown.replace("-", "−") in page.text
    assert "Label: <b>" in page.text and all(not bold or set(bold) == {"class"} for bold in page.all("b"))
    label, prediction, count = most_common_errors(read_predictions(run), "student", 1)[0]
    assert f"{names[label]} → {names[prediction]} {count} " in page.text


def test_many_classes_and_no_images(tmp_path: Path) -> None:
    """Above 256 classes a table of errors replaces the picture; without images, examples are identified by number."""
    run = make_run(tmp_path / "run", blocks=1)
    without = page_text(run)
    add_predictions(run, classes=300, images=False)
    record = read_run(run)
    assert confusion(record, None) is None
    page = Page(render_page(record, {}))
    assert not page.all("img") and len(page.all("li")) > 48 // 4
    assert f"test example {record.predictions.selected[0]}" in page.text
    assert len(page.all("tr")) < 400, "no table of classes × classes"
    assert "evidence.npz" in without and "evidence.npz" not in page.text
