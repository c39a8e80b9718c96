"""The run directory: whose it is, who goes on with it, who is refused; nothing that was there is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from kdsearch_jax.runs import directories, locks, provenance
from kdsearch_jax.runs.config import Experiment, ModelConfig, load_experiment
from kdsearch_jax.storage.files import DamagedError

SEARCH = {"command": "search", "--stop-after": None}


def begin(workdir, experiment=None, command=SEARCH, resume=False, data="d", fails=True):
    """A command that begins in `workdir`, or goes on there; fails: it is interrupted."""
    experiment = experiment or Experiment()
    going = directories.should_resume(workdir, experiment, command, resume)
    with (
        contextlib.suppress(ZeroDivisionError),
        directories.run_directory(workdir, experiment, command, resume=going, data=data),
    ):
        if fails:
            raise ZeroDivisionError
    return going


def content(workdir):
    return {path.name: path.read_bytes() for path in workdir.iterdir()}


def full(source, target):
    """The operating system's refusal."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


@pytest.mark.parametrize("module", ["kdsearch_jax.search.__main__", "kdsearch_jax.teacher"])
def test_describes_the_run(tmp_path, monkeypatch, module):
    main = types.ModuleType("__main__")
    main.__spec__ = importlib.util.find_spec(module)  # as `python -m` does
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/somewhere/file.py", "--quick"])
    experiment = load_experiment("digits")
    directories.new_run_directory(tmp_path / "a" / "b", experiment)
    assert load_experiment(str(tmp_path / "a" / "b" / "config.json")) == experiment
    environment = json.loads((tmp_path / "a" / "b" / "environment.json").read_text())
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(environment["versions"])
    assert {"git_revision", "devices", "started"} <= set(environment)
    assert environment["command"] == ["python", "-m", module.removesuffix(".__main__"), "--quick"]


def test_code_of_ones_own_is_known_by_its_file(tmp_path, monkeypatch):
    """Which has no version; of what is not imported nothing is known."""
    experiment = dataclasses.replace(Experiment(), model=ModelConfig("models_of_mine:make", {}))
    assert provenance.code(experiment) == {}
    found = []
    for text in ("make = 1\n", "make = 2\n"):
        (tmp_path / "models_of_mine.py").write_text(text)
        module = types.ModuleType("models_of_mine")
        module.__file__ = str(tmp_path / "models_of_mine.py")
        monkeypatch.setitem(sys.modules, "models_of_mine", module)
        found.append(provenance.code(experiment)["models_of_mine"])
    assert found[0] != found[1]
    assert provenance.code(Experiment()) == {}


def test_a_second_run_is_refused_and_the_first_intact(tmp_path):
    directories.new_run_directory(tmp_path, Experiment())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        directories.new_run_directory(tmp_path, Experiment())
    other = dataclasses.replace(Experiment(), name="other")
    with pytest.raises(ValueError, match=r"another experiment \(name: 'digits', not 'other'\)"):
        directories.new_run_directory(tmp_path, other, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resuming_keeps_a_record_of_each_start(tmp_path):
    for _ in range(3):
        directories.new_run_directory(tmp_path, Experiment(), resume=True)
    assert len(json.loads((tmp_path / "environment.json").read_text())["earlier"]) == 2


def test_a_config_of_another_version_cannot_be_resumed(tmp_path):
    (tmp_path / "config.json").write_text('{"serach": {}}')
    with pytest.raises(ValueError, match="config.json: serach is not a setting"):
        directories.new_run_directory(tmp_path, Experiment(), resume=True)


def test_no_space_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full)  # the operating system's refusal, not a part of ours
    with pytest.raises(OSError, match="No space left"):
        directories.new_run_directory(tmp_path / "run", Experiment())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        directories.new_run_directory(tmp_path / "file", Experiment())
    assert (tmp_path / "file").read_text() == "mine"


# Going on


def test_the_same_command_goes_on_until_it_has_ended(tmp_path):
    run = tmp_path / "run"
    assert [begin(run), begin(run), begin(run, fails=False)] == [False, True, True]
    before = content(run)
    with pytest.raises(ValueError, match="already holds a finished run; add --resume"):
        begin(run)
    assert content(run) == before
    assert begin(run, resume=True) is True  # once more, as asked
    assert begin(run) is True  # and that was interrupted


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"experiment": dataclasses.replace(Experiment(), name="other")}, r"another experiment \(name: 'digits', not"),
        (
            {"command": {"command": "teacher"}},
            r"of another command \(command search, not command teacher\); add --resume",
        ),
        ({"command": {**SEARCH, "--stop-after": "search"}}, "command search, --stop-after search"),
        ({"data": "e"}, r"data: .*fingerprint d, now e"),
        ({"data": "e", "resume": True}, "data: "),
    ],
)
def test_what_is_another_run_is_refused_and_nothing_changes(tmp_path, change, problem):
    begin(tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=problem) as refusal:
        begin(tmp_path / "run", **change)
    assert "\n" not in str(refusal.value)
    assert content(tmp_path / "run") == before


