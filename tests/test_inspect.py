"""What `inspect` says of a network: the same as tracing and cutting it says, in the words of the command line."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from proof import image, variables_of

import kdsearch_jax as kd
from kdsearch_jax.adapters.registry import build
from kdsearch_jax.inspect import main as inspect_main
from kdsearch_jax.pruning import budgets
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.runs import inspection
from kdsearch_jax.runs.config import Experiment

SMALL = ("--model", "cifar_resnet", "--model.arguments", "depth=8", "width=8", "--input-shape", "16", "16", "3")


class Masked(nn.Module):
    """Tokens and a mask that is given by keyword."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        x = nn.Embed(11, 6, name="embed")(tokens) * mask[..., None]
        x = nn.relu(nn.Dense(12, name="dense1")(x))
        return nn.Dense(self.num_classes, name="dense2")(nn.Dropout(0.5)(x, deterministic=deterministic).mean(1))


def records(capsys, *argv):
    assert inspect_main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_what_tracing_finds(capsys):
    record = records(capsys, *SMALL)
    module = build("cifar_resnet", {"depth": 8, "width": 8, "num_classes": 1000})
    topology = trace(module, np.zeros((2, 16, 16, 3), np.float32), train=False).topology
    assert (record["macs"], record["params"]) == topology.total()
    assert [(g["name"], g["kind"], g["size"]) for g in record["groups"]] == [
        (g.name, g.kind, g.size) for g in topology.groups
    ]
    assert {f["reason"] for f in record["frozen"]} == {f.reason for f in topology.frozen}
    one = {g.name: np.arange(g.size) < (g.kind != "branches") for g in topology.groups}
    assert (record["smallest"]["macs"]["count"], record["smallest"]["params"]["count"]) == topology.cost(one)
    assert record["inputs"] == {"input0": "float32[16,16,3]"}
    assert 0 < record["seconds"] < 60


def test_a_student_is_looked_at_by_its_directory(capsys, tmp_path):
    """It is called as its directory says, and what is left of it can be pruned."""
    module, x = build("small_cnn", {"num_classes": 5, "width": 8}), image(8, 8, 1)
    student = kd.prune(trace(module, x), variables_of(module, x), kd.magnitude(), kd.Budget(macs=0.6), x)
    kd.save(student, tmp_path / "student")
    record = records(capsys, "--teacher", str(tmp_path / "student"))
    assert (record["macs"], record["params"]) == (student.macs, student.params)
    assert record["inputs"] == {"images": "float32[8,8,1]"} and record["model"].endswith("SmallCNN")
    topology = trace(student.module, x).topology
    assert [(g["name"], g["size"]) for g in record["groups"]] == [(g.name, g.size) for g in topology.groups]


def test_text_names_every_group_and_every_reason(capsys):
    assert inspect_main([*SMALL]) == 0
    text = capsys.readouterr().out
    module = build("cifar_resnet", {"depth": 8, "width": 8, "num_classes": 1000})
    network = trace(module, np.zeros((2, 16, 16, 3), np.float32), train=False)
    for group in network.topology.groups:
        found = [
            line[0]
            for line in inspection.group_lines(network)
            if re.fullmatch(line[0].replace("#", r"\d+"), group.name)
        ]
        assert len(found) == 1 and found[0] in text
    lines = inspection.group_lines(network)
    assert sum(int(line[2]) for line in lines) == len(network.topology.groups)
    assert sum(int(line[3].replace(",", "")) for line in lines) == network.topology.units
    frozen = inspection.frozen_lines(network)
    assert sum(int(line[1]) for line in frozen) == len(network.topology.frozen)
    assert re.search(r"\(models/\w+\.py:\d+\)", text) and "linen.py" not in text  # the model's line, not ours
    assert all(line[0] in text for line in frozen) and len(frozen) < len(network.topology.frozen)


@pytest.mark.parametrize(("macs", "reachable"), [("0.5", True), ("0.001", False)])
def test_says_whether_the_budget_can_be_met(capsys, macs, reachable):
    record = records(capsys, *SMALL, "--budget.macs", macs)
    assert record["budget"]["macs"] == float(macs) and record["budget"]["reachable"] is reachable
    assert reachable or "out of reach" in record["budget"]["reason"]


def test_measures_on_request_and_says_what_that_means_for_a_budget(capsys):
    small = ("--model", "mlp", "--model.arguments", "hidden=[16]", "--input-shape", "4", "4", "1")
    asked = ("--budget.memory", "0.9", "--budget.batch-size", "8")
    record = records(capsys, *small, *asked)
    assert record["budget"]["reachable"] is None and "--measure" in record["budget"]["reason"]
    try:
        record = records(capsys, *small, *asked, "--measure")
    except budgets.BudgetError as error:
        assert "too noisy" in str(error)
        return
    assert record["budget"]["reachable"] and record["batch_size"] == 8 and record["latency"] > 0
    assert 0 < record["smallest"]["memory"]["count"] < record["memory"]
    assert "a call with 8 examples" in inspection.summary(record)


