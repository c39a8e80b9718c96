"""Checks that damage on disk is detected or harmless: `python -m benchmarks.corruption --cases 300`.

Makes a tiny run (the experiment of benchmarks/chaos.py) and damages one of its files at a time: flips a bit, truncates
it, or deletes it. Then the code that normally reads the file reads it. Each case must end in an error of one line, in
an older checkpoint with exactly its own arrays, or in the same values and logits as before. The file is restored
afterwards. A traceback, or different values without an error, fails the benchmark.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import chaos
from kdsearch_jax.runs import directories
from kdsearch_jax.runs.config import load_experiment
from kdsearch_jax.search.__main__ import main as search
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.files import read_arrays, read_sealed
from kdsearch_jax.storage.networks import load_network
from kdsearch_jax.training.checkpoints import Checkpointer

DAMAGES = ("flip", "truncation", "deletion")
Read = Callable[[], Any]  # what can be read, as comparable bytes; raises ValueError or OSError where it is damaged


def damaged(path: Path, how: str, chance: random.Random) -> str:
    """Damages the file; says where."""
    content = path.read_bytes()
    if how == "deletion" or not content:
        path.unlink()
        return "deleted"
    place = chance.randrange(len(content))
    if how == "truncation":
        path.write_bytes(content[:place])
        return f"cut to {place} of {len(content)} bytes"
    bit = chance.randrange(8)
    path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
    return f"bit {bit} of byte {place} of {len(content)}"


def outcome(read: Read, expected: Any, older: Any) -> str:
    """What became of a case: "refused", "an older step", or "harmless"; raises AssertionError for anything else."""
    try:
        found = read()
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error), f"more than one line: {error}"
        return "refused"
    if found == expected:
        return "harmless"
    assert older is not None and found == older, "other values, without a word"
    return "an older step"


# --- what is read ---------------------------------------------------------------------------------------------------


def checkpoints(directory: Path) -> Read:
    """The newest good checkpoint: (step, its arrays, what it says)."""
    from orbax.checkpoint import PyTreeCheckpointer

    newest = max((p for p in directory.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in PyTreeCheckpointer().restore(newest / "state").items()
    }
    # Names are flat in the file; a state of this structure has the same ones.
    from kdsearch_jax.storage.arrays import flatten, unflatten

    state = unflatten(shapes)
    assert flatten(state).keys() == shapes.keys()

    def read() -> Any:
        with Checkpointer(directory) as stored:
            found = stored.restore(state)
        assert found is not None, "no checkpoint, without a word"
        step, tree, meta = found
        return step, {name: np.asarray(leaf).tobytes() for name, leaf in flatten(tree).items()}, meta

    return read


def network(directory: Path) -> Read:
    """Logits of a network directory, with what it says of itself."""
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    run = jax.jit(lambda module, variables: module.apply(variables, images), static_argnums=0)

    def read() -> Any:
        module, variables, architecture, info = load_network(directory)
        return np.asarray(run(module, variables)).tobytes(), architecture.to_json(), info

    return read


def exported(directory: Path) -> Read:
    """The student's files: arrays of the one, logits of the other."""
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)

    def read() -> Any:
        _, variables = export_formats.load_safetensors(directory / "student.safetensors")
        function = export_formats.load_stablehlo(directory / "student.stablehlo").call
        return np.asarray(function(images)).tobytes(), jax.tree.map(lambda x: np.asarray(x).tobytes(), variables)

    return read


def arrays(path: Path) -> Read:
    """The arrays of an npz file."""

    def read() -> Any:
        return {name: (value.dtype.str, value.shape, value.tobytes()) for name, value in read_arrays(path).items()}

    return read


def sealed(path: Path, keys: tuple[str, ...]) -> Read:
    """What a small file that steers a run says under these keys."""

    def read() -> Any:
        try:
            return {key: read_sealed(path)[key] for key in keys}
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}") from None

    return read


def going_on(run: Path) -> Read:
    """Whether the run can be gone on with, and by which experiment: `--resume --workdir RUN`."""

    def read() -> Any:
        experiment = load_experiment(str(run / "config.json"))
        directories.should_resume(run, experiment, {"command": "search"}, True)
        directories.check_same_experiment(run, experiment)
        return experiment

    return read


def subjects(run: Path) -> dict[str, tuple[Read, list[Path], Any]]:
    """{what: (how it is read, the files that are damaged, what an older step would be)}."""

    def inside(directory: Path) -> list[Path]:
        return sorted(path for path in directory.rglob("*") if path.is_file())

    found: dict[str, tuple[Read, list[Path], Any]] = {}
    for stage in ("teacher", "search", "retrain"):
        directory = run / stage / "checkpoints"
        read, steps = checkpoints(directory), sorted(int(path.name) for path in directory.iterdir())
        hidden = run / "hidden"
        (directory / str(steps[-1])).rename(hidden)
        older = read()
        hidden.rename(directory / str(steps[-1]))
        found[f"checkpoints of {stage}"] = read, inside(directory / str(steps[-1])), older
    for name in ("teacher/network", "search/kept/network", "search/network", "retrain/network", "student"):
        files = [path for path in inside(run / name) if path.name[:7] not in ("student", "manifes")]
        found[name] = network(run / name), files, None
    found["exported files"] = (
        exported(run / "student"),
        [*(run / "student").glob("student.*"), run / "student" / "manifest.json"],
        None,
    )
    for name in ("search/gates.npz", "search/history.npz", "search/kept/units.npz", "evidence.npz"):
        found[name] = arrays(run / name), [run / name], None
    found["search/selection.json"] = (
        sealed(run / "search/selection.json", ("kept", "budget", "step", "macs")),
        [run / "search/selection.json"],
        None,
    )
    found["config.json, run.json"] = going_on(run), [run / "config.json", run / "run.json"], None
    return found


def prove(cases: int, seed: int, scratch: Path) -> collections.Counter[str]:
    """Damages so many files; {"DAMAGE: OUTCOME": how many}. Raises AssertionError where one is silently wrong."""
    run, chance, counts = scratch / "run", random.Random(seed), collections.Counter()
    if not run.exists():
        assert search(["--config", str(Path(chaos.__file__).resolve()), "--workdir", str(run)]) == 0
    everything = subjects(run)
    expected = {what: read() for what, (read, _, _) in everything.items()}
    logging.disable(logging.WARNING)  # "is passed over", a line a case
    for case in range(cases):
        what = sorted(everything)[case % len(everything)]
        read, files, older = everything[what]
        path, how = chance.choice(files), DAMAGES[case // len(everything) % len(DAMAGES)]
        content = path.read_bytes()
        where = damaged(path, how, chance)
        try:
            became = outcome(read, expected[what], older)
        except Exception as error:
            raise AssertionError(
                f"case {case}: {path.relative_to(run)}, {where}: {type(error).__name__}: {error}"
            ) from error
        finally:
            path.write_bytes(content)
        counts[f"{how}: {became}"] += 1
        counts[f"{what}: {became}"] += 1
    assert {what: read() for what, (read, _, _) in everything.items()} == expected
    return counts


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scratch", type=Path, help="a directory to work in, with or without a run; a temporary one if left out"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corruption-") as temporary:
        counts = prove(options.cases, options.seed, options.scratch or Path(temporary))
    for what, count in sorted(counts.items()):
        print(f"{what}: {count}")
    print(json.dumps({"cases": options.cases, "seed": options.seed, "silently wrong": 0}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
