"""Budgets of time and memory: the mechanism on made-up devices whose truth is known, and once on this machine."""

from __future__ import annotations

import itertools
import json
from functools import cache

import jax
import numpy as np
import pytest

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning import budgets, selection
from kdsearch_jax.pruning.budgets import BudgetError
from kdsearch_jax.pruning.costs import Estimate, groups_inside_branches
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting.intervals import median_interval
from kdsearch_jax.runs import latency, measurement
from kdsearch_jax.runs.latency import Instruments, calibration, landing, timing

NETWORKS = {
    "mlp": ("mlp", {"hidden": [24, 40]}, (4, 4, 1)),
    "resnet": ("cifar_resnet", {"depth": 8, "width": 8}, (8, 8, 3)),
    "resnet56": ("cifar_resnet", {"depth": 56}, (32, 32, 3)),
}


@cache
def traced_model(name: str):
    """(network, variables, call) of one of NETWORKS."""
    model, arguments, shape = NETWORKS[name]
    module = registry.build(model, {"num_classes": 10, **arguments})
    image = np.zeros((2, *shape), np.float32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, train=False))
    return (
        trace(module, image, train=False),
        jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes),
        CallSpec.of_image(shape),
    )


def size(network) -> float:
    """Parameters and statistics of (module, variables)."""
    return float(sum(leaf.size for leaf in jax.tree.leaves(network[1])))


def device(milliseconds, noise=0.0, own=0.0, seed=0) -> Instruments:
    """A device on which a network takes `milliseconds(size)`, times what a turn suffers, and each call of its own."""
    random = np.random.default_rng(seed)

    def clock(networks, batch, call):
        def turn():
            shared = np.exp(noise * random.normal())
            return {n: milliseconds(size(x)) * shared * np.exp(own * random.normal()) for n, x in networks.items()}

        return turn

    return Instruments(clock, lambda networks, batch, call: {n: 4 * size(x) + 1000 for n, x in networks.items()})


def straight(parameters: float) -> float:
    return 0.2 + 1e-3 * parameters


def chosen(name: str, tools: Instruments, seed=0, **asked):
    """(network, budget, limits, what lands)."""
    network, variables, call = traced_model(name)
    config = BudgetConfig(**{"macs": None, **asked})
    record = json.loads(json.dumps(latency.calibrate(network, variables, config, call, tools)))
    limits = latency.with_measured(budgets.resolve(config, network.topology), config, record)
    importance = np.random.default_rng(seed).exponential(1.0, network.topology.units)
    landed = latency.land(
        lambda bounds: selection.choose(network.topology, bounds, importance),
        limits,
        network,
        variables,
        config,
        call,
        tools,
    )
    return network, config, limits, (landed[0].keep, landed[1])


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_what_is_linear_is_known_exactly(name):
    """Parameters of a network are among what an estimate is made of, statistics are a number for each unit."""
    network, variables, call = traced_model(name)
    topology, random = network.topology, np.random.default_rng(0)
    record = latency.calibrate(network, variables, BudgetConfig(None, latency=0.5), call, device(straight))
    estimate = Estimate(**record["estimates"]["latency"])
    for _ in range(5):
        branches = {g.name for g in topology.groups if g.kind == "branches"}
        keep = {g.name: random.uniform(size=g.size) < 0.6 for g in topology.groups}
        keep |= {g.name: keep[g.name] | (np.arange(g.size) == 0) for g in topology.groups if g.name not in branches}
        flat = topology.flatten(keep).astype(float)
        truth = straight(size(calibration.sliced_student(network, variables, flat)))
        assert estimate.total(topology, flat) == pytest.approx(truth, rel=0.02)