def test_the_smallest_student_has_whole_multiples(capsys):
    one, eight = (records(capsys, *SMALL, "--budget.round-to", n)["smallest"]["macs"]["count"] for n in ("1", "8"))
    assert one < eight
    padded = records(capsys, *SMALL, "--budget.round-to", "hardware")["padded"]
    assert padded == {"platform": "cpu", "share": 1.0}


def test_only_some_kinds(capsys):
    record = records(capsys, *SMALL, "--gates.kinds", "branches")
    assert {group["kind"] for group in record["groups"]} == {"branches"}
    assert any(item["reason"] == "excluded: kind channels" for item in record["frozen"])


def test_the_data_set_of_an_experiment_says_the_shape(capsys):
    record = records(capsys, "--config", "cifar10_resnet20")
    assert record["inputs"] == {"input0": "float32[32,32,3]"} and record["arguments"]["num_classes"] == 10
    assert 40e6 < record["macs"] < 42e6  # as published


def test_several_inputs_and_keywords(capsys):
    record = records(capsys, "--model", "test_inspect:Masked", "--inputs", "int32[9]", "mask=float32[9]")
    assert {group["name"]: group["size"] for group in record["groups"]} == {"embed": 6, "dense1": 12}


class Unnumbered(nnx.Module):
    """Blocks of an nnx.Module that takes no number of classes, with a size written into the code."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1x1 = nnx.Linear(6, 16, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(3)])
        self.out = nnx.Linear(16, 7, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1x1(x)
        for block in self.blocks:
            x = block(nnx.relu(x)).reshape(-1, 2, 8).mean(1, keepdims=True).repeat(2, 1).reshape(-1, 16)
        return self.out(x)


def test_an_nnx_class_that_takes_no_number_of_classes(capsys):
    record = records(capsys, "--model", "test_inspect:Unnumbered", "--input-shape", "6")
    assert record["arguments"] == {} and record["params"] == 7 * 16 + 3 * 17 * 16 + 17 * 7


def test_lines_of_code_shapes_and_layers_that_are_single_keep_their_numbers(capsys):
    assert inspect_main(["--model", "test_inspect:Unnumbered", "--input-shape", "6"]) == 0
    text = capsys.readouterr().out
    code = Path(__file__).read_text().splitlines()
    line = next(i for i, row in enumerate(code, 1) if ".reshape(-1, 2, 8)" in row)
    assert f"(tests/test_inspect.py:{line})" in text or f"tests/test_inspect.py:{line} (" in text
    assert "conv1x1" in text and "blocks/#" in text and "py:#" not in text and "(#" not in text
    network = trace(Unnumbered(rngs=nnx.Rngs(0)), np.zeros((2, 6), np.float32))
    for reason, _, _ in inspection.frozen_lines(network):
        own = {re.sub(r"^(as in [^:]*(:branch)?: )+", "", item.reason) for item in network.topology.frozen}
        assert any(re.fullmatch(re.escape(reason).replace(r"\#", r"\d+"), each) for each in own)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in add of b1/conv2 (m1/b1.py:12)", "in add of b#/conv# (m1/b1.py:12)"),
        ("in add of Net2/b1/conv2 (m/net.py:3)", "in add of Net2/b#/conv# (m/net.py:3)"),
        ("reshape (2, 31) to (4, 8), at b1/conv2.py:5", "reshape (2, 31) to (4, 8), at b1/conv2.py:5"),
        ("as large as b1:branch", "as large as b#:branch"),
    ],
)
def test_only_numbers_in_names_of_layers_are_left_out(text, expected):
    assert inspection.alike(text, frozenset({"b1", "b1/conv2", "b1:branch"})) == expected
    assert inspection.common(["b1/conv3x3", "b2/conv3x3"]) == "b#/conv3x3"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inputs", "int32 9"], "--inputs: 'int32 9'"),
        (["--inputs", "int32[9]", "maks=float32[9]"], "takes no 'maks'"),
        (["--inputs", "int32[9]", "float32[9]", "bool[1]", "bool[1]"], "are 4 arguments, but"),
        (["--inputs", "int32[9]", "mask=float32[4]"], r"called with int32\[9\], float32\[4\] \(--input-shape"),
        (["--input-dtype", "float31"], "float31"),
    ],
)
def test_a_mistake_is_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as refusal:
        inspect_main(["--model", "test_inspect:Masked", *argv])
    assert "\n" not in str(refusal.value)


def test_unreachable_is_what_the_search_would_say():
    network = trace(build("mlp", {"hidden": [8], "num_classes": 3}), np.zeros((2, 4, 4, 1), np.float32), train=False)
    experiment = Experiment()
    assert inspection.report(network, experiment)["budget"]["reachable"]
    budgets.resolve(experiment.budget, network.topology)


def test_as_a_command(python, tmp_path):
    command = [python, "-m", "kdsearch_jax.inspect", "--model", "mlp", "--input-shape", "4", "4", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("mlp(num_classes=1000) of float32[4,4,1]: ")
    assert list(tmp_path.iterdir()) == []
    refused = subprocess.run([*command, "--model.arguments", "hiden=3"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "hiden" in refused.stderr
