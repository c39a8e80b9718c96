"""Targets that are not here: names, the text of a program, and real compilations where libtpu is installed."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.registry import build
from kdsearch_jax.pruning import budgets, selection
from kdsearch_jax.pruning.budgets import BudgetError
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs import latency, planning
from kdsearch_jax.runs.config import Experiment, changed
from kdsearch_jax.runs.planning.report import TEACHER, layer_of
from kdsearch_jax.runs.targets import CHIPS, TargetError, compile_for, parse_target
from kdsearch_jax.runs.targets.program_text import read_program
from kdsearch_jax.storage.files import read_sealed

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'kdsearch-jax[tpu-compiler]'",
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("tpu:v5e:2x4", "tpu:v5e:2x4", 8),
        ("TPU:v5e:1x1", "tpu:v5e:1x1", 1),
        ("tpu:v5e:16x16:2", "tpu:v5e:16x16:2", 512),
        ("tpu:v4:2x2x1", "tpu:v4:2x2x1", 4),
        ("tpu:tpu7x:2x2x1", "tpu:tpu7x:2x2x1", 8),
        ("tpu:v5p:4x4x12", "tpu:v5p:4x4x12", 192),
        ("tpu:v5litepod-16", "tpu:v5e:4x4", 16),
        ("tpu:v5p-8", "tpu:v5p:2x2x1", 4),
    ],
)
def test_names_of_slices(text, name, devices):
    target = parse_target(text)
    assert (target.name, target.devices) == (name, devices) and parse_target(target.name) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("tpu:v5:2x4", "v5p"),
        ("v5e:2x4", "tpu:v5e:2x4"),
        ("tpu:v5e", "tpu:v5e:2x2"),
        ("tpu:v5e:3x5", "2x4"),
        ("tpu:v5e:2x4:0", "2x4"),
        ("tpu:v5e:2x4:x", "2x4"),
        ("tpu:v4:2x4", "2x2x1"),
        ("tpu:v5litepod-7", "v5litepod-8"),
        ("gpu:h100", "tpu:v5e:2x4"),
        ("abacus", "tpu:v5e:2x4"),
    ],
)
def test_an_unknown_slice_is_an_error_that_names_what_there_is(text, hint):
    with pytest.raises(TargetError, match=f"--target: '{text}' .*{hint}") as error:
        parse_target(text)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is installed")
def test_without_the_compiler_it_says_what_to_install():
    with pytest.raises(TargetError, match=r"kdsearch-jax\[tpu-compiler\]"):
        parse_target("tpu:v5e:2x4").mesh()


# --- the text of a program --------------------------------------------------------------------------------------------

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
TEXT = f"""HloModule jit_f, is_scheduled=true

