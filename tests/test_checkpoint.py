"""Checkpoints and networks are restored exactly or refused, whatever is killed, full or damaged."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.storage import arrays, files, networks
from kdsearch_jax.storage.files import CheckpointError, atomic_directory
from kdsearch_jax.storage.networks import load_network, save_network
from kdsearch_jax.training import checkpoints as checkpoint_states
from kdsearch_jax.training.checkpoints import Checkpointer
from kdsearch_jax.training.preemption import Preempted, catch_sigterm, raise_on_sigterm

Pair = namedtuple("Pair", "first second")


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal structure, types of leaves and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def small_state(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {"kernel": rng.normal(size=(3, 16, 16)).astype(np.float32), "step": np.int32(step) + np.zeros((), np.int32)}


def save_all(directory: Path, steps: range, **arguments: Any) -> None:
    with Checkpointer(directory, **arguments) as checkpoints:
        for step in steps:
            checkpoints.save(step, small_state(step), {"config": {"a": 1}}, {"validation_accuracy": step / 10})


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


# Names


@given(
    st.dictionaries(
        st.text("ab/%2F.", min_size=1, max_size=4), st.dictionaries(st.text("a/%", max_size=3), st.integers())
    )
)
def test_flat_names_are_unique_and_reversible(tree):
    flat = arrays.flatten(tree)
    assert len(flat) == len(jax.tree.leaves(tree))
    assert arrays.unflatten(flat) == {key: value for key, value in tree.items() if value}


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_name_cannot_be_both_array_and_folder(names):
    with pytest.raises(ValueError, match="folder"):
        arrays.unflatten(dict.fromkeys(names, 0))


# Saving and restoring


def test_round_trip_of_a_state(tmp_path, key):
    params = {"a/b": {"kernel": jax.random.normal(key, (3, 4))}, "empty": {}, "none": None, "cut": jnp.zeros((3, 0))}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 10)))
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "pair": Pair((jnp.arange(3), jnp.bool_(True)), [jnp.ones(3, jnp.bfloat16), np.arange(4, dtype=np.uint32)]),
        "numbers": (3, 2.5, True, 1e-300),
        "zero": jnp.zeros(()),
    }
    meta = {"config": {"width": (1, 2), "name": "é"}, "note": [1, None]}
    with Checkpointer(tmp_path / "deep" / "er") as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(7, state, meta, {"loss": 1.0})
        step, restored, restored_meta = checkpoints.restore(state, {"width": (1, 2), "name": "é"})
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state
        )
        assert_equal(checkpoints.restore(shapes)[1], state)
    assert step == 7
    assert restored_meta == {"config": {"width": [1, 2], "name": "é"}, "note": [1, None]}
    assert_equal(restored, state)


def test_buffers_may_be_donated_once_save_returns(tmp_path):
    update = jax.jit(lambda x: x * 2.0 + 1.0, donate_argnums=0)
    on_device, on_host = jnp.ones((1000, 300)), np.ones((1000, 300), np.float32)
    with Checkpointer(tmp_path, keep=9) as checkpoints:
        expected = {}
        for step in range(4):
            expected[step] = np.array(on_device)
            checkpoints.save(step, {"device": on_device, "host": on_host}, {})
            on_device = update(on_device)
            on_host *= 2
            on_host += 1
        for step, value in expected.items():
            _, restored, _ = checkpoints.restore({"device": on_device, "host": on_host}, step=step)
            np.testing.assert_array_equal(restored["device"], value)
            np.testing.assert_array_equal(restored["host"], value)


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("max", [0.1, 0.9, 0.3, 0.2, 0.4], 1),
        ("min", [0.5, 0.1, 0.3, 0.2, 0.4], 1),
        ("max", [None, 0.1, float("nan"), None, float("inf")], 1),  # what is not finite does not compete
        ("max", [0.5, 0.5, 0.1, 0.1, 0.1], 1),  # of equals the newer
        ("max", [None] * 5, None),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, mode, scores, best):
    with Checkpointer(tmp_path, keep=2, best_metric="score", best_mode=mode) as checkpoints:
        for step, score in enumerate(scores):
            checkpoints.save(step, small_state(step), {}, None if score is None else {"score": score, "other": 1})
        assert checkpoints.best_step() == best
        assert checkpoints.steps() == sorted({3, 4} | ({best} if best is not None else set()))
    with Checkpointer(tmp_path, keep=1, best_metric="score", best_mode=mode) as checkpoints:
        assert checkpoints.best_step() == best  # known in another process too
        checkpoints.save(5, small_state(5), {})
        assert checkpoints.steps() == sorted({5} | ({best} if best is not None else set()))
        if best is not None:
            assert_equal(checkpoints.restore(small_state(0), step=best)[1], small_state(best))


def test_a_directory_never_mixes_two_runs(tmp_path):
    save_all(tmp_path, range(1, 3))
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="step 1: .*step 2"):
            checkpoints.save(1, small_state(1), {})
        checkpoints.save(3, small_state(3), {})
        checkpoints.save(3, small_state(3), {}, wait=True)  # the final save at the step of a regular one
        assert checkpoints.steps() == [2, 3]


def test_a_save_is_affordable_within_its_share_of_the_time(tmp_path, monkeypatch):
    written = threading.Event()
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.affordable(1e-9)  # nobody knows yet what one takes
        checkpoints.save(1, small_state(1), {}, wait=True)
        assert checkpoints.affordable(1.0) and checkpoints.affordable(None)
        assert not checkpoints.affordable(1e-9)
        monkeypatch.setattr(checkpoint_states, "MAX_INTERVAL", 0.0)
        assert checkpoints.affordable(1e-9)
        checkpoints._worker.submit(written.wait)  # a disk that takes its time
        checkpoints.save(2, small_state(2), {})
        assert not checkpoints.affordable(1.0)
        written.set()
        checkpoints.wait()
        assert checkpoints.affordable(1e-9) and checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    ("state", "meta", "problem"),
    [
        ({"k": jax.random.key(0)}, {}, "'k' is a typed random key; store jax.random.key_data"),
        ({"name": "x"}, {}, "'name' is of type str"),
        ({"empty": {}, "none": None}, {}, "nothing to save"),
        ({"a": np.ones(2)}, {"x": object()}, "^meta "),
    ],
)
def test_unsupported_states_are_refused(tmp_path, state, meta, problem):
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=problem):
            checkpoints.save(1, state, meta)
        assert checkpoints.steps() == []


@pytest.mark.parametrize("arguments", [{"keep": 0}, {"best_mode": "most"}, {"directory": "gs://"}])
def test_arguments_are_checked(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Checkpointer(**{"directory": tmp_path, **arguments})


def test_another_configuration_is_refused(tmp_path):
    config = {"run": {"seed": 0, "keep": 2}, "data": {"mean": (0.1, 0.2)}, "old": {"x": 1}}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, small_state(1), {"config": config})
        now = {"run": {"seed": 1, "keep": 2}, "data": {"mean": [0.1, 0.2]}, "new": {}}
        with pytest.raises(ValueError) as caught:
            checkpoints.restore(small_state(0), now)
        text = str(caught.value)
        assert all(setting in text for setting in ("new: ", "old.x: ", "run.seed: ")) and "\n" not in text
        assert "keep" not in text and "mean" not in text
        assert checkpoints.restore(small_state(0), config)[0] == 1


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ({"kernel": np.zeros((3, 16, 16), np.float32)}, "'step'"),
        (small_state(0) | {"bias": np.zeros(3)}, "'bias'"),
        (
            small_state(0) | {"kernel": np.zeros((3, 16, 17), np.float32)},
            r"'kernel' .*float32 \(3, 16, 16\).*float32 \(3, 16, 17\)",
        ),
        (small_state(0) | {"kernel": np.zeros((3, 16, 16), np.float64)}, "'kernel' .*float32 .*float64"),
    ],
)
def test_a_state_of_another_structure_is_refused(tmp_path, target, problem, caplog):
    save_all(tmp_path, range(1, 3))
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=problem) as caught:
        checkpoints.restore(target)
    assert "step 2" in str(caught.value)
    assert "step 1" in str(caught.value)
    with (
        Checkpointer(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"has checkpoints of the steps \[1, 2\]"),
    ):
        checkpoints.restore(target, step=3)


# Damage


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def largest(directory: Path) -> Path:
    return max(files_of(directory / "state"), key=lambda path: path.stat().st_size)


def other_dtype(directory: Path) -> None:
    """Replaces the arrays of the newest checkpoint by arrays of another dtype."""
    arrays = {"kernel": small_state(2)["kernel"].astype(np.float64), "step": small_state(2)["step"]}
    with Checkpointer(directory.parent / "other") as checkpoints:
        checkpoints.save(2, arrays, {})
    shutil.rmtree(directory / "state")
    shutil.move(directory.parent / "other" / "2" / "state", directory / "state")
    shutil.rmtree(directory.parent / "other")


def other_metrics(directory: Path) -> None:
    path = directory / "meta" / "metadata"
    path.write_text(path.read_text().replace("0.2", "0.9"))


def no_files(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda d: flip(largest(d), largest(d).stat().st_size // 2), "'kernel'"),
        (lambda d: largest(d).write_bytes(largest(d).read_bytes()[:100]), ""),
        (lambda d: largest(d).unlink(), ""),
        (lambda d: shutil.rmtree(d / "state"), ""),
        (other_dtype, "'kernel'"),
        (other_metrics, "JSON"),
        (lambda d: (d / "meta" / "metadata").write_text(""), ""),
        (no_files, ""),
        (lambda d: shutil.copytree(d.parent / "1", d, dirs_exist_ok=True), "step 1"),
    ],
    ids=["flip", "truncated", "deleted", "no-state", "dtype", "json", "empty-json", "nothing", "copy-of-another"],
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage, problem, caplog):
    save_all(tmp_path, range(1, 3))
    damage(tmp_path / "2")
    with Checkpointer(tmp_path) as checkpoints:
        with caplog.at_level(logging.WARNING):
            step, state, _ = checkpoints.restore(small_state(0), {"a": 1})
        assert step == 1
        assert_equal(state, small_state(1))
        warning = caplog.records[0].getMessage()
        assert str(tmp_path / "2") in warning and "\n" not in warning
        assert problem in warning
        assert len(warning) < 600
        checkpoints.save(2, small_state(20), {"config": {"a": 1}})  # the run continues and saves the step again
        assert_equal(checkpoints.restore(small_state(0))[1], small_state(20))
        assert checkpoints.steps() == [1, 2]


def test_flipped_bytes_are_detected_or_harmless(tmp_path):
    save_all(tmp_path, range(1, 3))
    chance = random.Random(0)
    for path in files_of(tmp_path / "2"):
        content = path.read_bytes()
        for _ in range(4):
            flip(path, chance.randrange(len(content)), chance.randrange(8))
            with Checkpointer(tmp_path) as checkpoints:
                step, state, _ = checkpoints.restore(small_state(0))
            assert_equal(state, small_state(step))
            path.write_bytes(content)


def test_only_damaged_checkpoints_is_an_error(tmp_path):
    save_all(tmp_path, range(1, 3))
    for step in "12":
        flip(largest(tmp_path / step), largest(tmp_path / step).stat().st_size // 2)
    with (
        Checkpointer(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="step 2.*step 1"),
    ):
        checkpoints.restore(small_state(0))


SAVES_UNTIL_KILLED = """
import itertools, sys
import numpy as np
from kdsearch_jax.training.checkpoints import Checkpointer
target = {"kernel": np.zeros((1000, 1000), np.float32), "step": np.zeros((), np.int32)}
with Checkpointer(sys.argv[1]) as checkpoints:
    restored = checkpoints.restore(target)
    for step in itertools.count(restored[0] + 1 if restored else 1):
        kernel = np.random.default_rng(step).random((1000, 1000), np.float32)
        state = {"kernel": kernel, "step": np.asarray(step, np.int32)}
        checkpoints.save(step, state, {})
        print(step, flush=True)
