"""The report of a run, complete or not, and how its page behaves in a browser."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kdsearch_jax import reporting
from kdsearch_jax.report import main
from kdsearch_jax.reporting import search_figures
from kdsearch_jax.reporting.figure_style import NARROW, Layout
from kdsearch_jax.reporting.formatting import number_ranges
from kdsearch_jax.reporting.predictions import write_predictions
from kdsearch_jax.reporting.rendering import render_page
from kdsearch_jax.reporting.run_record import read_run
from kdsearch_jax.reporting.unit_groups import PruneSteps, UnitGroup, merge_groups
from kdsearch_jax.runs import config
from kdsearch_jax.runs.results import format_table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEPS = np.arange(0, 401, 4)


# --- a run as the other stages write it: CIFAR ResNet, searched, retrained, with one baseline -------------------------


def make_run(directory: Path, blocks: int = 3, seed: int = 0, name: str = "resnet20_cifar10") -> Path:
    """Writes the files of a run over a CIFAR ResNet with 3 stages of `blocks` blocks, the last branch but one gone."""
    rng = np.random.default_rng(seed)
    groups, gates, kept = [], {}, {}
    layers = [(s, b) for s in (1, 2, 3) for b in range(1, blocks + 1)]
    removed = layers[-2]
    macs = {(s, b): 2 * 9 * 16 * 16 * 1024 * (0.75 if b == 1 and s > 1 else 1) for s, b in layers}
    total = round(sum(macs.values()) + 27 * 16 * 1024 + 640)
    for stage, block in layers:
        path, size = f"stage{stage}/block{block}", 16 * 2 ** (stage - 1)
        inner = [f"{path}/{layer}" for layer in ("conv1", "norm1", "conv2")]
        share = macs[stage, block] / total
        stays = rng.random(size) < (0.3 + 0.15 * stage)
        death = np.where(stays, 10**6, rng.integers(30, 330, size))
        level = rng.lognormal(0, 0.5, size) * (0.4 + 0.6 * stays)
        gate = level * np.clip((death - STEPS[:, None]) / np.minimum(death, 150), 0, 1)
        groups.append(_group(f"{path}/conv1", "channels", size, share, [f"params/{layer}" for layer in inner]))
        gates[f"{path}/conv1"], kept[f"{path}/conv1"] = gate, np.flatnonzero(stays).tolist()
        branch, gone = f"{path}:branch", (stage, block) == removed
        groups.append(_group(branch, "branches", 1, share, [*inner, f"{path}/norm2"]))
        gates[branch] = np.clip((280 - STEPS[:, None]) / 280, 0, 1) if gone else np.ones((len(STEPS), 1))
        kept[branch] = [] if gone else [0]
    fall = np.maximum(1 - 0.52 * np.minimum(STEPS / 320, 1), 0.48)
    frozen = [
        *({"name": f"params/stage{s}/block{b}/conv2/kernel", "axis": 3, "size": 16 * 2 ** (s - 1),
           "reason": "padded by the model’s own code <by a constant & more>"} for s, b in layers),
        {"name": "params/head/kernel", "axis": 1, "size": 10, "reason": "the network’s output"},
    ]  # fmt: skip
    search = directory / "search"
    _write(search / "topology.json", {"macs": total, "params": 272_474, "groups": groups, "frozen": frozen})
    _write(
        search / "selection.json", {"kept": kept, "macs": int(0.48 * total), "params": 141_000, "budget": {"macs": 0.5}}
    )
    _write(search / "architecture.json", _architecture(kept, blocks))
    named = {f"gate/{key}": gate.astype(np.float32) for key, gate in gates.items()}
    lambda2 = 1e-4 * np.exp(np.minimum(STEPS, 330) / 60) * (STEPS > 0)
    np.savez(
        search / "history.npz",
        steps=STEPS.astype(np.float64),
        cost_macs=fall,
        cost_params=0.3 + 0.7 * fall,
        lambda2=lambda2,
        **named,
    )
    _metrics(directory / "search", 400, 0.915, 0.86, rng)
    _metrics(directory / "retrain", 800, 0.86, 0.912, rng)
    _metrics(directory / "uniform", 1200, 0.30, 0.900, rng)
    _write(directory / "results.json", _results(total))
    experiment = config.to_json(
        config.Experiment(name=name, model=config.ModelConfig(arguments={"depth": 6 * blocks + 2}))
    )
    _write(directory / "config.json", experiment)
    _write(directory / "environment.json", _environment())
    return directory


def _group(name: str, kind: str, size: int, share: float, layers: list[str]) -> dict:
    return {"name": name, "kind": kind, "size": size, "macs_share": share, "params_share": share, "layers": layers}


def _architecture(kept: dict, blocks: int) -> dict:
    layers = {name: {"features": len(units)} for name, units in kept.items() if name.endswith("conv1") and units}
    return {"format": 1, "model": "cifar_resnet", "arguments": {"depth": 6 * blocks + 2, "num_classes": 10},
            "layers": layers, "dropped": [], "input_shape": [32, 32, 3]}  # fmt: skip


def _results(total: int) -> dict:
    def row(name: str, accuracy: float, agreement: float, cost: float, steps: int) -> dict:
        return {"name": name, "accuracy": accuracy, "accuracy_top5": 1 - (1 - accuracy) / 20, "agreement": agreement,
                "kl": 0.31 * (1 - agreement), "macs": round(cost * total), "params": round(272_474 * cost),
                "bytes": round(1_120_000 * cost), "ms_per_image": 0.41 * cost**0.8, "ms_batch": 128,
                "steps": steps}  # fmt: skip

    rows = [row("student", 0.9120, 0.9410, 0.48, 1200), row("teacher", 0.9168, 1.0, 1.0, 64000),
            row("uniform", 0.9003, 0.9262, 0.497, 1200)]  # fmt: skip
    budget = {"macs": 0.5, "params": None, "round_to": 1}
    return {"dataset": "cifar10", "split": "test", "seed": 0, "examples": 10_000, "budget": budget, "rows": rows}


def _environment() -> dict:
    versions = {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8"}
    return {"versions": versions, "git_revision": "0123456789abcdef-dirty",
            "devices": ["NVIDIA H100 80GB HBM3"], "command": ["pipeline.py", "--config", "resnet20_cifar10", "--quick"],
            "started": "2026-11-22T16:00:00+0000", "earlier": []}  # fmt: skip


def _metrics(directory: Path, steps: int, first: float, last: float, rng: np.random.Generator) -> None:
    rows = []
    for step in range(10, steps + 1, 10):
        t = 1 - np.exp(-4 * step / steps)
        accuracy = first + (last - first) * t
        row = {"step": step, "time": 0.1 * step, "loss": 2.2 * (1 - accuracy) + 0.02 * rng.standard_normal()}
        row |= {"accuracy": accuracy + 0.01 * rng.standard_normal(), "images_per_second": 5000.0}
        if step % 50 == 0:
            row["validation_accuracy"] = accuracy
        rows.append(row)
    _write_text(directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, value: object) -> None:
    _write_text(path, json.dumps(value))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def add_predictions(run: Path, classes: int = 10, count: int = 400, images: bool = True, names: tuple = ()) -> dict:
    """Writes the predictions of a teacher that errs now and then and of a student that errs more often."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, count)
    teacher = 3 * rng.standard_normal((count, classes)) + 7 * np.eye(classes)[labels]
    logits = {"teacher": teacher, "student": teacher + 1.5 * rng.standard_normal(teacher.shape)}
    logits["uniform"] = logits["student"] + rng.standard_normal(teacher.shape)
    pixels = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8) if images else None
    write_predictions(run, "test", logits, labels, pixels, names)
    return {"labels": labels, **{name: values.argmax(-1) for name, values in logits.items()}}


