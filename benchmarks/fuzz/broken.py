"""Bad input of every kind, made of the files of `seeds`: what a stranger, a broken disk or a slip of the hand can bring.

A case is a command line in a directory of its own. Cases that are broken on purpose must be refused; mutants by chance
may be harmless, and must then give what the valid file gives.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz import seeds

Write = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """argv: of `command`; write: makes the case's files; valid: the reference whose output a harmless mutant has."""

    kind: str
    name: str
    command: str
    argv: tuple[str, ...]
    write: Write
    valid: str | None = None


TRAIN = ("--config", "config.json", "--workdir", "run")
EVALUATE = ("net", "--data", "digits")
# What stands where something else is expected, in JSON.
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**9, 10**30, float("nan"), 1e308, "", "16", "\ud800", "\x1b[2J\n", [], [1, "a"], {}, {"a": {}},
)  # fmt: skip


def nested(depth: int) -> Any:
    """A list in a list in a list …"""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """The content with bytes changed, cut off, repeated or put in."""
    content, kind = bytearray(content), random.integers(5)
    at = int(random.integers(len(content))) if content else 0
    if kind == 0:
        for place in random.integers(len(content), size=1 + random.integers(8)):
            content[place] = random.integers(256)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at:at] = random.bytes(1 + random.integers(16))
    elif kind == 3:
        content[at : at + 4] = b"\xff\xff\xff\x7f"
    else:
        content[at:at] = content[at : at + 1 + random.integers(64)]
    return bytes(content)


def replaced(value: Any, random: np.random.Generator) -> Any:
    """A JSON value with one part of it, at any depth, replaced by something else, removed or added."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                todo.append(node[key])
    node, key = places[random.integers(len(places))]
    kind = random.integers(4)
    if kind == 0 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif kind == 1:
        node[key] = nested(int(random.choice([3, 63, 500])))
    else:
        node[key] = WRONG[random.integers(len(WRONG))]
    return value


# --- settings, configurations, paths --------------------------------------------------------------------------------


def settings(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """Overrides on the line that mean nothing."""
    from kdsearch_jax.config import Experiment, flatten

    for name, value in flatten(Experiment()).items():
        if name in ("name", "data.name", "data.data_dir", "model.arguments.depth", "data.stream"):
            continue
        numbers = ("nan", "inf", "-1e999", "zero", "1" + 400 * "0", "-7", "0x10", "", "１", "\x1b]0;x")
        text = ("nothing-like-it", "", "\x00", "a" * 10_000, "\x1b[2J", "../..", "import os")
        bad = text if isinstance(value, (str, tuple)) else ("maybe",) if isinstance(value, bool) else numbers
        chosen = bad[random.integers(len(bad))]
        yield Case("settings", f"{name}={chosen[:12]!r}", "teacher", (*TRAIN, f"--{name}={chosen}"), config(root))
    for key in ("num_classes", "width"):
        for given in ("0", "-1", "1e400", "1000000000", "null", "[]", "{", "NaN", "[" * 2000, '"16"'):
            line = (*TRAIN, "--model.arguments", f"{key}={given}")
            yield Case("settings", f"model.arguments {key}={given[:12]}", "teacher", line, config(root))
    for model, argument in (("vit", "depth=100000000"), ("swin", "window=10000"), ("unet", "depth=2000"), ("mlp", "hidden=[1000000,1000000]"),
                            ("mobilenet_v2", "width=1e30"), ("vgg", "hidden=1000000"), ("nosuch", "a=1"), ("os:system", "command=1"), ("a..b:c", "d=1")):  # fmt: skip
        line = (*TRAIN, "--model.name", model, "--model.arguments", argument)
        yield Case("settings", f"{model} {argument}", "teacher", line, config(root))
    for line in (("--",), ("--budget",), ("--budgets",), ("--budgets", "x"), ("--teacher-from",), ("--trust-cod",), ("loose",), ("--resume=maybe",),
                 ("--num-processes", "0"), ("--process-id", "x"), ("--join-timeout", "-1"), ("--config", ""), ("--stop-after", "never")):  # fmt: skip
        yield Case("settings", " ".join(line), "search", (*TRAIN, *line), config(root))


def config(root: Path, content: bytes | None = None) -> Write:
    """The run's config.json, or this in its place."""
    valid = (root / "config.json").read_bytes()
    return lambda box: (box / "config.json").write_bytes(valid if content is None else content) and None