def test_prices_are_what_the_next_unit_adds_and_a_branch_takes_all_that_is_in_it():
    topology = traced_model("resnet")[0].topology
    random = np.random.default_rng(1)
    units = {g.name: random.uniform(0.1, 1.0) for g in topology.groups}
    estimate = Estimate("latency", 100.0, macs=1e-6, params=1e-4, units=units, inside=groups_inside_branches(topology))
    keep = (random.uniform(size=topology.units) < 0.8).astype(float)
    price, starts = estimate.marginal(topology, keep), np.cumsum([0] + [g.size for g in topology.groups])
    for group, start in zip(topology.groups, starts, strict=False):
        more, less = keep.copy(), keep.copy()
        more[start], less[start] = 1.0, 0.0
        difference = estimate.total(topology, more) - estimate.total(topology, less)
        assert (price >= 0).all() and price[start] == pytest.approx(difference, rel=0.3, abs=1e-6)
        if group.kind == "branches":
            assert price[start] == pytest.approx(difference, rel=1e-6)  # nothing but itself multiplies with it
    assert groups_inside_branches(topology)["stage2/block1:branch"] == ("stage2/block1/conv1",)
    assert estimate.total(topology, np.ones(topology.units)) == 100.0
    without = topology.without({g.name: "stay" for g in topology.groups if g.kind == "branches"})
    alike = np.concatenate(
        [np.ones(g.size) if g.kind == "branches" else np.arange(g.size) < 3 for g in topology.groups]
    )
    other = np.concatenate([np.arange(g.size) < 3 for g in without.groups])
    assert estimate.total(without, other) == pytest.approx(estimate.total(topology, alike))


def test_few_networks_are_measured_and_every_group_is_in_one_class():
    topology = traced_model("resnet56")[0].topology
    names = [group.name for groups in calibration.classes(topology) for group in groups]
    assert sorted(names) == sorted(group.name for group in topology.groups)
    keeps = calibration.designs(topology)
    assert len(keeps) <= calibration.CLASSES + 5 and keeps["whole"].all()
    assert (keeps["smallest"] == budgets.smallest_keep(topology)).all()
    for a, b in itertools.combinations(keeps.values(), 2):
        assert (a != b).any()


# --- landing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize(
    "truth",
    [straight, lambda n: 0.3 + 0.02 * n**0.7, lambda n: 0.3 + 0.05 * np.ceil(n / 300)],
    ids=["line", "root", "steps"],
)
def test_the_student_is_within_the_budget_as_measured_and_uses_it(name, truth):
    network, _, _, (keep, found) = chosen(name, device(truth, noise=0.5, own=0.005), latency=0.7)
    _, variables, _ = traced_model(name)
    time = truth(size(calibration.sliced_student(network, variables, network.topology.flatten(keep).astype(float))))
    share = time / (0.7 * truth(size((None, variables))))
    assert 0.85 <= share <= 1.0
    assert found["latency"]["within"] and found["latency"]["share"] == pytest.approx(share, rel=0.01)
    assert found["latency"]["low"] <= found["latency"]["share"] <= found["latency"]["high"] <= 1 - 0.02


def test_all_bounds_hold_at_once():
    network, _, limits, (keep, found) = chosen(
        "resnet", device(straight, own=0.005), macs=0.8, params=0.75, latency=0.9, memory=0.85
    )
    flat = network.topology.flatten(keep).astype(float)
    assert (
        limits.names == ("macs", "params", "latency", "memory")
        and (limits.pressures(network.topology, flat) <= 1.02).all()
    )
    assert found["memory"]["share"] <= 1 and found["latency"]["within"]
    assert limits.pressure(network.topology, np.ones(network.topology.units)) > 1.0


def test_milliseconds_are_milliseconds():
    _, variables, _ = traced_model("mlp")
    whole = 20.0 + straight(size((None, variables)))
    _, _, limits, (_, found) = chosen("mlp", device(lambda n: 20.0 + straight(n)), latency=whole - 0.5)
    assert limits.measured[0][1] == whole - 0.5 and found["latency"]["student"] <= whole - 0.5
    with pytest.raises(BudgetError, match=r"budget\.latency: 50 is not below the teacher's 22[\d.]* ms"):
        chosen("mlp", device(lambda n: 20.0 + straight(n)), latency=50)


