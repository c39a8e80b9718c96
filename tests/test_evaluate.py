"""Predictions, scores, times, and the command that prints them."""

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.distill.objective import Objective, Output
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.evaluate import main as evaluate_main
from kdsearch_jax.runs import command_line, evaluation
from kdsearch_jax.storage.networks import save_network

MEAN, STD = (0.4,), (0.3,)


class Spoken(nn.Module):
    """An attribute without a hash, and a mode that must be given."""

    scale: np.ndarray

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1) * self.scale[0] * (2 if train else 1))


def some_variables(module, **arguments):
    """Variables for images of 8x8 pixels, none of them 0 or 1; from NumPy, for `init` takes seconds to compile."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(module.init, **arguments), jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

    def some(leaf):
        values = random.normal(0, 0.3, leaf.shape) if len(leaf.shape) > 1 else random.uniform(0.3, 1.2, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(some, shapes)


@pytest.fixture(scope="module")
def network():
    """A small CNN."""
    module = registry.build("small_cnn", {"num_classes": 10, "width": 4})
    return module, some_variables(module)


@pytest.fixture(scope="module")
def images():
    """101 images: no multiple of anything."""
    return np.random.default_rng(0).integers(0, 256, (101, 8, 8, 1)).astype(np.uint8)


@pytest.fixture
def saved(network, tmp_path):
    """A function that writes a network of the digits and gives its directory."""

    def save(name="network", variables=None, classes=10, **info):
        module = registry.build("small_cnn", {"num_classes": classes, "width": 4})
        architecture = Architecture("small_cnn", {"num_classes": classes, "width": 4}, {}, (), (8, 8, 1))
        if variables is None:
            variables = network[1] if classes == 10 else some_variables(module)
        info = {"dataset": "digits", "num_classes": classes, "mean": list(MEAN), "std": list(STD), **info}
        save_network(tmp_path / name, architecture, variables, info)
        return tmp_path / name

    return save


# --- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 40, 101, 500])
def test_every_example_once_and_in_order(network, images, batch_size):
    module, variables = network
    images = images[:7] if batch_size == 1 else images
    expected = module.apply(variables, (images / np.float32(255) - MEAN[0]) / STD[0])
    found = evaluation.predict(module, variables, images, MEAN, STD, batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(found).max()))


def test_a_module_without_a_hash_predicts(images):
    module = Spoken(np.full(1, 2.0, np.float32))
    with pytest.raises(TypeError):
        hash(module)
    variables = some_variables(module, train=False)
    expected = module.apply(variables, jnp.asarray((images / np.float32(255) - MEAN[0]) / STD[0]), train=False)
    np.testing.assert_allclose(evaluation.predict(module, variables, images, MEAN, STD), expected, atol=1e-4)


def test_predicting_again_compiles_nothing(network, images, caplog):
    module, variables = network
    evaluation.predict(module, variables, images, MEAN, STD, 50)
    with jax.log_compiles():
        # An equal module and other variables: what happens at every evaluation of a run.
        other = jax.tree.map(lambda x: np.asarray(x) + 1, variables)
        evaluation.predict(registry.build("small_cnn", {"num_classes": 10, "width": 4}), other, images, MEAN, STD, 50)
    assert "Compiling jit(forward)" not in caplog.text


def test_eight_devices_predict_as_one(network, images, tmp_path):
    """101 images in batches of 20, which 8 devices cannot share: batches of 24, the last one filled up."""
    code = (
        "import sys; import jax, numpy as np; from kdsearch_jax.runs import evaluation\n"
        "from kdsearch_jax.storage import networks\n"
        "assert jax.device_count() == 8\n"
        "module, variables, _, info = networks.load_network(sys.argv[1])\n"
        "images = np.load(sys.argv[2])\n"
        "np.save(sys.argv[3], evaluation.predict(module, variables, images, info['mean'], info['std'], 20))"
    )
    module, variables = network
    architecture = Architecture("small_cnn", {"num_classes": 10, "width": 4}, {}, (), (8, 8, 1))
    save_network(tmp_path / "network", architecture, variables, {"mean": MEAN, "std": STD})
    np.save(tmp_path / "images.npy", images)
    paths = [str(tmp_path / name) for name in ("network", "images.npy", "logits.npy")]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run([sys.executable, "-c", code, *paths], env=environment, check=True, timeout=120)
    expected = evaluation.predict(module, variables, images, MEAN, STD)
    np.testing.assert_allclose(np.load(paths[2]), expected, atol=1e-6 * np.abs(expected).max())


def measured() -> dict[str, float]:
    """What `measurer` says of values, of 103 examples in batches of 20; by a metric of their numbers, squared; and by
    a loss that is one number a batch, their mean square, "whole"."""
    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=(103, 3)).astype(np.float32), "number": np.arange(103, dtype=np.int32)}
    call = CallSpec(("x",), {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})

    def numbers(outputs, batch):
        return {"square": batch["number"] ** 2, "sum": outputs.sum(-1)}

    task = Objective(call, DistillConfig(), (Output("output", "values"),), metrics=numbers)
    student, teacher = ({"params": {"kernel": random.normal(size=(3, 2)), "bias": np.ones(2)}} for _ in range(2))
    dataset = Dataset("values", *[Split(arrays)] * 3, 0, (), (), ())
    module = nn.Dense(2)
    options = {"batch_size": 20, "teacher": (module, teacher)}
    found = evaluation.measurer(task, module, dataset.test, dataset, **options)(student)
    whole = Objective(
        call, DistillConfig(), (Output("output", "values"),), loss=lambda a, b, _: jnp.square(a - b).mean()
    )
    found["whole"] = evaluation.measurer(whole, module, dataset.test, dataset, **options)(student)["distance"]
    difference = arrays["x"] @ (student["params"]["kernel"] - teacher["params"]["kernel"])
    assert found["whole"] == pytest.approx(np.square(difference).mean(), rel=1e-5)
    return found


def test_two_processes_measure_each_example_once(tmp_path):
    """Four devices share 103 examples of which 3 are left over; each process has the figures of a single one."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[3]); import jax\n"
        "jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n"
        "assert jax.device_count() == 4\n"
        "import test_evaluate; print(json.dumps(test_evaluate.measured()))"
    )
    command = [sys.executable, "-c", code, address]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen([*command, str(rank), str(Path(__file__).parent)], env=environment, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    found = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    alone = measured()
    assert found[0] == found[1] and found[0].keys() == alone.keys() == {"distance", "square", "sum", "whole"}
    assert found[0]["square"] == alone["square"] == (np.arange(103) ** 2).mean()
    assert found[0] == pytest.approx(alone, rel=1e-6)


def test_nothing_to_predict_is_named(network, images):
    with pytest.raises(ValueError, match="images: there are none"):
        evaluation.predict(*network, images[:0], MEAN, STD)
    with pytest.raises(ValueError, match="batch_size: 0"):
        evaluation.predict(*network, images, MEAN, STD, 0)


# --- score ----------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    logits = np.array([[2, 1, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 9]], np.float32)
    labels = np.array([0, 0, 5], np.int32)
    found = evaluation.score(logits, labels, teacher_logits=logits[[0, 1, 0]])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_top5"] == pytest.approx(2 / 3)
    assert found["agreement"] == pytest.approx(2 / 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(probabilities[np.arange(3), labels]).mean(), rel=1e-5)
    p, q = probabilities[0], probabilities[2]
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum() / 3, rel=1e-5)


