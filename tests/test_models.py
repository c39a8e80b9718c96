"""Built-in models: published sizes, PyTorch's padding, stable names, the common call, and refused arguments."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import check_call, check_names
from proof import variables_of

from kdsearch_jax.adapters import registry
from kdsearch_jax.models import blocks

IMAGENET, CIFAR, DIGITS = (224, 224, 3), (32, 32, 3), (8, 8, 1)

SMALL = {  # every network at a size that computes at once: name, arguments, input shape
    "cifar_resnet": ("cifar_resnet", {"depth": 8, "width": 4}, (8, 8, 3)),
    "cifar_resnet B": ("cifar_resnet", {"depth": 8, "width": 4, "shortcut": "B"}, (8, 8, 3)),
    "wide_resnet": ("wide_resnet", {"depth": 10, "width": 1}, (8, 8, 3)),
    "resnet": (
        "kdsearch_jax.models.resnet:ResNet",
        {"stage_blocks": (1, 1), "width": 4},
        (16, 16, 3),
    ),
    "resnet bottleneck": (
        "kdsearch_jax.models.resnet:ResNet",
        {"stage_blocks": (2, 1), "width": 4, "bottleneck": True, "stem": "small"},
        (8, 8, 3),
    ),
    "vgg": ("vgg", {"depth": 8, "width": 4}, (32, 32, 3)),
    "vgg pools": ("vgg", {"depth": 8, "width": 4, "pools": 3}, (8, 8, 1)),
    "vgg flattened": (
        "vgg",
        {"depth": 8, "width": 4, "pools": 2, "head": "flattened", "hidden": 8, "dropout": 0.5},
        (8, 8, 3),
    ),
    "vit": ("vit", {"patch": 4, "width": 12, "depth": 2, "heads": 3, "mlp_dim": 16, "dropout": 0.1}, (8, 8, 3)),
    "vit mean": (
        "vit",
        {"patch": 4, "width": 12, "depth": 1, "heads": 3, "mlp_dim": 16, "pool": "mean"},
        (8, 12, 1),
    ),
    "vit distilled": (
        "vit",
        {"patch": 4, "width": 12, "depth": 1, "heads": 3, "mlp_dim": 16, "distillation": "head"},
        (8, 8, 3),
    ),
    "convnext": (
        "convnext",
        {"stage_blocks": [1, 1], "widths": [8, 12], "patch": 2, "layer_scale": 0.5},
        (8, 8, 3),
    ),
    "mixer": ("mixer", {"patch": 4, "width": 12, "depth": 1, "token_neurons": 6, "channel_neurons": 8}, (8, 12, 1)),
    "swin": (
        "swin",
        {"stage_blocks": [2], "heads": [2], "width": 12, "window": 4, "patch": 2},
        (10, 12, 3),
    ),
    "small_cnn": ("small_cnn", {"width": 4}, DIGITS),
    "mlp": ("mlp", {"hidden": [8, 6]}, DIGITS),
}


def small(case: str, num_classes: int = 5):
    name, arguments, shape = SMALL[case]
    return registry.build(name, {"num_classes": num_classes, **arguments}), shape


def leaf_shapes(name: str, shape: tuple[int, ...], **arguments) -> dict[str, tuple[int, ...]]:
    module = registry.build(name, arguments)
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "published"),
    [
        ("cifar_resnet", CIFAR, {"depth": 20, "num_classes": 10}, 269_722),
        ("cifar_resnet", CIFAR, {"depth": 56, "num_classes": 10}, 853_018),
        ("cifar_resnet", CIFAR, {"depth": 110, "num_classes": 10}, 1_727_962),
        ("cifar_resnet", CIFAR, {"depth": 20, "num_classes": 100, "shortcut": "B"}, 278_324),
        ("wide_resnet", CIFAR, {"depth": 28, "width": 10, "num_classes": 10}, 36_479_194),
        ("wide_resnet", CIFAR, {"depth": 40, "width": 2, "num_classes": 100}, 2_255_156),
        ("wide_resnet", CIFAR, {"depth": 16, "width": 2, "num_classes": 100}, 703_284),
        ("resnet", IMAGENET, {"depth": 18, "num_classes": 1000}, 11_689_512),
        ("resnet", IMAGENET, {"depth": 34, "num_classes": 1000}, 21_797_672),
        ("resnet", IMAGENET, {"depth": 50, "num_classes": 1000}, 25_557_032),
        ("vgg", IMAGENET, {"depth": 11, "num_classes": 1000, "head": "flattened"}, 132_868_840),
        ("vgg", IMAGENET, {"depth": 16, "num_classes": 1000, "head": "flattened"}, 138_365_992),
        ("vgg", IMAGENET, {"depth": 19, "num_classes": 1000, "head": "flattened"}, 143_678_248),
        ("vgg", CIFAR, {"depth": 8, "num_classes": 100, "pools": 3}, 3_965_028),
        ("vit", IMAGENET, {"num_classes": 1000}, 86_567_656),
    ],
)
def test_parameters_are_as_many_as_published(name, shape, arguments, published):
    assert sum(math.prod(leaf) for leaf in leaf_shapes(name, shape, **arguments).values()) == published


@pytest.mark.parametrize("case", SMALL)
def test_call(case):
    module, shape = small(case)
    check_call(module, shape, (5,), dropout="dropout" in SMALL[case][1])


@pytest.mark.parametrize("case", SMALL)
def test_every_layer_has_its_own_name(case):
    check_names(*small(case))


def test_a_deeper_network_has_the_layers_of_the_shallower_one():
    shallow = leaf_shapes("cifar_resnet", CIFAR, depth=20, num_classes=10)
    deep = leaf_shapes("cifar_resnet", CIFAR, depth=32, num_classes=10)
    assert shallow.items() < deep.items()
    assert shallow["stage2/block1/conv1/kernel"] == (3, 3, 16, 32)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_strided_convolution_is_centred_as_in_pytorch(size):
    """A kernel with a single one in its centre selects rows 0, 2, 4, …; XLA's SAME padding would select 1, 3, 5, …."""
    image = jax.random.normal(jax.random.key(0), (1, 8, 8, 1))
    kernel = jnp.zeros((size, size, 1, 1)).at[size // 2, size // 2].set(1.0)
    out = blocks.conv(1, size, stride=2, name="conv").apply({"params": {"kernel": kernel}}, image)
    np.testing.assert_array_equal(out, image[:, ::2, ::2])


def test_option_a_shortcut_subsamples_and_pads_both_sides():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    out = blocks.pad_shortcut(x, features=16, stride=2)
    assert out.shape == (2, 2, 2, 16)
    np.testing.assert_array_equal(out[..., 4:12], x[:, ::2, ::2])
    assert not out[..., :4].any() and not out[..., 12:].any()


def test_whether_a_block_projects_does_not_hang_on_the_channels_that_arrive():
    """A student's stream may be narrower than the block's `features`, which must not add a projection."""
    block = blocks.BasicBlock(features=8)
    inner = jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
    assert set(inner["params"]) == {"conv1", "bn1", "conv2", "bn2"}
    with pytest.raises(TypeError):  # 6 channels and 8 do not add up: an error, not a silent projection
        jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 4, 4, 6)))