# --- reading a page ---------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """What a page says and is made of; fails on tags that do not pair up."""

    def __init__(self, source: Path | str):
        super().__init__()
        self.text, self.tags, self._open = "", [], []
        self.feed(source.read_text("utf-8") if isinstance(source, Path) else source)
        assert not self._open, f"never closed: {self._open}"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += f" {data}"

    def all(self, *names: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag in names]


def page_text(run: Path) -> str:
    """The text of a run's page, without its figures."""
    return Page(render_page(read_run(run), {})).text


def change_json(path: Path, **changes: object) -> None:
    """Replaces entries of a JSON object in a file."""
    _write(path, json.loads(path.read_text()) | changes)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "resnet20")
    add_predictions(run)
    return run


@pytest.fixture(scope="module")
def index(run_dir: Path) -> Path:
    return reporting.write_report(run_dir)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_run(tmp_path / "small", blocks=1)


# --- content ----------------------------------------------------------------------------------------------------------


def test_the_page_has_the_results(run_dir: Path, index: Path) -> None:
    page, selection = Page(index), json.loads((run_dir / "search/selection.json").read_text())
    groups = {g["name"]: g for g in json.loads((run_dir / "search/topology.json").read_text())["groups"]}
    assert index == run_dir / "report" / "index.html"
    lead = page.text[: page.text.index("Results")]
    assert all(value in lead for value in ("48% of the teacher", "91.20%", "−0.48", "+1.17"))
    assert "at most 50% of the teacher’s MACs. The student needs 48%: met" in page.text
    assert "1 of 9 residual branches" in page.text
    for name, kept in selection["kept"].items():
        inside_removed = name.startswith("stage3/block2")
        row = f"{name} {groups[name]['kind']} {0 if inside_removed else len(kept)} {groups[name]['size']}"
        assert row in page.text
    assert "padded by the model’s own code <by a constant & more> (9)" in page.text
    assert "pipeline.py --config resnet20_cifar10 --quick" in page.text and "NVIDIA H100" in page.text
    assert "kdsearch_jax.load(" in page.text and "module.apply(variables, images)" in page.text
    assert "run.eval_batch_size 500" in page.text


