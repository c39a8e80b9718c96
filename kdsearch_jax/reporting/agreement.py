"""Where student and teacher agree and where not: outcomes, confusion, classes, and the examples themselves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np

from kdsearch_jax.reporting import confusion, markup
from kdsearch_jax.reporting.evidence import MOST, Evidence
from kdsearch_jax.reporting.look import INK, Canvas, Look, blank, plain
from kdsearch_jax.reporting.markup import cell, details, escape, notes, paragraph, table
from kdsearch_jax.reporting.record import Run
from kdsearch_jax.reporting.results import label, points

_FIRST = 12  # examples that are seen without opening anything
_APART = 0.05  # what is less far apart is not worth a look
_CLASSES, _PAIRS = 20, 10  # rows of the tables


def title(run: Run) -> str:
    """The finding: on how many examples student and teacher say the same."""
    found = run.evidence
    if found is None:
        return "Where student and teacher differ"
    same = (found.predictions["teacher"] == found.predictions[found.student]).mean()
    return f"Says the same as the teacher on {_share(same)} of the examples"


def section(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    """Everything that `evidence.npz` has."""
    found = run.evidence
    if found is None:
        return paragraph("There is no evidence.npz: the predictions of this run’s networks were not kept.")
    who = "student" if found.student == "student" else label(found.student)
    about = f"The student here is {who}, that of the smallest budget." if found.student != "student" else ""
    if found.examples > MOST:
        about += f" Counts are of {len(found.labels):,} of the {found.examples:,} examples, spread evenly."
    text = paragraph(about) if about else ""
    text += _outcomes(found) + _confusion(run, found, pictures) + _classes(found) + _errors(found)
    return text + _examples(found)


def paired(found: Evidence) -> list[str]:
    """Student minus each other network, with the spread that the examples, the same for both, leave."""
    said, mine = [], found.predictions[found.student] == found.labels
    for name, predictions in found.predictions.items():
        if name != found.student and not name.startswith("at-"):
            each = mine.astype(float) - (predictions == found.labels)
            error = each.std() / len(each) ** 0.5
            said.append(
                f"Student minus {label(name).lower()}: {points(each.mean())} points, ± {100 * error:.2f} (one standard "
                f"error, on the same {len(each):,} examples of the {found.split} split)."
            )
    return said


def _share(value: float) -> str:
    return f"{100 * value:.1f}%" if 0.0005 < value < 0.9995 or value in (0, 1) else f"{100 * value:.3g}%"


def _outcomes(found: Evidence) -> str:
    counts = confusion.outcomes(found)
    total = int(counts.sum())
    rows = [
        [f"Teacher {name}", *(f"{n:,}<small>{100 * n / total:.2f}%</small>" for n in line)]
        for name, line in zip(("right", "wrong"), counts, strict=True)
    ]
    wrong = (found.predictions["teacher"] != found.labels) & (found.predictions[found.student] != found.labels)
    alike = int((found.predictions["teacher"] == found.predictions[found.student])[wrong].sum())
    said = [
        *paired(found),
        f"Where both are wrong, they give the same answer in {alike:,} of {int(counts[1, 1]):,} cases."
        if counts[1, 1]
        else "",
    ]
    head = ['<span class="hidden">Outcome</span>', "Student right", "Student wrong"]
    return table("Examples, by who is right", head, rows, "numbers", spoken=False) + notes(said)


def _confusion(run: Run, found: Evidence, pictures: Mapping[str, markup.Pictures]) -> str:
    if "confusion" not in pictures:
        return paragraph(
            f"With {len(found.class_names):,} classes a picture of the confusion would show nothing; the table of the "
            "commonest errors does."
        )
    caption = (
        "A line a class, a column a prediction; each line adds up to 100%. Blue on the diagonal is right, orange off "
        "it an error; colours grow with the root of the share, so that rare errors are seen. The last picture is what "
        "changed: blue where the student does better than the teacher, orange where it does worse."
    )
    spoken = (
        "Confusion matrices of the teacher, of the student, and their difference. The tables below have the share of "
        "each class that is right, and the commonest errors."
    )
    return "<h3>Which class is taken for which</h3>" + markup.picture(pictures["confusion"], spoken, caption)


def _classes(found: Evidence) -> str:
    teacher, student = (confusion.recall(found, name) for name in ("teacher", found.student))
    counts = np.bincount(found.labels, minlength=len(teacher))
    change = student - teacher
    order = np.lexsort((np.arange(len(change)), np.where(np.isnan(change), np.inf, change)))
    few = len(order) <= _CLASSES
    picked = order if few else [*order[: _CLASSES // 2], *(i for i in order[-_CLASSES // 2 :])]
    rows = [
        [escape(found.class_names[i]), f"{counts[i]:,}", *(_rate(float(values[i])) for values in (teacher, student)),
         cell(None if np.isnan(change[i]) else change[i], points)]
        for i in picked
    ]  # fmt: skip
    head = ["Class", "Examples", "Teacher", "Student", "Points"]
    which = "" if few else f", the {_CLASSES // 2} that lost most and the {_CLASSES // 2} that lost least"
    return details(f"Accuracy of each class{which}", table("Accuracy of each class", head, rows, "numbers"))


def _rate(value: float) -> str:
    return cell(None if np.isnan(value) else value, lambda v: f"{100 * v:.1f}%")


def _errors(found: Evidence) -> str:
    top = confusion.pairs(found, found.student, _PAIRS)
    rows = []
    for truth, said, count in top:
        mine = found.labels == truth
        other = int((found.predictions["teacher"][mine] == said).sum())
        names = [escape(found.class_names[i]) for i in (truth, said)]
        rows.append([f"{names[0]} → {names[1]}", f"{count:,}", f"{other:,}", f"{int(mine.sum()):,}"])
    if not rows:
        return paragraph("The student makes no error on these examples.")
    head = ["Label → prediction", "Student", "Teacher", "Of"]
    listed = table("The student’s commonest errors, how often each makes them, and of how many", head, rows, "numbers")
    summary = "The student’s commonest errors"
    return f"<h3>{summary}</h3>{listed}" if len(found.class_names) > confusion.DRAWN else details(summary, listed)


# --- the examples -----------------------------------------------------------------------------------------------------


def _examples(found: Evidence) -> str:
    if not len(found.shown):
        return paragraph("Student and teacher hold every class equally likely on every example.")
    text = "<h3>The examples on which they differ most</h3>" + paragraph(
        "Ordered by how far apart the two networks’ probabilities are (half the sum of their differences): 0 where "
        "they are equal, 1 where one excludes what the other holds certain. ✓: right, ✗: wrong; percentages "
        "are the networks’ own probabilities."
    )
    cards = [_card(found, i) for i in range(len(found.shown)) if found.apart[i] >= _APART or i < 4]
    text += f'<ol class="sheet">{"".join(cards[:_FIRST])}</ol>'
    rest = cards[_FIRST:]
    more = f'<ol class="sheet" start="{_FIRST + 1}">{"".join(rest)}</ol>'
    return text + (details(f"{len(rest)} more", more) if rest else "")


def _card(found: Evidence, i: int) -> str:
    name = found.class_names[found.shown_labels[i]]
    where = f"example {found.shown[i]:,} of the {found.split} split"
    image = ""
    if found.images is not None:
        image = f'<img src="{_data(found.images[i])}" alt="{escape(where.capitalize())}, labelled {escape(name)}">'
    lines = [f"Label: <strong>{escape(name)}</strong> <small>{escape(where)}, apart by {found.apart[i]:.2f}</small>"]
    for key, who in (("teacher", "Teacher"), ("student", "Student")):
        classes, chances = (part[i] for part in found.likely[key])
        right = classes[0] == found.shown_labels[i]
        mark = f'<span class="{"right" if right else "wrong"}">{"✓" if right else "✗"}</span>'
        mark += f'<span class="hidden">{"right" if right else "wrong"}: </span>'
        line = f"{who} {mark} {escape(found.class_names[classes[0]])}: {chances[0]:.0%}"
        if not right:
            line += f"<small>{escape(name)}: {found.given[key][i]:.0%}</small>"
        elif len(classes) > 1 and chances[1] >= 0.005:
            line += f"<small>{escape(found.class_names[classes[1]])}: {chances[1]:.0%}</small>"
        lines.append(line)
    return f"<li>{image}<div>{'<br>'.join(lines[:1])}</div>{''.join(f'<div>{line}</div>' for line in lines[1:])}</li>"


def _data(image: np.ndarray) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.repeat(image, 3, -1) if image.shape[-1] == 1 else image, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def sheet(run: Run, look: Look) -> Canvas | None:
    """The first of these examples as one picture, for slides; None without images."""
    found = run.evidence
    if found is None or found.images is None or not len(found.shown):
        return None
    columns = 3 if look.narrow else 6
    count = min(len(found.shown), 4 * columns)
    lines = -(-count // columns)
    body = blank(look, 2.15 * lines)
    for i, axes in enumerate(body.subplots(lines, columns, squeeze=False).ravel()):
        axes.set_axis_off()
        if i >= count:
            continue
        image = found.images[i]
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(plain(found.class_names[found.shown_labels[i]], 18), fontsize=9, color=INK, fontweight="bold")
        for line, key in enumerate(("teacher", "student")):
            classes, chances = (part[i] for part in found.likely[key])
            right = classes[0] == found.shown_labels[i]
            said = f"{key} {'✓' if right else '✗'} {plain(found.class_names[classes[0]], 12)} {chances[0]:.0%}"
            axes.text(0.5, -0.03 - 0.13 * line, said, transform=axes.transAxes, ha="center", va="top", fontsize=8,
                      color=INK)  # fmt: skip
    return body