%fused (a: bf16[8,20], b: bf16[20,24]) -> f32[8,24] {{
  %a = bf16[8,20]{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[20,24]{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %c = f32[8,24]{{1,0:T(8,128)}} convolution(%a, %b), dim_labels=bf_io->bf, metadata={{op_name="jit(f)/n/dot"}}
}}

%condition (p: (s32[], f32[8,24])) -> pred[] {{
  %p = (s32[]{{:T(128)}}, f32[8,24]{{1,0:T(8,128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %limit = s32[]{{:T(128)}} constant(7)
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %limit), direction=LT
}}

%unknown (p.3: (s32[], f32[8,24])) -> pred[] {{
  %p.3 = (s32[]{{:T(128)}}, f32[8,24]{{1,0:T(8,128)}}) parameter(0)
  ROOT %more = pred[]{{:T(512)}} get-tuple-element(%p.3), index=0
}}

%body (p.1: (s32[], f32[8,24])) -> (s32[], f32[8,24]) {{
  %p.1 = (s32[]{{:T(128)}}, f32[8,24]{{1,0:T(8,128)}}) parameter(0)
  %f = f32[8,24]{{1,0:T(8,128)}} fusion(%x, %y), calls=%fused, metadata={{op_name="jit(f)/n/dot"}}, {CYCLES % 100}
  %r = (f32[16]{{0:T(128)S(1)}}, f32[4]{{0:T(128)}}) all-reduce(%f, %f), replica_groups={{{{0,1}}}}, to_apply=%add
}}

%cheap (p.4: s32[]) -> s32[] {{
  %s = s32[]{{:T(128)}} negate(%p.4), {CYCLES % 3}
}}

%dear (p.5: s32[]) -> s32[] {{
  %t = s32[]{{:T(128)}} negate(%p.5), {CYCLES % 50}
}}

ENTRY %main (x: bf16[8,20], y: bf16[20,24]) -> f32[8,24] {{
  %x = bf16[8,20]{{1,0:T(8,128)(2,1)}} parameter(0)
  %y = bf16[20,24]{{1,0:T(8,128)(2,1)}} parameter(1)
  %w = (s32[]{{:T(128)}}, f32[8,24]{{1,0:T(8,128)}}) while(%x), condition=%condition, body=%body
  %v = (s32[]{{:T(128)}}, f32[8,24]{{1,0:T(8,128)}}) while(%w), condition=%unknown, body=%body
  %q = s32[]{{:T(128)}} conditional(%y), branch_computations={{%cheap, %dear}}
  %k = f32[8,24]{{1,0:T(8,128)}} custom-call(%v), custom_call_target="Mystery"
  ROOT %copy = f32[8,24]{{0,1:T(8,128)}} copy(%k), {CYCLES % 5}
}}
"""


def test_a_program_is_counted_as_often_as_it_runs():
    found = read_program(TEXT)
    assert found.cycles == 7 * 100 + 100 + 5 and found.conditional == 50 and found.loops == 1
    assert found.matrix == {"bf16": [2, 800.0]} and found.not_bf16 == []
    assert found.collectives["all-reduce"] == {"count": 2, "arrays": 4, "bytes": 2 * 80, "small": 2}
    assert found.custom_calls == {"Mystery": 1}
    scope = found.scopes["jit(f)/n/dot"]
    assert scope.cycles == scope.matrix == 800
    assert scope.elements == 2 * (8 * 20 + 20 * 24 + 8 * 24)
    assert scope.padded == 2 * (8 * 128 + 24 * 128 + 8 * 128)  # 20 sublanes take 24, rows of 20 or 24 take 128 lanes


def test_operations_belong_to_the_longest_path_of_a_layer():
    layers = ["block1", "block1/conv", "block10/conv"]
    assert layer_of("jit(update)/while/body/transpose(jvp(Net))/block1/conv/transpose()/conv", layers) == "block1/conv"
    assert layer_of("jit(update)/jvp(Net)/block10/conv/conv_general_dilated", layers) == "block10/conv"
    assert layer_of("jit(update)/jvp(Net)/block1/add", layers) == "block1"
    assert layer_of("jit(update)/jvp(teacher)/Net/block1/conv/dot", layers) == TEACHER


# --- real compilations ------------------------------------------------------------------------------------------------


class Perceptron(nnx.Module):
    """An NNX network with one layer to prune."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(32, 40, rngs=rngs), nnx.Linear(40, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


NETWORKS = {
    "cnn": (lambda: build("small_cnn", {"width": 8, "num_classes": 10}), (8, 8, 1)),
    "vit": (lambda: build("vit", {"patch": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 10}), (8, 8, 1)),
    "nnx": (Perceptron, (32,)),
    "wide": (lambda: build("mlp", {"hidden": [1024, 1024], "num_classes": 10}), (8, 8, 1)),
}


def abstract_run(name: str, examples: int | None = 256, **settings) -> planning.AbstractRun:
    make, shape = NETWORKS[name]
    settings = {
        "run.precision": "bf16",
        "search.batch_size": 64,
        "retrain.batch_size": 64,
        "run.steps_per_dispatch": 2,
        **settings,
    }
    call = CallSpec.of_image(shape) if len(shape) == 3 else CallSpec(("x",), {"x": jax.ShapeDtypeStruct(shape, "f4")})
    module = make()
    keywords = {} if isinstance(module, nnx.Module) else call.keywords(module, train=False)
    return planning.AbstractRun(
        changed(Experiment(), settings), trace(module, *call.example(2), **keywords), call, examples
    )


@needs_compiler
@pytest.mark.parametrize(
    ("name", "step"),
    [("cnn", "search"), ("nnx", "search"), ("vit", "retrain"), pytest.param("vit", "search", marks=pytest.mark.slow)],
)
def test_the_steps_compile_for_a_slice(name, step):
    target = parse_target("tpu:v5e:2x4")
    record = json.loads(json.dumps(planning.plan(abstract_run(name), target, [step])))
    found = record["programs"][step]
    assert found["fits"] and found["per_device"] == 8 and found["bf16"] == 1.0, found["not_bf16"]
    assert found["milliseconds"] > 0 and (found["conditional_cycles"] > 0) == (step == "search")  # λ2's controller
    assert found["collectives"]["all-reduce"]["count"] > 0 and not found["not_estimated"]
    assert sum(layer["share"] for layer in found["layers"].values()) == pytest.approx(1.0)


@needs_compiler
def test_what_does_not_fit_is_reported_and_what_was_compiled_is_not_compiled_again(caplog):
    target = parse_target("tpu:v5e:1x1")
    sharding = NamedSharding(target.mesh(), PartitionSpec())
    double = jax.jit(lambda x: x + x)
    with caplog.at_level("INFO"):
        for _ in range(2):
            small = compile_for(target, double, jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding))
            large = compile_for(target, double, jax.ShapeDtypeStruct((1 << 33,), jnp.float32, sharding=sharding))
    assert sum("compiling" in line for line in caplog.messages) == 2
    assert small.fits and small.cycles > 0 and small.flops == 1024
    assert not large.fits and large.memory["peak"] > target.chip.memory


@needs_compiler
def test_of_a_batch_that_does_not_fit_it_finds_one_that_does():
    run = abstract_run("nnx", **{"run.eval_batch_size": 1 << 28})
    step = planning.plan(run, parse_target("tpu:v5e:1x1"), ["forward"])["programs"]["forward"]
    assert not step["fits"] and step["milliseconds"] is None
    found = step["at_largest_batch"]
    assert found["fits"] and 0 < step["largest_batch"] == found["batch"] <= 1 << 27
    assert found["memory"]["peak"] <= CHIPS["v5e"].memory


@needs_compiler
def test_padding_costs_cycles():
    """Two products take as many cycles at an inner width of 1000 as at 1024, eight lanes of 128, and more at 1032."""
    target = parse_target("tpu:v5e:1x1")
    sharding = NamedSharding(target.mesh(), PartitionSpec())

    def cycles(width: int) -> float:
        shapes = ((4096, 1024), (1024, width), (width, 1024))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        return compile_for(target, jax.jit(lambda x, a, b: x @ a @ b), *arrays).cycles

    narrow, whole, wide = cycles(1000), cycles(1024), cycles(1032)
    assert whole == pytest.approx(narrow, rel=0.02) and wide > 1.05 * whole


@needs_compiler
def test_a_sharded_state_takes_a_share_of_the_memory():
    target, arguments = parse_target("tpu:v5e:2x4"), {}
    for shard in (None, "fsdp"):
        run = abstract_run("wide", **{"run.shard": shard, "teacher.batch_size": 64})
        step = planning.plan(run, target, ["teacher"])["programs"]["teacher"]
        arguments[shard] = step["memory"]["arguments"]
        assert ("all-gather" in step["collectives"]) == (shard == "fsdp")
    assert arguments["fsdp"] < 0.25 * arguments[None]  # the examples, biases and layers of odd sizes stay whole


@needs_compiler
def test_a_budget_on_a_target_is_met_as_compiled(tmp_path):
    module, call = build("mlp", {"hidden": [2048, 2048], "num_classes": 10}), CallSpec.of_image((16, 16, 1))
    variables = module.init(jax.random.key(0), *(np.zeros(x.shape, x.dtype) for x in call.example(2)))
    network = trace(module, *call.example(2), train=False)
    budget = BudgetConfig(macs=None, latency=0.7, batch_size=1024, target="tpu:v5e:1x1")
    record = latency.calibrate(network, variables, budget, call)
    limits = latency.with_measured(budgets.resolve(budget, network.topology), budget, record)
    importance = np.random.default_rng(0).uniform(0.1, 1.0, network.topology.units)
    chosen, verdicts = latency.land(
        lambda bounds: selection.choose(network.topology, bounds, importance), limits, network, variables, budget, call
    )
    assert verdicts["latency"]["within"] and verdicts["latency"]["share"] == pytest.approx(0.95, abs=0.05)
    keep = network.topology.flatten(chosen.keep).astype(float)
    student = latency.sliced_student(network, variables, keep)
    latency.confirm((module, variables), student, budget, call, tmp_path / "measured.json")
    assert read_sealed(tmp_path / "measured.json")["target"] == record["device"] == "tpu:v5e:1x1"


def test_the_target_of_a_budget_is_checked():
    with pytest.raises(ValueError, match=r"budget\.target: 'tpu:v5:1x1'"):
        changed(Experiment(), {"budget.target": "tpu:v5:1x1"})
    budget = BudgetConfig(macs=None, latency=0.5, batch_size=60, target="tpu:v5e:2x4")
    with pytest.raises(BudgetError, match=r"budget\.batch_size: 60 .* give 56"):
        latency.instruments_for(budget).timer({}, 60, CallSpec.of_image((8, 8, 1)))


def test_a_batch_that_does_not_divide_names_the_setting():
    run = abstract_run("nnx", **{"search.batch_size": 60})
    with pytest.raises(TargetError, match=r"search\.batch_size: 60 .* give 56"):
        planning.plan(run, parse_target("tpu:v5e:2x4"), ["search"])
    with pytest.raises(ValueError, match="--programs: 'serch'"):
        planning.plan(run, parse_target("tpu:v5e:2x4"), ["serch"])


@pytest.mark.parametrize("examples", [256, None])
def test_steps_take_and_return_the_state_of_the_loop(examples):
    """Resident or streamed: the update of each stage returns a state like the one that it takes."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for program in abstract_run("nnx", examples).programs().values():
        function, arguments = program.make(mesh, 32)
        outputs = jax.eval_shape(function, *arguments)
        if program.stage is not None:
            assert jax.tree.map(np.shape, outputs[0]) == jax.tree.map(np.shape, arguments[0])
            assert set(outputs[1]) >= {"loss", "gradient_norm"}


def test_chips_have_consistent_peaks():
    """Operations per cycle are a power of two, which is where the clock comes from."""
    for chip in CHIPS.values():
        exponent = np.log2(chip.flops / chip.clock)
        assert abs(exponent - round(exponent)) < 0.02, chip