"""


def test_a_kill_while_saving_loses_at_most_that_save(tmp_path, python):
    target = {"kernel": np.zeros((1000, 1000), np.float32), "step": np.zeros((), np.int32)}
    chance, reached = random.Random(1), 0
    for _ in range(2):
        command = [python, "-c", SAVES_UNTIL_KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            begun = [int(line) for line in itertools.islice(process.stdout, 4)]
            time.sleep(chance.random() * 0.05)
            process.kill()
            begun += [int(line) for line in process.stdout]
        assert process.returncode == -signal.SIGKILL
        assert begun[0] == reached + 1
        with Checkpointer(tmp_path) as checkpoints:
            step, state, _ = checkpoints.restore(target)
        reached = step
        assert begun[-1] - 2 <= step <= begun[-1] + 1
        expected = np.random.default_rng(step).random((1000, 1000), np.float32)
        assert_equal(state, {"kernel": expected, "step": np.asarray(step, np.int32)})
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(reached + 1, target, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([str(reached), str(reached + 1)])


# Disks


def test_a_full_disk(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, small_state(1), {}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
            checkpoints.save(2, small_state(2), {})
            with pytest.raises(OSError, match=r"step 2 .*No space left on device"):
                checkpoints.wait()
        assert_equal(checkpoints.restore(small_state(0))[1], small_state(1))
        checkpoints.save(2, small_state(2), {})  # tried again with room
        assert checkpoints.steps() == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Orbax's threads shout as well
def test_a_write_that_fails_halfway(tmp_path):
    big = {"kernel": np.random.default_rng(0).random(300_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, big, {}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(OSError, match="step 2 .*File too large"):
                checkpoints.save(2, big, {}, wait=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
        assert_equal(checkpoints.restore(big)[1], big)


def test_a_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpointer(tmp_path / "file" / "run")
    checkpoints.save(1, small_state(1), {})
    with pytest.raises(OSError, match="Not a directory"):
        checkpoints.close()
    with pytest.raises(OSError, match="Not a directory"):
        save_network(tmp_path / "file" / "network", MLP, {"params": {"a": np.ones(2)}}, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path):
    save_all(tmp_path, range(1, 3))
    tmp_path.chmod(0o500)
    try:
        with Checkpointer(tmp_path) as checkpoints:
            assert_equal(checkpoints.restore(small_state(0))[1], small_state(2))
            with pytest.raises(OSError, match="step 3 .*Permission denied"):
                checkpoints.save(3, small_state(3), {}, wait=True)
    finally:
        tmp_path.chmod(0o700)


# Devices and processes

OTHER_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from kdsearch_jax.training.checkpoints import Checkpointer
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
abstract = {"a": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=split), "b": jax.device_put(jnp.zeros(3), whole)}
with Checkpointer(sys.argv[1]) as checkpoints:
    _, state, _ = checkpoints.restore(abstract)
    assert state["a"].sharding == split and state["b"].sharding == whole, state
    assert [shard.data.shape for shard in state["a"].addressable_shards] == [(2, 2)] * 4
    checkpoints.save(2, jax.tree.map(lambda x: x + 1, state), {})
"""


