"""Untrusted files run no code, take no more memory than their size, and are refused in one line."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import readers
from benchmarks.fuzz.cases import mutated, replaced
from kdsearch_jax import load
from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.data import datasets, images
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.evaluate import main as evaluate_main
from kdsearch_jax.models.pretrained.torch_files import read_tensors
from kdsearch_jax.runs import command_line
from kdsearch_jax.storage import export_formats, files, safe_readers
from kdsearch_jax.storage.networks import load_network, save_network

SHAPE = (2, 2, 1)
JSON = ("architecture", "models", "config", "network", "huggingface")


@pytest.mark.parametrize("name", readers.READERS)
def test_readers_read_or_refuse(name):
    """Intact files, and files with bytes changed, removed and inserted."""
    contents = readers.examples(name) if name != "json" else [b'{"a": [1, 2.5, null, "x"]}']
    for content in contents:
        readers.READERS[name](content)

    @settings(max_examples=30)
    @given(st.integers(0, 2**32 - 1), st.sampled_from(contents))
    def mutants(seed, content):
        random = np.random.default_rng(seed)
        if name in JSON and seed % 2:
            content = json.dumps(replaced(json.loads(content), random)).encode()
        else:
            content = mutated(content, random)
        readers.READERS[name](content)

    mutants()


@pytest.mark.parametrize("dtype", ["000i4", "3i4", "0003700047209481721172f", "object", "V8", "datetime64", "float33"])
def test_unknown_dtypes_are_refused(dtype):
    """NumPy parses counts in dtype names, and crashes on some."""
    with pytest.raises(ValueError, match="has the unknown dtype"):
        CallSpec.from_json({"arguments": ["x"], "inputs": {"x": f"{dtype}[2]"}, "train": {}, "eval": {}})


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def untrusted_network(tmp_path, monkeypatch):
    """(directory, mark): a network whose package creates the file `mark` when it is imported."""
    mark, name = tmp_path / "mark", f"somebody_s_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        f"import flax.linen as nn\nopen({str(mark)!r}, 'w').close()\n"
        "class Net(nn.Module):\n @nn.compact\n def __call__(self, x):\n  return nn.Dense(3)(x.reshape(len(x), -1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    architecture = Architecture(f"{name}:Net", input_shape=SHAPE)
    variables = architecture.module().init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    save_network(tmp_path / "net", architecture, variables, {})
    (tmp_path / "net.safetensors").write_bytes(export_formats.to_safetensors(architecture, variables, {}))
    del sys.modules[name]
    mark.unlink()
    yield tmp_path / "net", mark
    sys.modules.pop(name, None)


def test_a_package_is_imported_only_with_consent(untrusted_network):
    directory, mark = untrusted_network
    with pytest.raises(ValueError, match="somebody_s_.*--trust-code"):
        load(directory)
    with pytest.raises(ValueError, match="import the package"):
        export_formats.load_safetensors(directory.with_suffix(".safetensors"))
    assert not mark.exists()
    module, variables = load(directory, trust_code=True)
    assert mark.exists()
    assert module.apply(variables, jnp.zeros((2, *SHAPE))).shape == (2, 3)
    load(directory)  # what is imported has run
    export_formats.load_safetensors(directory.with_suffix(".safetensors"))


def test_commands_ask_for_consent(untrusted_network):
    directory, mark = untrusted_network

    with pytest.raises(ValueError, match="--trust-code"):
        evaluate_main([str(directory), "--data", "digits"])
    assert not mark.exists()
    with pytest.raises(ValueError, match="has 3 classes"):
        evaluate_main([str(directory), "--data", "digits", "--trust-code"])
    assert mark.exists()


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "json:loads", "kdsearch_jax.runs.command_line:run"])
def test_only_network_factories_are_called(name):
    with pytest.raises(ValueError, match="is not known to return a network"):
        registry.build(name, {})


def test_unpickling_needs_a_safe_pytorch(tmp_path, monkeypatch):
    old = types.ModuleType("torch")
    vars(old)["__version__"] = "2.5.1+cpu"
    monkeypatch.setitem(sys.modules, "torch", old)
    (tmp_path / "x.pth").write_bytes(b"whatever")
    with pytest.raises(ValueError, match=r"PyTorch 2\.5\.1\+cpu could run code .*; install PyTorch 2\.6 or newer"):
        read_tensors(tmp_path / "x.pth")


# --- memory and time ------------------------------------------------------------------------------------------------


def test_declared_sizes_in_pytorch_files_are_checked(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(ValueError, match="weight is sparse, or declares more numbers than the file has"):
        read_tensors(path)
    torch.save({"weight": torch.zeros(1000)}, path)
    content = io.BytesIO()
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as deflated:
        for member in plain.namelist():
            deflated.writestr(member, plain.read(member))
    path.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="is compressed, and would take"):
        read_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xdd\x7f\xff\xff\xff",
        b"\xdd\x01\x00\x00\x00" + b"\x80" * (1 << 24),  # 16 million dictionaries, a GiB of them
        b"\xc9\x00\x20\x00\x05\x01" + b"\xdd\x00\x20\x00\x00" + b"\x80" * (1 << 21),  # the same within an array
        b"\xc9\xff\xff\xff\xff\x01",
    ],
)
def test_msgpack_values_are_counted_before_reading(tmp_path, content):
    (tmp_path / "x.msgpack").write_bytes(content)
    with pytest.raises(files.DamagedError, match="cannot be read as Flax's msgpack"):
        safe_readers.read_msgpack(tmp_path / "x.msgpack")


def test_orbax_metadata_is_checked_against_a_limit():
    tree = {"a": jax.ShapeDtypeStruct((1000, 1000), jnp.float32), "b": jax.ShapeDtypeStruct((10**6,), jnp.float32)}
    safe_readers.check_declared(tree, 8 * 10**6)
    with pytest.raises(files.DamagedError, match="8000000 .*7999999"):
        safe_readers.check_declared(tree, 8 * 10**6 - 1)


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        for read in (files.read_json, safe_readers.read_safetensors, safe_readers.read_msgpack):
            with pytest.raises(files.DamagedError, match="regular file"):
                read(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            datasets.load(DataConfig(f"npz:{tmp_path / name}"))
        with pytest.raises(FileNotFoundError, match="is not a file"):
            export_formats.load_stablehlo(tmp_path / name)
    with pytest.raises(files.DamagedError, match=r"(pipe|endless) is not a regular file"):
        safe_readers.check_directory(tmp_path)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("vit", {"depth": 10**9}),
        ("vit", {"width": 10**30}),
        ("unet", {"depth": 2048}),
        ("mlp", {"hidden": [8] * 10**5}),
        ("convnext", {"stage_blocks": [10**6], "widths": [8]}),
        ("mobilenet_v2", {"width": 1e300}),
        ("swin", {"mlp_ratio": float("inf")}),
        ("resnext", {"groups": 2**40}),
    ],
)
def test_the_size_of_a_network_is_bounded(model, arguments):
    with pytest.raises(ValueError, match="at most|up to|must be"):
        registry.build(model, {"num_classes": 10, **arguments})


@pytest.mark.parametrize("shape", [[2**24, 2**24, 1], [2**20] * 60])
def test_the_size_of_an_input_is_bounded(shape):
    record = Architecture("mlp", {"num_classes": 2}, input_shape=SHAPE).to_json()
    with pytest.raises(ValueError, match="'input_shape' must list sizes"):
        Architecture.from_json({**record, "input_shape": shape})
    call = {"arguments": ["x"], "inputs": {"x": f"float32[{','.join(map(str, shape))}]"}, "train": {}, "eval": {}}
    with pytest.raises(ValueError, match=r"call: input 'x' (has more|must read)"):
        Architecture.from_json({**record, "call": call})


def test_a_table_of_windows_is_bounded():
    module = registry.build("swin", {"num_classes": 2, "window": 5000, "patch": 1, "width": 24})
    with pytest.raises(ValueError, match="window=5000 is too large for 4096x4096 patches"):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4096, 4096, 1), jnp.float32))


def test_json_is_bounded_in_size_and_depth(tmp_path):
    path = tmp_path / "x.json"
    for content in ("[" * 100_000, "[" * 65 + "]" * 65):
        path.write_text(content)
        with pytest.raises(files.DamagedError, match="nested"):
            files.read_json(path)
    path.write_text("[" * 60 + "]" * 60)
    files.read_json(path)
    with pytest.raises(files.DamagedError, match="119 bytes"):
        files.read_json(path, limit=119)


# --- images ---------------------------------------------------------------------------------------------------------


def encoded(kind, mode="L", size=(3, 2)):
    from PIL import Image

    content = io.BytesIO()
    Image.new(mode, size, 7).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", images.FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_known_formats_are_decoded(kind, channels):
    assert images.decode(encoded(kind), channels).shape == (2, 3, channels)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "WEBP", "PDF"])
def test_other_image_formats_are_refused(kind):
    with pytest.raises(files.DamagedError, match="JPEG, PNG, GIF, BMP"):
        images.decode(encoded(kind, "RGB", (32, 32)), 3)


def test_image_sizes_are_checked_before_decoding():
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    for side in (9_000, 60_000):
        large = head + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0) + bytes(4)
        with pytest.raises(files.DamagedError):
            images.decode(large, 1)
    with pytest.raises(files.DamagedError, match="more than 8 bits"):
        images.decode(encoded("PNG", "I;16"), 1)


# --- paths and errors -----------------------------------------------------------------------------------------------


def test_names_in_files_never_become_paths(tmp_path):
    """Arrays may have any name; all output stays in the given directory."""
    home = tmp_path / "home" / "net"
    dense = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    variables = {"params": {"../../../x": {"/etc/y": jnp.ones(3)}, "dense": dense}}
    save_network(home, Architecture("mlp", {"num_classes": 3, "hidden": []}, input_shape=SHAPE), variables, {})
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert [path.name for path in home.parent.iterdir()] == ["net"]
    _, restored, _, _ = load_network(home)
    np.testing.assert_array_equal(restored["params"]["../../../x"]["/etc/y"], np.ones(3))


def test_a_manifest_cannot_name_other_files(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "x").write_text("x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    for name, whole in (("../x", False), (str(tmp_path / "x"), False)):
        record = {"files": {name: {"sha256": digest}}}
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(record))
        assert export_formats.is_complete_export(tmp_path / "out") is whole


def test_errors_are_printed_in_one_line():
    line = command_line.error_line(ValueError("a \x1b[2J\nname \x07 out of\r a file: é \udcff"))
    assert line == "a \\x1b[2J name \\x07 out of a file: é \\xdcff"
    assert line.isprintable()