def test_groups_have_their_first_and_last_pruning_step(run_dir: Path, index: Path) -> None:
    with np.load(run_dir / "search/history.npz") as history:
        gate = history["gate/stage1/block1/conv1"]
    zero_from = STEPS[[np.flatnonzero(unit > 0)[-1] + 1 for unit in gate.T if unit[-1] == 0]]
    pruned = len(zero_from)
    row = f"stage1/block1/conv1 {16 - pruned} {pruned} step {zero_from.min()} step {zero_from.max()}"
    assert row in Page(index).text


def test_a_missed_budget_is_reported(small: Path) -> None:
    results = json.loads((small / "results.json").read_text())
    change_json(small / "results.json", budget=results["budget"] | {"macs": 0.4})
    text = page_text(small)
    assert "at most 40% of the teacher’s MACs. The student needs 48%: not met" in text
    assert "needs 48% of the MACs and 56% of the time" in text


def test_a_noisy_time_is_not_compared(small: Path) -> None:
    """The student's interval is wide, the baseline's overlaps the teacher's."""
    results = json.loads((small / "results.json").read_text())
    student, teacher, uniform = results["rows"]
    student |= {"ms_low": 0.1, "ms_high": 0.35}
    teacher |= {"ms_low": 0.39, "ms_high": 0.43}
    uniform |= {"ms_per_image": 0.4, "ms_low": 0.38, "ms_high": 0.4}
    _write(small / "results.json", results)
    text = page_text(small)
    assert "needs 48% of the MACs" in text and "of the time" not in text
    assert "0.1 ms to 0.35 ms no clear difference 0.4 ms no clear difference" in text
    table = format_table(results)
    assert "0.100–0.350" in table and "0.410" in table and "0.400" in table


def test_figures_are_files_and_in_the_page(index: Path) -> None:
    for name in ("architecture", "timeline", "gates", "training", "confusion", "examples"):
        png = (index.parent / f"{name}.png").read_bytes()
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
        assert png.startswith(b"\x89PNG") and width > 1500 and height > 400 and len(png) > 10_000
    drawings = Page(index).all("svg")
    assert [svg["class"] for svg in drawings] == ["wide", "narrow"] * 5
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 40 for svg in drawings)


def test_deep_networks_are_folded(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "large", blocks=14)
    run = read_run(directory)
    merged = merge_groups(run.layer_groups)
    assert [group.name for group in merged] == ["stage1", "stage2", "stage3"]
    for stage, group in enumerate(merged, 1):
        inside = [g for g in run.layer_groups if g.name.startswith(f"stage{stage}/")]
        assert (group.size, group.kept_count) == (sum(g.size for g in inside), sum(g.kept_count for g in inside))
    index = reporting.write_report(directory)
    assert index.stat().st_size < 2e6 and len(Page(index).all("svg")) == 2 * 4 + 2
    assert (index.parent / "timeline-all.png").stat().st_size > 30_000


