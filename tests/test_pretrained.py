"""PyTorch weights in our networks: every tensor at its place, the same logits as PyTorch, published accuracy, and
clear refusals of what is damaged, dangerous or another network.

The state dicts are written here as PyTorch's own sources name and shape them, apart from the code under test.
"""

import hashlib
import math
import os
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdsearch_jax import models
from kdsearch_jax.adapters import registry
from kdsearch_jax.models import pretrained
from kdsearch_jax.models.pretrained import tensor_mapping, torchvision
from kdsearch_jax.models.resnet import ResNet
from kdsearch_jax.models.vgg import VGG

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR = (32, 32, 3)


def conv_shapes(name, inputs, outputs, size):
    return {f"{name}.weight": (outputs, inputs, size, size)}


def norm_shapes(name, channels):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()}


def dense_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def resnet_shapes(stages, widths, *, stem=3, expansion=1, head="fc", shortcut=None, classes=10):
    """Names and shapes of a residual network in PyTorch; `shortcut` names its projections, None has none."""
    shapes = conv_shapes("conv1", 3, widths[0], stem) | norm_shapes("bn1", widths[0])
    inputs = widths[0]
    for stage, (count, width) in enumerate(zip(stages, widths, strict=True), 1):
        outputs = width * expansion
        for block in range(count):
            name = f"layer{stage}.{block}"
            if expansion == 1:
                convs = [(inputs, width, 3), (width, width, 3)]
            else:
                convs = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            for i, (channels_in, channels_out, size) in enumerate(convs, 1):
                shapes |= conv_shapes(f"{name}.conv{i}", channels_in, channels_out, size)
                shapes |= norm_shapes(f"{name}.bn{i}", channels_out)
            if shortcut and inputs != outputs:
                shapes |= conv_shapes(f"{name}.{shortcut}.0", inputs, outputs, 1)
                shapes |= norm_shapes(f"{name}.{shortcut}.1", outputs)
            inputs = outputs
    return shapes | dense_shapes(head, inputs, classes)


def vgg_shapes(layout, head):
    """`layout`: output channels of convolutions and "M" for poolings, as in torchvision; `head`: {name: (in, out)}."""
    shapes, index, inputs = {}, 0, 3
    for entry in layout:
        if entry == "M":
            index += 1
            continue
        shapes |= {f"features.{index}.weight": (entry, inputs, 3, 3), f"features.{index}.bias": (entry,)}
        shapes |= norm_shapes(f"features.{index + 1}", entry)
        index, inputs = index + 3, entry
    for name, sizes in head.items():
        shapes |= dense_shapes(name, *sizes)
    return shapes


def random_tensors(shapes, seed=0):
    """Values that keep activations near 1, and that tell every place from every other one."""
    rng = np.random.default_rng(seed)

    def value(name, shape):
        if name.endswith("num_batches_tracked"):
            return np.array(7, np.int64)
        if len(shape) > 1:
            return rng.normal(scale=math.prod(shape[1:]) ** -0.5, size=shape)
        positive = name.endswith(("running_var", "weight"))
        return rng.uniform(0.5, 1.5, shape) if positive else rng.normal(scale=0.3, size=shape)

    cast = {name: value(name, shape) for name, shape in shapes.items()}
    return {k: v if v.dtype == np.int64 else v.astype(np.float32) for k, v in cast.items()}


RESNET20 = resnet_shapes((3, 3, 3), (16, 32, 64), head="linear")
VGG_TINY = [4, "M", 8, "M", 16, 16, "M", 32, 32, "M", 32, 32, "M"]  # VGG-11 at width 4

