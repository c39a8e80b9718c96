"""`kdsearch_jax.search(module, variables, data)`: whole runs of small models of every kind, and what it refuses."""

import json
import re
import subprocess
import sys
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, struct

import kdsearch_jax
from kdsearch_jax.pruning import budgets, surgery
from kdsearch_jax.search.__main__ import main as search_main
from kdsearch_jax.storage.arrays import flatten

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEW = {"search_steps": 4, "retrain_steps": 2, "batch_size": 8}
RANDOM = np.random.default_rng(0)


class UNet(nn.Module):
    """Two levels, one skip connection: class logits of every pixel."""

    classes: int = 3

    @nn.compact
    def __call__(self, x, train: bool = False):
        skip = nn.relu(nn.BatchNorm(not train, name="bn")(nn.Conv(8, (3, 3), name="down")(x)))
        low = nn.relu(nn.Conv(12, (3, 3), strides=2, name="bottom")(skip))
        up = nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="up")(low)
        return nn.Conv(self.classes, (1, 1), name="head")(nn.relu(jnp.concatenate([skip, up], -1)))


class TwoHeads(nn.Module):
    """Two inputs, two heads, and a required training mode with an unusual name."""

    @nn.compact
    def __call__(self, tokens, mask, *, explore: bool):
        x = nn.Embed(20, 8, name="embed")(tokens) * mask[..., None]
        x = nn.Dropout(0.1, deterministic=not explore)(nn.relu(nn.Dense(16, name="hidden")(x)))
        return {"tags": nn.Dense(5, name="tags")(x), "box": nn.Dense(2, name="box")(x.mean(1))}