def test_a_network_agrees_with_itself():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    found = evaluation.score(logits, logits.argmax(-1).astype(np.int32), logits + 3)
    assert found["accuracy"] == found["accuracy_top5"] == found["agreement"] == 1
    assert abs(found["kl"]) < 1e-6


def test_evaluate_is_the_score_of_predictions(network, images):
    labels = np.arange(101, dtype=np.int32) % 10
    found = evaluation.evaluate(*network, Split.of(images, labels), MEAN, STD, batch_size=33)
    logits = evaluation.predict(*network, images, MEAN, STD)
    assert found == pytest.approx(evaluation.score(logits, labels), rel=1e-5)
    assert set(found) == {"loss", "accuracy", "accuracy_top5"}


def test_scores_of_what_does_not_fit_are_refused():
    logits, labels = np.zeros((4, 3), np.float32), np.array([0, 1, 2, 3], np.int32)
    with pytest.raises(ValueError, match="class 3.*3 only"):
        evaluation.score(logits, labels)
    with pytest.raises(ValueError, match=r"teacher_logits \(4, 5\).*\(4, 3\)"):
        evaluation.score(logits, labels % 3, np.zeros((4, 5), np.float32))


# --- time -----------------------------------------------------------------------------------------------------------


def test_a_larger_network_takes_longer():
    """64 times the multiply-accumulates: told apart on any machine."""
    networks = {}
    for name, size in (("large", 1024), ("small", 16)):
        module = registry.build("mlp", {"num_classes": 3, "hidden": [size, size]})
        networks[name] = (module, some_variables(module))
    found = evaluation.measure_latency(networks, (8, 8, 1), batch=32, repeats=5)
    assert list(found) == ["large", "small"] and 0 < found["small"][0] < found["large"][0]
    assert all(low <= median <= high for median, low, high in found.values())