def test_resume_takes_over_what_another_command_began(tmp_path):
    begin(tmp_path / "run", command={"command": "teacher"}, fails=False)
    assert begin(tmp_path / "run", resume=True) is True
    assert begin(tmp_path / "run") is True


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_flipped_byte_in_what_steers_is_found(tmp_path, name, resume):
    begin(tmp_path / "run")
    path = tmp_path / "run" / name
    content = path.read_bytes()
    for place in range(0, len(content), 1 if name == "run.json" else 23):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with contextlib.suppress(ValueError):
            begin(tmp_path / "run", resume=resume)
            # Harmless: white space, or what says the same.
            assert json.loads(path.read_text()) == json.loads(content)
    path.write_bytes(content)
    assert begin(tmp_path / "run") is True


@pytest.mark.parametrize(
    "said", ["{}", "[]", '{"finished": false}', '{"command": 3, "finished": false}', '{"command": {}, "finished": 1}']
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_does_not_say_what_it_is_is_refused(tmp_path, said, resume):
    begin(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(said)
    with pytest.raises(DamagedError, match=r"run\.json is damaged"):
        begin(tmp_path / "run", resume=resume)


@pytest.mark.parametrize("said", ["[]", '{"earlier": 3}', "{", "null"])
def test_what_is_only_told_of_earlier_starts_stops_nobody(tmp_path, said):
    begin(tmp_path / "run")
    (tmp_path / "run" / "environment.json").write_text(said)
    assert begin(tmp_path / "run") is True
    assert "versions" in json.loads((tmp_path / "run" / "environment.json").read_text())


def test_settings_are_no_large_file(tmp_path):
    """Of which a JSON parser makes thirty times as much in memory."""
    begin(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("[" + "{}," * (1 << 19) + "{}]")
    with pytest.raises(DamagedError, match="1048576 bytes"):
        begin(tmp_path / "run")


def test_a_changed_config_is_no_way_to_change_a_run(tmp_path):
    """--resume --workdir RUN takes the experiment from there."""
    begin(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DamagedError, match="config.json: "):
        begin(tmp_path / "run", load_experiment(str(path)), resume=True)


def test_a_refusal_leaves_no_directory(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        begin(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Leftovers


def test_leftovers_go_and_nothing_else(tmp_path):
    """A stranger's files in the same directory stay, whatever they are called."""
    run = tmp_path / "run"
    begin(run)
    stay = ["search/network/network.json", "search/checkpoints/4/meta", "search/metrics.jsonl", "report/index.html",
            ".notes.12", ".notes.12.part", ".mine.01234567.tmp/x", "mine/.x.01234567.old/x", "mine/metrics.jsonl.new",
            "mine/4.orbax-checkpoint-tmp/x", "x.tmp", "search/x.tmp", "search/.notes.12", ".x.old"]  # fmt: skip
    go = [".config.json.123.part", "search/metrics.jsonl.new", "search/.network.0a1b2c3d.tmp/x",
          ".student.01234567.old/x", "student/.export-abc/student.stablehlo", "retrain-0.5/.x.npz.7.part",
          "search/checkpoints/8.orbax-checkpoint-tmp/state/a", ".teacher.01234567.tmp/network/x"]  # fmt: skip
    for name in [*stay, *go, "student/network.json", "retrain/.network.89abcdef.old/network.json"]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    begin(run)
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == {*stay, "student/network.json", "retrain/network/network.json", "config.json", "run.json",
                     "environment.json"}  # fmt: skip


# Two at once


HOLD = """
import sys, time
from pathlib import Path
from kdsearch_jax.runs import locks
with locks.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_directory(tmp_path, python):
    """The second is refused; whatever way the first ends, it is no obstacle any more."""
    begin(tmp_path)
    before = content(tmp_path)
    with subprocess.Popen([python, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(locks.InUseError, match=f"process {first.pid} of ") as refusal:
                begin(tmp_path, resume=resume)
            assert "\n" not in str(refusal.value)
        first.kill()
    assert (tmp_path / ".lock").exists()
    assert content(tmp_path).items() >= before.items()
    assert begin(tmp_path) is True
    assert not (tmp_path / ".lock").exists()


def test_a_fresh_start_that_comes_second_is_refused_as_well(tmp_path):
    """Both have found the directory empty."""
    with (
        locks.locked(tmp_path),
        pytest.raises(locks.InUseError, match=f"process {os.getpid()} of "),
        directories.run_directory(tmp_path, Experiment(), SEARCH, resume=False),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []
    begin(tmp_path)
    with (
        pytest.raises(ValueError, match="already holds a run"),
        directories.run_directory(tmp_path, Experiment(), SEARCH, resume=False),
    ):
        raise AssertionError


def test_who_waits_comes_in_one_after_another(tmp_path):
    inside, most = [], []

    def work() -> None:
        with locks.locked(tmp_path, wait=True):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] * 6 and list(tmp_path.iterdir()) == []


# Fingerprints


def test_a_fingerprint_tells_data_apart():
    images = np.arange(24, dtype=np.uint8).reshape(6, 4)
    seen = {
        provenance.fingerprint({"train": entries})
        for entries in (
            {"images": images},
            {"images": images.reshape(4, 6)},
            {"images": images.view(np.int8)},
            {"pictures": images},
            {"images": images ^ (images == 7).astype(np.uint8)},
        )
    }
    assert len(seen) == 5
    assert provenance.fingerprint({"train": {"images": images.copy()}}) in seen
