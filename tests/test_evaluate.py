"""Evaluation of networks, their time per call, and the command that prints metrics."""

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
from kdsearch_jax.distill.objective import Objective, Output, classification
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.evaluate import main as evaluate_main
from kdsearch_jax.runs import command_line, evaluation, measurement
from kdsearch_jax.storage.networks import save_network

MEAN, STD = (0.4,), (0.3,)
OBJECTIVE = classification(DistillConfig())


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


def dataset_of(images, labels=None):
    """A data set whose splits are all these images."""
    split = Split.of(images, np.zeros(len(images), np.int32) if labels is None else labels)
    return Dataset("images", split, split, split, 10, MEAN, STD, ())


def predict(module, variables, images, batch_size=500, mean=MEAN, std=STD):
    """Logits of all images."""
    network = evaluation.EvaluatedNetwork(module, variables, CallSpec.of_image((8, 8, 1)), mean, std)
    found = evaluation.evaluate(
        OBJECTIVE, {"network": network}, dataset_of(images), batch_size=batch_size, keep_logits=True
    )
    return found["network"].logits


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 40, 101, 500])
def test_every_example_once_and_in_order(network, images, batch_size):
    module, variables = network
    images = images[:7] if batch_size == 1 else images
    expected = module.apply(variables, (images / np.float32(255) - MEAN[0]) / STD[0])
    found = predict(module, variables, images, batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(found).max()))


def test_a_module_without_a_hash_predicts(images):
    module = Spoken(np.full(1, 2.0, np.float32))
    with pytest.raises(TypeError):
        hash(module)
    variables = some_variables(module, train=False)
    expected = module.apply(variables, jnp.asarray((images / np.float32(255) - MEAN[0]) / STD[0]), train=False)
    np.testing.assert_allclose(predict(module, variables, images), expected, atol=1e-4)


def test_evaluating_again_compiles_nothing(network, images, caplog):
    module, variables = network
    predict(module, variables, images, 50)
    with jax.log_compiles():
        # An equal module and other variables: what happens at every evaluation of a run.
        other = jax.tree.map(lambda x: np.asarray(x) + 1, variables)
        predict(registry.build("small_cnn", {"num_classes": 10, "width": 4}), other, images, 50)
    assert "Compiling jit" not in caplog.text


def test_eight_devices_predict_as_one(network, images, tmp_path):
    """101 images in batches of 20, which 8 devices cannot share: batches of 24, the last one padded."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[4]); import jax, numpy as np, test_evaluate\n"
        "from kdsearch_jax.storage import networks\n"
        "assert jax.device_count() == 8\n"
        "module, variables, _, _ = networks.load_network(sys.argv[1])\n"
        "np.save(sys.argv[3], test_evaluate.predict(module, variables, np.load(sys.argv[2]), 20))"
    )
    module, variables = network
    architecture = Architecture("small_cnn", {"num_classes": 10, "width": 4}, {}, (), (8, 8, 1))
    save_network(tmp_path / "network", architecture, variables, {"mean": MEAN, "std": STD})
    np.save(tmp_path / "images.npy", images)
    paths = [str(tmp_path / name) for name in ("network", "images.npy", "logits.npy")]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run(
        [sys.executable, "-c", code, *paths, str(Path(__file__).parent)], env=environment, check=True, timeout=120
    )
    expected = predict(module, variables, images)
    np.testing.assert_allclose(np.load(paths[2]), expected, atol=1e-6 * np.abs(expected).max())


def test_an_empty_split_and_a_batch_of_none_are_named(network, images):
    with pytest.raises(ValueError, match="^test: "):
        predict(*network, images[:0])
    with pytest.raises(ValueError, match="^batch_size: 0"):
        predict(*network, images, 0)


# --- metrics --------------------------------------------------------------------------------------------------------


def measured() -> dict[str, float]:
    """Metrics of 103 examples in batches of 20: a user's own, and a loss that is one number per batch, "whole"."""
    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=(103, 3)).astype(np.float32), "number": np.arange(103, dtype=np.int32)}
    call = CallSpec(("x",), {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})

    def numbers(outputs, batch):
        return {"square": batch["number"] ** 2, "sum": outputs.sum(-1)}

    def mean_square(student, teacher, batch):
        return jnp.square(student - teacher).mean()

    kernels = [random.normal(size=(3, 2)) for _ in range(2)]
    networks = {
        name: evaluation.EvaluatedNetwork(nn.Dense(2), {"params": {"kernel": k, "bias": np.ones(2)}}, call, (), ())
        for name, k in zip(("student", "teacher"), kernels, strict=True)
    }
    dataset = Dataset("values", *[Split(arrays)] * 3, 0, (), (), ())

    def means(**functions):
        objective = Objective(call, DistillConfig(), (Output("output", "values"),), **functions)
        found = evaluation.evaluate(objective, networks, dataset, batch_size=20, teacher="teacher")
        assert "distance" not in found["teacher"].means
        return found["student"].means

    whole = means(loss=mean_square)["distance"]
    difference = arrays["x"] @ (kernels[0] - kernels[1])
    assert whole == pytest.approx(np.square(difference).mean(), rel=1e-5)
    return {**means(metrics=numbers), "whole": whole}