@pytest.mark.slow
def test_very_deep_networks_share_a_heat_map(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "large", blocks=21))
    figures = ("architecture", "architecture_by_layer", "timeline", "timeline_by_layer", "gates")
    assert all(getattr(search_figures, name)(run, Layout(NARROW)) is not None for name in figures)
    assert len(run.layer_groups) > search_figures.MAX_PANELS


def test_groups_without_a_common_prefix_are_merged_with_their_neighbours() -> None:
    groups = tuple(UnitGroup(f"layer_{i}", "channels", i + 1, (), 0.1, np.ones(i + 1, bool), None) for i in range(50))
    merged = merge_groups(groups, 10)
    assert [g.name for g in merged][:2] == ["layer_0 … layer_4", "layer_5 … layer_9"] and len(merged) == 10
    assert sum(g.size for g in merged) == sum(g.size for g in groups)
    assert merge_groups(groups, 50) is groups


def test_every_pruned_unit_has_its_step(run_dir: Path, index: Path) -> None:
    """It is listed once, at the step from which on the history has its gate at zero."""
    run = read_run(run_dir)
    for group in run.layer_groups:
        steps = PruneSteps.of(group, run.history)
        assert steps is not None and group.kept is not None and group.gates is not None
        assert np.array_equal((steps.step >= 0) | steps.at_end, ~group.kept)
        for step, units in steps.units_by_step():
            at = int(np.flatnonzero(step == STEPS)[0])
            assert (group.gates[at:, units] == 0).all() and (group.gates[at - 1, units] > 0).all()
    first = run.layer_groups[0]
    step, units = PruneSteps.of(first, run.history).units_by_step()[0]
    assert f"{first.name} step {step} {number_ranges(units)}" in Page(index).text


def test_runs_of_numbers_are_abbreviated() -> None:
    assert number_ranges([0, 2, 3, 5, 6, 7, 9]) == "0, 2, 3, 5–7, 9" and number_ranges([]) == ""


def test_the_same_run_gives_the_same_report(small: Path) -> None:
    first = {path.name: path.read_bytes() for path in reporting.write_report(small).parent.iterdir()}
    assert first == {path.name: path.read_bytes() for path in reporting.write_report(small).parent.iterdir()}


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&$x^2${{ 7 * 7 }}{% raw %}"
    run = make_run(tmp_path / "run", blocks=1, name=evil)
    topology = json.loads((run / "search/topology.json").read_text())
    for group in topology["groups"]:
        group["name"] = group["name"].replace("stage1/block1", evil)
    _write(run / "search/topology.json", topology)
    for file in ("results.json", "environment.json"):
        change_json(run / file, **{"dataset": evil, "command": ["run.py", evil], evil: evil})
    page = Page(reporting.write_report(run))
    assert not page.all("script") and page.text.count(evil) >= 6


# --- runs that lack something -----------------------------------------------------------------------------------------


def remove(run: Path, *names: str) -> None:
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (["retrain", "uniform", "results.json"], "before its student was evaluated"),
        (["results.json"], "no results.json"),
        (["search/selection.json", "results.json"], "before its search finished"),
        (["environment.json"], "no environment.json"),
        (["search", "retrain", "uniform", "results.json"], "no search/topology.json"),
    ],
)
def test_the_page_says_what_is_missing(small: Path, missing: list[str], expected: str) -> None:
    assert expected not in page_text(small)
    remove(small, *missing)
    assert expected in page_text(small)


def test_without_a_baseline_the_page_says_so(small: Path) -> None:
    rows = json.loads((small / "results.json").read_text())["rows"]
    assert "No baseline" not in page_text(small)
    change_json(small / "results.json", rows=[row for row in rows if row["name"] != "uniform"])
    assert "No baseline" in page_text(small)


@pytest.mark.parametrize(
    ("missing", "drawn", "expected"),
    [
        (["search/selection.json", "results.json", "retrain"],
         {"architecture", "timeline", "gates", "training"}, "Preliminary"),
        (["search/history.npz"], {"architecture", "training"}, "no search/history.npz"),
        (["search/history.npz", "search/selection.json", "retrain"], {"training"}, "No units have been selected"),
        (["search", "retrain", "uniform"], set(), "No metrics"),
    ],
)  # fmt: skip
def test_figures_without_data_are_left_out(small: Path, missing: list[str], drawn: set, expected: str) -> None:
    for name in ("architecture", "timeline", "gates", "training", "confusion", "examples"):
        _write(small / "report" / f"{name}.png", "of an earlier report")
    remove(small, *missing)
    index = reporting.write_report(small)
    files = list(index.parent.glob("*.png"))
    assert {file.stem for file in files} == drawn and all(file.stat().st_size > 10_000 for file in files)
    assert len(Page(index).all("svg")) == 2 * len(drawn) and expected in Page(index).text


