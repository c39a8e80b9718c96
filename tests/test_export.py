"""Exported files compute what the network computes, in another process, or are not written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.export import main as export_main
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.files import DamagedError, json_digest
from kdsearch_jax.storage.networks import load_network, save_network

SHAPE = (8, 8, 1)
# Pruned: the first convolution keeps 5 of its 8 channels, the inner one of the block 3 of 16.
LAYERS = {"stage1/conv": {"features": 5}, "block/conv1": {"features": 3}}
INFO = {"dataset": "digits", "mean": [0.3], "std": [0.4], "class_names": ["é", "b"]}


class FixedBatch(nn.Module):
    """Works for a single batch size, like a `reshape` with a constant."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0] * 2, -1)
        if int(x.shape[0]) > 6:
            x = x * 2
        return nn.Dense(self.num_classes, name="dense")(x.reshape(-1, 64))


class Detector(nn.Module):
    """Returns scores that are small compared with boxes in pixels and a mask."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        x = x.reshape(x.shape[0], -1)
        boxes = 1280 * nn.sigmoid(nn.Dense(4, name="box")(x))
        scores = nn.sigmoid(nn.Dense(self.num_classes, name="score")(x) - 20)
        return {"found": jnp.concatenate([boxes, scores], -1), "masked": scores.at[:, 0].set(-jnp.inf)}


def saved(directory: Path, architecture: Architecture) -> Path:
    """A network with random weights from NumPy, since compiling `init` takes many seconds."""
    images = jax.ShapeDtypeStruct((1, *architecture.input_shape), jnp.float32)
    shapes = jax.eval_shape(architecture.module().init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(0, 0.3, x.shape) if len(x.shape) > 1 else rng.uniform(0.5, 1.5, x.shape)  # noqa: E731
    save_network(directory, architecture, jax.tree.map(lambda x: draw(x).astype(np.float32), shapes), INFO)
    return directory


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "network"
    return saved(directory, Architecture("small_cnn", {"num_classes": 10, "width": 8}, LAYERS, (), SHAPE))


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "out"
    export_formats.export(network, directory)
    return directory


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def test_the_manifest_describes_each_file(network, exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert sorted(path.name for path in exported.iterdir()) == [
        "manifest.json",
        "student.safetensors",
        "student.stablehlo",
    ]
    assert manifest["input"]["shape"] == ["batch", *SHAPE]
    assert manifest["info"] == INFO
    assert Architecture.from_json(manifest["architecture"]) == load_network(network)[2]
    for name, file in manifest["files"].items():
        content = (exported / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert file["difference"] <= export_formats.TOLERANCE


def test_incomplete_exports_are_detected(copy):
    assert export_formats.is_complete_export(copy)
    content = (copy / "student.safetensors").read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        (copy / "student.safetensors").write_bytes(damaged)
        assert not export_formats.is_complete_export(copy)
    (copy / "student.safetensors").write_bytes(content)
    assert export_formats.is_complete_export(copy)
    for name in ("student.stablehlo", "manifest.json"):
        (copy / name).unlink()
        assert not export_formats.is_complete_export(copy)


def test_damaged_stablehlo_is_refused(copy):
    """JAX alone accepts many flipped bits and computes something else."""
    path = copy / "student.stablehlo"
    images, content = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32), path.read_bytes()
    expected = jax.export.deserialize(bytearray(content)).call(images)
    np.testing.assert_array_equal(export_formats.load_stablehlo(path).call(images), expected)
    for at in np.random.default_rng(2).integers(0, len(content), 20):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(DamagedError, match="student.stablehlo"):
            export_formats.load_stablehlo(path)
    path.write_bytes(content)
    for said in ("{}", '{"files": []}', '{"files": {"student.stablehlo": 3}}'):
        (copy / "manifest.json").write_text(said)
        with pytest.raises(DamagedError, match="student.stablehlo"):
            export_formats.load_stablehlo(path)
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json"):
        export_formats.load_stablehlo(path)


def test_the_stablehlo_file_needs_only_jax(network, exported, tmp_path, python):
    module, variables, _, _ = load_network(network)
    images = np.random.default_rng(0).normal(size=(7, *SHAPE)).astype(np.float32)  # a batch size never seen before
    np.save(tmp_path / "images.npy", images)
    use = json.loads((exported / "manifest.json").read_text())["files"]["student.stablehlo"]["use"]
    script = (
        "import sys, numpy as np, jax, jax.export\n"
        f"images = np.load({str(tmp_path / 'images.npy')!r})\n{use}\n"
        f"np.save({str(tmp_path / 'logits.npy')!r}, logits)\n"
        "assert not {'flax', 'kdsearch_jax'} & set(sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-W", "error", "-c", script], cwd=exported, env=environment, check=True)
    expected = np.asarray(module.apply(variables, images))
    difference = np.abs(np.load(tmp_path / "logits.npy") - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()


def test_equal_networks_give_equal_files(network, exported):
    _, variables, architecture, info = load_network(network)
    files = {export_formats.to_safetensors(architecture, variables, info) for _ in range(20)}
    assert files == {(exported / "student.safetensors").read_bytes()}
    (content,) = files
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_safetensors_round_trip(network, exported):
    module, variables, _, _ = load_network(network)
    loaded, arrays = export_formats.load_safetensors(exported / "student.safetensors")
    assert loaded == module
    assert jax.tree.structure(arrays) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, arrays, variables)
    plain = safetensors.numpy.load_file(exported / "student.safetensors")  # as any other program reads it
    assert plain["params/stage1/conv/kernel"].shape == (3, 3, 1, 5)


def test_export_into_the_network_directory(network, tmp_path):
    directory = Path(shutil.copytree(network, tmp_path / "network"))
    manifest = export_formats.export(directory, directory, ["safetensors"])
    assert list(manifest["files"]) == ["student.safetensors"]
    load_network(directory)
    assert export_main([str(directory), "--out", str(directory), "--check", "--formats", "safetensors"]) == 0


def test_every_dtype_and_shape_survives(tmp_path):
    variables = {
        "params": {"a/b": jnp.ones((2, 3), jnp.bfloat16), "cut": jnp.zeros((3, 0))},
        "batch_stats": {"count": jnp.int32(3)},
    }
    architecture = Architecture("mlp", {"num_classes": 2}, {}, (), SHAPE)
    (tmp_path / "file").write_bytes(export_formats.to_safetensors(architecture, variables, {}))
    with pytest.raises(ValueError, match="architecture"):
        export_formats.load_safetensors(tmp_path / "file")
    loaded = safetensors.numpy.load_file(tmp_path / "file")
    assert {name: (x.shape, x.dtype.name) for name, x in loaded.items()} == {
        "params/a%2Fb": ((2, 3), "bfloat16"),
        "params/cut": ((3, 0), "float32"),
        "batch_stats/count": ((), "int32"),
    }


def test_a_file_with_other_outputs_is_detected(network, copy):
    assert export_formats.check(network, copy)["stablehlo"]["difference"] < 1e-5
    module, variables, architecture, info = load_network(network)
    variables["params"]["dense"]["kernel"] = variables["params"]["dense"]["kernel"] * 1.001
    (copy / "student.safetensors").write_bytes(export_formats.to_safetensors(architecture, variables, info))
    (copy / "student.stablehlo").write_bytes(export_formats._to_stablehlo(module, variables, architecture))
    for format in export_formats.FORMATS:
        with pytest.raises(ValueError, match=rf"student.{format} "):
            export_formats.check(network, copy, [format])


def test_each_output_is_checked_by_its_own_scale(tmp_path):
    network = saved(tmp_path / "network", Architecture(f"{__name__}:Detector", {"num_classes": 3}, {}, (), SHAPE))
    export_formats.export(network, tmp_path / "out", trust_code=True)
    module, variables, architecture, _ = load_network(network, trust_code=True)
    variables["params"]["score"]["kernel"] = variables["params"]["score"]["kernel"] * 1.001
    (tmp_path / "out" / "student.stablehlo").write_bytes(export_formats._to_stablehlo(module, variables, architecture))
    with pytest.raises(ValueError, match="student.stablehlo "):
        export_formats.check(network, tmp_path / "out", ["stablehlo"], trust_code=True)


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    network = saved(tmp_path / "network", Architecture(f"{__name__}:FixedBatch", {"num_classes": 3}, {}, (), SHAPE))
    with pytest.raises(ValueError, match="stablehlo .*safetensors"):
        export_formats.export(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="format 'onnx' .*safetensors, stablehlo"):
        export_formats.export(network, tmp_path / "out", ["onnx"])
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        export_formats.export(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_check_keeps_the_previous_files(network, copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    broken = Path(shutil.copytree(network, copy.parent / "network"))
    _, variables, architecture, info = load_network(broken)
    scaled = jax.tree.map(lambda x: x * np.float32("nan"), variables)
    save_network(broken, architecture, scaled, info, overwrite=True)
    problem = "failed its check in a fresh process: ValueError: the outputs of .* are not finite"
    with pytest.raises(ValueError, match=problem):
        export_formats.export(broken, copy, ["safetensors"])
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


# Untrusted files


def rewritten(path: Path, **metadata: str) -> None:
    """The same arrays with other metadata and a matching digest, as an attacker would write them."""
    with safetensors.safe_open(path, framework="numpy") as file:
        new = {**file.metadata(), **metadata}
    new["sha256"] = json_digest({name: value for name, value in new.items() if name != "sha256"})
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, new)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"architecture": "{"}, "cannot be loaded: Expecting property name"),
        ({"architecture": "[" * 100_000}, "nested"),
        ({"architecture": "{}"}, "format None"),
        (
            {"architecture": json.dumps(Architecture("mlp", {"num_classes": 2}, {}, (), SHAPE).to_json())},
            "architecture",
        ),
        ({"architecture": json.dumps(Architecture("none", {}, {}, (), SHAPE).to_json())}, "model 'none' is unknown"),
        ({"leaves": "[]"}, "its arrays are not those that were saved"),
        ({"leaves": "{}"}, "its arrays are not those that were saved"),
    ],
)
def test_untrusted_metadata_is_checked(copy, metadata, problem):
    rewritten(copy / "student.safetensors", **metadata)
    with pytest.raises(ValueError, match=problem) as caught:
        export_formats.load_safetensors(copy / "student.safetensors")
    assert "\n" not in str(caught.value)


def test_damaged_metadata_is_refused(copy):
    path = copy / "student.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        changed = {**file.metadata(), "info": "{}"}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, changed)
    with pytest.raises(ValueError, match="digest"):
        export_formats.load_safetensors(path)


def test_other_safetensors_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="is not a file"):
        export_formats.load_safetensors(path)
    safetensors.numpy.save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ValueError, match="architecture"):
        export_formats.load_safetensors(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")  # a header of 4 EB
    with pytest.raises(ValueError, match="cannot be loaded"):
        export_formats.load_safetensors(path)


def test_flipped_bytes_in_safetensors_are_detected_or_harmless(copy, network):
    path, chance = copy / "student.safetensors", random.Random(0)
    content = path.read_bytes()
    variables = load_network(network)[1]
    for position in [*range(8), *(chance.randrange(len(content)) for _ in range(25))]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            _, arrays = export_formats.load_safetensors(path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            jax.tree.map(np.testing.assert_array_equal, arrays, variables)


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_truncated_file_is_refused_in_one_line(network, copy, size):
    for format in export_formats.FORMATS:
        path = copy / f"student.{format}"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            export_formats.check(network, copy, [format])
        assert "\n" not in str(caught.value)
