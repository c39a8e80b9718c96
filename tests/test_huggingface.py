"""Teachers in Hugging Face's format: the logits that `transformers` computes, and refusals that say what is wrong.

Directories are written by `transformers` itself where it and PyTorch are installed, and else by their known names.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from kdsearch_jax import models
from kdsearch_jax.adapters import registry
from kdsearch_jax.models import pretrained
from kdsearch_jax.models.pretrained import huggingface_models, huggingface_names, tensor_mapping

VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {  # 19x19 patches: padded to whole windows and to be merged, shifted, and one window at last
    "embed_dim": 12,
    "depths": [2, 2, 2],
    "num_heads": [3, 6, 6],
    "window_size": 5,
    "mlp_ratio": 2.5,
    "image_size": 38,
    "patch_size": 2,
}
BASIC: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32],
    "depths": [1, 2, 1],
    "layer_type": "basic",
}
BOTTLENECK: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [2, 1], "num_channels": 1}
CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 16, 16], "depths": [1, 2, 1], "num_stages": 3, "image_size": 40}

# model_type, its name in transformers, configuration, shape of an image
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, int, int]]] = {
    "resnet basic": ("resnet", "ResNet", BASIC, (64, 48, 3)),
    "resnet bottleneck": ("resnet", "ResNet", BOTTLENECK, (40, 40, 1)),
    "vit": ("vit", "ViT", VIT | {"image_size": [32, 48]}, (32, 48, 3)),
    "deit": ("deit", "DeiT", VIT, (32, 32, 3)),
    "deit distilled": ("deit", "DeiT", VIT, (32, 32, 3)),
    "convnext": ("convnext", "ConvNext", CONVNEXT, (40, 40, 3)),
    "swin": ("swin", "Swin", SWIN, (38, 38, 3)),
    "mobilenet_v2": ("mobilenet_v2", "MobileNetV2", {"depth_multiplier": 0.35}, (65, 64, 3)),
    "mobilenet_v2 symmetric": (
        "mobilenet_v2",
        "MobileNetV2",
        {"depth_multiplier": 0.5, "tf_padding": False, "layer_norm_eps": 1e-5},
        (64, 64, 3),
    ),
}
TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
RESNET18 = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
PUBLISHED = {  # at 224x224
    "resnet-18": ("ResNet", RESNET18),
    "vit-tiny": ("ViT", TINY),
    "deit-tiny distilled": ("DeiT", TINY),
    "convnext-tiny": ("ConvNext", {}),
    "swin-tiny": ("Swin", {}),
    "mobilenet_v2": ("MobileNetV2", {"num_labels": 1001}),
}
PREPROCESSOR = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}


# The same logits as PyTorch


def of_transformers(case: str, kind: str, config: dict[str, Any]) -> Any:
    """A network of `transformers` with random weights, normalisation's statistics and scales included."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    head = "ForImageClassification" + ("WithTeacher" if "distilled" in case else "")
    network = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**{"num_labels": 7, **config}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith(("weight", "scale_parameter"))):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                # Small biases and means, and weights that keep activations large: else little is left of the image.
                spread = (2 / math.prod(value.shape[1:])) ** 0.5 if value.ndim > 1 else 0.1
                value.copy_(torch.randn(value.shape, generator=generator) * spread)
    return network.eval()


def check_same_logits(network: Any, teacher: pretrained.PretrainedNetwork, shape: tuple[int, ...]) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(1)  # noise on two colours, so that the images differ on average too
    images = (rng.normal(size=(2, *shape)) + 3 * rng.normal(size=(2, 1, 1, shape[-1]))).astype(np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
    ours = np.asarray(jax.jit(teacher.module().apply)(teacher.variables, images))
    assert ours.shape == theirs.shape
    assert np.ptp(theirs, axis=0).max() > 0.1 * np.abs(theirs).max()  # the images matter
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    """As saved, and with the names in memory."""
    _, kind, config, shape = CASES[case]
    network = of_transformers(case, kind, config)
    network.save_pretrained(tmp_path)
    teacher = pretrained.from_huggingface(tmp_path)
    check_same_logits(network, teacher, shape)
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, pretrained.from_huggingface(tmp_path).variables, teacher.variables)


@pytest.mark.parametrize("case", PUBLISHED)
def test_logits_equal_those_of_transformers_at_published_sizes(case, tmp_path):
    kind, config = PUBLISHED[case]
    network = of_transformers(case, kind, config)
    network.save_pretrained(tmp_path)
    teacher = pretrained.from_huggingface(tmp_path)
    assert teacher.input_shape == (224, 224, 3)
    check_same_logits(network, teacher, (224, 224, 3))