def test_two_processes_measure_each_example_once(tmp_path):
    """Four devices share 103 examples of which 3 are left over; each process has the metrics of a single one."""
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


class Entry(nn.Module):
    """A network whose logits are its input."""

    @nn.compact
    def __call__(self, x):
        return x


def scores(logits, labels, teacher_logits):
    """Metrics of given logits, compared with a teacher's."""
    shape = jax.ShapeDtypeStruct(logits.shape[1:], jnp.float32)
    networks = {
        name: evaluation.EvaluatedNetwork(Entry(), {"params": {}}, CallSpec((name,), {name: shape}), (), ())
        for name in ("student", "teacher")
    }
    split = Split({"student": logits, "teacher": teacher_logits, "labels": labels})
    dataset = Dataset("logits", split, split, split, logits.shape[1], (), (), ())
    objective = classification(DistillConfig(), networks["student"].call)
    return evaluation.evaluate(objective, networks, dataset, batch_size=2, teacher="teacher")["student"].means


def test_metrics_by_hand():
    logits = np.array([[2, 1, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 9]], np.float32)
    labels = np.array([0, 0, 5], np.int32)
    found = scores(logits, labels, logits[[0, 1, 0]])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_top5"] == pytest.approx(2 / 3)
    assert found["agreement"] == pytest.approx(2 / 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(probabilities[np.arange(3), labels]).mean(), rel=1e-5)
    p, q = probabilities[0], probabilities[2]
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum() / 3, rel=1e-5)


def test_a_network_agrees_with_itself():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    found = scores(logits, logits.argmax(-1).astype(np.int32), logits + 3)
    assert found["accuracy"] == found["accuracy_top5"] == found["agreement"] == 1
    assert abs(found["kl"]) < 1e-6


# --- time -----------------------------------------------------------------------------------------------------------


def test_a_larger_network_takes_longer():
    """64 times the multiply-accumulates: told apart on any machine."""
    networks = {}
    for name, size in (("large", 1024), ("small", 16)):
        module = registry.build("mlp", {"num_classes": 3, "hidden": [size, size]})
        networks[name] = (module, some_variables(module))
    found = measurement.measure_latency(networks, 32, CallSpec.of_image((8, 8, 1)), turns=5)
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

    monkeypatch.setattr(measurement, "TURN", 0.05)
    turn = measurement.turn_timer(
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


def test_the_command_prints_the_metrics(saved, network, capsys):
    other = jax.tree.map(lambda x: 1.5 * x, network[1])
    assert evaluate_main([str(saved()), "--teacher", str(saved("teacher", other))]) == 0
    text = capsys.readouterr().out
    split = load(DataConfig("digits")).test
    logits, teacher_logits = (predict(network[0], variables, split.images) for variables in (network[1], other))
    expected = scores(logits, split.labels, teacher_logits)
    head, titles, row, teacher = text.splitlines()
    assert head == f"{len(split)} images of digits, test"
    assert titles.split() == ["accuracy", "top", "5", "loss", "KL", "agreement"]
    cells = row.split()
    assert cells[1] == f"{100 * expected['accuracy']:.2f}%" and cells[5] == f"{100 * expected['agreement']:.2f}%"
    assert float(cells[4]) == pytest.approx(expected["kl"], abs=2e-4)
    assert teacher.split()[4:] == ["–", "–"]


def test_another_data_set_of_another_size_is_resized(saved, tmp_path, capsys):
    random = np.random.default_rng(0)
    sizes = {"images": random.integers(0, 256, (60, 12, 12, 1)).astype(np.uint8), "labels": np.arange(60) % 10}
    np.savez(tmp_path / "mine.npz", **sizes)
    assert evaluate_main([str(saved()), "--data", f"npz:{tmp_path / 'mine.npz'}", "--split", "train"]) == 0
    assert "train" in capsys.readouterr().out


def test_another_number_of_classes_is_named(saved):
    with pytest.raises(ValueError, match="has 7 classes, digits has 10"):
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
