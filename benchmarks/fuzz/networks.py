"""Bad directories of networks: damaged ones, and such whose digests are right and whose contents are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.cases import EVALUATE, WRONG, Case, Write, mutated, nested


def network(
    root: Path, change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None, then: Write | None = None
) -> Write:
    """A copy of the network, its two records changed by `change` and sealed anew, as an attacker would."""
    from kdsearch_jax.storage.files import json_digest

    def write(box: Path) -> None:
        shutil.copytree(root / "net", box / "net")
        if change is not None:
            architecture = json.loads((box / "net/architecture.json").read_text())
            payload = json.loads((box / "net/network.json").read_text())["payload"]
            change(architecture, payload)
            payload["architecture"] = json_digest(architecture)
            (box / "net/architecture.json").write_text(json.dumps(architecture))
            (box / "net/network.json").write_text(json.dumps({"payload": payload, "sha256": json_digest(payload)}))
        if then is not None:
            then(box / "net")

    return write


def setting(*keys: Any, to: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A change that sets one entry; keys begin with "a", the architecture, or "p", the payload of network.json."""

    def change(architecture: dict[str, Any], payload: dict[str, Any]) -> None:
        node: Any = architecture if keys[0] == "a" else payload
        for key in keys[1:-1]:
            node = node[key]
        node[keys[-1]] = to

    return change


def networks(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """Networks' directories whose digests are right and whose contents are not, and damaged ones."""
    for name, change in {**_architectures(), **_records()}.items():
        yield Case("networks", name, "evaluate", EVALUATE, network(root, change))
    for name in ("architecture.json", "network.json", "variables"):
        for what in ("missing", "folder", "dangling", "endless", "pipe", "deep"):
            yield Case(
                "networks",
                f"{name} {what}",
                "evaluate",
                EVALUATE,
                network(root, then=lambda net, n=name, w=what: odd(net / n, w)),
            )
    yield Case(
        "networks",
        "a pipe among the arrays",
        "evaluate",
        EVALUATE,
        network(root, then=lambda net: os.mkfifo(net / "variables/pipe")),
    )
    for info in (
        {"mean": "x"},
        {"mean": [1] * 99},
        {"std": [0.0]},
        {"mean": None},
        {"std": nested(60)},
        {"mean": [1e999]},
    ):

        def change(_: Any, payload: Any, info: Any = info) -> None:
            payload["info"].update(info)

        yield Case("networks", f"info {info!r:.30}", "evaluate", EVALUATE, network(root, change))
    files = sorted(path.relative_to(root / "net") for path in (root / "net").rglob("*") if path.is_file())
    for i in range(24):
        path, seed = files[random.integers(len(files))], int(random.integers(2**31))

        def damage(net: Path, path: Path = path, seed: int = seed) -> None:
            (net / path).write_bytes(mutated((net / path).read_bytes(), np.random.default_rng(seed)))

        yield Case("networks", f"mutant {i} {path.name}", "evaluate", EVALUATE, network(root, then=damage), "evaluate")


def _architectures() -> dict[str, Any]:
    """Changes of architecture.json, by name."""
    size = 2**23
    return {
        **{f"width {value!r:.12}": setting("a", "arguments", "width", to=value) for value in WRONG[::2]},
        **{
            f"{key} {value!r:.12}": setting("a", key, to=value)
            for key in ("arguments", "layers", "dropped", "input_shape", "call")
            for value in (None, nested(60), [1, 2, "a"], {"a": 1})
        },
        **{
            f"model {name!r}": setting("a", "model", to=name)
            for name in (
                "nosuch",
                "os:system",
                "antigravity:fly",
                "this:s",
                "subprocess:Popen",
                "builtins:eval",
                "a..b:c",
                ":",
                "given:x",
                "kdsearch_jax.runs.command_line:run",
                "flax.linen:Dense",
                "__main__:main",
                "mlp",
                "\x1b[2J",
                "x" * 10_000,
                "benchmarks.fuzz.hostile:Net",
            )
        },
        "swin": lambda a, p: a.update(
            model="swin",
            arguments={"num_classes": 10, "window": 10**5, "patch": 1},
            layers={},
            input_shape=[4096, 4096, 1],
        ),
        "deep": lambda a, p: a.update(
            model="vit", arguments={"num_classes": 10, "depth": 10**9, "patch": 1}, layers={}
        ),
        "deep list": lambda a, p: a.update(
            model="mlp", arguments={"num_classes": 10, "hidden": [1] * 100_000}, layers={}
        ),
        **{
            f"layer {name}={value!r:.12}": setting("a", "layers", to={where: {name: value}})
            for where, name, value in (
                ("stage1/conv", "features", size),
                ("stage1/conv", "features", 0),
                ("stage1/conv", "parent", 3),
                ("stage1/conv", "__class__", 3),
                ("nowhere", "features", 3),
                ("stage1/conv", "kernel_size", [4000, 4000]),
                ("block", "features", size),
                ("", "width", size),
                ("stage1/conv/conv", "feature_group_count", 3),
                ("dense", "features", 3),
            )
        },
        "dropped nothing": setting("a", "dropped", to=["nowhere"]),
        "image of 2**60": setting("a", "input_shape", to=[2**20, 2**20, 2**20]),
        "call of 2**60": setting(
            "a",
            "call",
            to={"arguments": ["x"], "inputs": {"x": "float32[1073741824,1073741824]"}, "train": {}, "eval": {}},
        ),
        "call of objects": setting(
            "a", "call", to={"arguments": ["x"], "inputs": {"x": "object[8]"}, "train": {}, "eval": {}}
        ),
    }


def _records() -> dict[str, Any]:
    """Changes of network.json, by name."""
    leaf, first = "params/dense/kernel", "params/stage1/conv/kernel"
    return {
        **{
            f"leaf {key} {value!r:.20}": setting("p", "leaves", leaf, key, to=value)
            for key, value in (
                ("shape", [10**12]),
                ("shape", [-1]),
                ("shape", [2**62, 2**62, 0]),
                ("shape", "x"),
                ("shape", [True, 10]),
                ("dtype", "object"),
                ("dtype", "U9"),
                ("dtype", "complex128"),
                ("dtype", 3),
                ("sha256", None),
                ("sha256", "0" * 64),
                ("more", 1),
            )
        },
        "leaf outside": lambda a, p: p["leaves"].__setitem__("../../outside", p["leaves"].pop(leaf)),
        "leaf too many": lambda a, p: p["leaves"].__setitem__("params/more/kernel", dict(p["leaves"][leaf])),
        "leaf empty": lambda a, p: p["leaves"].__setitem__(
            "params/more/kernel", {**p["leaves"][leaf], "shape": [0, 2**40]}
        ),
        "leaf missing": lambda a, p: p["leaves"].pop(first) and None,
        "leaves of leaves": lambda a, p: p["leaves"].__setitem__(f"{leaf}/x", p["leaves"].pop(first)),
        **{
            f"{key} {value!r:.12}": setting("p", key, to=value)
            for key, value in (
                ("version", 2),
                ("version", nested(60)),
                ("format", "x"),
                ("info", None),
                ("info", []),
                ("leaves", []),
                ("leaves", {}),
            )
        },
    }


def odd(path: Path, what: str) -> None:
    """Something else in the place of a file or a directory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "endless":
        path.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "missing":
        path.write_bytes({"empty": b"", "binary": bytes(range(256)), "deep": b"[" * 100_000}[what])
