"""What processes of a run agree on: two of them, asked everything in turn."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

from kdsearch_jax.runs.consensus import check_alike, check_shared, first_says

ASKED = """
import json, sys, threading
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from kdsearch_jax.runs.consensus import check_alike, check_shared, first_says

rank, shared, own = int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
answers = {}

def ask(name, question):
    try:
        answers[name] = question()
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"

def refuse():
    raise KeyError("no such thing")

ask("says", lambda: [first_says(lambda: rank == 0), first_says(lambda: rank == 1)])
ask("refuses", lambda: first_says(refuse))
ask("alike", lambda: check_alike({"data": lambda: "a", "settings": lambda: "b"}))
ask("unlike", lambda: check_alike({"data": lambda: "a", "settings": lambda: f"b{rank}"}))
ask("shared", lambda: check_shared(shared, "config.json"))
ask("absent", lambda: check_shared(shared, "nothing"))
if rank == 1:
    threading.Timer(0.5, (own / "config.json").write_text, ["{}"]).start()  # as of a slow file system
ask("late", lambda: check_shared(own, "config.json"))
if rank == 1:
    (own / "config.json").write_text("[]")
ask("apart", lambda: check_shared(own, "config.json", patience=0.3))
print(json.dumps(answers))
"""


def test_two_processes_agree_or_both_refuse(tmp_path: Path, python: str) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    (tmp_path / "0" / "config.json").write_text("{}")
    both = [
        subprocess.Popen(
            [python, "-c", ASKED, address, str(rank), str(tmp_path), str(tmp_path / str(rank))],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    zero, one = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both)
    for answers in (zero, one):
        assert answers["says"] == [True, False]
        assert answers["alike"] is answers["shared"] is answers["absent"] is answers["late"] is None
        assert answers["unlike"].startswith("ValueError: settings: process 1 has another than process 0; start all by")
        assert "process 1 has another config.json there than process 0; give a --workdir" in answers["apart"]
    assert zero["refuses"] == "KeyError: 'no such thing'"
    assert one["refuses"] == "ValueError: refused by process 0, see its message"


def test_a_single_process_agrees_with_itself(tmp_path: Path) -> None:
    def never() -> str:
        raise AssertionError("there is nobody to compare with")

    assert first_says(lambda: True)
    check_alike({"data": never})
    check_shared(tmp_path, "nothing")
