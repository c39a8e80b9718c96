"""Every file in examples/ runs, and does what it says."""

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

CALLS = {
    "nnx_loop": "student, macs = main(24); assert macs <= 0.5 and type(student.module).__name__ == 'Net'",
    "linen_loop": "student, macs = main(24); assert macs <= 0.5 and student.difference <= 1e-5",
    "scanned_loop": "student, share = main(40); assert share <= 0.4",
    "distillation_trainer": "student, macs = main(40); assert macs <= 0.4",
    "rounds": "costs = main(2, 10); assert all(b <= 0.7 * a for a, b in zip(costs, costs[1:]))",
    "sharded_loop": (
        "import jax, numpy as np; found = main(30); assert jax.device_count() == 8; "
        "one, student = found['one device']; "
        "assert all(np.abs(gates - one).max() < 1e-4 and each.macs == student.macs for gates, each in found.values())"
    ),
}


def test_every_example_is_run():
    assert set(CALLS) == {path.stem for path in EXAMPLES.glob("*.py")} - {"data"}


@pytest.mark.parametrize("name", CALLS)
def test_an_example(name, python, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); from {name} import main; {CALLS[name]}"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8" if name == "sharded_loop" else "1"}
    done = subprocess.run(
        [python, "-W", "error", "-W", "ignore::UserWarning", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
