"""What benchmarks/scaling.py reads out of a compiled program, and what it reckons from that."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scaling.py"

# As XLA prints them: a tuple with comments that number its parts, a single array, the start of an asynchronous one.
HLO = """
  %a = (f32[64]{0}, f32[64]{0}, /*index=2*/bf16[3,3,64,64]{3,2,1,0}) all-reduce(%x, %y, %z), channel_id=2, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true, to_apply=%region
  %b = f32[]{} all-reduce(%p), channel_id=3, replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%region
  %c = f32[20000]{0} all-gather-start(%q), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
  %d = f32[64]{0} fusion(%a), kind=kLoop, calls=%all-reduce.clone
"""


@pytest.fixture(scope="module")
def scaling():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("scaling_of_benchmarks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its record looks for the names of types
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_collectives_are_counted(scaling):
    found = scaling.collectives(HLO)
    tensor = 2 * 3 * 3 * 64 * 64
    assert found == {
        "all-reduce": {
            "count": 2, "arrays": 4, "bytes": 2 * 256 + tensor + 4, "small": 1, "largest": tensor,
            "groups": ["mesh['axis_0'=8] {'axis_0'}", "{{0,1},{2,3}}"],
        },
        "all-gather": {
            "count": 1, "arrays": 1, "bytes": 80_000, "small": 0, "largest": 80_000, "groups": ["[1,8]<=[8]"]
        },
    }  # fmt: skip


def test_at_the_batch_of_the_limit_input_takes_as_long_as_the_rest(scaling):
    counts = {"flops": 3e12, "bytes": 3e10, "batch": 128, "collectives": {"all-reduce": {"bytes": 1e8, "small": 90}}}
    for machine in scaling.MACHINES.values():
        slow = next(rate for rate in range(400, 0, -1) if scaling.input_limit(counts, machine, rate) < math.inf)
        limit = scaling.input_limit(counts, machine, slow)
        each = scaling.times(counts, machine, limit, slow)
        assert each["input"] == pytest.approx(max(each["matrix"], each["memory"]) + each["exchange"])
        assert scaling.step(scaling.times(counts, machine, 2 * limit, slow)) > 2 * each["input"] * (1 - 1e-9)


@pytest.mark.slow
def test_a_step_exchanges_its_gradient_and_the_statistics_and_nothing_else(tmp_path):
    """By all-reduces over all 8 devices: parameters once, three numbers a channel of BatchNorm, and the metrics."""
    argv = ["--depth", "18", "--size", "32", "--batch", "16", "--steps", "search", "--out", tmp_path / "counts.json"]
    subprocess.run([sys.executable, SCRIPT, *map(str, argv)], check=True, timeout=600, capture_output=True)
    found = json.loads((tmp_path / "counts.json").read_text())["search"]
    assert list(found["collectives"]) == ["all-reduce"]
    metrics = 3  # loss, accuracy, agreement
    expected = 4 * (found["parameters"] + 3 * found["statistics"] // 2 + metrics)
    assert found["collectives"]["all-reduce"]["bytes"] == expected
    assert len(found["collectives"]["all-reduce"]["groups"]) == 1