def test_the_number_of_devices_may_change(tmp_path, python):
    state = {"a": jnp.arange(16.0).reshape(8, 2), "b": jnp.arange(3.0)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    subprocess.run([python, "-W", "error", "-c", OTHER_DEVICES, str(tmp_path)], env=environment, check=True)
    with Checkpointer(tmp_path) as checkpoints:
        step, restored, _ = checkpoints.restore(state)
    assert step == 2
    assert_equal(restored, jax.tree.map(lambda x: x + 1, state))


TWO_PROCESSES = """
import sys, time
import jax, numpy as np
index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kdsearch_jax.training.checkpoints import Checkpointer
from kdsearch_jax.training.preemption import catch_sigterm
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
state = lambda k: {"a": jax.make_array_from_callback((4,), sharding, lambda i: np.arange(4.0, dtype=np.float32)[i] * k)}
with catch_sigterm() as stop, Checkpointer(directory) as checkpoints:
    assert checkpoints.restore(state(0)) is None
    for step in range(1, 5):
        checkpoints.save(step, state(step), {}, {"validation_accuracy": -step})
    assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 3, 4], 1)
    step, restored, _ = checkpoints.restore(state(0))
    assert step == 4
    mine = restored["a"].addressable_shards[0].data
    np.testing.assert_array_equal(mine, np.arange(4.0)[2 * index : 2 * index + 2] * 4)
    print("ready", flush=True)
    asked = 0
    while not stop.requested:
        asked += 1
        assert asked < 600
        time.sleep(0.05)
    print(asked, flush=True)
"""


def test_two_processes_save_and_stop_together(tmp_path, python):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as stack:
        commands = [[python, "-c", TWO_PROCESSES, str(index), port, str(tmp_path)] for index in range(2)]
        processes = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) for command in commands
        ]
        outputs = [process.stdout for process in processes]
        for output in outputs:
            assert any("ready" in line for line in output)
        processes[1].send_signal(signal.SIGTERM)  # one machine is taken away; both must stop at the same step
        asked = [output.read().split() for output in outputs]
    assert [process.returncode for process in processes] == [0, 0]
    assert asked[0] == asked[1]