CASES = {  # our network, PyTorch's names and shapes, input shape
    "cifar_resnet A": (models.cifar_resnet(num_classes=10, depth=20), RESNET20, CIFAR),
    "cifar_resnet B": (
        models.cifar_resnet(num_classes=10, depth=14, shortcut="B"),
        resnet_shapes((2, 2, 2), (16, 32, 64), head="linear", shortcut="shortcut"),
        CIFAR,
    ),
    "resnet18": (
        models.resnet(num_classes=10, depth=18, width=8),
        resnet_shapes((2, 2, 2, 2), (8, 16, 32, 64), stem=7, shortcut="downsample"),
        (64, 64, 3),
    ),
    "bottleneck": (
        ResNet((2, 1), 10, bottleneck=True, width=8),
        resnet_shapes((2, 1), (8, 16), stem=7, expansion=4, shortcut="downsample"),
        (32, 32, 3),
    ),
    "vgg pooled": (
        models.vgg(num_classes=10, depth=11, width=4),
        vgg_shapes(VGG_TINY, {"classifier": (32, 10)}),
        CIFAR,
    ),
    "vgg flattened": (  # 64x96 pixels, so that height and width differ where the image is flattened: 2x3
        models.vgg(num_classes=10, depth=11, width=4, head="flattened", hidden=20),
        vgg_shapes(VGG_TINY, {"classifier.0": (32 * 6, 20), "classifier.3": (20, 20), "classifier.6": (20, 10)}),
        (64, 96, 3),
    ),
}


def saved(directory: Path, tensors, name="weights.safetensors") -> Path:
    save_file(tensors, directory / name)
    return directory / name


def loaded_case(case, directory):
    module, shapes, input_shape = CASES[case]
    tensors = random_tensors(shapes)
    return module, tensors, input_shape, pretrained.load_torch(saved(directory, tensors), module, input_shape)


@pytest.mark.parametrize("case", CASES)
def test_every_leaf_is_filled_from_a_tensor_of_its_own(case, tmp_path):
    """The tree and shapes of `init`; each tensor's values appear once, in one leaf."""
    module, tensors, input_shape, variables = loaded_case(case, tmp_path)
    init = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *input_shape), np.float32))
    assert jax.tree.structure(variables) == jax.tree.structure(init)
    assert [leaf.shape for leaf in jax.tree.leaves(variables)] == [leaf.shape for leaf in jax.tree.leaves(init)]
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    fingerprint = sorted(np.sort(np.asarray(leaf).ravel()).tobytes() for leaf in jax.tree.leaves(variables))
    given = [value for name, value in tensors.items() if not name.endswith("num_batches_tracked")]
    assert fingerprint == sorted(np.sort(value.ravel()).tobytes() for value in given)


