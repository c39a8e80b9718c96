"""The pages of a comparison and of a run with several budgets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_report import Page, _write, browse, make_run, page_text

from kdsearch_jax import reporting
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting.comparison_figures import accuracy_floor, ranking
from kdsearch_jax.reporting.comparison_record import read_comparison
from kdsearch_jax.reporting.figure_style import NARROW, Layout
from kdsearch_jax.reporting.rendering import render_page
from kdsearch_jax.reporting.result_figures import budget_sweep, training
from kdsearch_jax.reporting.run_record import read_run
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


def comparison_text(directory: Path) -> str:
    return Page(render_page(read_comparison(directory), {})).text.replace("\u00a0", " ").replace("−", "-")


def test_the_page_reports_leads_and_their_intervals(tmp_path: Path) -> None:
    record = make_comparison(tmp_path)
    text = comparison_text(tmp_path)
    searched, lead = record["rows"][0]["accuracy"], record["differences"][1]
    assert lead["name"] == "magnitude"
    assert f"{100 * np.mean(searched):.2f}% ± {100 * np.std(searched, ddof=1):.2f}" in text
    assert f"“magnitude (L1 norm)” with {100 * np.mean(record['rows'][2]['accuracy']):.2f}" in text
    assert f"95% interval {100 * lead['low']:+.2f} to {100 * lead['high']:+.2f}" in text
    assert ("may be chance" in text) == (lead["low"] < 0 < lead["high"])
    significant = sum(d["low"] > 0 for d in record["differences"])
    ahead = sum(d["mean"] > 0 for d in record["differences"])
    assert f"ahead of {ahead} of 4" in text and f"of {significant} with an interval above zero" in text
    assert "fewer layers: no network of <these> blocks has 50% of the MACs" in text


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    make_comparison(tmp_path, (0,))
    text = comparison_text(tmp_path)
    assert "one seed" in text and "±" not in text and "interval" not in text.split("Accuracy of the students")[0]


def test_a_comparison_that_has_begun(tmp_path: Path) -> None:
    record = make_comparison(tmp_path)
    _write(tmp_path / "comparison.json", {**record, "rows": record["rows"][1:2], "differences": []})
    assert "not available yet" in comparison_text(tmp_path)
    _write(tmp_path / "comparison.json", {**record, "rows": [], "differences": []})
    assert "No student has been evaluated" in comparison_text(tmp_path)
    assert not list(reporting.write_report(tmp_path).parent.glob("*.png"))


def test_a_method_far_below_does_not_compress_the_others(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    record = read_comparison(tmp_path)
    assert 80 < accuracy_floor(record.methods) < 88
    figure = ranking(record, Layout())
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
    with pytest.raises(ValueError, match=r"comparison\.json") as error:
        reporting.write_report(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()


def test_architectures_of_all_seeds_and_links(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    kept = []
    for seed in (0, 1):
        run = make_run(tmp_path / f"seed-{seed}" / "searched", blocks=1, seed=seed)
        kept.append(len(json.loads((run / "search/selection.json").read_text())["kept"]["stage3/block1/conv1"]))
    (tmp_path / "seed-0/searched/report").mkdir()
    (tmp_path / "seed-0/searched/report/index.html").write_text("")
    source = render_page(read_comparison(tmp_path), {})
    assert f"stage3/block1/conv1 64 {kept[0]} {kept[1]}" in Page(source).text
    assert {"href": "../seed-0/searched/report/index.html"} in Page(source).all("a")


def test_a_browser_shows_a_comparison(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    index = reporting.write_report(tmp_path)
    assert {path.stem for path in index.parent.glob("*.png")} == {"ranking", "tradeoff"}
    frames, console = browse(index.read_text("utf-8"), True)
    assert console == [] and all(len(frame["drawn"]) == 2 for frame in frames)
    assert all(frame["needs"] <= frame["inner"] and frame["unreachable"] == frame["faint"] == [] for frame in frames)


# --- several budgets --------------------------------------------------------------------------------------------------


def make_sweep(run: Path) -> list[dict]:
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


def test_students_of_several_budgets(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    make_sweep(run)
    record = read_run(run)
    assert budget_sweep(record, Layout(NARROW)) is not None
    text = Page(reporting.write_report(run).read_text("utf-8")).text.replace("−", "-")
    assert "2 students: 91.55% accuracy at 70% of the" in text and "and 89.21% at 30%" in text
    assert "At 30% of the MACs, accuracy changes by -2.52 points" in text
    assert "Student at 0.7 70% of MACs 91.55% 28.4 M 70%" in text and "Uniform at 0.7 70% of MACs 91.01%" in text
    kept = json.loads((run / "search/selection.json").read_text())["kept"]["stage3/block1/conv1"]
    share = next(g.macs_share for g in record.groups if g.name == "stage3/block1/conv1")
    assert f"stage3/block1/conv1 channels {len(kept)} 64 {100 * share:.1f}% 50" in text
    assert "run/student-0.3" in text and "stopped" not in text


def test_retraining_is_drawn_from_the_step_of_the_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    make_sweep(run)
    (run / "at-0.7").mkdir()
    (run / "at-0.7" / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n')
    figure = training(read_run(run), Layout())
    assert figure is not None
    lines = {line.get_label(): list(line.get_xdata()) for axes in figure.get_figure().axes for line in axes.lines}
    assert lines["student at 0.7"] == [234 + 10, 234 + 20]


def test_budgets_on_time_and_memory_are_checked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", blocks=1)
    tools = latency.Instruments(
        timer=lambda *_: lambda: {"teacher": 4.0, "student": 1.9},
        memory=lambda *_: {"teacher": 3e6, "student": 1e6},
    )
    asked = BudgetConfig(None, latency=0.5, memory=2e6)
    latency.confirm((None, None), (None, None), asked, CallSpec.of_image(()), run / "retrain" / "measured.json", tools)
    text = page_text(run)
    for limit, teacher, reached in (("2 ms of time", "4 ms", "1.9 ms"), ("2 MB of memory", "3 MB", "1 MB")):
        assert f"at most {limit} per call with 64 examples (teacher: {teacher})" in text
        assert f"The student needs {reached}: met" in text