def test_less_than_the_smallest_student_takes_is_refused_with_what_that_is():
    with pytest.raises(
        BudgetError, match=r"latency: 0\.1 is out of reach: the smallest student takes [\d.]+ ms here, 0\."
    ):
        chosen("mlp", device(lambda n: 1.0 + 1e-4 * n), latency=0.1)
    with pytest.raises(BudgetError, match=r"memory: 0\.05 is out of reach: the smallest student takes [\d,.e+]+ bytes"):
        chosen("mlp", device(straight), memory=0.05)
    with pytest.raises(BudgetError, match="budget.latency: "):
        chosen("mlp", device(lambda n: 1.0), latency=0.5)


def test_a_limit_that_not_even_the_smallest_student_meets_says_what_that_takes():
    """Measured at calibration and at the landing by devices that do not agree."""
    network, variables, call = traced_model("mlp")
    config = BudgetConfig(None, latency=0.5)
    record = latency.calibrate(network, variables, config, call, device(straight))
    limits = latency.with_measured(budgets.resolve(config, network.topology), config, record)
    ones = np.ones(network.topology.units)
    with pytest.raises(BudgetError, match=r"budget: .*latency [12]\.\d+ of the budget"):
        latency.land(
            lambda bounds: selection.choose(network.topology, bounds, ones),
            limits, network, variables, config, call, device(lambda n: 1.0 + 1e-6 * n),
        )  # fmt: skip


def test_where_the_model_is_wrong_about_all_but_the_smallest_student_that_is_taken():
    network, variables, call = traced_model("mlp")
    config = BudgetConfig(None, latency=0.9, round_to=8)
    record = latency.calibrate(network, variables, config, call, device(straight))
    limits = latency.with_measured(budgets.resolve(config, network.topology), config, record)
    flat = budgets.smallest_keep(network.topology, 8)
    least, ones = size(calibration.sliced_student(network, variables, flat)), np.ones(network.topology.units)
    found, cost = latency.land(
        lambda bounds: selection.choose(network.topology, bounds, ones),
        limits, network, variables, config, call, device(lambda n: 1.0 if n <= least else 2.0 + 1e-6 * n),
    )  # fmt: skip
    assert (network.topology.flatten(found.keep) == flat).all() and cost["latency"]["within"]
    assert found.landed or "latency" in found.note


# --- time -----------------------------------------------------------------------------------------------------------


def turns(student: float, noise: float = 0.0, own: float = 0.0):
    random = np.random.default_rng(0)

    def turn():
        shared = np.exp(noise * random.normal())
        return {"teacher": 2.0 * shared, "student": 2.0 * student * shared * np.exp(own * random.normal())}

    return turn


def test_what_slows_whole_turns_down_does_not_count_and_more_turns_decide_closer_calls():
    far = latency.decide(turns(0.5, noise=1.0, own=0.02), 0.7)
    assert far["within"] and far["turns"] == timing.FIRST and far["share"] == pytest.approx(0.5 / 0.7, rel=0.02)
    near = latency.decide(turns(0.695, noise=1.0, own=0.05), 0.7)
    assert near["turns"] > far["turns"] and near["low"] <= near["share"] <= near["high"]
    assert latency.decide(turns(0.75, noise=1.0, own=0.02), 0.7)["within"] is False


