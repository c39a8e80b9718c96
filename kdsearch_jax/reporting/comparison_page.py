"""The data of a comparison's page, for the template `comparison.html`. Sentences and headings are the template's."""

from __future__ import annotations

from typing import Any

from kdsearch_jax.reporting.comparison_record import ComparisonRecord, MethodResults
from kdsearch_jax.reporting.formatting import points
from kdsearch_jax.reporting.run_page import details
from kdsearch_jax.reporting.tables import COSTS, Cell, ReportTable, cost_cell, cost_header, settings_table

_MAX_LINKS = 60  # to the reports of single runs
_MAX_OPEN_ROWS = 24  # of the table of architectures; longer ones are folded
_SETTINGS = ("dataset", "split", "examples", "budget", "match", "seeds", "steps", "search_steps", "hardware", "seconds")


def page_data(comparison: ComparisonRecord) -> dict[str, Any]:
    """The variables of `comparison.html`, except for the figures."""
    summary, searched = comparison.summary, comparison.searched
    leads = [d for method in comparison.others if (d := comparison.differences.get(method.name)) is not None]
    steps = summary.get("steps")
    return {
        "name": str(summary.get("name", comparison.directory.name)),
        "comparison": comparison,
        "split": summary.get("split", "test"),
        "dataset": summary.get("dataset", "the data set"),
        "examples": summary.get("examples"),
        "match": summary.get("match"),
        "steps": steps,
        "other_steps": [m for m in comparison.methods if m.steps not in (None, steps)],
        "seeds": 0 if searched is None else len(searched.values["accuracy"]),
        "macs": _macs_share(comparison, searched),
        "best_other": comparison.others[0] if comparison.others else None,
        "leads": {
            "total": len(leads),
            "ahead": sum(lead.mean > 0 for lead in leads),
            "significant": sum(lead.is_significant and lead.mean > 0 for lead in leads),
            "have_intervals": any(lead.interval for lead in leads),
            "level": min((lead.level for lead in leads), default=None),
        },
        "results": _results_table(comparison),
        "results_by_seed": _seed_table(comparison),
        "costs": _cost_table(comparison),
        "durations": _duration_table(comparison),
        "architectures": _architectures(comparison),
        "settings": settings_table("Settings of the comparison", {k: summary[k] for k in _SETTINGS if summary.get(k)}),
        "details": details(
            {**(comparison.environment or {}), **({"command": summary["command"]} if summary.get("command") else {})},
            comparison.config,
        ),
        "links": _links(comparison),
    }


def _macs_share(comparison: ComparisonRecord, method: MethodResults | None) -> float | None:
    macs, whole = None if method is None else method.mean("macs"), comparison.teacher.get("macs")
    return macs / whole if macs and whole else None


def _results_table(comparison: ComparisonRecord) -> ReportTable:
    rows = []
    for method in comparison.methods:
        lead, cell = comparison.differences.get(method.name), Cell("")
        if lead is not None:
            cell = Cell(points(lead.mean), " to ".join(map(points, lead.interval or ())))
        rows.append([Cell(method.label), _mean_cell(method, "accuracy"), cell, _mean_cell(method, "agreement")])
    header = [
        Cell("Student"), Cell("Accuracy, %"), Cell("Lead of the search", "points, interval"),
        Cell("Agreement with teacher, %"),
    ]  # fmt: skip
    return ReportTable("Accuracy of the students", header, rows)


def _mean_cell(method: MethodResults, measure: str) -> Cell:
    mean, std = method.mean(measure), method.std(measure)
    if mean is None:
        return Cell(None)
    return Cell(f"{100 * mean:.2f}", "" if std is None else f"±\u00a0{100 * std:.2f}")


def _seed_table(comparison: ComparisonRecord) -> ReportTable:
    seeds = list(dict.fromkeys(seed for method in comparison.methods for seed in method.seeds))
    rows = []
    for method in comparison.methods:
        known = dict(zip(method.seeds, method.values["accuracy"], strict=False))
        shares = [known.get(seed) for seed in seeds]
        cells = [Cell(None if share is None else f"{100 * share:.2f}") for share in shares]
        rows.append([Cell(method.label), *cells])
    return ReportTable("Accuracy by seed, %", [Cell("Student"), *(Cell(f"Seed {seed}") for seed in seeds)], rows)


def _cost_table(comparison: ComparisonRecord) -> ReportTable:
    networks: list[tuple[str, dict[str, Any]]] = [("Teacher", comparison.teacher)] if comparison.teacher else []
    networks += [(method.label, {key: method.mean(key) for key in COSTS}) for method in comparison.methods]
    costs = [key for key in COSTS if any(row.get(key) is not None for _, row in networks)]
    rows = [[Cell(name), *(cost_cell(row, comparison.teacher, key) for key in costs)] for name, row in networks]
    return ReportTable("Costs, averaged over the seeds", [Cell("Student"), *map(cost_header, costs)], rows)


def _duration_table(comparison: ComparisonRecord) -> ReportTable:
    rows = [
        [Cell(method.label), Cell(f"{seconds:,.0f} s")]
        for method in comparison.methods
        if (seconds := method.mean("seconds")) is not None
    ]
    return ReportTable("Time to produce one student", [Cell("Student"), Cell("Mean over the seeds")], rows)


def _architectures(comparison: ComparisonRecord) -> dict[str, Any] | None:
    if not comparison.groups:
        return None
    groups = {group.name: group for searched in comparison.groups.values() for group in searched}
    kept = {seed: {group.name: group.kept_count for group in searched} for seed, searched in comparison.groups.items()}
    rows = [
        [
            Cell(name),
            Cell(f"{group.size}"),
            *(Cell(None if name not in counts else f"{counts[name]}") for counts in kept.values()),
        ]
        for name, group in groups.items()
    ]
    header = [Cell("Group"), Cell("Teacher"), *(Cell(f"Seed {seed}") for seed in kept)]
    return {
        "table": ReportTable("Units kept, by group and seed", header, rows),
        "is_long": len(rows) > _MAX_OPEN_ROWS,
        "total": sum(group.size for group in groups.values()),
        "kept": [sum(counts.values()) for counts in kept.values()],
    }


def _links(comparison: ComparisonRecord) -> list[tuple[str, str]]:
    """(name, relative address) of the reports of single runs."""
    directory = comparison.directory
    pages = sorted([*directory.glob("*/report/index.html"), *directory.glob("*/*/report/index.html")])[:_MAX_LINKS]
    paths = [page.relative_to(directory) for page in pages]
    return [(path.parent.parent.as_posix(), f"../{path.as_posix()}") for path in paths]
