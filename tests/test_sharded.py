"""Sharded training states (`run.shard`): the same losses as replicated, restored onto another number of devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdsearch_jax.adapters.devices import shardings_of
from kdsearch_jax.runs.config import Experiment, changed


def test_leaves_are_divided_along_their_largest_axis_that_fits():
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {"wide": (3, 3, 64, 256), "odd": (1023, 1025), "last": (129, 1024), "small": (64,), "step": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    specs = {name: s.spec for name, s in shardings_of(tree, mesh, "fsdp").items()}
    assert specs == {
        "wide": PartitionSpec(None, None, None, "data"),
        "odd": PartitionSpec(),
        "last": PartitionSpec(None, "data"),
        "small": PartitionSpec(),
        "step": PartitionSpec(),
    }
    assert all(s.spec == PartitionSpec() for s in shardings_of(tree, mesh, None).values())


def test_the_setting_is_checked():
    with pytest.raises(ValueError, match=r"run\.shard: 'zero'"):
        changed(Experiment(), {"run.shard": "zero"})


def train(directory: Path, shard: str | None, steps: int) -> dict:
    """Trains a gated network for some updates, resumed from `directory`; metrics, parameters, and where they lie."""
    from kdsearch_jax.adapters.registry import build
    from kdsearch_jax.data import datasets
    from kdsearch_jax.data.settings import DataConfig
    from kdsearch_jax.distill import search_step
    from kdsearch_jax.distill.objective import classification
    from kdsearch_jax.distill.settings import DistillConfig
    from kdsearch_jax.distill.shrinking import Subnetwork
    from kdsearch_jax.pruning import budgets
    from kdsearch_jax.pruning.network import trace
    from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
    from kdsearch_jax.training import loop
    from kdsearch_jax.training.optimizer import make_optimizer
    from kdsearch_jax.training.settings import RunConfig, StageConfig

    module = build("mlp", {"hidden": [256, 128], "num_classes": 10})
    data = DataConfig("digits", train_limit=160)
    dataset = datasets.load(data)
    image = np.zeros((2, 8, 8, 1), np.float32)
    variables, teacher = (module.init(jax.random.key(seed), image) for seed in (0, 1))  # differ: gradients are not 0
    stage = StageConfig(steps=8, batch_size=16, optimizer="adamw", learning_rate=1e-3)
    run = RunConfig(steps_per_dispatch=2, checkpoint_every=4, checkpoint_share=None, evaluate_every=100, shard=shard)
    network = trace(module, image, train=False)
    limits = budgets.resolve(BudgetConfig(macs=0.6), network.topology)
    search = search_step.gated_search(network, [limits], stage, GatesConfig(), run)
    tx = search.optimizer(make_optimizer(stage))
    step = search_step.search_step(
        Subnetwork.of(search), module, tx, stage, classification(DistillConfig()), GatesConfig(), run
    )
    layout = {}

    def look(state):
        kernel = state.params["params"]["dense1"]["kernel"]
        layout["share"] = kernel.addressable_shards[0].data.size / kernel.size
        return state, {}

    state = loop.fit(
        search_step.begin(search, variables, tx), step, dataset, data, stage, run, directory=directory, name="search",
        meta={"config": {}}, constants=teacher, between=look, resume=True,
        until=lambda state: int(state.step) >= steps,
    )  # fmt: skip
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf).astype(float).ravel().tolist()
              for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}  # fmt: skip
    return {"losses": [row["loss"] for row in rows], "share": layout.get("share"), "params": leaves}


def start(calls: list[tuple[Path, str | None, int]], devices: int) -> list[dict]:
    """What `train` returns for each of its arguments, in a process with so many devices."""
    listed = ", ".join(f"(Path({str(directory)!r}), {shard!r}, {steps})" for directory, shard, steps in calls)
    code = (
        "import json, test_sharded; from pathlib import Path\n"
        f"print(json.dumps([test_sharded.train(*call) for call in [{listed}]]))"
    )
    paths = os.pathsep.join((str(Path(__file__).parent), os.environ["PYTHONPATH"]))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": paths}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles much and computes little
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_sharded_training_is_replicated_training(tmp_path):
    """Of a search with AdamW on 8 devices, and continued on 4 from a checkpoint of 8."""
    whole, sharded = start([(tmp_path / "whole", None, 8), (tmp_path / "sharded", "fsdp", 8)], 8)
    assert (whole["share"], sharded["share"]) == (1.0, 1 / 8)
    shutil.copytree(tmp_path / "sharded" / "checkpoints" / "4", tmp_path / "moved" / "checkpoints" / "4")
    (moved,) = start([(tmp_path / "moved", "fsdp", 8)], 4)
    assert moved["share"] == 1 / 4
    for other in (sharded, moved):
        assert other["losses"] == pytest.approx(whole["losses"][-len(other["losses"]) :], rel=1e-5)
        for name, values in whole["params"].items():
            difference = np.subtract(other["params"][name], values)
            assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(values), name