# Preemption


def test_sigterm_sets_a_flag_once():
    before = signal.getsignal(signal.SIGTERM)
    with catch_sigterm() as outer:
        assert not outer.requested
        with catch_sigterm() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process
        assert not outer.requested
        os.kill(os.getpid(), signal.SIGTERM)  # caught again
        assert outer.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_unchecked_signal_is_raised_again():
    """A signal between the last check and the end of the loop."""
    with pytest.raises(Preempted, match="SIGTERM"), raise_on_sigterm():
        with catch_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("passed over")
    assert Preempted.exit_status == 143 and not issubclass(Preempted, Exception)


def test_sigterm_outside_of_training_raises(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted), raise_on_sigterm(), atomic_directory(tmp_path / "new") as part:
        (part / "file").write_text("")
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
        raise AssertionError
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_a_finaliser_is_not_lost():
    """Python drops exceptions raised there, and in callbacks of the garbage collector, of which JAX has one."""
    before = sys.unraisablehook

    class Dying:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10_000):
                pass

    with pytest.raises(Preempted, match="SIGTERM"), raise_on_sigterm():
        dying = Dying()
        del dying
        threading.Event().wait(20)
        raise AssertionError("lost")
    assert sys.unraisablehook is before


def test_other_threads_do_not_handle_the_signal():
    seen = []

    def ask() -> None:
        with catch_sigterm() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