def some(module, *inputs, **keywords):
    """Variables from NumPy, as `init` takes long to compile."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **keywords))
    random = np.random.default_rng(1)

    def draw(path, leaf):
        positive = path[-1].key in ("scale", "var")
        values = random.uniform(0.5, 1.5, leaf.shape) if positive else random.normal(0, 0.3, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


IMAGES = RANDOM.normal(size=(64, 8, 8, 1)).astype(np.float32)
TOKENS = {"tokens": RANDOM.integers(0, 20, (64, 6)), "mask": RANDOM.integers(0, 2, (64, 6)).astype(bool)}


@pytest.fixture(scope="module")
def two_heads():
    return TwoHeads(), some(TwoHeads(), TOKENS["tokens"][:2], TOKENS["mask"][:2], explore=False)


MODES = {"train_kwargs": {"explore": True}, "eval_kwargs": {"explore": False}}


def within(result, share):
    rows = {row["name"]: row for row in result.results["rows"]}
    assert 0.97 * share <= rows["student"]["macs"] / rows["teacher"]["macs"] <= share
    return rows


def test_a_budget_between_possible_students_takes_the_one_below_and_warns_once(tmp_path):
    """Widths are multiples of 8 up to 24: of two budgets 0.5 cannot be met exactly; nor can the uniform students."""
    module = nn.Sequential([nn.Dense(24, name="hidden"), nn.relu, nn.Dense(5, name="out")])
    x = RANDOM.normal(size=(64, 7)).astype(np.float32)
    with pytest.warns(budgets.BudgetWarning) as caught:
        result = kdsearch_jax.search(
            module, some(module, x[:2]), {"x": x}, budget={"macs": [0.68, 0.5], "round_to": 8},
            baselines=("uniform",), workdir=tmp_path / "run", search_steps=8, retrain_steps=2, batch_size=8,
            settings={"run.steps_per_dispatch": 2},
        )  # fmt: skip
    told = [str(w.message) for w in caught if issubclass(w.category, budgets.BudgetWarning)]
    assert len(told) == 2 and "budget.macs 0.5:" in told[0] and "budget.macs 0.3334" in told[0], told
    assert "uniform" in told[1]
    macs = {row["name"]: row["macs"] / (24 * 12) for row in result.results["rows"]}
    assert macs == {"teacher": 1, "at-0.68": 2 / 3, "at-0.5": 1 / 3, "uniform-0.68": 2 / 3, "uniform-0.5": 1 / 3}
    assert "0.3334" in result.report.read_text()


def test_dense_prediction_with_user_loss_and_metric(tmp_path):
    """A U-Net by a pixel-wise loss; its directory names the class, so that another process can load it."""
    module, labels = UNet(), RANDOM.integers(0, 3, (64, 8, 8))

    def loss(student, teacher, batch):
        assert set(batch) == {"images", "labels"} and batch["labels"].shape == student.shape[:-1]
        return jnp.abs(student - teacher).mean((1, 2, 3))

    def metrics(outputs, batch):
        return {"first": (outputs.argmax(-1) == 0).mean((1, 2))}

    result = kdsearch_jax.search(
        module, some(module, IMAGES[:2]), {"images": IMAGES, "labels": labels}, loss=loss, metrics=metrics, budget=0.6,
        workdir=tmp_path / "run", **FEW,
    )  # fmt: skip
    rows = within(result, 0.6)
    for row in rows.values():
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["first"] <= 1
    assert rows["student"]["distance"] > 0 and 0 <= rows["student"]["agreement"] <= 1
    assert result.report.is_file() and "first" in str(result)
    assert result.architecture["model"] == "test_api:UNet"
    assert result.module.apply(result.variables, IMAGES[:2]).shape == (2, 8, 8, 3)
    again, variables = kdsearch_jax.load(tmp_path / "run" / "student")
    np.testing.assert_array_equal(again.apply(variables, IMAGES[:2]), result.module.apply(result.variables, IMAGES[:2]))
    assert (tmp_path / "run" / "student" / "student.stablehlo").is_file()
    # The proof: what the search cut is, weight by weight, the gated network; verify ran inside and is on record.
    proof = json.loads((tmp_path / "run" / "search" / "selection.json").read_text())["proof"]
    assert proof["difference"] <= surgery.TOLERANCE


def test_two_inputs_two_heads_and_keywords(two_heads, tmp_path):
    """No images, no labels, no accuracy; an input by keyword; an unusual name for the training mode."""
    result = kdsearch_jax.search(
        *two_heads, TOKENS, inputs={"tokens": "tokens", "mask": "mask"}, workdir=tmp_path / "run", **MODES, **FEW
    )
    rows = within(result, 0.5)
    assert "accuracy" not in rows["student"] and rows["student"]["distance"] > 0
    compared = json.loads((tmp_path / "run" / "results.json").read_text())["compared"]
    assert "box by squared error over its variance" in compared and "tags by squared error" in compared
    outputs = result.module.apply(result.variables, TOKENS["tokens"][:3], TOKENS["mask"][:3], explore=False)
    assert jax.tree.map(jnp.shape, outputs) == {"tags": (3, 6, 5), "box": (3, 2)}
    page = result.report.read_text()
    assert "Distance" in page and "Top-5" not in page


@struct.dataclass
class Answer:
    """A custom output type, as many packages have."""

    logits: jax.Array
    hidden: jax.Array | None = None


def test_a_module_that_no_file_can_name_is_loaded_with_module(tmp_path):
    class Local(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Answer(nn.Dense(4, name="out")(nn.relu(nn.Dense(12, name="hidden")(x))))

    x = RANDOM.normal(size=(40, 5)).astype(np.float32)
    result = kdsearch_jax.search(
        Local(), some(Local(), x[:2]), {"x": x, "labels": RANDOM.integers(0, 4, 40)}, workdir=tmp_path / "run", **FEW
    )
    assert 0 <= within(result, 0.5)["student"]["accuracy"] <= 1
    assert result.architecture["model"].startswith("given:test_api.") and result.architecture["model"].endswith("Local")
    with pytest.raises(ValueError, match=r"Local.*module="):
        kdsearch_jax.load(tmp_path / "run" / "student")
    module, variables = kdsearch_jax.load(tmp_path / "run" / "student", module=Local())
    logits = module.apply(variables, x).logits
    np.testing.assert_array_equal(logits, result.module.apply(result.variables, x).logits)
    exported = jax.export.deserialize(bytearray((tmp_path / "run" / "student" / "student.stablehlo").read_bytes()))
    np.testing.assert_allclose(exported.call(x)["logits"], logits, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(two_heads, match, *, data=TOKENS, variables=None, **options):
    """Asserts that a call is refused in one line."""
    module, own = two_heads
    with pytest.raises(ValueError, match=match) as caught:
        kdsearch_jax.search(module, variables or own, data, **{**MODES, **FEW, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"loss: .*returned .*\(2, 6, 5\).*one number per example", {"loss": lambda s, t, b: s["tags"] - t["tags"]}),
        (r"loss: .*\(student_outputs, teacher_outputs, batch\) failed: TypeError", {"loss": lambda s, t: 0.0}),
        (r"loss: .* failed: KeyError.*batch has mask, tokens", {"loss": lambda s, t, b: b["labels"]}),
        (
            r"loss: the gradient of .* is not finite",
            {"loss": lambda s, t, b: jnp.sqrt(jnp.square(s["box"] - t["box"]).sum(-1))},
        ),
        (r"loss: .* is nan", {"loss": lambda s, t, b: s["box"].sum() * jnp.nan}),
        (r"metrics: .*\{name: \(2,\)\}", {"metrics": lambda o, b: {"x": o["box"]}}),
        (r"needs 'explore'.*train_kwargs", {"train_kwargs": {}, "eval_kwargs": {}}),
        (r"train_kwargs.*takes no 'exploring'", {"train_kwargs": {"exploring": True}}),
        (r"data.inputs: .*'words'.* mask, tokens", {"inputs": ("tokens", "words")}),
        (r"needs 'mask'", {"inputs": ("tokens",)}),
        (r"unequal lengths \(tokens: 64, mask: 60\)", {"data": {**TOKENS, "mask": TOKENS["mask"][:60]}}),
        (r"data: list", {"data": [1, 2]}),
        (r"budget\.macs: 0\.0 is not possible", {"budget": 0.0}),
        (r"budget", {"budget": 0.01}),
        (r"search\.optimiser is not a setting; did you mean 'search\.optim", {"settings": {"search.optimiser": 1}}),
        (r"distill\.logits: 'boxes' matches no output; .* box, tags", {"settings": {"distill.logits": ["boxes"]}}),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused_in_one_line(two_heads, match, options):
    refused(two_heads, match, **options)


def test_variables_of_another_model_are_listed_on_both_sides(two_heads):
    variables = jax.tree.map(lambda x: x, two_heads[1])
    variables["params"]["dense"] = variables["params"].pop("hidden")
    refused(two_heads, r"needs params/hidden/bias \(16,\).*there is params/dense/bias \(16,\)", variables=variables)


def test_labels_out_of_range_and_outputs_without_a_batch():
    class Odd(nn.Module):
        batched: bool = True

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="out")(nn.relu(nn.Dense(12, name="hidden")(x)))
            return x if self.batched else x.mean(0)

    x = RANDOM.normal(size=(40, 5)).astype(np.float32)
    variables = some(Odd(), x[:2])
    with pytest.raises(ValueError, match="labels: from 0 to 7, but the network has 4 classes"):
        kdsearch_jax.search(Odd(), variables, {"x": x, "labels": np.arange(40) % 8})
    with pytest.raises(ValueError, match=r"outputs: output has the shape \(4,\).*leading axis must be"):
        kdsearch_jax.search(Odd(batched=False), variables, {"x": x})


# --- the name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "imports", ["import kdsearch_jax", "import kdsearch_jax.search",
                "import kdsearch_jax.runs.api, kdsearch_jax.runs.stages", "from kdsearch_jax.search import __main__"]
)  # fmt: skip
def test_search_is_the_function_whatever_was_imported(imports):
    code = f"{imports}\nimport kdsearch_jax\nassert kdsearch_jax.search.__name__ == 'search', kdsearch_jax.search"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_is_light():
    code = "import sys, kdsearch_jax\nassert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_the_example_of_an_own_model_runs(repository, tmp_path):
    """What stands between the markers, in a process of its own, with fewer steps."""
    text = (repository / "docs" / "own_model.md").read_text()
    (code,) = re.findall(r"<!-- own model -->\n+```python\n(.*?)```", text, re.S)
    assert len(code.strip().splitlines()) <= 20
    code = code.replace("budget=0.4", "budget=0.4, search_steps=4, retrain_steps=2")
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout


def test_flat_names(two_heads):
    """What the errors call a parameter is what files call it."""
    assert "params/hidden/kernel" in flatten(two_heads[1])


# --- the command ----------------------------------------------------------------------------------------------------

PACKAGE = """
import flax.linen as nn
import jax.numpy as jnp