def test_shards_and_preprocessing_written_by_transformers(tmp_path):
    network = of_transformers("vit", "ViT", VIT)
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    check_same_logits(network, pretrained.from_huggingface(tmp_path), (32, 32, 3))


# Without transformers: directories by its names


def written(directory: Path, case: str, **changes: Any) -> dict[str, np.ndarray]:
    """Writes a directory with random tensors, which it returns; `changes` to the configuration."""
    family, _, config, shape = CASES[case]
    config = {"model_type": family, **config, **changes}
    head = "cls_classifier" if "distilled" in case else huggingface_names.HEADS[family][-1]
    described = huggingface_models.model_spec(Path("config.json"), config, head, 7)
    module = registry.build(described.model, described.arguments)
    naming = huggingface_names.naming(family, module)
    rng = np.random.default_rng(0)
    tensors = {
        source.names[0]: rng.normal(size=source.shape).astype(np.float32)
        for source in tensor_mapping.leaf_sources(module, shape, naming).values()
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_every_leaf_is_filled_from_a_tensor_of_its_own(case, tmp_path):
    tensors = written(tmp_path, case)
    teacher = pretrained.from_huggingface(tmp_path)
    fingerprint = sorted(np.sort(np.asarray(leaf).ravel()).tobytes() for leaf in jax.tree.leaves(teacher.variables))
    assert fingerprint == sorted(np.sort(value.ravel()).tobytes() for value in tensors.values())
    assert json.loads(json.dumps(teacher.arguments)) == teacher.arguments


def identity(value):
    return value


def kernel(value):
    return value.transpose(2, 3, 1, 0)


PLACES = {  # our leaf, the name that checkpoints have, from theirs to ours
    "vit": [
        ("patches/kernel", "vit.embeddings.patch_embeddings.projection.weight", kernel),
        ("token", "vit.embeddings.cls_token", identity),
        ("positions", "vit.embeddings.position_embeddings", identity),
        ("block1/norm2/scale", "vit.encoder.layer.0.layernorm_after.weight", identity),
        (
            "block2/attention/query/kernel",
            "vit.encoder.layer.1.attention.attention.query.weight",
            lambda v: v.T.reshape(24, 3, 8),
        ),
        (
            "block2/attention/value/bias",
            "vit.encoder.layer.1.attention.attention.value.bias",
            lambda v: v.reshape(3, 8),
        ),
        (
            "block2/attention/out/kernel",
            "vit.encoder.layer.1.attention.output.dense.weight",
            lambda v: v.T.reshape(3, 8, 24),
        ),
        ("block1/dense1/kernel", "vit.encoder.layer.0.intermediate.dense.weight", np.transpose),
        ("block1/dense2/kernel", "vit.encoder.layer.0.output.dense.weight", np.transpose),
        ("norm/bias", "vit.layernorm.bias", identity),
        ("dense/kernel", "classifier.weight", np.transpose),
    ],
    "deit distilled": [
        ("distillation_token", "deit.embeddings.distillation_token", identity),
        ("dense/bias", "cls_classifier.bias", identity),
        ("distillation_dense/kernel", "distillation_classifier.weight", np.transpose),
    ],
    "convnext": [
        ("patches_norm/scale", "convnext.embeddings.layernorm.weight", identity),
        ("stage2/downsample_norm/scale", "convnext.encoder.stages.1.downsampling_layer.0.weight", identity),
        ("stage2/downsample_conv/kernel", "convnext.encoder.stages.1.downsampling_layer.1.weight", kernel),
        ("stage2/block2/conv/kernel", "convnext.encoder.stages.1.layers.1.dwconv.weight", kernel),
        ("stage2/block2/scale", "convnext.encoder.stages.1.layers.1.layer_scale_parameter", identity),
        ("stage3/block1/dense1/kernel", "convnext.encoder.stages.2.layers.0.pwconv1.weight", np.transpose),
    ],
    "swin": [
        ("patches_norm/scale", "swin.embeddings.norm.weight", identity),
        ("stage2/merge/dense/kernel", "swin.encoder.layers.0.downsample.reduction.weight", np.transpose),
        (
            "stage2/block2/attention/relative_bias",
            "swin.encoder.layers.1.blocks.1.attention.self.relative_position_bias_table",
            identity,
        ),
        (
            "stage1/block1/attention/key/kernel",
            "swin.encoder.layers.0.blocks.0.attention.self.key.weight",
            lambda v: v.T.reshape(12, 3, 4),
        ),
    ],
    "resnet bottleneck": [
        ("conv/kernel", "resnet.embedder.embedder.convolution.weight", kernel),
        ("stage1/block2/bn3/scale", "resnet.encoder.stages.0.layers.1.layer.2.normalization.weight", identity),
        (
            "stage2/block1/shortcut_conv/kernel",
            "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight",
            kernel,
        ),
        ("dense/kernel", "classifier.1.weight", np.transpose),
    ],
    "mobilenet_v2": [
        ("conv/kernel", "mobilenet_v2.conv_stem.first_conv.convolution.weight", kernel),
        ("stage1/block1/project_conv/kernel", "mobilenet_v2.conv_stem.reduce_1x1.convolution.weight", kernel),
        ("stage2/block2/expand_bn/scale", "mobilenet_v2.layer.1.expand_1x1.normalization.weight", identity),
        ("stage7/block1/depthwise_conv/kernel", "mobilenet_v2.layer.15.conv_3x3.convolution.weight", kernel),
        ("last_conv/kernel", "mobilenet_v2.conv_1x1.convolution.weight", kernel),
    ],
}


@pytest.mark.parametrize("case", PLACES)
def test_values_are_assigned_to_the_right_leaves(case, tmp_path):
    tensors = written(tmp_path, case)
    params = pretrained.from_huggingface(tmp_path).variables["params"]
    for leaf, name, converted in PLACES[case]:
        ours = params
        for part in leaf.split("/"):
            ours = ours[part]
        np.testing.assert_array_equal(ours, converted(tensors[name]), err_msg=leaf)


def test_unused_tensors_are_ignored(tmp_path):
    tensors = written(tmp_path, "swin")
    index = {"swin.encoder.layers.0.blocks.0.attention.self.relative_position_index": np.zeros((25, 25), np.int64)}
    save_file({**tensors, **index}, tmp_path / "model.safetensors")
    pretrained.from_huggingface(tmp_path)
    tensors = written(tmp_path, "vit")
    pooler = {"vit.pooler.dense.weight": np.zeros((24, 24), np.float32), "vit.pooler.dense.bias": np.zeros(24)}
    save_file({**tensors, **pooler}, tmp_path / "model.safetensors")
    pretrained.from_huggingface(tmp_path)


def test_irrelevant_keys_are_allowed(tmp_path):
    """As in published configurations."""
    extra = {"path_norm": True, "max_length": 128, "padding": "max_length", "pruned_heads": {}, "id2label": {"0": "a"},
             "problem_type": "single_label_classification", "torch_dtype": "float32", "hidden_size": 48,
             "num_layers": 3, "out_features": ["stage3"], "transformers_version": "4.31.0"}  # fmt: skip
    written(tmp_path, "swin", **extra)
    assert pretrained.from_huggingface(tmp_path).arguments["window"] == 5


def test_epsilon_and_padding_come_from_the_configuration(tmp_path):
    written(tmp_path, "vit", layer_norm_eps=1e-3)
    assert pretrained.from_huggingface(tmp_path).arguments["epsilon"] == 1e-3
    written(tmp_path, "mobilenet_v2")
    assert pretrained.from_huggingface(tmp_path).arguments.items() >= {"padding": "same", "epsilon": 1e-3}.items()


# How images are prepared


@pytest.mark.parametrize(
    ("record", "size", "mean", "std"),
    [
        ({"size": 224}, (224, 224), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        ({"size": {"height": 160, "width": 96}}, (160, 96), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        ({"size": {"shortest_edge": 96}, "crop_pct": 0.875}, (96, 96), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}},
            (64, 64),
            (0.5, 0.4, 0.3),
            (0.2, 0.25, 0.3),
        ),
        ({"do_normalize": False}, (224, 224), (0, 0, 0), (1, 1, 1)),
        ({"do_rescale": False, "image_mean": 51, "image_std": 102}, (224, 224), (0.2,) * 3, (0.4,) * 3),
        ({"rescale_factor": 2 / 255, "image_mean": 1.0}, (224, 224), (0.5, 0.5, 0.5), (0.1, 0.125, 0.15)),
        ({"image_mean": None}, (224, 224), None, None),
    ],
)  # fmt: skip
def test_preprocessing(record, size, mean, std, tmp_path):
    written(tmp_path, "resnet basic")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **record}))
    teacher = pretrained.from_huggingface(tmp_path)
    assert teacher.input_shape == (*size, 3)
    assert teacher.mean == (mean and pytest.approx(mean)) and teacher.std == (std and pytest.approx(std))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"image_std": [0.5, 0, 0.5]}, ["'image_std'", "above 0"]),
        ({"image_mean": [0.5]}, ["'image_mean'", "3 numbers"]),
        ({"image_mean": [0.5, "a", True]}, ["'image_mean'", "3 numbers"]),
        ({"size": {"longest_edge": 3}}, ["'size'", "sides of 1 to"]),
        ({"size": 10**9}, ["'size'", "sides of 1 to"]),
        ({"rescale_offset": True}, ["'rescale_offset'", "not supported"]),
        ({"rescale_factor": 0}, ["'rescale_factor'"]),
    ],
)
def test_invalid_preprocessing_is_named(record, words, tmp_path):
    written(tmp_path, "resnet basic")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **record}))
    assert all(word in refusal(tmp_path) for word in ["preprocessor_config.json", *words])