# Networks

MLP = Architecture("mlp", {"num_classes": 10}, {}, (), (8, 8, 1))
INFO = {"dataset": "digits", "mean": [0.3], "accuracy": 0.5}


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("networks") / "network"
    shapes = jax.eval_shape(MLP.module().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    rng = np.random.default_rng(0)  # to compile `init` takes seconds
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    save_network(directory, MLP, variables, INFO)
    return directory, variables


@pytest.fixture
def copy(tmp_path, network) -> Path:
    return Path(shutil.copytree(network[0], tmp_path / "network"))


def reseal(directory: Path, architecture: Any = None, **changes: Any) -> None:
    """Writes changed JSON with matching digests, as an attacker would."""
    payload = json.loads((directory / "network.json").read_text())["payload"] | changes
    if architecture is not None:
        (directory / "architecture.json").write_text(json.dumps(architecture))
        payload["architecture"] = files.json_digest(architecture)
    (directory / "network.json").write_text(json.dumps(files.seal(payload)))


def test_a_network_is_loaded_by_another_process(network, tmp_path, python):
    directory, variables = network
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys, numpy as np; from kdsearch_jax.storage.networks import load_network\n"
        "module, variables, architecture, info = load_network(sys.argv[1])\n"
        "np.save(sys.argv[3], module.apply(variables, np.load(sys.argv[2]))); print(architecture.model, info)"
    )
    command = [python, "-W", "error", "-c", script, directory, tmp_path / "images.npy", tmp_path / "logits.npy"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert printed.stdout == f"mlp {INFO}\n"
    assert printed.stderr == ""
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), MLP.module().apply(variables, images), atol=1e-6)
    assert_equal(load_network(directory)[1], variables)


def test_round_trip_of_empty_arrays_and_odd_names(tmp_path):
    variables = {"params": {"a/b%": {"cut": np.zeros((3, 0, 4), np.float32)}, "dense": np.ones((2, 2), np.float32)}}
    flat = arrays.flatten(variables)
    save_network(tmp_path / "network", MLP, variables, {})
    leaves = networks._read_network_json(tmp_path / "network" / "network.json")["leaves"]
    assert_equal(networks._read_arrays(tmp_path / "network" / "variables", leaves), flat)
    assert_equal(arrays.unflatten(flat), variables)


