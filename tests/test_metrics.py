"""Metrics on disk and on the screen, and metrics per example."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from kdsearch_jax.data.progress import Progress
from kdsearch_jax.distill.metrics import agreement, kl_to_teacher, top_k
from kdsearch_jax.training.metrics import MetricsWriter


def rows(directory: Path) -> list[dict]:
    """The rows of metrics.jsonl, by a reader that takes no NaN: `json` alone would."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path) -> list:
    """All TensorBoard events, file after file."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((directory / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(directory: Path) -> list[tuple[int, str, float]]:
    return [(e.step, v.tag, v.simple_value) for e in events(directory) for v in e.summary.value]


# --- MetricsWriter --------------------------------------------------------------------------------------------------


def test_rows_are_written_at_once_to_both_files(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(10, {"loss": 1.5, "alive": 7})
        (row,) = rows(tmp_path / "run")
        writer.write(20, {"loss": np.float32(0.25), "accuracy": jnp.float32(0.5)})
    assert row.pop("time") > 1e9
    assert row == {"step": 10, "loss": 1.5, "alive": 7}
    assert [r["step"] for r in rows(tmp_path / "run")] == [10, 20]
    assert scalars(tmp_path / "run") == [
        (10, "loss", 1.5), (10, "alive", 7.0), (20, "loss", 0.25), (20, "accuracy", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), None])
def test_values_that_are_not_finite_become_null(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": value, "accuracy": 0.5})
    assert rows(tmp_path)[0]["loss"] is None
    assert scalars(tmp_path) == [(1, "accuracy", 0.5)]


@pytest.mark.parametrize("values", [{"step": 3}, {"time": 1.0}, {"loss": "low"}, {"loss": np.zeros(2)}])
def test_invalid_values_are_refused(tmp_path, values):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=f"values: '{next(iter(values))}'"):
        writer.write(1, values)
    assert rows(tmp_path) == []


def test_a_resumed_run_continues_at_its_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "los')  # a process that was killed
    with MetricsWriter(tmp_path, start_step=20) as writer:
        writer.write(30, {"loss": -30})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(10, 10), (20, 20), (30, -30)]
    purges = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert purges[-1] == 21  # TensorBoard hides earlier events from there on
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("damage", [b'{"step": 20, "loss": 1}', b"\xff\xfe\n", b"[]\n", b'{"loss": 1}\n', b"\n",
                                    b'{"step": "a"}\n', b'{"step": null}\n', b"[" * 100_000 + b"\n"])  # fmt: skip
def test_damaged_lines_do_not_stop_a_resumed_run(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10, "loss": 1}\n' + damage)
    MetricsWriter(tmp_path, start_step=20).close()
    assert rows(tmp_path) == [{"step": 10, "loss": 1}]


def test_a_new_run_deletes_old_rows(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(0, {"loss": 3.0})
    assert len(rows(tmp_path)) == 1


def test_an_error_closes_the_files(tmp_path):
    with pytest.raises(KeyError), MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        raise KeyError
    writer.close()
    assert scalars(tmp_path) == [(1, "loss", 1.0)]
    with pytest.raises(ValueError, match="closed"):
        writer.write(2, {"loss": 1.0})


def test_a_full_disk_names_the_file(tmp_path, python):
    code = (
        "import sys; from kdsearch_jax.training import metrics, tensorboard\n"
        "rows, shown = (metrics.MetricsWriter(sys.argv[1] + name) for name in ('/rows', '/shown'))\n"
        "rows._file = open('/dev/full', 'a', buffering=1)\n"
        "shown._events._records._writer, tensorboard._FLUSH_INTERVAL = open('/dev/full', 'wb'), 0\n"
        "for writer in (rows, shown):\n"
        "    for call in (lambda: writer.write(1, {'loss': 1.0}), writer.close):\n"
        "        try: call()\n"
        "        except OSError as error: print(error)\n"
    )
    done = subprocess.run([python, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("No space left on device") == 4
    for name in ("rows/metrics.jsonl", "shown/tensorboard/events"):
        assert done.stdout.count(str(tmp_path / name)) == 2


# --- Progress -------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_limited_and_end_with_the_last():
    clock, stream = Clock(), io.StringIO()
    with Progress("search", 100, stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.25  # 4 steps a second, 25 seconds in all
            progress.update(step, {"loss": 1 / step, "accuracy": None})
    assert stream.getvalue().splitlines() == [
        "search 40/100 4 steps/s · 0:15 left · loss 0.025 · accuracy none",
        "search 80/100 4 steps/s · 0:05 left · loss 0.0125 · accuracy none",
        "search 100/100 4 steps/s · 0:25 · loss 0.01 · accuracy none",
    ]


def test_a_resumed_stage_is_timed_from_where_it_resumed():
    clock, stream = Clock(), io.StringIO()
    with Progress("retrain", 20_000, 10_000, stream=stream, clock=clock, interval=0) as progress:
        clock.now += 2
        progress.update(10_100, {})
    assert stream.getvalue() == "retrain 10100/20000 50 steps/s · 3:18 left\n"


def test_the_rate_is_that_of_the_last_half_minute():
    """A slow start, such as compilation, soon has no effect."""
    clock, stream = Clock(), io.StringIO()
    with Progress("teacher", 4_000, stream=stream, clock=clock, interval=1e9) as progress:
        clock.now += 500
        progress.update(1, {})
        for step in range(2, 1_002):
            clock.now += 0.1
            progress.update(step, {})
    assert stream.getvalue() == "teacher 1001/4000 10 steps/s · 5:00 left\n"


def test_an_interrupted_stage_prints_its_progress():
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("search", 100, stream=stream, clock=Clock()) as progress:
        progress.update(7, {"loss": 2.0})
        raise KeyError
    assert stream.getvalue() == "search 7/100 loss 2\n"


def test_without_updates_nothing_is_printed():
    stream = io.StringIO()
    with Progress("search", 100, stream=stream):
        pass
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    clock, stream = Clock(), Terminal()
    with Progress("search", 100, stream=stream, clock=clock) as progress:
        clock.now += 10
        progress.update(50, {"loss": 0.125})
        clock.now += 10
        progress.update(100, {"loss": 0.0625, "[accuracy]": 0.5})
    shown = stream.getvalue()
    assert "100/100" in shown and "loss 0.0625" in shown and "[accuracy] 0.5" in shown
    assert "━" in shown


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("search", 100, stream=stream, clock=Clock()) as progress:
        progress.update(100, {})
    assert stream.getvalue() == "search 100/100\n"


# --- per example ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(2, 6), st.booleans())
def test_top_k_is_membership_in_the_sorted_classes(seed, k, classes, ties):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (9, classes)).astype(np.float32) if ties else rng.normal(size=(9, classes))
    labels = rng.integers(0, classes, 9)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    found = top_k(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), k)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, (best == labels[:, None]).any(1))


def test_top_1_is_argmax(key):
    logits = jnp.round(jax.random.normal(key, (200, 5)))  # rounded: with ties
    labels = jax.random.randint(key, (200,), 0, 5)
    np.testing.assert_array_equal(jax.jit(top_k, static_argnums=2)(logits, labels, 1), logits.argmax(-1) == labels)


def test_a_nan_prediction_is_never_correct():
    logits = jnp.asarray([[jnp.nan, 0.0], [jnp.nan, jnp.nan], [0.0, jnp.nan], [1.0, 0.0]])
    assert top_k(logits, jnp.asarray([0, 0, 0, 0]), 5).tolist() == [0, 0, 0, 1]
    assert top_k(jnp.zeros((1, 2)), jnp.asarray([2]), 5).tolist() == [0]  # no such class


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k: 0 "):
        top_k(jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32), 0)


def test_agreement_compares_the_most_likely_classes():
    student = jnp.asarray([[2.0, 1.0], [0.0, 1.0], [5.0, 5.0]])
    teacher = jnp.asarray([[9.0, -1.0], [1.0, 0.0], [1.0, 0.0]])
    assert agreement(student, teacher).tolist() == [1, 0, 1]
    assert agreement(student, teacher).dtype == jnp.float32


def test_kl_to_teacher_is_the_relative_entropy_of_the_student(key):
    student, teacher = 3 * jax.random.normal(key, (2, 20, 7))
    p, q = softmax(np.float64(teacher), axis=-1), softmax(np.float64(student), axis=-1)
    np.testing.assert_allclose(jax.jit(kl_to_teacher)(student, teacher), rel_entr(p, q).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kl_to_teacher(teacher + 3, teacher), 0, atol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        kl_to_teacher(student, teacher[:, :5])