def test_turns_are_to_and_fro_and_as_long_as_the_shortest_call_allows(monkeypatch):
    """Where others' work delays three of the five calls by which it is decided how many make a turn."""
    seen = []

    class Watched(nn.Module):
        title: str

        @nn.compact
        def __call__(self, x):
            def note(x):
                seen.append(self.title)
                if 1 < seen.count(self.title) < 5:
                    time.sleep(0.1)
                return x

            return jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    monkeypatch.setattr(evaluation, "TURN", 0.05)
    turn = evaluation.clock(
        {title: (Watched(title), {"params": {}}) for title in "ab"}, 2, CallSpec.of_image((1, 1, 1))
    )
    orders = []
    for _ in range(2):
        seen.clear()
        seen.extend("ab" * 5)  # none is delayed any more
        turn()
        orders.append("".join(seen[10:]))
    assert orders[0] == "".join(sorted(orders[0])) and orders[1] == orders[0][::-1]
    assert all(orders[0].count(title) > 1 for title in "ab")


# --- command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_evaluate_says(saved, network, capsys):
    other = jax.tree.map(lambda x: 1.5 * x, network[1])
    assert evaluate_main([str(saved()), "--teacher", str(saved("teacher", other))]) == 0
    text = capsys.readouterr().out
    split = load(DataConfig("digits")).test
    teacher_logits = evaluation.predict(network[0], other, split.images, MEAN, STD)
    expected = evaluation.evaluate(*network, split, MEAN, STD, teacher_logits=teacher_logits)
    head, titles, row, teacher = text.splitlines()
    assert head == f"{len(split)} images of digits, test"
    assert titles.split() == ["accuracy", "top", "5", "loss", "KL", "agreement"]
    cells = row.split()
    assert cells[1] == f"{100 * expected['accuracy']:.2f}%" and cells[5] == f"{100 * expected['agreement']:.2f}%"
    assert float(cells[4]) == pytest.approx(expected["kl"], abs=2e-4)
    assert teacher.split()[5] == "100.00%"


def test_another_data_set_of_another_size_is_resized(saved, tmp_path, capsys):
    random = np.random.default_rng(0)
    sizes = {"images": random.integers(0, 256, (60, 12, 12, 1)).astype(np.uint8), "labels": np.arange(60) % 10}
    np.savez(tmp_path / "mine.npz", **sizes)
    assert evaluate_main([str(saved()), "--data", f"npz:{tmp_path / 'mine.npz'}", "--split", "train"]) == 0
    assert "train" in capsys.readouterr().out


def test_another_number_of_classes_is_named(saved):
    with pytest.raises(ValueError, match="tells apart 7 classes, digits has 10"):
        evaluate_main([str(saved(classes=7))])


def test_other_channels_are_named(saved, tmp_path):
    images = np.zeros((60, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(60) % 10)
    with pytest.raises(ValueError, match=r"takes images \(8, 8, 1\).*\(8, 8, 3\).*--data"):
        evaluate_main([str(saved()), "--data", f"npz:{tmp_path / 'mine.npz'}"])


def test_an_unknown_data_set_is_asked_for(saved):
    with pytest.raises(ValueError, match="--data NAME"):
        evaluate_main([str(saved(dataset=None))])


def test_what_is_no_network_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_main([str(tmp_path / "nowhere")])
    with pytest.raises(command_line.UsageError, match="--teachr is not an option.*teacher"):
        evaluate_main([str(tmp_path), "--teachr", "x"])


def test_the_command_fails_in_one_line(tmp_path):
    command = [sys.executable, "-m", "kdsearch_jax.evaluate", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