def test_vit_sees_a_set_of_patches_but_for_their_positions():
    """Mean pooling and no positions: the order of the patches has no effect; with positions it has."""
    module, _ = small("vit mean")
    images = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)
    swapped = np.concatenate([images[:, 4:], images[:, :4]], axis=1)
    params = variables_of(module, np.zeros((1, 8, 8, 1), np.float32))["params"]
    apply = jax.jit(module.apply)
    blind = {"params": {**params, "positions": np.zeros_like(params["positions"])}}
    sighted = {"params": params}
    np.testing.assert_allclose(apply(blind, images), apply(blind, swapped), atol=1e-5)
    assert not np.allclose(apply(sighted, images), apply(sighted, swapped), atol=1e-3)


def test_networks_of_the_same_arguments_are_equal():
    for case in SMALL:
        assert small(case)[0] == small(case)[0] and hash(small(case)[0]) == hash(small(case)[0])
        assert small(case)[0] != small(case, num_classes=6)[0]


def test_build_takes_other_packages():
    module = registry.build("kdsearch_jax.models.small:SmallCNN", {"num_classes": 5, "width": 4})
    assert module == small("small_cnn")[0]


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("cifar_resnt", {}, ["'cifar_resnt' is unknown", "did you mean 'cifar_resnet'", "small_cnn", "package.module"]),
        ("cifar_resnet", {"num_classes": 10, "dept": 20}, ["no argument 'dept'", "did you mean 'depth'", "shortcut"]),
        ("cifar_resnet", {"depth": 20}, ["needs 'num_classes'"]),
        ("cifar_resnet", {"num_classes": 10, "depth": 21}, ["6n + 2", "got 21", "nearest is 20"]),
        ("cifar_resnet", {"num_classes": 10, "depth": 2}, ["6n + 2", "got 2", "nearest is 8"]),
        ("cifar_resnet", {"num_classes": 10, "depth": "20"}, ["depth", "'20'"]),
        ("cifar_resnet", {"num_classes": 10, "shortcut": "C"}, ["shortcut", "'A', 'B'", "'C'"]),
        ("cifar_resnet", {"num_classes": 10, "width": 5}, ["width must be even", "5"]),
        ("wide_resnet", {"num_classes": 10, "depth": 41}, ["6n + 4", "got 41", "nearest is 40"]),
        ("resnet", {"num_classes": 10, "depth": 20}, ["depth", "18, 34, 50", "20"]),
        ("resnet", {"num_classes": 0}, ["num_classes", "at least 1", "0"]),
        ("vgg", {"num_classes": 10, "depth": 12}, ["depth", "11, 13, 16, 19", "12"]),
        ("vgg", {"num_classes": 10, "pools": 6}, ["pools", "6"]),
        ("vgg", {"num_classes": 10, "dropout": 1.5}, ["dropout", "1.5"]),
        ("vit", {"num_classes": 10, "width": 10, "heads": 3}, ["width=10", "heads=3"]),
        ("mlp", {"num_classes": 10, "hidden": [8, 0]}, ["hidden[1]", "0"]),
        ("mlp", {"num_classes": 10, "hidden": 8}, ["hidden", "list", "8"]),
        ("no_such_package.nets:make", {}, ["no_such_package", "PYTHONPATH"]),
        ("kdsearch_jax.models.small:SmalCNN", {}, ["has no 'SmalCNN'", "did you mean 'SmallCNN'"]),
        ("kdsearch_jax.models:MODELS", {}, ["cannot call"]),
        ("kdsearch_jax.models.blocks:check_positive", {"a": 1}, ["check_positive", "-> nn.Module"]),
        ("os:system", {"command": "true"}, ["'system'", "not called"]),
        ("kdsearch_jax.models.small:SmallCNN", {"num_clases": 5}, ["no argument 'num_clases'", "num_classes"]),
        ("a-b:c", {}, ["package.module:factory"]),
    ],
)
def test_build_refuses_with_the_way_out(name, arguments, parts):
    with pytest.raises(ValueError) as raised:
        registry.build(name, arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("case", "shape", "parts"),
    [("vgg", DIGITS, ["at least 32", "8x8", "fewer pools"]), ("vit", (10, 8, 3), ["multiples of patch=4", "10x8"])],
)
def test_images_of_an_impossible_size_are_refused(case, shape, parts):
    with pytest.raises(ValueError) as raised:
        jax.eval_shape(small(case)[0].init, jax.random.key(0), jnp.zeros((1, *shape)))
    for part in parts:
        assert part in str(raised.value)
