"""Bad settings, configurations and paths: slips of the hand on the line, and broken or hostile files of settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.fuzz.cases import TRAIN, UNTAUGHT, Case, both, config, mutated, replaced

# Any text is one of these, until more is known.
OPEN = ("name", "data.name", "data.data_dir", "data.inputs", "data.stream", "model.arguments.depth", "teacher_from",
        "distill.loss", "distill.metrics", "distill.teachers", "gates.include", "gates.exclude")  # fmt: skip


def settings(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """Overrides on the line that mean nothing."""
    from kdsearch_jax.runs.config import Experiment, flatten

    for number, (name, value) in enumerate(flatten(Experiment()).items()):
        if number % 2 or name in OPEN:  # the other half is read by the same code
            continue
        numbers = ("nan", "inf", "-1e999", "zero", "1" + 400 * "0", "-7", "0x10", "", "\x1b]0;x")
        text = ("nothing-like-it", "", "\x00", "a" * 10_000, "\x1b[2J", "../..", "import os")
        bad = text if isinstance(value, (str, tuple)) else ("maybe",) if isinstance(value, bool) else numbers
        chosen = bad[random.integers(len(bad))]
        yield Case("settings", f"{name}={chosen[:12]!r}", "teacher", (*UNTAUGHT, f"--{name}={chosen}"), config(root))
    for key in ("num_classes", "width"):
        for given in ("0", "-1", "1e400", "1000000000", "null", "[]", "{", "NaN", "[" * 2000, '"16"'):
            line = (*TRAIN, "--model.arguments", f"{key}={given}")
            yield Case("settings", f"model.arguments {key}={given[:12]}", "teacher", line, config(root))
    for model, argument in (
        ("vit", "depth=100000000"),
        ("unet", "depth=2000"),
        ("mlp", "hidden=[1000000,1000000]"),
        ("mobilenet_v2", "width=1e30"),
        ("vgg", "hidden=1000000"),
        ("nosuch", "a=1"),
        ("os:system", "command=1"),
        ("a..b:c", "d=1"),
    ):
        line = (*TRAIN, "--model.name", model, "--model.arguments", argument)
        yield Case("settings", f"{model} {argument}", "teacher", line, config(root))
    for line in (
        ("--budget",),
        ("--budgets",),
        ("--budgets", "x"),
        ("--teacher-from",),
        ("--trust-cod",),
        ("loose",),
        ("--resume=maybe",),
        ("--num-processes", "0"),
        ("--process-id", "x"),
        ("--join-timeout", "-1"),
        ("--config", ""),
        ("--stop-after", "never"),
    ):
        yield Case("settings", " ".join(line), "search", (*TRAIN, *line), config(root))


def configurations(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """config.json, broken."""
    valid = (root / "config.json").read_bytes()
    record = json.loads(valid)
    text = {
        "empty": b"",
        "null": b"null",
        "list": b"[]",
        "text": b'"x"',
        "number": b"1e999",
        "cut": valid[:100],
        "binary": bytes(range(256)),
        "utf-16": valid.decode().encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + valid,
        "deep": b"[" * 100_000,
        "deep object": b'{"a":' * 50_000,
        "surrogate": b'{"name": "\\ud800"}',
        "huge number": b'{"name": ' + b"9" * 5000 + b"}",
        "nan": b'{"name": NaN}',
        "65 deep": b'{"model": {"name": "mlp", "arguments": {"a": ' + b"[" * 65 + b"]" * 65 + b"}}}",
        "no such key": b'{"naem": "x"}',
        "large": b"[" + b"{}," * (1 << 25) + b"{}]",
        "slash": b'{"name": "../../x"}',
        "control": b'{"name": "a\\u001b[2J\\nb"}',
    }
    for name, content in text.items():
        yield Case("configurations", name, "teacher", UNTAUGHT, config(root, content))
    for i in range(50):
        content = json.dumps(replaced(record, random)).encode() if i % 2 else mutated(valid, random)
        yield Case("configurations", f"mutant {i}", "teacher", UNTAUGHT, config(root, content), "configurations")


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
    odd = (
        "missing",
        "folder",
        "file",
        "file/below",
        "dangling",
        "loop",
        "endless",
        "pipe",
        "x" * 300,
        "a\x1b[2Jb",
        "~nobody/x",
        "/",
        "gs:/x",
        "\udcff",
    )
    for path in odd:
        for command, line in (
            ("evaluate", (path, "--data", "digits")),
            ("export", (path, "--out", "out")),
            ("report", (path,)),
        ):
            yield Case("paths", f"{command} {path[:12]!r}", command, line, odd_paths)
        for flag in ("--config", "--teacher-from", "--search-from"):
            if (flag, path) in (("--config", "missing"),):
                continue
            more = () if flag == "--config" else ("--workdir", "run")
            base = () if flag == "--config" else ("--config", "digits")
            yield Case("paths", f"{flag} {path[:12]!r}", "search", (*base, flag, path, *more), odd_paths)
        if path in ("file", "file/below", "dangling", "loop", "endless", "pipe", "x" * 300):
            yield Case(
                "paths",
                f"--workdir {path[:12]!r}",
                "teacher",
                (*TRAIN[:2], "--workdir", path),
                both(odd_paths, config(root)),
            )
        for suffix in (".npz", ".safetensors", ".msgpack", ".pth"):

            def link(box: Path, suffix: str = suffix, path: str = path) -> None:
                odd_paths(box)
                (box / f"x{suffix}").symlink_to(path)

            if path in ("folder", "dangling", "loop", "endless", "pipe"):
                line = ("--data.name", "npz:x.npz") if suffix == ".npz" else ("--teacher-from", f"x{suffix}")
                yield Case("paths", f"x{suffix} → {path}", "search", (*TRAIN, *line), both(link, config(root)))
