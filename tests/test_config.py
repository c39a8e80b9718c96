"""Settings: what may be said, how a wrong one is refused, and that none is lost on the way to a file and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.runs import config
from kdsearch_jax.runs.config import Experiment, ModelConfig
from kdsearch_jax.training.settings import StageConfig


def changed(key: str, value: object) -> Experiment:
    """The default experiment with one setting changed."""
    stage, _, name = key.rpartition(".")
    if not stage:
        return dataclasses.replace(Experiment(), **{name: value})
    return dataclasses.replace(
        Experiment(), **{stage: dataclasses.replace(getattr(Experiment(), stage), **{name: value})}
    )


WRONG = [
    ("name", "a/b"),
    ("name", ""),
    ("model.name", ""),
    ("model.arguments", {"depth": object()}),
    ("model.arguments", {"rate": float("nan")}),
    ("data.name", ""),
    ("data.validation", 0.0),
    ("data.validation", 1.0),
    ("data.image_size", 0),
    ("data.crop", -1),
    ("data.flip", 1),
    ("data.train_limit", 0),
    ("data.framing", "fit"),
    ("data.least_area", 0.0),
    ("data.stream", 1),
    ("data.workers", -1),
    ("data.prefetch", 0),
    ("teacher.steps", -1),
    ("teacher.steps", 1.5),
    ("teacher.steps", True),
    ("search.batch_size", 0),
    ("search.optimizer", "adam"),
    ("search.learning_rate", 0.0),
    ("search.learning_rate", float("nan")),
    ("search.momentum", 1.0),
    ("search.momentum", -0.1),
    ("search.weight_decay", -1e-4),
    ("retrain.boundaries", (0.7, 0.5)),
    ("retrain.boundaries", (0.5, 1.5)),
    ("retrain.decay", 0.0),
    ("retrain.warmup", 400),
    ("retrain.clip", 0.0),
    ("retrain.ema", 1.0),
    ("gates.kinds", ("channel",)),
    ("gates.kinds", ()),
    ("gates.include", ()),
    ("gates.penalty", "two"),
    ("gates.importance_decay", 1.0),
    ("gates.sharpness", 0.0),
    ("gates.ramp", 0.0),
    ("gates.lambda2", -1.0),
    ("distill.temperature", 0.0),
    ("distill.cross_entropy", 1.1),
    ("distill.direction", "backward"),
    ("budget.macs", 0.0),
    ("budget.macs", -1.0),
    ("budget.macs", 1.5),
    ("budget.params", float("inf")),
    ("budget.round_to", 0),
    ("baselines", ("uniform", "uniform")),
    ("baselines", ("random",)),
    ("run.seed", -1),
    ("run.precision", "fp16"),
    ("run.steps_per_dispatch", 0),
    ("run.checkpoint_every", 0),
    ("run.checkpoint_share", 0.0),
    ("run.evaluate_every", 0),
    ("run.keep", 0),
    ("run.eval_batch_size", 0),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda v: str(v)[:20])
def test_an_impossible_value_is_refused_by_name(key, value):
    with pytest.raises(ValueError) as refusal:
        config.check(changed(key, value))
    assert str(refusal.value).startswith(f"{key}: ")
    assert "\n" not in str(refusal.value)


def test_every_rule_is_about_a_setting():
    for pattern in config.RULES:
        assert any(key == pattern or (pattern[0] == "*" and key.endswith(pattern[1:])) for key in config.SETTINGS), (
            pattern
        )


def test_every_number_has_a_rule():
    free = {"data.mean", "data.std"}  # looked at together
    for key, value in config.flatten(Experiment()).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not key.startswith("model.arguments."):
            assert any(key == p or (p[0] == "*" and key.endswith(p[1:])) for p in config.RULES) or key in free, key


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"budget\.macs, budget\.params, .* are all None"):
        config.check(changed("budget.macs", None))
    with pytest.raises(ValueError, match=r"data\.mean .* data\.std"):
        config.check(changed("data.mean", (0.5,)))
    both = DataConfig(mean=(0.5, 0.5), std=(0.2,))
    with pytest.raises(ValueError, match="as many values"):
        config.check(dataclasses.replace(Experiment(), data=both))


@pytest.mark.parametrize("macs", [1e-6, 0.5, 1.0, 2.0, 41e6, 1])
def test_a_budget_is_a_fraction_or_an_absolute_number(macs):
    config.check(dataclasses.replace(Experiment(), budget=BudgetConfig(macs=macs)))


def test_what_is_left_out_takes_its_default():
    assert config.from_json({}) == Experiment()
    assert config.from_json({"search": {"steps": 7}}) == changed("search.steps", 7)


fractions = st.floats(0.01, 1.0)
stages = st.builds(
    StageConfig,
    steps=st.integers(0, 10**6),
    batch_size=st.integers(1, 4096),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    learning_rate=st.floats(1e-6, 10),
    momentum=st.floats(0, 0.999),
    clip=st.none() | st.floats(1e-3, 1e3),
    boundaries=st.lists(st.floats(0.01, 0.99), unique=True, max_size=4).map(lambda v: tuple(sorted(v))),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**31), 2**31)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
experiments = st.builds(
    Experiment,
    model=st.builds(ModelConfig, arguments=st.dictionaries(st.text("abc", min_size=1), json_values, max_size=3)),
    search=stages,
    budget=st.builds(BudgetConfig, macs=fractions | st.integers(2, 10**9).map(float), round_to=st.integers(1, 16)),
    gates=st.builds(GatesConfig, exclude=st.lists(st.text(max_size=8), max_size=3).map(tuple)),
)


@given(experiments)
def test_a_file_and_back_loses_nothing(experiment):
    back = config.from_json(json.loads(json.dumps(config.to_json(experiment))))
    assert back == experiment
    assert config.differences(back, experiment) == []


@given(experiments, experiments)
def test_differences_are_empty_exactly_for_equals(a, b):
    assert (config.differences(a, b) == []) == (config.flatten(a) == config.flatten(b))


def test_differences_name_the_setting_and_both_values():
    other = dataclasses.replace(changed("search.steps", 7), model=ModelConfig(arguments={"depth": 20, "width": 8}))
    assert config.differences(Experiment(), other) == [
        "search.steps: 400, not 7",
        "model.arguments.width: 'absent', not 8",
    ]


@pytest.mark.parametrize(
    ("values", "nearest"),
    [
        ({"serach": {}}, "search"),
        ({"budget": {"mac": 0.5}}, "budget.macs"),
        ({"run": {"seeds": 1}}, "run.seed"),
        ({"distill": {"temp": 1.0}}, "distill.temperature"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(values, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}"):
        config.from_json(values)


def test_a_wrong_shape_of_a_record_is_refused():
    with pytest.raises(ValueError, match="search: 5 is not a record"):
        config.from_json({"search": 5})
    with pytest.raises(ValueError, match="an experiment: 5 is not a record"):
        config.from_json(5)  # pyright: ignore[reportArgumentType]


class TestLoading:
    def test_by_name_from_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert config.load_experiment("digits").name == "digits"
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "mine.py").write_text(
            "from kdsearch_jax.runs.config import Experiment\n"
            "def experiment(quick=False): return Experiment(name='mine')\n"
        )
        assert config.load_experiment("mine").name == "mine"
        assert {"mine", "digits"} <= set(config.config_names())

    def test_an_unknown_name_lists_what_there_is(self):
        with pytest.raises(ValueError, match=r"did you mean 'cifar10_resnet56'\?.*digits"):
            config.load_experiment("cifar10-resnet56")

    def test_by_file(self, tmp_path):
        path = tmp_path / "mine.py"
        for text, message in [
            ("x = 1", "no function experiment"),
            ("def experiment(quick=False): return 5", "int"),
            (
                "from kdsearch_jax.runs.config import *\n"
                "def experiment(quick=False): return Experiment(budget=BudgetConfig(macs=0))",
                "budget.macs",
            ),
        ]:
            path.write_text(text)
            with pytest.raises(ValueError, match=f"{path}: .*{message}"):
                config.load_experiment(str(path))
        with pytest.raises(FileNotFoundError, match="no such file"):
            config.load_experiment(str(tmp_path / "other.py"))

    def test_by_the_file_of_a_run(self, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config.to_json(changed("search.steps", 7))))
        assert config.load_experiment(str(path)) == changed("search.steps", 7)
        with pytest.raises(ValueError, match="--quick"):
            config.load_experiment(str(path), quick=True)
        path.write_text('{"search": ')
        with pytest.raises(ValueError, match="config.json"):
            config.load_experiment(str(path))


def test_an_experiment_file_may_define_modules_of_its_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import flax.linen as nn\n"
        "from kdsearch_jax.runs.config import Experiment\n"
        "class Net(nn.Module):\n    width: int = 4\n"
        "def experiment(quick: bool = False) -> Experiment:\n    return Experiment(name=f'mine{Net().width}')\n"
    )
    assert config.load_experiment(str(path)).name == "mine4"