def test_values_are_assigned_to_the_right_leaves(tmp_path):
    _, tensors, _, variables = loaded_case("cifar_resnet B", tmp_path)
    params, stats = variables["params"], variables["batch_stats"]
    block = params["stage2"]["block1"]
    expected = [
        (params["conv"]["kernel"], tensors["conv1.weight"].transpose(2, 3, 1, 0)),
        (block["conv1"]["kernel"], tensors["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)),
        (params["stage3"]["block2"]["conv2"]["kernel"], tensors["layer3.1.conv2.weight"].transpose(2, 3, 1, 0)),
        (block["shortcut_conv"]["kernel"], tensors["layer2.0.shortcut.0.weight"].transpose(2, 3, 1, 0)),
        (block["shortcut_bn"]["bias"], tensors["layer2.0.shortcut.1.bias"]),
        (block["bn2"]["scale"], tensors["layer2.0.bn2.weight"]),
        (stats["stage2"]["block1"]["bn2"]["mean"], tensors["layer2.0.bn2.running_mean"]),
        (stats["bn"]["var"], tensors["bn1.running_var"]),
        (params["dense"]["kernel"], tensors["linear.weight"].T),
        (params["dense"]["bias"], tensors["linear.bias"]),
    ]
    for ours, theirs in expected:
        np.testing.assert_array_equal(ours, theirs)


def test_flattened_dense_layer_is_reordered(tmp_path):
    """Neuron by neuron: our product with an (h, w, c) image is PyTorch's with the same image as (c, h, w)."""
    _, tensors, _, variables = loaded_case("vgg flattened", tmp_path)
    image = np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32)
    ours = image.ravel() @ np.asarray(variables["params"]["dense1"]["kernel"])
    theirs = tensors["classifier.0.weight"] @ image.transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# What fills what in torchvision's networks, each leaf's path with its tensor's name and shape, as a digest. All were
# proved by tests/test_pretrained_torchvision.py, which is skipped where torchvision is missing: after a change, run it.
TORCHVISION = {
    ("resnet", 18): "504db2314dd3320d",
    ("resnext", 50): "cf7b6f323cbbce1f",
    ("vgg", 11): "8e2651394aff3e3b",
    ("densenet", 121): "1ffbcf872acf50b3",
    ("mobilenet_v2", None): "07d89c9c98db1f16",
    ("mobilenet_v3", None): "6ab347550ac9a0b6",
    ("efficientnet", None): "703920fd1ae22d21",
}


@pytest.mark.parametrize(("name", "depth"), TORCHVISION)
def test_torchvision_names_equal_recorded_ones(name, depth):
    arguments = {"depth": depth} if depth else {}
    module = registry.build(
        name, {"num_classes": 1000, **arguments, **({"head": "flattened"} if name == "vgg" else {})}
    )
    found = tensor_mapping.leaf_sources(module, (224, 224, 3), torchvision.naming(module, (224, 224, 3)))
    lines = sorted(f"{'/'.join(leaf)} {source.names[0]} {source.shape}" for leaf, source in found.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == TORCHVISION[name, depth]


def test_another_width_lists_both_sides(tmp_path):
    def naming(module):
        return tensor_mapping.leaf_sources(module, CIFAR, torchvision.naming(module, CIFAR)).values()

    narrow = models.mobilenet_v2(num_classes=10, width=0.25)
    tensors = random_tensors({source.names[0]: source.shape for source in naming(narrow)})
    text = refusal(tmp_path, tensors, models.mobilenet_v2(num_classes=10, width=0.5))
    assert "features.0.0.weight: 8x3x3x3 in the file, 16x3x3x3 in the network" in text
    assert "but not in the" not in text


# The same logits as PyTorch


def torch_logits(module, tensors, images):
    """A forward pass in PyTorch's functions straight from a state dict: a second writing of each network."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    functional = torch.nn.functional
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return functional.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def conv(x, name, stride=1):
        kernel = state[f"{name}.weight"]
        return functional.conv2d(x, kernel, state.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)

    def dense(x, name):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def block(x, name, stride):
        convs = 3 if f"{name}.conv3.weight" in state else 2
        y = x
        for i in range(1, convs + 1):
            strided = i == convs - 1  # conv1 of two, conv2 of three: the first 3x3 convolution
            y = norm(conv(y, f"{name}.conv{i}", stride if strided else 1), f"{name}.bn{i}")
            y = functional.relu(y) if i < convs else y
        projection = next((p for p in ("downsample", "shortcut") if f"{name}.{p}.0.weight" in state), None)
        if projection:
            x = norm(conv(x, f"{name}.{projection}.0", stride), f"{name}.{projection}.1")
        elif stride == 2:  # option A, as akamaster writes it
            planes = y.shape[1]
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
        return functional.relu(x + y)

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    if isinstance(module, VGG):
        layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
        layout = iter(VGG_TINY)
        for index in layers[::2]:
            while next(layout) == "M":
                x = functional.max_pool2d(x, 2, 2)
            x = functional.relu(norm(conv(x, f"features.{index}"), f"features.{index + 1}"))
        x = functional.max_pool2d(x, 2, 2).flatten(1)
        if module.head == "pooled":
            return dense(x, "classifier").numpy()
        x = functional.relu(dense(x, "classifier.0"))
        return dense(functional.relu(dense(x, "classifier.3")), "classifier.6").numpy()

    large = state["conv1.weight"].shape[-1] == 7
    x = functional.relu(norm(conv(x, "conv1", 2 if large else 1), "bn1"))
    x = functional.max_pool2d(x, 3, 2, 1) if large else x
    blocks = sorted({tuple(name.split(".")[:2]) for name in state if name.startswith("layer")})
    for stage, index in blocks:
        x = block(x, f"{stage}.{index}", 2 if index == "0" and stage != "layer1" else 1)
    return dense(x.mean((2, 3)), "linear" if "linear.weight" in state else "fc").numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pytorch(case, tmp_path):
    module, tensors, input_shape, variables = loaded_case(case, tmp_path)
    images = np.random.default_rng(1).normal(size=(2, *input_shape)).astype(np.float32)
    theirs = torch_logits(module, tensors, images)
    ours = np.asarray(jax.jit(module.apply)(variables, images))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_published_teacher_scores_its_published_accuracy():
    """ResNet-20 of akamaster/pytorch_resnet_cifar10 on the first 2,000 test images: 1,834 right (10,000: 91.73%)."""
    weights = SHARED / "teachers/cifar10-resnet20.safetensors"
    if not weights.is_file():
        pytest.skip("the published teachers and CIFAR-10 are not beside this checkout")
    image = pytest.importorskip("PIL.Image", reason="pillow reads the test images")
    sheets = [np.asarray(image.open(SHARED / f"data/cifar10/test-0{i}.webp").convert("RGB")) for i in range(2)]
    images = np.concatenate([s.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, *CIFAR) for s in sheets])
    labels = np.load(SHARED / "data/cifar10/labels.npz")["test"][: len(images)]
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

    module = models.cifar_resnet(num_classes=10, depth=20)
    variables = pretrained.load_torch(weights, module, CIFAR)
    logits = jax.jit(module.apply)(variables, (images.astype(np.float32) / 255 - mean) / std)
    assert abs(int((np.asarray(logits).argmax(-1) == labels).sum()) - 1834) <= 2


# PyTorch's own files


@pytest.mark.parametrize("form", ["plain", "parallel", "state_dict", "model", "bfloat16", "legacy"])
def test_torch_files_equal_safetensors(form, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tensors = random_tensors(RESNET20)
    module, _, _ = CASES["cifar_resnet A"]
    content = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if form == "bfloat16":
        content = {name: value.bfloat16() if value.ndim else value for name, value in content.items()}
        tensors = {name: value.float().numpy() if value.ndim else value.numpy() for name, value in content.items()}
    if form in ("parallel", "state_dict"):
        content = {f"module.{name}": value for name, value in content.items()}
    if form in ("state_dict", "model"):
        content = {form: content, "epoch": 3, "best_prec1": 91.7}
    path = tmp_path / "weights.th"
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    expected = pretrained.load_torch(saved(tmp_path, tensors), module, CIFAR)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_torch(path, module, CIFAR), expected)


def test_code_in_a_torch_file_is_not_run(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"state_dict": {"conv1.weight": Payload()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="run code") as raised:
        pretrained.read_tensors(tmp_path / "evil.pth")
    assert "weights_only" not in str(raised.value)  # no advice to switch the protection off
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": "text"}}, {}])
def test_torch_file_without_tensors_is_refused(content, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="contains no"):
        pretrained.read_tensors(tmp_path / "a.pt")


def test_without_pytorch_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    (tmp_path / "weights.pth").write_bytes(b"PK")
    with pytest.raises(ImportError, match=r"pip install .kdsearch-jax.torch.*safetensors"):
        pretrained.read_tensors(tmp_path / "weights.pth")


# Damaged files


@pytest.mark.parametrize("suffix", [".safetensors", ".th"])
@pytest.mark.parametrize("part", [0.0, 0.0001, 0.3, 0.999999])
def test_truncated_files_are_refused(suffix, part, tmp_path):
    path = saved(tmp_path, random_tensors(RESNET20))
    if suffix == ".th":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
        path = tmp_path / "weights.th"
        torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match="cannot be read") as raised:
        pretrained.read_tensors(path)
    assert str(path) in str(raised.value)


def test_other_damage_is_refused(tmp_path):
    tensors = random_tensors(RESNET20)
    for bad, message in [
        (b"no weights at all" * 9, "cannot be read"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cannot be read"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
    ]:
        (tmp_path / "bad.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            pretrained.read_tensors(tmp_path / "bad.safetensors")
    tensors["bn1.weight"][3] = np.nan
    with pytest.raises(ValueError, match=r"bn1\.weight.*not finite"):
        pretrained.read_tensors(saved(tmp_path, tensors))
    with pytest.raises(ValueError, match=r"conv1\.weight.*int8"):
        pretrained.read_tensors(saved(tmp_path, {"conv1.weight": np.zeros((2, 2), np.int8)}))
    with pytest.raises(ValueError, match=r"kdsearch_jax\.load"):
        pretrained.read_tensors(saved(tmp_path, {"params/conv/kernel": np.zeros((2, 2), np.float32)}))


def test_missing_file_and_unknown_suffix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        pretrained.read_tensors(tmp_path / "nothing.safetensors")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.onnx.*\.safetensors, \.pth, \.pt, \.th"):
        pretrained.read_tensors(tmp_path / "weights.onnx")


# Other networks


def refusal(directory, tensors, module, input_shape=CIFAR) -> str:
    with pytest.raises(ValueError) as raised:
        pretrained.load_torch(saved(directory, tensors), module, input_shape)
    return str(raised.value)


def test_a_deeper_file_lists_its_surplus(tmp_path):
    text = refusal(tmp_path, random_tensors(RESNET20), models.cifar_resnet(num_classes=10, depth=14))
    assert "in the file but not in the network (30)" in text  # 3 blocks of 2 convolutions and 8 BatchNorm vectors
    assert "layer1.2.conv1.weight" in text and "… and 20 more" in text
    assert "in the network but not in the file" not in text and "different shapes" not in text


def test_a_shallower_file_lists_what_is_missing(tmp_path):
    text = refusal(tmp_path, random_tensors(RESNET20), models.cifar_resnet(num_classes=10, depth=26))
    assert "in the network but not in the file (30)" in text
    assert "layer1.3.conv1.weight" in text and "… and 20 more" in text
    assert "the file has" not in text


def test_other_names_suggest_the_nearest(tmp_path):
    tensors = random_tensors(RESNET20)
    tensors["layer2.0.convA.weight"] = tensors.pop("layer2.0.conv1.weight")
    text = refusal(tmp_path, tensors, models.cifar_resnet(num_classes=10, depth=20))
    assert "layer2.0.conv1.weight (nearest in the file: layer2.0.convA.weight)" in text


def test_other_shapes_are_listed_from_both_sides(tmp_path):
    text = refusal(tmp_path, random_tensors(RESNET20), models.cifar_resnet(num_classes=100, depth=20))
    assert "linear.weight: 10x64 in the file, 100x64 in the network" in text
    assert "linear.bias: 10 in the file, 100 in the network" in text
    text = refusal(tmp_path, random_tensors(RESNET20), models.cifar_resnet(num_classes=10, depth=20, width=8))
    assert "conv1.weight: 16x3x3x3 in the file, 8x3x3x3 in the network" in text
    text = refusal(tmp_path, random_tensors(CASES["vgg flattened"][1]), CASES["vgg flattened"][0], (96, 96, 3))
    assert "classifier.0.weight: 20x192 in the file, 20x288 in the network" in text


def test_networks_without_names_in_pytorch_are_refused(tmp_path):
    text = refusal(tmp_path, random_tensors(RESNET20), models.mlp(num_classes=10))
    assert "MLP" in text and "cifar_resnet, resnet" in text
