"""The pages of a comparison and of a front: what they say, and that they say no more than the numbers do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_report import Page, _write, browse, make_run

from kdsearch_jax import reporting
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting import comparison, comparison_page, curves, fronts, look, page, record, versus
from kdsearch_jax.runs import latency

MEANS = {"searched": 88.2, "uniform": 87.0, "magnitude": 87.9, "slimming": 86.9, "scratch": 38.2}
LABELS = {"uniform": "fewer channels (uniform)", "magnitude": "magnitude (L1 norm)",
          "slimming": "searched without the teacher", "scratch": "searched shape, from scratch"}  # fmt: skip
TEACHER = {"accuracy": 0.9173, "macs": 40_551_040, "params": 269_722, "bytes": 1_090_000, "ms_per_image": 0.19}


def make_comparison(directory: Path, seeds: tuple = (0, 1, 2)) -> dict:
    """Writes comparison.json with five rows that were made and one that could not be."""
    rng = np.random.default_rng(3)
    rows, count = [], len(seeds)
    for name, mean in MEANS.items():
        accuracy = ((mean + 0.3 * rng.standard_normal(count)) / 100).round(4).tolist()
        cost = {"macs": rng.integers(20_100_000, 20_270_000, count).tolist(), "params": [158_000] * count,
                "bytes": [712_000] * count, "ms_per_image": [0.11] * count, "seconds": [310.5] * count}  # fmt: skip
        rows.append({"name": name, "label": LABELS.get(name, name), "seeds": list(seeds), "accuracy": accuracy,
                     "agreement": accuracy, "kl": [None] * count, "steps": 390, **cost})  # fmt: skip
    rows.append({"name": "layers", "label": "fewer layers", "why": "no network of <these> blocks has 50% of the MACs"})
    record = {"name": "short_run", "dataset": "cifar10", "split": "test", "examples": 10_000, "budget": {"macs": 0.5},
              "match": "macs", "seeds": list(seeds), "steps": 390, "command": "python -m kdsearch_jax.compare",
              "teacher": TEACHER, "rows": rows}  # fmt: skip
    record["differences"] = [difference(rows[0], row) for row in rows[1:-1]]
    _write(directory / "comparison.json", record)
    return record


def difference(ours: dict, row: dict) -> dict:
    each = np.array(ours["accuracy"]) - np.array(row["accuracy"])
    found = {"name": row["name"], "metric": "accuracy", "each": each.tolist(), "mean": each.mean(), "level": 0.95}
    if len(each) == 1:
        return {**found, "std": None, "low": None, "high": None}
    low, high = stats.t.interval(0.95, len(each) - 1, each.mean(), each.std(ddof=1) / len(each) ** 0.5)
    return {**found, "std": each.std(ddof=1), "low": low, "high": high}


def shown(directory: Path) -> str:
    return Page(comparison_page.page(comparison.read(directory), {})).text.replace("\u00a0", " ").replace("−", "-")


def test_the_page_says_who_wins_and_how_surely(tmp_path: Path) -> None:
    made = make_comparison(tmp_path)
    text = shown(tmp_path)
    ours, best = made["rows"][0]["accuracy"], made["differences"][1]
    assert best["name"] == "magnitude"
    assert f"The searched student has {100 * np.mean(ours):.2f} ± {100 * np.std(ours, ddof=1):.2f}% accuracy" in text
    assert f"“magnitude (L1 norm)” with {100 * np.mean(made['rows'][2]['accuracy']):.2f}" in text
    assert f"interval {100 * best['low']:+.2f} to {100 * best['high']:+.2f}" in text
    assert ("does not exclude that they are equal" in text) == (best["low"] < 0 < best["high"])
    sure = sum(d["low"] > 0 for d in made["differences"])
    ahead = sum(d["mean"] > 0 for d in made["differences"])
    assert f"Ahead of {ahead} of 4 others on average, of {sure} with an interval above zero" in text
    assert "fewer layers no network of <these> blocks has 50% of the MACs" in text
    assert "95% for each row by itself, not for all" in text


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    make_comparison(tmp_path, (0,))
    text = shown(tmp_path)
    assert "with one seed, so that nothing can be said of chance" in text and "±" not in text.split("Results")[0]
    assert "interval above zero" not in text


def test_a_comparison_that_has_begun(tmp_path: Path) -> None:
    made = make_comparison(tmp_path)
    _write(tmp_path / "comparison.json", {**made, "rows": made["rows"][1:2], "differences": []})
    assert "The searched student is not there yet" in shown(tmp_path)
    _write(tmp_path / "comparison.json", {**made, "rows": [], "differences": []})
    assert "No student has been measured yet" in shown(tmp_path)
    assert not list(reporting.write(tmp_path).parent.glob("*.png"))


def test_a_row_far_off_does_not_squash_the_others(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    found = comparison.read(tmp_path)
    assert 80 < versus.floor(found.rows) < 88
    figure = versus.ranking(found, look.Look())
    low, high = figure.axes[0].get_xlim()
    assert low > 85 and high > 91.7 and any("38." in text.get_text() for text in figure.axes[0].texts)


@pytest.mark.parametrize(
    "change",
    [{"accuracy": [0.5]}, {"accuracy": ["high"] * 3}, {"macs": [float("nan")] * 3}, {"name": None, "label": 3}],
)
def test_a_damaged_comparison_is_named(tmp_path: Path, change: dict) -> None:
    made = make_comparison(tmp_path)
    row = {key: value for key, value in {**made["rows"][1], **change}.items() if value is not None}
    _write(tmp_path / "comparison.json", {**made, "rows": [row]})
    with pytest.raises(ValueError, match=r"comparison\.json is damaged") as error:
        reporting.write(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()


def test_architectures_of_all_seeds_and_links(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    kept = []
    for seed in (0, 1):
        run = make_run(tmp_path / f"seed-{seed}" / "searched", blocks=1, seed=seed)
        kept.append(len(json.loads((run / "search/selection.json").read_text())["kept"]["stage3/block1/conv1"]))
    (tmp_path / "seed-0/searched/report").mkdir()
    (tmp_path / "seed-0/searched/report/index.html").write_text("")
    source = comparison_page.page(comparison.read(tmp_path), {})
    assert f"stage3/block1/conv1 64 {kept[0]} {kept[1]}" in Page(source).text
    assert {"href": "../seed-0/searched/report/index.html"} in Page(source).all("a")


def test_a_browser_shows_a_comparison(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    index = reporting.write(tmp_path)
    assert {path.stem for path in index.parent.glob("*.png")} == {"ranking", "tradeoff"}
    frames, console = browse(index.read_text("utf-8"), True)
    assert console == [] and all(len(frame["drawn"]) == 2 for frame in frames)
    assert all(frame["needs"] <= frame["inner"] and frame["unreachable"] == frame["faint"] == [] for frame in frames)


# --- the front --------------------------------------------------------------------------------------------------------


def make_front(run: Path) -> list[dict]:
    def point(name: str, share: float, accuracy: float) -> dict:
        costs = {key: round(TEACHER[key] * share, 4) for key in ("macs", "params", "bytes", "ms_per_image")}
        return {"name": name, "method": name.split("-")[0], "budget": {"macs": share}, "accuracy": accuracy,
                "agreement": accuracy, "kl": 0.1, "steps": 900, "search_steps": 234, **costs}  # fmt: skip

    points = [point("at-0.3", 0.3, 0.8921), point("at-0.7", 0.7, 0.9155)]
    others = [point("uniform-0.7", 0.7, 0.9101)]
    record = {"dataset": "cifar10", "split": "test", "examples": 10_000, "teacher": TEACHER, "points": points}
    _write(run / "front.json", {**record, "baselines": others})
    rows = [{"name": "teacher", **TEACHER}, *points, *others]
    _write(run / "results.json", {"dataset": "cifar10", "split": "test", "examples": 10_000, "seed": 0, "rows": rows})
    _write(run / "search/at-0.7/selection.json", {"kept": {"stage3/block1/conv1": list(range(50))}})
    return points


def test_the_front_of_one_search(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    make_front(run)
    found = record.read(run)
    assert fronts.figure(found, look.Look(3.7)) is not None
    text = Page(reporting.write(run).read_text("utf-8")).text.replace("−", "-")
    assert "One search gave 2 students of the teacher: accuracy 91.55% at 70% of the MACs, 89.21% at 30%" in text
    assert "At 30% of the MACs, -2.52 points" in text
    assert "Student at 0.7 70% of MACs 91.55% 28.4 M 70%" in text and "Uniform at 0.7 70% of MACs 91.01%" in text
    kept = json.loads((run / "search/selection.json").read_text())["kept"]["stage3/block1/conv1"]
    share = next(g.macs_share for g in found.groups if g.name == "stage3/block1/conv1")
    assert f"stage3/block1/conv1 channels {len(kept)} 64 {100 * share:.1f}% 50" in text
    assert "run/student-0.3" in text and "This run stopped" not in text


def test_a_student_of_a_front_is_drawn_from_where_it_was_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    make_front(run)
    (run / "at-0.7").mkdir()
    (run / "at-0.7" / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n')
    figure = curves.search(record.read(run), look.Look())
    assert figure is not None
    lines = {line.get_label(): list(line.get_xdata()) for axes in figure.get_figure().axes for line in axes.lines}
    assert lines["student at 0.7"] == [234 + 10, 234 + 20]


def test_bounds_on_time_and_memory_have_their_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    instruments = latency.Instruments(
        timer=lambda *_: lambda: {"teacher": 4.0, "student": 1.9},
        memory=lambda *_: {"teacher": 3e6, "student": 1e6},
    )
    asked = BudgetConfig(None, latency=0.5, memory=2e6)
    latency.confirm(
        (None, None), (None, None), asked, CallSpec.of_image(()), run / "retrain" / "measured.json", instruments
    )
    text = Page(page.page(record.read(run), {})).text
    assert "Asked: at most 2 ms of time a call of 64 examples (the teacher: 4 ms); got 1.9 ms: met." in text
    assert "Asked: at most 2 MB of memory a call of 64 examples (the teacher: 3 MB); got 1 MB: met." in text