def test_values_that_were_not_measured_leave_a_dash(small: Path) -> None:
    results = json.loads((small / "results.json").read_text())
    for row in results["rows"]:
        row.pop("accuracy_top5")
        row["ms_per_image"] = row["ms_batch"] = None
    results["rows"][0]["agreement"] = None
    _write(small / "results.json", results)
    text = page_text(small)
    assert "Top-5" not in text and "Time per example" not in text
    assert "Agreement with teacher 100.00% – not measured 92.62%" in text


def test_a_last_line_that_a_kill_cut_short_is_ignored(small: Path) -> None:
    path = small / "retrain" / "metrics.jsonl"
    whole = page_text(small)
    path.write_text(path.read_text() + '{"step": 9999, "lo')
    assert page_text(small) == whole


@pytest.mark.parametrize("directory", [".", "nowhere"])
def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path, directory: str) -> None:
    with pytest.raises(ValueError, match="is not a run") as error:
        reporting.write_report(tmp_path / directory)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", b'{"rows": [1]}'),
        ("config.json", b"[]"),
        ("search/topology.json", b'{"groups": [{"name": "a"}]}'),
        ("search/topology.json", b'{"grou'),
        ("search/history.npz", b"PK no archive"),
        ("evidence.npz", b"PK no archive"),
        ("front.json", b'{"points": [{"name": "at-0.5", "accuracy": "high"}], "teacher": {}}'),
    ],
)
def test_a_damaged_file_is_named(small: Path, file: str, content: bytes) -> None:
    (small / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(Path(file).name)) as error:
        reporting.write_report(small)
    assert "\n" not in str(error.value) and not (small / "report").exists()


@pytest.mark.parametrize("row", [{"accuracy": "high"}, {"macs": {}}, {"ms_per_image": []}, {"bytes": "<b>"}])
def test_values_of_a_wrong_type_are_an_error_of_one_line(small: Path, row: dict) -> None:
    rows = json.loads((small / "results.json").read_text())["rows"]
    change_json(small / "results.json", rows=[rows[0] | row, *rows[1:]])
    with pytest.raises(ValueError, match=re.escape(str(small))) as error:
        reporting.write_report(small)
    assert "\n" not in str(error.value) and not (small / "report").exists()


@pytest.mark.parametrize("line", [b'{"step"', b"\xff\xfe{", b"[" * 100_000], ids=["cut", "not UTF-8", "deep"])
def test_a_damaged_line_of_metrics_is_skipped_with_a_warning(small: Path, line: bytes, caplog) -> None:
    path = small / "search/metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    rows = read_run(small).metrics["search"]
    assert len(rows) == 40 and f"{path}: line 1" in caplog.text


def test_a_selection_of_another_network_is_refused(small: Path) -> None:
    selection = json.loads((small / "search/selection.json").read_text())
    selection["kept"]["stage1/block1/conv1"] = [99]
    _write(small / "search/selection.json", selection)
    with pytest.raises(ValueError, match=r"topology\.json"):
        reporting.write_report(small)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_page(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small)]) == 0
    assert capsys.readouterr().out.strip() == str(small / "report" / "index.html")