# Refusals


def refusal(directory: Path, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as raised:
        pretrained.from_huggingface(directory)
    assert str(directory) in str(raised.value)
    return str(raised.value)


def changed(directory: Path, case: str, **changes: Any) -> str:
    """The refusal of a directory whose configuration is changed after it was written."""
    written(directory, case)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return refusal(directory)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("vit", {"model_type": "beit"}, ["'beit'", "convnext, deit, mobilenet_v2, resnet, swin, vit"]),
        ("vit", {"model_type": None}, ["model_type None"]),
        ("vit", {"model_type": ["vit"]}, ["model_type ['vit']"]),
        ("vit", {"hidden_act": "gelu_new"}, ["'hidden_act'", "'gelu'", "'gelu_new'", "not supported"]),
        ("vit", {"qkv_bias": False}, ["'qkv_bias'", "True", "False"]),
        ("vit", {"pruned_heads": {"1": [0]}}, ["'pruned_heads'"]),
        ("vit", {"head_dim": 4}, ["'head_dim'"]),
        ("vit", {"hidden_size": 10**9}, ["'hidden_size'", "from 1 to", "1000000000"]),
        ("vit", {"num_hidden_layers": 100_000}, ["'num_hidden_layers'", "from 1 to"]),
        ("vit", {"hidden_size": True}, ["'hidden_size'", "True"]),
        ("vit", {"num_attention_heads": 5}, ["'num_attention_heads'", "hidden_size=24"]),
        ("vit", {"patch_size": [8, 4]}, ["'patch_size'", "square"]),
        ("vit", {"image_size": 4096, "patch_size": 1}, ["'image_size'", "256 patches"]),
        ("vit", {"layer_norm_eps": "1e-12"}, ["'layer_norm_eps'", "number"]),
        ("vit", {"layer_norm_eps": math.nan}, ["'layer_norm_eps'", "nan"]),
        ("vit", {"quantization_config": {"bits": 4}}, ["'quantization_config'"]),
        ("swin", {"use_absolute_embeddings": True}, ["'use_absolute_embeddings'", "False"]),
        ("swin", {"depths": [2, 2]}, ["'num_heads'", "as long as 'depths'"]),
        ("swin", {"depths": [2] * 9}, ["'depths'", "1 to 8"]),
        ("convnext", {"layer_scale_init_value": 0}, ["'layer_scale_init_value'", "between 0 and 1"]),
        ("convnext", {"num_stages": 4}, ["'num_stages'", "3"]),
        ("resnet basic", {"downsample_in_first_stage": True}, ["'downsample_in_first_stage'"]),
        ("resnet bottleneck", {"downsample_in_bottleneck": True}, ["'downsample_in_bottleneck'"]),
        ("resnet basic", {"layer_type": "preact"}, ["'layer_type'", "'bottleneck'", "'preact'"]),
        ("resnet basic", {"hidden_sizes": [8, 16, 24]}, ["'hidden_sizes'", "[8, 16, 32]"]),
        ("mobilenet_v2", {"output_stride": 16}, ["'output_stride'", "32"]),
        ("mobilenet_v2", {"first_layer_is_expansion": False}, ["'first_layer_is_expansion'"]),
        ("mobilenet_v2", {"finegrained_output": False}, ["'finegrained_output'"]),
        ("mobilenet_v2", {"tf_padding": "yes"}, ["'tf_padding'"]),
    ],
)
def test_unsupported_options_are_named(case, changes, words, tmp_path):
    text = changed(tmp_path, case, **changes)
    assert all(word in text for word in ["config.json", *words]), text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_configuration_is_read_or_refused(data):
    family, _, config, _ = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    key = data.draw(st.sampled_from([*config, "layer_norm_eps", "num_channels", "hidden_act", "model_type"]))
    config = {"model_type": family, **config, key: data.draw(JSON)}
    try:
        described = huggingface_models.model_spec(Path("config.json"), config, "classifier", 7)
        registry.build(described.model, described.arguments)
    except ValueError as error:
        assert repr(key) in str(error) or key in str(error) or "depths" in str(error) or "hidden_sizes" in str(error)