def test_networks_are_replaced_atomically(copy, network, monkeypatch):
    _, variables = network
    other = jax.tree.map(lambda x: x + 1, variables)
    (copy / "student.safetensors").write_text("belongs to the old one")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_network(copy, MLP, other, INFO)
    with pytest.raises(ValueError, match="^info "):
        save_network(copy, MLP, other, {"x": object()}, overwrite=True)
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"No space left"),
    ):
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        save_network(copy, MLP, other, INFO, overwrite=True)
    assert_equal(load_network(copy)[1], variables)
    assert (copy / "student.safetensors").exists()
    (copy.parent / ".network.dead.tmp").mkdir()  # of a process that was killed
    save_network(copy, MLP, other, {"second": True}, overwrite=True)
    assert_equal(load_network(copy)[1], other)
    assert load_network(copy)[3] == {"second": True}
    assert [path.name for path in copy.parent.iterdir()] == ["network"]
    assert not (copy / "student.safetensors").exists()


def test_other_directories_are_never_replaced(tmp_path, network):
    _, variables = network
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match="not overwritten"):
        save_network(tmp_path, MLP, variables, INFO, overwrite=True)
    assert (tmp_path / "precious").exists()


def test_flipped_bytes_in_a_network_are_detected_or_harmless(copy, network):
    chance = random.Random(0)
    for path in files_of(copy):
        content = path.read_bytes()
        for _ in range(4):
            flip(path, chance.randrange(len(content)), chance.randrange(8))
            try:
                _, variables, architecture, info = load_network(copy)
            except ValueError as error:
                assert str(copy) in str(error) or "architecture" in str(error)
                assert "\n" not in str(error)
            else:
                assert_equal(variables, network[1])
                assert (architecture, info) == (MLP, INFO)
            path.write_bytes(content)


def test_a_flipped_weight_is_named(copy):
    data = max(files_of(copy / "variables"), key=lambda path: path.stat().st_size)
    flip(data, data.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"\'params/dense\d?/kernel\'"):
        load_network(copy)


@pytest.mark.parametrize("missing", ["architecture.json", "network.json", "variables"])
def test_a_missing_part_is_named(copy, missing):
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_network(copy)


def test_a_missing_directory_is_named(copy):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_network(copy / "nowhere")
    copy.rename(copy.with_name(".network.dead.old"))  # killed between the two renames of a replacement
    with pytest.raises(FileNotFoundError, match=r"rename .*\.network\.dead\.old"):
        load_network(copy)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "another"}, "network.json"),
        ({"info": []}, "info"),
        ({"leaves": {"params/dense/bias": {"shape": [-1], "dtype": "float32", "sha256": ""}}}, "params/dense/bias"),
        ({"leaves": {"params/dense/bias": {"shape": [2], "dtype": "O", "sha256": ""}}}, "params/dense/bias"),
        # 4 EB that would be allocated, had it not been compared with the size of the files
        ({"leaves": {"params/dense/bias": {"shape": [10**6] * 3, "dtype": "float32", "sha256": ""}}}, "bytes"),
        ({"leaves": {"params/x": {"shape": [2], "dtype": "float32", "sha256": ""}}}, "is damaged"),
        ({"leaves": {}}, "is damaged"),
    ],
)
def test_untrusted_network_json_is_checked(copy, changes, problem):
    reseal(copy, **changes)
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_network(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "no_such_model"},
        {"model": "no_such_package:factory"},
        {"model": 3},
        {"arguments": {"num_classes": -1}},
        {"arguments": {"num_classes": 10, "unknown": 1}},
        {"arguments": {"num_classes": 11}},
        {"arguments": {"num_classes": 10, "hidden": [1 << 40]}},
        {"layers": {"dense": {"features": 3}}},
        {"layers": {"dense": {"features": 10**30}}},
        {"layers": {"dense": {"parent": 3}}},
        {"input_shape": []},
        {"input_shape": [8]},
        {"input_shape": [8, 8, 1 << 20]},
        {"dropped": [["x"]]},
        {"format": 2},
    ],
    ids=str,
)
def test_untrusted_architectures_are_checked(copy, change):
    reseal(copy, architecture=json.loads((copy / "architecture.json").read_text()) | change)
    with pytest.raises(ValueError) as caught:
        load_network(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "null", '"text"', "\x00"])
@pytest.mark.parametrize("name", ["architecture.json", "network.json"])
def test_invalid_json_is_refused_in_one_line(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        load_network(copy)
    assert "\n" not in str(caught.value)
