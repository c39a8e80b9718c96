"""A plan on one screen: what to know before paying for a slice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdsearch_jax.reporting.formatting import amount, file_size, percent
from kdsearch_jax.runs.plain_tables import Table, common, print_table

GIB = 2.0**30
SHOWN = 12  # lines of the table of layers


def print_plan(record: Mapping[str, Any]) -> None:
    """Prints the table of programs, then times, communication and the layers of the most expensive program."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    chips = f"{record['chips']} chip{'s' * (record['chips'] > 1)}"
    print(
        f"{record['target']}: {chips}, {record['memory'] / GIB:.4g} GiB of HBM a device; estimated by the compiler "
        f"({versions}), nothing was measured"
    )
    titles = ("program", "batch", "a device", "HBM, GiB", "fits", "ms", "examples/s", "matrix unit", "HBM", "links",
              "bf16", "padding", "bound by")  # fmt: skip
    print_table(titles, [_line(name, row, record) for name, row in record["programs"].items()])
    for line in _remarks(record):
        print(line)
    steps = {name: row for name, row in record["programs"].items() if row["layers"]}
    if steps:
        name = next((n for n in ("search", "retrain", "teacher", "forward") if n in steps), next(iter(steps)))
        print_table(
            (f"layers of {name}", "share of cycles", "in matrix operations", "padding"), layer_lines(steps[name])
        )


def _line(name: str, row: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, ...]:
    peak = row["memory"].get("peak")
    memory = "?" if peak is None else f"{peak / GIB:.3g}"
    fits = "yes" if row["fits"] else f"no: {row['largest_batch'] or 'not even 1 a device'}"
    shares = [_share(row["shares"].get(key)) for key in ("matrix unit", "HBM", "links")]
    time = "" if row["milliseconds"] is None else f"{row['milliseconds']:.3g}"
    rate = "" if row["examples_per_second"] is None else f"{row['examples_per_second']:,.0f}"
    return (name, f"{row['batch']:,}", f"{row['per_device']:,}", memory, fits, time, rate, *shares, _share(row["bf16"]),
            _share(row["padding"]), row["bound"] or "")  # fmt: skip


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _remarks(record: Mapping[str, Any]) -> list[str]:
    rows, lines = record["programs"], [""]
    lines += _comparison(rows, record["macs"])
    hours = {
        n: record["updates"][n] * rows[n]["milliseconds"] / 3.6e6 for n in record["updates"] if rows[n]["milliseconds"]
    }
    if hours:
        parts = " + ".join(f"{name} {record['updates'][name]:,}" for name in hours)
        total = sum(hours.values())
        lines.append(
            f"updates: {parts}: {_hours(total)} of this slice, {_hours(total * record['chips'], 'chip-hours')}; "
            "without baselines, input, evaluation and compilation"
        )
    for name, row in rows.items():
        kinds = [f"{each['count']} {kind} ({file_size(each['bytes'])}, {each['small']} of at most 64 KiB)"
                 for kind, each in row["collectives"].items()]  # fmt: skip
        if kinds:
            lines.append(f"{name}: {', '.join(kinds)} a call")
        if row["not_bf16"] and record["precision"] == "bf16" and not name.startswith("forward"):
            lines.append(f"{name}: not in bf16: {', '.join(row['not_bf16'][:6])}")
        if row["not_estimated"]:
            calls = ", ".join(f"{target} ×{n}" for target, n in row["not_estimated"].items())
            lines.append(f"{name}: the compiler has no estimate for {calls}, which is missing in the time")
        if row["loops_counted_once"]:
            lines.append(f"{name}: {row['loops_counted_once']} loops of unknown length are counted once")
    return lines


def _comparison(rows: Mapping[str, Any], macs: Mapping[str, int]) -> list[str]:
    """Whether each pruned network is faster than the one it was cut from."""
    pairs = [("forward student", "forward"), ("forward", "forward unpruned")]
    lines = []
    for pruned, whole in pairs:
        times = [rows.get(name, {}).get("milliseconds") for name in (pruned, whole)]
        if times[0] and times[1]:
            share, left = times[0] / times[1], macs[pruned] / macs[whole]
            verdict = "faster" if share < 0.98 else "not faster" if share < 1.02 else "slower"
            lines.append(
                f"{pruned}: {verdict} than {whole}: {share:.2f} of its time with {left:.2f} of its "
                f"{amount(macs[whole])} MACs"
            )
    return lines


def _hours(value: float, unit: str = "hours") -> str:
    return f"{value:,.1f} {unit}" if value >= 1 else f"{value:.2g} {unit}"


def layer_lines(row: Mapping[str, Any]) -> Table:
    """The most expensive layers; those whose paths differ in numbers only share a line."""
    alike: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, each in row["layers"].items():
        key = name if len(row["layers"]) <= SHOWN else re.sub(r"\d+", "#", name)
        alike.setdefault(key, []).append((name, each))
    lines = []
    for layers in sorted(alike.values(), key=lambda found: -sum(each["share"] for _, each in found)):
        share, matrix = (sum(each[key] for _, each in layers) for key in ("share", "matrix"))
        paddings = [each["padding"] for _, each in layers if each["padding"] is not None]
        padding = _share(sum(paddings) / len(paddings)) if paddings else ""
        lines.append((common([name for name, _ in layers]), percent(share), percent(matrix), padding))
    return lines[:SHOWN]