def test_tensors_that_differ_are_listed_from_both_sides(tmp_path):
    tensors = written(tmp_path, "vit")
    tensors["vit.encoder.layer.2.layernorm_before.weight"] = tensors.pop("vit.encoder.layer.1.layernorm_before.weight")
    tensors["vit.layernorm.bias"] = np.zeros(23, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    text = refusal(tmp_path)
    assert "in the network but not in the file (1)" in text and "vit.encoder.layer.1.layernorm_before.weight" in text
    assert "in the file but not in the network (1)" in text and "vit.encoder.layer.2.layernorm_before.weight" in text
    assert "vit.layernorm.bias: 23 in the file, 24 in the network" in text


def test_a_network_without_a_classifier_is_refused(tmp_path):
    tensors = written(tmp_path, "convnext")
    base = {name.removeprefix("convnext."): value for name, value in tensors.items() if "classifier" not in name}
    save_file(base, tmp_path / "model.safetensors")
    text = refusal(tmp_path)
    assert "no classifier (classifier.weight)" in text and "ForImageClassification" in text


def test_another_module_is_refused(tmp_path):
    written(tmp_path, "vit")
    teacher = pretrained.from_huggingface(tmp_path)
    arguments = teacher.arguments
    held = pretrained.load_torch(tmp_path, models.vit(**arguments, dropout=0.1), (32, 48, 3))
    jax.tree.map(np.testing.assert_array_equal, held, teacher.variables)
    with pytest.raises(ValueError, match="ViT.*MLP"):
        pretrained.load_torch(tmp_path, models.mlp(num_classes=7), (32, 48, 3))
    with pytest.raises(ValueError, match="epsilon"):
        pretrained.load_torch(tmp_path, models.vit(**{**arguments, "epsilon": 1e-6}), (32, 48, 3))
    with pytest.raises(ValueError, match=r"position_embeddings: 1x25x24 in the file, 1x17x24 in the network"):
        pretrained.load_torch(tmp_path, models.vit(**arguments), (32, 32, 3))


# Files


def sharded(directory: Path) -> dict[str, str]:
    """Splits the tensors into two files; returns the index's map."""
    names = sorted(tensors := load_file(directory / "model.safetensors"))
    half = len(names) // 2
    parts = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, directory / file)
    (directory / "model.safetensors").unlink()
    index = {name: file for file, own in parts.items() for name in own}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_shards_equal_a_single_file(tmp_path):
    written(tmp_path, "resnet basic")
    whole = pretrained.from_huggingface(tmp_path).variables
    index = sharded(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, pretrained.from_huggingface(tmp_path).variables, whole)

    def with_index(index: Any) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    (tmp_path / "outside").mkdir()
    (tmp_path / "model-1.safetensors").rename(tmp_path / "outside" / "model-1.safetensors")
    assert "model-1.safetensors" in refusal(tmp_path, FileNotFoundError)
    for bad in ("outside/model-1.safetensors", "../model-1.safetensors", "/etc/passwd", "model.bin"):
        with_index({"weight_map": {**index, "classifier.1.bias": bad}})
        assert repr(bad) in refusal(tmp_path)
    with_index({"weight_map": dict.fromkeys(index, "model-2.safetensors")})
    assert "disagree" in refusal(tmp_path)
    for bad in ({}, {"weight_map": [1]}, {"weight_map": {"a": 1}}):
        with_index(bad)
        assert "'weight_map' must map" in refusal(tmp_path)


def test_damaged_directories(tmp_path):
    assert "no such directory" in refusal(tmp_path / "none", FileNotFoundError)
    assert "config.json" in refusal(tmp_path, FileNotFoundError)
    assert not pretrained.is_huggingface(tmp_path)
    written(tmp_path, "vit")
    assert pretrained.is_huggingface(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    text = refusal(tmp_path, FileNotFoundError)
    assert "pytorch_model.bin" in text and "save_pretrained" in text
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "cannot be read as safetensors" in refusal(tmp_path)
    for content in ("", "[]", "{", "[" * 100_000, '{"model_type": '):
        (tmp_path / "config.json").write_text(content)
        assert "JSON" in refusal(tmp_path)
