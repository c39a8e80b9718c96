"""The report of a comparison as one HTML page: does the search beat students made by hand, and by how much?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax.reporting import costs, markup, provenance
from kdsearch_jax.reporting.comparison import OURS, Comparison, Difference, Row
from kdsearch_jax.reporting.document import Section, broken, document
from kdsearch_jax.reporting.markup import NONE, NOTHING, cell, details, escape, notes, paragraph, table
from kdsearch_jax.reporting.results import percent, points

_REPORTS = 60  # links to the pages of single runs


def page(comparison: Comparison, pictures: Mapping[str, markup.Pictures]) -> str:
    """The whole page; `pictures` by name of the figure, those that could be drawn."""
    record = comparison.record
    name = str(record.get("name", comparison.directory.name))
    sections = [
        Section("results", "Results", title(comparison), _results(comparison, pictures)),
        Section("costs", "Costs", "What the students cost", _costs(comparison, pictures)),
        Section("architecture", "Architectures", "What the search found with each seed", _architectures(comparison)),
        Section("run", "The comparison", "How it was made", _made(comparison)),
    ]
    head = f"<h1>Searched against hand-made students: {broken(name)}</h1>{lead(comparison)}"
    return document(f"{name}, compared", head, sections)


def title(comparison: Comparison) -> str:
    """The finding: of how many rows the search is ahead, and of how many surely."""
    pairs = [d for row in comparison.others if (d := comparison.differences.get(row.name)) is not None]
    if not pairs:
        return "Results"
    ahead, sure = sum(d.mean > 0 for d in pairs), sum(d.low is not None and d.low > 0 for d in pairs)
    text = f"Ahead of {ahead} of {len(pairs)} others on average"
    return text + (f", of {sure} with an interval above zero" if any(d.low is not None for d in pairs) else "")


def lead(comparison: Comparison) -> str:
    """What came out, in two sentences."""
    ours, record = comparison.ours, comparison.record
    where = f"the {record.get('split', 'test')} split of {record.get('dataset', 'the data set')}"
    if ours is None:
        said = "The searched student is not there yet; the page shows what there is."
        return paragraph(said)
    seeds = len(ours.values["accuracy"])
    text = f"The searched student has {_spread(ours, 'accuracy')} accuracy on {where} ({_seeds(seeds)})"
    macs, whole = ours.mean("macs"), comparison.teacher.get("macs")
    text += f" with {percent(macs / whole)} of the teacher’s multiply-accumulates (MACs)" if macs and whole else ""
    text += (
        f"; the teacher has {100 * comparison.teacher['accuracy']:.2f}%" if comparison.teacher.get("accuracy") else ""
    )
    text += "."
    if comparison.others:
        best = comparison.others[0]
        text += f" The best other is “{best.label}” with {_spread(best, 'accuracy')}"
        found = comparison.differences.get(best.name)
        text += f": {_led(found)}." if found is not None else "."
    return f'<p class="lead">{escape(text)}</p>'


def _led(found: Difference) -> str:
    side = "ahead" if found.mean > 0 else "behind"
    text = f"the search is {side} by {abs(100 * found.mean):.2f} points"
    if found.low is None or found.high is None:
        return text + ", with one seed, so that nothing can be said of chance"
    text += f", {found.level:.0%} interval {points(found.low)} to {points(found.high)}"
    return text if found.low > 0 or found.high < 0 else text + ", which does not exclude that they are equal"


def _seeds(count: int) -> str:
    return f"{count} seeds, mean ± standard deviation" if count > 1 else "one seed"


def _spread(row: Row, key: str) -> str:
    mean, std = row.mean(key), row.std(key)
    assert mean is not None
    return f"{100 * mean:.2f}%" if std is None else f"{100 * mean:.2f}\u00a0±\u00a0{100 * std:.2f}%"


# --- results ----------------------------------------------------------------------------------------------------------


def _results(comparison: Comparison, pictures: Mapping[str, markup.Pictures]) -> str:
    if not comparison.rows:
        return paragraph("No student has been measured yet.") + _missing(comparison)
    text = ""
    if "ranking" in pictures:
        caption = "A dot a seed, a bar their mean, a band the standard deviation"
        if comparison.differences:
            caption += (
                ". Right (on a phone below): the searched student minus the row’s with the same seed, and the interval "
                "of their mean; dashed where it does not exclude zero"
            )
        spoken = f"Accuracy of every row, and by how much the search leads it. {title(comparison)}. The table has all."
        text += markup.picture(pictures["ranking"], spoken, caption + ". Triangles: rows beyond the edge.")
    rows = [_quality(comparison, row) for row in comparison.rows]
    head = ["Student", "Accuracy, %", "Searched minus it<small>points, interval</small>", "Agrees with teacher, %"]
    text += table("Accuracy of the students", head, rows, "numbers", spoken=False)
    each = _each_table(comparison)
    return text + details("Accuracy with each seed", each) + _notes(comparison) + _missing(comparison)


def _quality(comparison: Comparison, row: Row) -> list[str]:
    found = comparison.differences.get(row.name)
    lead = NONE
    if found is not None:
        lead = escape(points(found.mean))
        if found.low is not None and found.high is not None:
            lead += f"<small>{escape(points(found.low))} to {escape(points(found.high))}</small>"
    name = f"<strong>{escape(row.label)}</strong>" if row.name == OURS else escape(row.label)
    return [name, _cell(row, "accuracy", 100), lead, _cell(row, "agreement", 100)]


def _cell(row: Row, key: str, scale: float) -> str:
    mean, std = row.mean(key), row.std(key)
    if mean is None:
        return NOTHING
    return f"{scale * mean:.2f}" + ("" if std is None else f"<small>±\u00a0{scale * std:.2f}</small>")


def _each_table(comparison: Comparison) -> str:
    seeds = list(dict.fromkeys(seed for row in comparison.rows for seed in row.seeds))
    rows = []
    for row in comparison.rows:
        known = dict(zip(row.seeds, row.values["accuracy"], strict=False))
        rows.append([escape(row.label), *(cell(known.get(seed), lambda v: f"{100 * v:.2f}") for seed in seeds)])
    return table("Accuracy with each seed, %", ["Student", *(f"Seed {escape(s)}" for s in seeds)], rows, "numbers")


def _notes(comparison: Comparison) -> str:
    record = comparison.record
    count = record.get("examples")
    levels = {d.level for d in comparison.differences.values()}
    said = [
        f"All from one teacher, {record['steps']:,} training steps each, the search’s own counted."
        if record.get("steps")
        else "",
        f"Measured on {count:,} examples, the same for all." if count else "",
    ]
    if levels and any(d.low is not None for d in comparison.differences.values()):
        said.append(
            f"Interval: of Student’s t over differences paired by seed, {min(levels):.0%} for each row by itself, not "
            "for all of them together."
        )
    said += [f"{row.label}: {row.note}." for row in comparison.rows if row.note]
    said += [
        f"{row.label}: {row.steps:,} steps." for row in comparison.rows if row.steps not in (None, record.get("steps"))
    ]
    return notes(said)


def _missing(comparison: Comparison) -> str:
    if not comparison.missing:
        return ""
    rows = [[escape(label), escape(why)] for label, why in comparison.missing]
    return table("Rows that could not be made", ["Student", "Why"], rows, spoken=False)


# --- costs ------------------------------------------------------------------------------------------------------------


def _costs(comparison: Comparison, pictures: Mapping[str, markup.Pictures]) -> str:
    if not comparison.rows:
        return paragraph("No student has been measured yet.")
    text = ""
    if "tradeoff" in pictures:
        matched = comparison.record.get("match")
        caption = "Up and to the left is better; lines are ± one standard deviation. Rows far below are left out. "
        caption += "The budget bounds the MACs of all" if matched == "macs" else ""
        caption += "The budget bounds MACs and parameters of all" if matched == "both" else ""
        spoken = "Accuracy of every row against its MACs and its parameters. The tables have all numbers."
        text = markup.picture(
            pictures["tradeoff"], spoken, caption.strip() + ("." if matched in ("macs", "both") else "")
        )
    everyone: list[tuple[str, dict[str, Any]]] = [("Teacher", comparison.teacher)] if comparison.teacher else []
    everyone += [(row.label, {key: row.mean(key) for _, key, _ in costs.MEASURES}) for row in comparison.rows]
    measures = [m for m in costs.MEASURES if any(row.get(m[1]) is not None for _, row in everyone)]
    head = ["Student", *(name + costs.SHARE for name, _, _ in measures)]
    rows = [
        [escape(name), *(costs.bar(row, comparison.teacher, key, form) for _, key, form in measures)]
        for name, row in everyone
    ]
    text += table("Costs, means over the seeds", head, rows, "numbers", spoken=False)
    spent = [
        [escape(r.label), f"{r.mean('seconds') or 0:,.0f} s"] for r in comparison.rows if r.mean("seconds") is not None
    ]
    listed = table("Time to make one student", ["Student", "Mean over the seeds"], spent, "numbers")
    return text + (details("Time to make one student", listed) if spent else "")


# --- what was found, and how ------------------------------------------------------------------------------------------


def _architectures(comparison: Comparison) -> str:
    if not comparison.groups:
        return paragraph("The searches’ own files are not in this directory.")
    seeds = list(comparison.groups)
    every = {g.name: g for groups in comparison.groups.values() for g in groups}
    kept = {seed: {g.name: g.kept_units for g in groups} for seed, groups in comparison.groups.items()}
    rows = [
        [escape(name), f"{g.size}", *(cell(kept[seed].get(name), str) for seed in seeds)] for name, g in every.items()
    ]
    totals = [sum(kept[seed].values()) for seed in seeds]
    whole = sum(g.size for g in every.values())
    text = paragraph(
        f"Of {whole:,} units (channels, heads, neurons, branches) the searches kept {', '.join(map(str, totals))}."
    )
    head = ["Group", "Teacher", *(f"Seed {escape(seed)}" for seed in seeds)]
    listed = table("Units kept, by group and seed", head, rows, "numbers")
    return text + (details("Units kept, by group and seed", listed) if len(rows) > 24 else listed)


def _made(comparison: Comparison) -> str:
    record = comparison.record
    keys = ("dataset", "split", "examples", "budget", "match", "seeds", "steps", "search_steps", "hardware", "seconds")
    shown = {key: record[key] for key in keys if record.get(key) is not None}
    environment = {
        **(comparison.environment or {}),
        **({"command": record["command"]} if record.get("command") else {}),
    }
    text = provenance.settings("The comparison", shown)
    text += provenance.the_run(environment, comparison.config)
    return text + _links(comparison.directory)


def _links(directory: Path) -> str:
    found = sorted([*directory.glob("*/report/index.html"), *directory.glob("*/*/report/index.html")])[:_REPORTS]
    links = [path.relative_to(directory) for path in found]
    items = "".join(
        f'<li><a href="../{escape(link.as_posix())}">{escape(link.parent.parent.as_posix())}</a></li>' for link in links
    )
    return f'<h3>Reports of single runs</h3><ul class="links">{items}</ul>' if items else ""