class Tagger(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, tokens, mask, deterministic: bool):
        x = nn.Embed(20, 8, name="embed")(tokens) * mask[..., None]
        x = nn.Dropout(0.1, deterministic=deterministic)(nn.relu(nn.Dense(self.width, name="hidden")(x)))
        return nn.Dense(5, name="tags")(x)

def make_net(width: int = 16) -> nn.Module:
    return Tagger(width)

def tagging(student, teacher, batch):
    return (jnp.square(student - teacher).mean(-1) * batch["valid"]).mean(-1)
"""


def test_the_command_with_user_model_data_and_loss(tmp_path, monkeypatch, capsys):
    """A factory that takes no number of classes, weights from Flax's msgpack, tokens out of an npz, a loss by name."""
    (tmp_path / "taggers.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    import taggers  # pyright: ignore[reportMissingImports]

    module = taggers.make_net()
    variables = some(module, TOKENS["tokens"][:2], TOKENS["mask"][:2], deterministic=True)
    (tmp_path / "net.msgpack").write_bytes(serialization.to_bytes(variables))
    np.savez(tmp_path / "mine.npz", tokens=TOKENS["tokens"], valid=TOKENS["mask"])
    argv = [
        "--model", "taggers:make_net", "--teacher", str(tmp_path / "net.msgpack"), "--data", f"npz:{tmp_path}/mine.npz",
        "--data.inputs", "tokens", "mask=valid", "--distill.loss", "taggers:tagging", "--budget.macs", "0.5",
        "--search.steps", "4", "--retrain.steps", "2", "--baselines",
        "--search.batch-size", "8", "--retrain.batch-size", "8", "--workdir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert search_main(argv) == 0
    assert "distance" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["name"] == "own" and config["data"]["crop"] == 0
    student, variables = kdsearch_jax.load(tmp_path / "run" / "student")
    assert student.apply(variables, TOKENS["tokens"], TOKENS["mask"], deterministic=True).shape == (64, 6, 5)
    assert search_main(["--resume", "--workdir", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_several_budgets_give_several_results(tmp_path):
    """By parameters, as `macs` is not asked for."""
    module, x = UNet(), IMAGES
    labels = RANDOM.integers(0, 3, (64, 8, 8))
    sweep = kdsearch_jax.search(
        module, some(module, x[:2]), {"images": x, "labels": labels}, budget={"params": [0.5, 0.7]}, baselines=(),
        search_steps=24, retrain_steps=2, batch_size=8, workdir=tmp_path / "run",
        settings={"run.steps_per_dispatch": 4},
    )  # fmt: skip
    assert sweep.budgets == (0.7, 0.5) and len(sweep) == 2
    total = sweep.results["rows"][0]["params"]
    for result, budget in zip(sweep, sweep.budgets, strict=True):
        params = sum(leaf.size for leaf in jax.tree.leaves(result.variables["params"]))
        assert 0.97 * budget <= params / total <= budget
        assert result.module.apply(result.variables, x[:2]).shape == (2, 8, 8, 3)
    assert "at-0.7" in str(sweep)
    with pytest.raises(ValueError, match="budget: "):
        kdsearch_jax.search(module, some(module, x[:2]), {"images": x, "labels": labels}, budget=[])


def test_a_refusal_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module, data = nn.Dense(3), {"x": np.zeros((20, 4), np.float32)}
    for budget, said in (({"mac": 1}, "budget: .*'mac'.*'macs'"), (0.5, "nothing")):
        with pytest.raises(ValueError, match=said):
            kdsearch_jax.search(module, some(module, data["x"][:2]), data, budget=budget)
    assert not list(tmp_path.iterdir())