def test_the_interval_holds_the_median_as_often_as_it_says():
    random = np.random.default_rng(0)
    for n in (15, 60):
        inside = [low <= 0 <= high for _, low, high in (median_interval(random.standard_cauchy(n)) for _ in range(400))]
        assert 0.92 <= np.mean(inside) <= 0.995
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_timing_that_is_too_noisy_is_an_error_with_the_spread(monkeypatch):
    monkeypatch.setattr(timing, "MOST", 30)
    network, variables, call = traced_model("mlp")
    config = BudgetConfig(None, latency=0.5)
    with pytest.raises(BudgetError, match="budget.latency: .*noisy"):
        latency.calibrate(network, variables, config, call, device(straight, own=3.0))
    verdict = {"within": None, "low": 0.7, "high": 1.3, "share": 1.0, "turns": 30}
    with pytest.raises(BudgetError, match=r"budget\.latency: .*noisy.*30 turns.* 0\.70 to 1\.30"):
        timing.check_noise("latency", verdict)
    timing.check_noise("latency", {**verdict, "low": 0.99, "high": 1.01})  # narrow, and yet undecided: not noise


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_search_is_calibrated_once_and_reads_the_same_again(tmp_path):
    network, variables, call = traced_model("mlp")
    config, limits = BudgetConfig(0.6, latency=0.7), budgets.resolve(BudgetConfig(0.6), network.topology)
    latency.calibrate_once(network, variables, config, call, tmp_path, device(straight))
    first = latency.add_measured(limits, config, tmp_path)
    latency.calibrate_once(network, variables, config, call, tmp_path, device(lambda n: 7.0 * straight(n)))
    assert latency.add_measured(limits, config, tmp_path) == first and first.names == ("macs", "latency")
    with pytest.raises(BudgetError, match=r"budget\.batch_size: 8 .*64"):
        latency.add_measured(limits, BudgetConfig(0.6, latency=0.7, batch_size=8), tmp_path)
    with pytest.raises(BudgetError, match=r"budget\.memory: .*measured\.json"):
        latency.add_measured(limits, BudgetConfig(0.6, memory=0.7), tmp_path)
    (tmp_path / "measured.json").write_text("{")
    with pytest.raises(BudgetError, match="measured.json"):
        latency.add_measured(limits, config, tmp_path)
    latency.calibrate_once(network, variables, BudgetConfig(), call, tmp_path / "none", device(straight))
    assert not (tmp_path / "none").exists() and latency.add_measured(limits, BudgetConfig(), tmp_path) is limits


def test_the_final_student_is_within_or_the_run_fails(tmp_path):
    network, variables, call = traced_model("mlp")
    teacher = (network.module, variables)
    student = calibration.sliced_student(network, variables, budgets.smallest_keep(network.topology))
    share = straight(size(student)) / straight(size(teacher))
    path = tmp_path / "measured.json"
    with pytest.raises(BudgetError, match=r"the student takes [\d.]+ ms a call, 1\.25\d of the budget .*--resume"):
        latency.confirm(
            teacher, student, BudgetConfig(None, latency=share / 1.25), call, path, device(straight, own=0.01)
        )
    assert not path.exists()
    config = BudgetConfig(None, latency=share * 1.1, memory=0.9)
    latency.confirm(teacher, student, config, call, path, device(straight, own=0.01))
    found = json.loads(path.read_text())
    assert found["latency"]["within"] and found["memory"]["within"] and found["batch_size"] == 64
    latency.confirm(teacher, student, config, call, path, device(lambda n: 1.0))  # it is confirmed
    assert json.loads(path.read_text()) == found


# --- this machine ---------------------------------------------------------------------------------------------------


def test_memory_is_at_least_what_goes_in_and_comes_out_and_falls_with_the_network():
    network, variables, call = traced_model("mlp")
    student = calibration.sliced_student(network, variables, budgets.smallest_keep(network.topology))
    networks = {"teacher": (network.module, variables), "student": student}
    found = measurement.measure_memory(networks, 8, call)
    assert found == measurement.measure_memory(networks, 8, call)
    for name, each in networks.items():
        assert found[name] >= 4 * (size(each) + 8 * 16 + 8 * 10)
    assert found["student"] < found["teacher"] < measurement.measure_memory(networks, 64, call)["teacher"]


def test_on_this_machine_the_student_is_within_or_the_error_says_why(monkeypatch):
    """Real clocks; on a busy machine that they cannot decide is a right answer too."""
    monkeypatch.setattr(timing, "SECONDS", 3.0)
    monkeypatch.setattr(landing, "TRIES", 2)
    try:
        _, _, _, (keep, found) = chosen("mlp", Instruments(), macs=0.5, latency=0.97, memory=0.8, batch_size=32)
    except BudgetError as error:
        assert "budget" in str(error) and any(
            w in str(error) for w in ("noisy", "out of reach", "smallest", "does not change")
        )
        return
    assert found["latency"]["within"] and found["memory"]["share"] <= 1.0
    assert all(mask.any() for mask in keep.values())