def configurations(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """config.json, broken."""
    valid = (root / "config.json").read_bytes()
    record = json.loads(valid)
    text = {
        "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"1e999", "cut": valid[:100], "binary": bytes(range(256)),
        "utf-16": valid.decode().encode("utf-16"), "bom": b"\xef\xbb\xbf" + valid, "deep": b"[" * 100_000, "deep object": b'{"a":' * 50_000,
        "surrogate": b'{"name": "\\ud800"}', "huge number": b'{"name": ' + b"9" * 5000 + b"}", "nan": b'{"name": NaN}',
        "65 deep": b'{"model": {"name": "mlp", "arguments": {"a": ' + b"[" * 65 + b"]" * 65 + b"}}}", "no such key": b'{"naem": "x"}',
        "large": b"[" + b"{}," * (1 << 25) + b"{}]", "slash": b'{"name": "../../x"}', "control": b'{"name": "a\\u001b[2J\\nb"}',
    }  # fmt: skip
    for name, content in text.items():
        yield Case("configurations", name, "teacher", TRAIN, config(root, content))
    for i in range(50):
        content = json.dumps(replaced(record, random)).encode() if i % 2 else mutated(valid, random)
        yield Case("configurations", f"mutant {i}", "teacher", TRAIN, config(root, content), "teacher")


def odd_paths(box: Path) -> None:
    """Everything that a path can lead to but what is looked for."""
    (box / "folder").mkdir()
    (box / "file").write_text("x")
    (box / "dangling").symlink_to("nowhere")
    (box / "loop").symlink_to("loop")
    (box / "endless").symlink_to("/dev/zero")
    os.mkfifo(box / "pipe")


def paths(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """Paths that lead nowhere, or to something else."""
    odd = ("missing", "folder", "file", "file/below", "dangling", "loop", "endless", "pipe", "x" * 300, "a\x1b[2Jb", "~nobody/x", "/", "gs:/x", "\udcff")
    for path in odd:
        for command, line in (("evaluate", (path, "--data", "digits")), ("export", (path, "--out", "out")), ("report", (path,))):
            yield Case("paths", f"{command} {path[:12]!r}", command, line, odd_paths)
        for flag in ("--config", "--teacher-from", "--search-from", "--from"):
            if (flag, path) in (("--config", "missing"),):
                continue
            more = ("--budgets", "0.4") if flag == "--from" else () if flag == "--config" else ("--workdir", "run")
            base = () if flag == "--config" else ("--config", "digits")
            yield Case("paths", f"{flag} {path[:12]!r}", "search", (*base, flag, path, *more), odd_paths)
        if path in ("file", "file/below", "dangling", "loop", "endless", "pipe", "x" * 300):
            yield Case("paths", f"--workdir {path[:12]!r}", "teacher", (*TRAIN[:2], "--workdir", path), both(odd_paths, config(root)))
        for suffix in (".npz", ".safetensors", ".msgpack", ".pth"):
            def link(box: Path, suffix: str = suffix, path: str = path) -> None:
                odd_paths(box)
                (box / f"x{suffix}").symlink_to(path)

            if path in ("folder", "dangling", "loop", "endless", "pipe"):
                line = ("--data.name", "npz:x.npz") if suffix == ".npz" else ("--teacher-from", f"x{suffix}")
                yield Case("paths", f"x{suffix} → {path}", "search", (*TRAIN, *line), both(link, config(root)))


def both(*writes: Write) -> Write:
    """All of them."""

    def write(box: Path) -> None:
        for each in writes:
            each(box)

    return write


# --- networks -------------------------------------------------------------------------------------------------------


def network(root: Path, change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None, then: Write | None = None) -> Write:
    """A copy of the network, its two records changed by `change` and sealed anew, as an attacker would."""
    from kdsearch_jax.files import seal

    def write(box: Path) -> None:
        shutil.copytree(root / "net", box / "net")
        if change is not None:
            architecture = json.loads((box / "net/architecture.json").read_text())
            payload = json.loads((box / "net/network.json").read_text())["payload"]
            change(architecture, payload)
            payload["architecture"] = seal(architecture)
            (box / "net/architecture.json").write_text(json.dumps(architecture))
            (box / "net/network.json").write_text(json.dumps({"payload": payload, "sha256": seal(payload)}))
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
    size = 2**23
    leaf = "params/dense/kernel"
    first = "params/stage1/conv/conv/kernel"
    changes: dict[str, Any] = {
        **{f"width {value!r:.12}": setting("a", "arguments", "width", to=value) for value in WRONG if value != 4},
        **{f"{key} {value!r:.12}": setting("a", key, to=value) for key in ("arguments", "layers", "dropped", "input_shape", "call")
           for value in (None, -1, "x", nested(60), [1, 2, "a"], {"a": 1}, 10**30)},
        **{f"model {name!r}": setting("a", "model", to=name) for name in
           ("nosuch", "os:system", "antigravity:fly", "this:s", "subprocess:Popen", "builtins:eval", "a..b:c", ":", "given:x", "kdsearch_jax.cli:run",
            "flax.linen:Dense", "__main__:main", "mlp", "\x1b[2J", "x" * 10_000, "benchmarks.fuzz.hostile:Net")},
        "swin": lambda a, p: a.update(model="swin", arguments={"num_classes": 10, "window": 10**5, "patch": 1}, layers={}, input_shape=[4096, 4096, 1]),
        "deep": lambda a, p: a.update(model="vit", arguments={"num_classes": 10, "depth": 10**9, "patch": 1}, layers={}),
        "deep list": lambda a, p: a.update(model="mlp", arguments={"num_classes": 10, "hidden": [1] * 100_000}, layers={}),
        **{f"layer {name}={value!r:.12}": setting("a", "layers", to={where: {name: value}}) for where, name, value in
           (("stage1/conv", "features", size), ("stage1/conv", "features", 0), ("stage1/conv", "parent", 3), ("stage1/conv", "__class__", 3),
            ("nowhere", "features", 3), ("stage1/conv", "kernel_size", [4000, 4000]), ("block", "features", size), ("", "width", size),
            ("stage1/conv/conv", "feature_group_count", 3), ("dense", "features", 3))},
        "dropped nothing": setting("a", "dropped", to=["nowhere"]),
        "dropped all": setting("a", "dropped", to=["stage1", "stage2", "block", "stage3"]),
        "image of 2**60": setting("a", "input_shape", to=[2**20, 2**20, 2**20]),
        "call of 2**60": setting("a", "call", to={"arguments": ["x"], "inputs": {"x": "float32[1073741824,1073741824]"}, "train": {}, "eval": {}}),
        "call of objects": setting("a", "call", to={"arguments": ["x"], "inputs": {"x": "object[8]"}, "train": {}, "eval": {}}),
        **{f"leaf {key} {value!r:.20}": setting("p", "leaves", leaf, key, to=value) for key, value in
           (("shape", [10**12]), ("shape", [-1]), ("shape", [2**62, 2**62, 0]), ("shape", "x"), ("shape", [True, 10]), ("dtype", "object"), ("dtype", "U9"),
            ("dtype", "complex128"), ("dtype", 3), ("sha256", None), ("sha256", "0" * 64), ("more", 1))},
        "leaf outside": lambda a, p: p["leaves"].__setitem__("../../outside", p["leaves"].pop(leaf)),
        "leaf too many": lambda a, p: p["leaves"].__setitem__("params/more/kernel", dict(p["leaves"][leaf])),
        "leaf empty": lambda a, p: p["leaves"].__setitem__("params/more/kernel", {**p["leaves"][leaf], "shape": [0, 2**40]}),
        "leaf missing": lambda a, p: p["leaves"].pop(first) and None,
        "leaves of leaves": lambda a, p: p["leaves"].__setitem__(f"{leaf}/x", p["leaves"].pop(first)),
        **{f"{key} {value!r:.12}": setting("p", key, to=value) for key, value in
           (("version", 2), ("version", True), ("version", nested(60)), ("format", "x"), ("info", None), ("info", []), ("leaves", []), ("leaves", {}))},
    }  # fmt: skip
    for name, change in changes.items():
        yield Case("networks", name, "evaluate", EVALUATE, network(root, change))
    for name in ("architecture.json", "network.json", "variables"):
        for what in ("missing", "folder", "empty", "dangling", "endless", "pipe", "binary", "deep"):
            yield Case("networks", f"{name} {what}", "evaluate", EVALUATE, network(root, then=lambda net, n=name, w=what: odd(net / n, w)))
    yield Case("networks", "a pipe among the arrays", "evaluate", EVALUATE, network(root, then=lambda net: os.mkfifo(net / "variables/pipe")))
    for info in ({"mean": "x"}, {"mean": [1] * 99}, {"std": [0.0]}, {"mean": None}, {"std": nested(60)}, {"mean": [1e999]}):
        def change(_: Any, payload: Any, info: Any = info) -> None:
            payload["info"].update(info)

        yield Case("networks", f"info {info!r:.30}", "evaluate", EVALUATE, network(root, change))
    files = sorted(path.relative_to(root / "net") for path in (root / "net").rglob("*") if path.is_file())
    for i in range(40):
        path, seed = files[random.integers(len(files))], int(random.integers(2**31))

        def damage(net: Path, path: Path = path, seed: int = seed) -> None:
            (net / path).write_bytes(mutated((net / path).read_bytes(), np.random.default_rng(seed)))

        yield Case("networks", f"mutant {i} {path.name}", "evaluate", EVALUATE, network(root, then=damage), "evaluate")


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