def test_the_command_fails_in_one_line_and_pyplot_is_never_loaded(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdsearch_jax.report", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "config.json" in done.stderr
    check = "import sys, kdsearch_jax.reporting.rendering; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=120).returncode == 0


# --- accessibility, and in a browser ----------------------------------------------------------------------------------


def test_the_page_is_accessible_and_self_contained(index: Path) -> None:
    page = Page(index)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1 and len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all("labelled" in image["alt"] for image in page.all("img"))
    anchors = [link["href"].removeprefix("#") for link in page.all("a")]
    assert anchors and set(anchors) <= set(identifiers) and len(page.all("nav")) == 1
    assert len(page.all("caption")) == len(page.all("table")) and all("scope" in head for head in page.all("th"))
    loaded = [image["src"] for image in page.all("img")] + [image["xlink:href"] for image in page.all("image")]
    assert loaded and all(address.startswith("data:image/png;base64,") for address in loaded)
    assert not page.all("script", "link", "iframe", "object", "embed", "base", "form")
    assert "default-src 'none'" in page.all("meta")[1]["content"]


PROBE = """<!doctype html><meta charset="utf-8"><body>%s<pre id="measured"></pre><script>
const light = c => {
  const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const contrast = (frame, e) => {
  const style = x => frame.contentWindow.getComputedStyle(x);
  let behind = e;
  while (behind.parentElement && style(behind).backgroundColor == 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
  const paper = style(behind).backgroundColor == 'rgba(0, 0, 0, 0)' ? style(e.ownerDocument.body) : style(behind);
  const [a, b] = [light(style(e).color), light(paper.backgroundColor)];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
};
onload = () => {
  const look = frame => {
    const d = frame.contentDocument, root = d.documentElement, images = [...d.images];
    d.querySelectorAll('details').forEach(e => e.open = true);
    return {
      inner: frame.contentWindow.innerWidth, needs: root.scrollWidth, paper: getComputedStyle(d.body).backgroundColor,
      drawn: [...d.querySelectorAll('figure > svg')]
        .filter(s => s.getBoundingClientRect().width && !s.closest('details'))
        .map(s => ({ kind: s.getAttribute('class'), width: s.getBoundingClientRect().width,
          inks: [...new Set([...s.querySelectorAll('[style*="--text"]')].map(e => getComputedStyle(e).fill))] })),
      broken: images.filter(i => !i.naturalWidth).length, images: images.length,
      faint: [...d.querySelectorAll('body *')].filter(e => !e.closest('svg, .hidden') && e.checkVisibility() &&
        [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) && contrast(frame, e) < 4.5)
        .map(e => e.outerHTML.slice(0, 80)),
      unreachable: [...d.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0 &&
        ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).map(e => e.outerHTML.slice(0, 80)) };
  };
  measured.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(look));
};
</script>"""
WIDTHS = (360, 1280)


def browse(page: str, dark: bool) -> tuple[list[dict], list[str]]:
    """Shows a page in frames of WIDTHS: what each frame measures, and the browser's console."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    frames = "".join(f'<iframe style="width:{w}px;border:0" srcdoc="{html.escape(page)}"></iframe>' for w in WIDTHS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        probe = Path(scratch) / "probe.html"
        probe.write_text(PROBE % frames, "utf-8")
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
        flags += " --blink-settings=preferredColorScheme=0" if dark else ""
        command = [BROWSER, *flags.split(), f"--user-data-dir={scratch}/profile", probe.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    measured = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert measured, f"the browser showed nothing: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(measured[1])), console


INKS = {False: "rgb(28, 30, 33)", True: "rgb(232, 230, 227)"}


def test_a_browser_shows_it_light_and_dark_on_phone_and_desk(index: Path) -> None:
    for dark in (False, True):
        frames, console = browse(index.read_text("utf-8"), dark)
        assert console == []
        for frame, width, kind in zip(frames, WIDTHS, ("narrow", "wide"), strict=True):
            assert frame["inner"] == width and frame["needs"] <= width, "the page scrolls sideways"
            assert frame["unreachable"] == [], "cannot be scrolled by keyboard"
            assert frame["faint"] == [], "contrast below 4.5"
            assert frame["broken"] == 0 and frame["images"] >= 12
            assert [drawing["kind"] for drawing in frame["drawn"]] == [kind] * 5
            assert all(0.6 * min(width, 992) < drawing["width"] <= width for drawing in frame["drawn"])
            assert all(drawing["inks"] == [INKS[dark]] for drawing in frame["drawn"]), "ink follows the colour scheme"
        assert (frames[0]["paper"] == "rgb(255, 255, 255)") != dark


def test_the_browser_test_detects_what_it_looks_for(index: Path) -> None:
    broken = index.read_text("utf-8").replace(
        "<main>",
        '<main><div style="width:3000px;color:#bbb">wide</div><img src="https://example.invalid/a.png" alt="">',
        1,
    )
    frames, console = browse(broken, False)
    assert all(frame["needs"] >= 3000 for frame in frames)
    assert all(frame["broken"] == 1 and len(frame["faint"]) == 1 for frame in frames)
    assert any("Content Security Policy" in line for line in console)
